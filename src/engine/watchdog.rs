//! Says in the log what a step hangs at, once, and when it goes on.
//!
//! It only watches. Whether to restart is decided by whoever asks `/health/live`.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use crate::engine::heartbeat::{Heartbeat, Overdue};

/// How often it looks.
const PERIOD: Duration = Duration::from_millis(500);

/// Watches until the engine thread, which alone holds `alive`, has ended.
pub(super) fn watch(heartbeat: Arc<Heartbeat>, alive: Weak<()>) {
    let engine = ThreadFiles::of_this_thread();
    let watch = move || {
        let mut reported: Option<Overdue> = None;
        while alive.strong_count() != 0 {
            thread::sleep(PERIOD);
            match (heartbeat.overdue(), reported) {
                (Some(overdue), None) => {
                    report(&overdue, engine.as_ref());
                    reported = Some(overdue);
                }
                (None, Some(before)) => {
                    let step = before.num_steps;
                    tracing::warn!(step, "the step that took too long has ended");
                    reported = None;
                }
                _ => {}
            }
        }
    };
    let builder = thread::Builder::new().name("watchdog".to_owned());
    if let Err(error) = builder.spawn(watch) {
        tracing::warn!(%error, "no watchdog: the system starts no more threads");
    }
}

fn report(overdue: &Overdue, engine: Option<&ThreadFiles>) {
    tracing::error!(
        step = overdue.num_steps,
        phase = ?overdue.phase,
        seconds = overdue.running_for.as_secs_f64(),
        sequences = overdue.num_seqs,
        tokens = overdue.num_tokens,
        engine_thread = engine.map_or_else(String::new, ThreadFiles::describe),
        "a step takes too long; /health/live fails until it ends"
    );
}

/// What Linux tells of a thread.
struct ThreadFiles(PathBuf);

impl ThreadFiles {
    fn of_this_thread() -> Option<Self> {
        let own = fs::read_link("/proc/thread-self").ok()?;
        Some(Self(PathBuf::from("/proc").join(own)))
    }

    /// Whether it computes or waits, and for what.
    fn describe(&self) -> String {
        let before = self.cpu_ticks();
        thread::sleep(PERIOD / 5);
        if before != self.cpu_ticks() {
            return "is computing".to_owned();
        }
        let waits_for = fs::read_to_string(self.0.join("wchan")).unwrap_or_default();
        match waits_for.as_str() {
            "" | "0" => "is waiting".to_owned(),
            place => format!("is waiting in {place}"),
        }
    }

    /// Time it has used in user and kernel mode: fields 14 and 15 of `stat`, see proc(5). The name
    /// in the second field may hold blanks, but nothing behind its closing parenthesis does.
    fn cpu_ticks(&self) -> Option<(u64, u64)> {
        let stat = fs::read_to_string(self.0.join("stat")).ok()?;
        let (_, fields) = stat.rsplit_once(") ")?;
        let mut fields = fields.split(' ').skip(11);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_a_computing_thread_from_a_waiting_one() {
        let this = ThreadFiles::of_this_thread().expect("Linux");
        let (ticks, _) = this.cpu_ticks().expect("a thread has a history");
        while this.cpu_ticks().expect("still").0 <= ticks + 1 {
            std::hint::black_box((0..1000).sum::<u64>());
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        let waiting = thread::spawn(move || {
            sender.send(ThreadFiles::of_this_thread().expect("Linux")).expect("heard");
            thread::park();
        });
        let files = receiver.recv().expect("it says where it is");
        assert!(files.describe().starts_with("is waiting"));
        waiting.thread().unpark();
        waiting.join().expect("it ends");
    }
}
