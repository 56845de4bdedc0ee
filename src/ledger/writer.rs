//! The thread that writes. What it has not written waits in memory, added up.
//!
//! There is no queue that could run full: requests add to a sum under a lock that is held for
//! nanoseconds and never while a disk is busy.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Account, Counts, LedgerError, Store, Totals, add_all};
use crate::telemetry::metrics;

/// How long counts come together before they are written. With the time a disk takes, less than
/// the second that the end of the process may cost.
const BATCH: Duration = Duration::from_millis(400);
/// Pause before what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Takes counts from any thread.
#[derive(Debug)]
pub(super) struct Writer {
    inbox: Arc<Inbox>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    pub(super) fn start(store: Store) -> Self {
        let inbox = Arc::new(Inbox::default());
        let scribe = Scribe {
            path: store.path().to_owned(),
            store: Some(store),
            unwritten: Totals::new(),
            is_failing: false,
        };
        let builder = std::thread::Builder::new().name("usage-ledger".to_owned());
        let to_read = Arc::clone(&inbox);
        let thread = builder.spawn(move || scribe.run(&to_read));
        let thread = thread.expect("the operating system can start one thread");
        Self { inbox, thread: Mutex::new(Some(thread)) }
    }

    pub(super) fn add(&self, account: Account, counts: Counts) {
        let mut contents = self.inbox.lock();
        *contents.totals.entry(account).or_default() += counts;
        drop(contents);
        self.inbox.changed.notify_one();
    }

    pub(super) fn close(&self) {
        self.inbox.lock().is_closing = true;
        self.inbox.changed.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the thread that writes the usage ledger panicked");
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

/// Where requests leave their counts.
#[derive(Debug, Default)]
struct Inbox {
    contents: Mutex<Contents>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Contents {
    totals: Totals,
    is_closing: bool,
}

impl Inbox {
    /// Counts are whole at any moment, so a panic elsewhere harms none.
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until there is something to write, or the end has come.
    fn wait_for_work(&self) {
        let is_idle = |contents: &mut Contents| contents.totals.is_empty() && !contents.is_closing;
        let contents = self.changed.wait_while(self.lock(), is_idle);
        drop(contents.unwrap_or_else(PoisonError::into_inner));
    }

    /// Sleeps for a while, but no longer than to the end. Returns what has come together, and
    /// whether the end has come.
    fn collect(&self, pause: Duration) -> (Totals, bool) {
        let is_open = |contents: &mut Contents| !contents.is_closing;
        let waited = self.changed.wait_timeout_while(self.lock(), pause, is_open);
        let (mut contents, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut contents.totals), contents.is_closing)
    }
}

/// What the thread owns.
struct Scribe {
    path: PathBuf,
    /// Opened anew after a failure.
    store: Option<Store>,
    unwritten: Totals,
    is_failing: bool,
}

impl Scribe {
    fn run(mut self, inbox: &Inbox) {
        loop {
            if !self.is_failing {
                inbox.wait_for_work();
            }
            let pause = if self.is_failing { RETRY } else { BATCH };
            let (totals, is_closing) = inbox.collect(pause);
            add_all(&mut self.unwritten, totals);
            self.write();
            if is_closing {
                if self.is_failing {
                    let num_requests = self.num_unwritten();
                    tracing::error!(num_requests, "usage that was never written is lost");
                }
                return;
            }
        }
    }

    fn num_unwritten(&self) -> u64 {
        self.unwritten.values().map(|counts| counts.requests).sum()
    }

    fn write(&mut self) {
        match self.try_write() {
            Ok(()) => {
                self.unwritten.clear();
                if std::mem::take(&mut self.is_failing) {
                    tracing::info!(ledger = %self.path.display(), "usage is written again");
                }
            }
            Err(error) => {
                self.store = None;
                metrics::ledger_write_failed();
                // Once, not with every attempt.
                if !std::mem::replace(&mut self.is_failing, true) {
                    let error = anyhow::Error::from(error);
                    let error = format!("{error:#}");
                    tracing::error!(error, "cannot write the usage ledger: counts wait in memory");
                }
            }
        }
        metrics::ledger_unwritten(self.num_unwritten());
    }

    fn try_write(&mut self) -> Result<(), LedgerError> {
        if self.store.as_ref().is_some_and(|store| !store.is_in_place()) {
            self.store = None;
        }
        let store = match &mut self.store {
            Some(store) => store,
            none => none.insert(Store::open(&self.path)?),
        };
        let path = self.path.clone();
        store.add(&self.unwritten).map_err(|source| LedgerError::Unusable { path, source })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::ledger::Hour;

    fn add(writer: &Writer, hour: u64, num: u64) {
        let account = Account { hour: Hour(hour), key: "k".into(), model: "m".into() };
        for _ in 0..num {
            let counts = Counts { requests: 1, completion_tokens: 5, ..Counts::default() };
            writer.add(account.clone(), counts);
        }
    }

    fn stored(path: &Path) -> Vec<(u64, Counts)> {
        let mut lines = Vec::new();
        let store = Store::open_existing(path).unwrap();
        let all = Hour(0)..Hour::MAX;
        store.read(all, |account, counts| lines.push((account.hour.0, counts))).unwrap();
        lines
    }

    fn requests(num: u64) -> Counts {
        Counts { requests: num, completion_tokens: 5 * num, ..Counts::default() }
    }

    /// Goal: closing loses nothing, and an hour may come back after a jump of the clock.
    #[test]
    fn everything_is_written_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.db");
        let writer = Writer::start(Store::open(&path).unwrap());
        for hour in [9, 3, 9] {
            add(&writer, hour, 10);
        }
        writer.close();
        assert_eq!(stored(&path), [(3, requests(10)), (9, requests(20))]);
        writer.close();
    }

    #[test]
    fn threads_that_count_at_once_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.db");
        let writer = Writer::start(Store::open(&path).unwrap());
        std::thread::scope(|scope| {
            for hour in 0..8 {
                let writer = &writer;
                scope.spawn(move || add(writer, hour % 2, 5000));
            }
        });
        drop(writer);
        assert_eq!(stored(&path), [(0, requests(20_000)), (1, requests(20_000))]);
    }

    /// Goal: whatever keeps the file from being written, counts wait and nothing is written twice.
    /// Method: one scribe, without its thread, through every kind of trouble.
    #[test]
    fn counts_wait_while_the_file_cannot_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.db");
        let mut scribe = Scribe {
            path: path.clone(),
            store: Some(Store::open(&path).unwrap()),
            unwritten: Totals::new(),
            is_failing: false,
        };
        let account = Account { hour: Hour(1), key: "k".into(), model: "m".into() };
        let mut write = |is_failing: bool| {
            add_all(&mut scribe.unwritten, Totals::from([(account.clone(), requests(1))]));
            scribe.write();
            assert_eq!(scribe.is_failing, is_failing);
            assert_eq!(scribe.unwritten.is_empty(), !is_failing);
        };
        write(false);
        // Somebody else writes and takes their time.
        let other = rusqlite::Connection::open(&path).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        write(true);
        write(true);
        other.execute_batch("COMMIT").unwrap();
        write(false);
        assert_eq!(stored(&path), [(1, requests(4))]);
        drop(other);
        // The file is deleted, and its place taken by what cannot be written.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        write(true);
        std::fs::remove_dir(&path).unwrap();
        write(false);
        assert_eq!(stored(&path), [(1, requests(2))]);
    }
}
