//! How fast first tokens come, to tell who comes how long it takes.
//!
//! By Little's law the wait is the number of sequences without a token over the rate at which they
//! get one, whatever holds them up: places, blocks, or prompts to be read. The rate is a mean over the latest time in which
//! there was a queue. Pure: durations come as arguments.

use std::time::Duration;

/// What happened so long ago counts a third.
const MEMORY_SECONDS: f64 = 20.0;
/// Less than this is no rate yet.
const MIN_SECONDS: f64 = 0.5;

/// Sequences that left the queue, and in which time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QueueRate {
    num_left: f64,
    seconds: f64,
}

impl QueueRate {
    /// In `duration`, all of which there was a queue, so many sequences left it.
    pub(super) fn observe(&mut self, num_left: usize, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let kept = (-seconds / MEMORY_SECONDS).exp();
        self.num_left = self.num_left * kept + num_left as f64;
        self.seconds = self.seconds * kept + seconds;
    }

    /// How long the last of so many waits; nothing as long as nothing was observed.
    pub(super) fn wait_of(&self, num_waiting: usize) -> Duration {
        if self.seconds < MIN_SECONDS {
            return Duration::ZERO;
        }
        // A queue that has not moved at all: it takes longer than it was seen.
        let num_left = self.num_left.max(1.0);
        Duration::from_secs_f64(num_waiting as f64 * self.seconds / num_left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_is_the_queue_over_its_rate() {
        let mut rate = QueueRate::default();
        assert_eq!(rate.wait_of(100), Duration::ZERO);
        for step in 0..200 {
            rate.observe(usize::from(step % 2 == 0), Duration::from_millis(100));
        }
        let wait = rate.wait_of(50).as_secs_f64();
        assert!((9.0..11.0).contains(&wait), "five a second: {wait}");
        for _ in 0..600 {
            rate.observe(2, Duration::from_millis(100));
        }
        let wait = rate.wait_of(50).as_secs_f64();
        assert!((2.4..3.2).contains(&wait), "now twenty: {wait}");
        let mut stuck = QueueRate::default();
        stuck.observe(0, Duration::from_secs(10));
        assert!(Duration::from_secs(9) < stuck.wait_of(1));
    }
}
