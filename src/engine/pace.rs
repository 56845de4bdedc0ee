//! How fast prompts are read and places become free, to tell who comes how long a first token takes.
//!
//! By Little's law a wait is what comes before over the rate at which it goes, whatever holds it up.
//! Prompts differ by orders of magnitude, so they are counted in tokens; the rate is a mean over the
//! latest time in which there was something to read. A place is had for as long as answers take: when
//! all are taken, as many become free in that time as there are. Pure: durations come as arguments.

use std::time::Duration;

use crate::scheduler::SchedulerStats;

/// What happened so long ago counts a third.
const MEMORY_SECONDS: f64 = 10.0;
/// Less than this is no rate yet.
const MIN_SECONDS: f64 = 0.5;

/// Mean time of whatever is counted, the latest of it.
#[derive(Clone, Copy, Debug, Default)]
struct MeanTime {
    count: f64,
    seconds: f64,
}

impl MeanTime {
    /// So many more ended, of which this much time was spent on all of them; `duration` passed.
    fn observe(&mut self, count: usize, seconds: f64, duration: Duration) {
        let kept = (-duration.as_secs_f64() / MEMORY_SECONDS).exp();
        self.count = self.count * kept + count as f64;
        self.seconds = self.seconds * kept + seconds;
    }

    /// `None` as long as too little was observed.
    fn each(&self) -> Option<Duration> {
        // None ended at all: one takes longer than was seen.
        let each = self.seconds / self.count.max(1.0);
        (MIN_SECONDS <= self.seconds).then(|| Duration::from_secs_f64(each))
    }
}

/// What prompts and answers take.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// What a token of a prompt takes as long as nothing was observed.
    expected_per_token: Duration,
    prompt_tokens: MeanTime,
    sequences: MeanTime,
    num_left: u64,
}

impl Pace {
    /// Begins with an expectation, from before there was any real work.
    pub(super) fn expecting(per_token: Duration) -> Self {
        Self { expected_per_token: per_token, ..Self::default() }
    }

    /// A step took `duration`; what was there before it, and what is there afterwards.
    pub(super) fn observe(
        &mut self,
        before: &SchedulerStats,
        after: &SchedulerStats,
        duration: Duration,
    ) {
        let seconds = duration.as_secs_f64();
        if 0 < before.num_pending_tokens {
            let num_read = before.num_pending_tokens.saturating_sub(after.num_pending_tokens);
            self.prompt_tokens.observe(num_read, seconds, duration);
        }
        let num_running = before.num_running.max(after.num_running);
        // An engine that started anew counts from zero again.
        let num_ended = after.num_left.saturating_sub(self.num_left) as usize;
        self.num_left = after.num_left;
        self.sequences.observe(num_ended, seconds * num_running as f64, duration);
    }

    /// How long a token of a prompt takes until it is read; nothing as long as nobody knows.
    pub(super) fn wait_per_token(&self) -> Duration {
        self.prompt_tokens.each().unwrap_or(self.expected_per_token)
    }

    /// How long it takes until one of so many running sequences ends.
    pub(super) fn wait_per_place(&self, num_running: usize) -> Duration {
        self.sequences.each().unwrap_or_default() / num_running.max(1) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(100);

    fn stats(num_pending_tokens: usize, num_running: usize, num_left: u64) -> SchedulerStats {
        SchedulerStats { num_running, num_pending_tokens, num_left, ..SchedulerStats::default() }
    }

    #[test]
    fn a_token_takes_what_tokens_took() {
        let mut pace = Pace::default();
        assert_eq!(pace.wait_per_token(), Duration::ZERO);
        let read = |pace: &mut Pace, num: usize| {
            pace.observe(&stats(1000, 0, 0), &stats(1000 - num, 0, 0), STEP);
            1000.0 * pace.wait_per_token().as_secs_f64()
        };
        for step in 0..200 {
            read(&mut pace, if step % 2 == 0 { 100 } else { 0 });
        }
        let wait = read(&mut pace, 50);
        assert!((1.8..2.2).contains(&wait), "500 a second: {wait}");
        let wait = (0..600).map(|_| read(&mut pace, 200)).last();
        assert!((0.48..0.64).contains(&wait.unwrap()), "now 2000: {wait:?}");
        pace.observe(&stats(0, 9, 0), &stats(0, 9, 0), Duration::from_secs(99));
        assert_eq!(1000.0 * pace.wait_per_token().as_secs_f64(), wait.unwrap(), "nobody waits");
        let mut stuck = Pace::default();
        stuck.observe(&stats(7, 0, 0), &stats(7, 0, 0), Duration::from_secs(10));
        assert!(Duration::from_secs(9) < stuck.wait_per_token());
    }

    #[test]
    fn an_expectation_holds_until_there_is_something_better() {
        let mut pace = Pace::expecting(Duration::from_micros(10));
        pace.observe(&stats(100, 0, 0), &stats(100, 0, 0), STEP);
        assert_eq!(pace.wait_per_token(), Duration::from_micros(10));
        pace.observe(&stats(100, 0, 0), &stats(40, 0, 0), 5 * STEP);
        assert_eq!(pace.wait_per_token().as_millis(), 9, "about 600 ms over 60");
    }

    #[test]
    fn places_become_free_as_answers_end() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.observe(&stats(0, 8, 0), &stats(0, 8, 0), STEP);
        }
        let stuck = pace.wait_per_place(8);
        assert!(Duration::from_secs(6) < stuck, "nobody has ended for ten seconds: {stuck:?}");
        for step in 0..2000 {
            pace.observe(&stats(0, 8, 0), &stats(0, 8, step / 5), STEP);
        }
        let (few, many) = (pace.wait_per_place(8), pace.wait_per_place(16));
        assert!((450..550).contains(&few.as_millis()), "two of eight a second: {few:?}");
        assert!(few.abs_diff(2 * many) < Duration::from_micros(1));
    }
}
