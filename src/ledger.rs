//! Who used how much: requests and tokens per key, model and hour, kept in a SQLite file.
//!
//! [`Ledger::record`] adds to an aggregate in memory and never waits for a disk; one thread writes
//! what has come together, twice a second, and keeps it for later when that fails. Whatever has been
//! written survives the end of the process and a power cut. Start at [`Ledger::open`], or at
//! [`report::Report`] for reading.
//!
//! **Invariant:** no text of a prompt, an answer or a key's secret comes near this module; names of
//! keys and models do. Prices are not stored either: they are applied when somebody asks.

pub mod calendar;
pub mod money;
pub mod report;

mod store;
mod writer;

use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

pub use calendar::Hour;
pub use store::{LedgerError, Store};

use writer::Writer;

/// What is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Requests to compute something, whatever became of them.
    pub requests: u64,
    /// Those that were refused or failed. A client that leaves is no error.
    pub errors: u64,
    /// Tokens of prompts, cached ones included.
    pub prompt_tokens: u64,
    /// Those of them that need not be computed again.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        for (sum, number) in [
            (&mut self.requests, other.requests),
            (&mut self.errors, other.errors),
            (&mut self.prompt_tokens, other.prompt_tokens),
            (&mut self.cached_tokens, other.cached_tokens),
            (&mut self.completion_tokens, other.completion_tokens),
        ] {
            *sum = sum.saturating_add(number);
        }
    }
}

/// Where counts are kept: one line of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Account {
    /// The hour of wall time in which the requests ended.
    pub hour: Hour,
    /// The name of the key that the requests came with.
    pub key: Arc<str>,
    /// The model that computed them.
    pub model: Arc<str>,
}

/// Counts by account. As large as there are keys, models and hours, not as there are requests.
type Totals = BTreeMap<Account, Counts>;

fn add_all(totals: &mut Totals, more: Totals) {
    for (account, counts) in more {
        *totals.entry(account).or_default() += counts;
    }
}

/// The ledger of a server. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ledger {
    store_path: Arc<Path>,
    writer: Arc<Writer>,
}

impl Ledger {
    /// Opens the ledger at `path`, or makes one, and starts the thread that writes.
    ///
    /// # Errors
    /// If the file cannot be written, or is something else.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        let store = Store::open(path)?;
        Ok(Self { store_path: path.into(), writer: Arc::new(Writer::start(store)) })
    }

    /// Counts something for a key and a model at a time. Neither waits nor fails.
    pub fn record(&self, at: SystemTime, names: (Arc<str>, Arc<str>), counts: Counts) {
        let (key, model) = names;
        self.writer.add(Account { hour: Hour::of(at), key, model }, counts);
    }

    /// Where the ledger is.
    pub fn path(&self) -> &Path {
        &self.store_path
    }

    /// Writes what has not been written, as the last thing; later counts are lost.
    pub fn close(&self) {
        self.writer.close();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Goal: a clock that jumps ahead, back, and behind its own beginning costs nothing and counts
    /// nothing twice. Method: such a clock.
    #[test]
    fn a_clock_that_jumps_moves_counts_and_loses_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.db");
        let ledger = Ledger::open(&path).unwrap();
        let epoch = SystemTime::UNIX_EPOCH;
        let hours = |number: u64| Duration::from_secs(3600 * number);
        let noon = epoch + hours(500_000);
        for at in [noon, noon + hours(9000), noon, noon - hours(1), epoch - hours(5), noon] {
            let counts = Counts { requests: 1, ..Counts::default() };
            ledger.record(at, ("key".into(), "model".into()), counts);
        }
        ledger.close();
        let mut lines = Vec::new();
        let store = Store::open_existing(&path).unwrap();
        let all = Hour(0)..Hour::MAX;
        store.read(all, |account, counts| lines.push((account.hour.0, counts.requests))).unwrap();
        assert_eq!(lines, [(0, 1), (499_999, 1), (500_000, 3), (509_000, 1)]);
    }
}
