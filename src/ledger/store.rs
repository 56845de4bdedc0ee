//! The file: one table in SQLite.
//!
//! In WAL mode readers never wait for the writer, nor it for them. With `synchronous=FULL` a
//! transaction that was committed survives a power cut as well as the end of the process; there
//! are two a second at most, so that costs nothing.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, TransactionBehavior, params};

use super::{Account, Counts, Hour, Totals};

/// Tells our files from other programs' databases: `qwsl` in ASCII.
const APPLICATION_ID: i32 = 0x7177_736c;
/// The version of the schema below. A change adds a step to [`migrate`].
const SCHEMA_VERSION: i32 = 1;
const SCHEMA: &str = "
CREATE TABLE usage (
    hour INTEGER NOT NULL, -- when it begins, in seconds since 1970
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    PRIMARY KEY (hour, key, model)
) STRICT, WITHOUT ROWID";
const ADD: &str = "
INSERT INTO usage VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
ON CONFLICT DO UPDATE SET
    requests = requests + excluded.requests,
    errors = errors + excluded.errors,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens";
const READ: &str = "SELECT * FROM usage WHERE ?1 <= hour AND hour < ?2 ORDER BY hour, key, model";

/// How long to wait for another process that writes to the same file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// The ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// There is no such file.
    #[error("there is no usage ledger `{0}`")]
    Missing(PathBuf),
    /// SQLite refuses, for want of rights or space, or because the file is none of its own.
    #[error("cannot use `{path}` as usage ledger")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// A database, but of another program.
    #[error("`{0}` is a database, but no usage ledger")]
    Foreign(PathBuf),
    /// A ledger of the future.
    #[error(
        "the usage ledger `{path}` has version {version}, newer than this program's {SCHEMA_VERSION}"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: i32,
    },
}

/// An open ledger.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
    /// Device and number of the file, to notice when somebody moves it away.
    identity: Option<(u64, u64)>,
}

impl Store {
    /// Opens the ledger at `path` to write, or makes one.
    ///
    /// # Errors
    /// If the file cannot be written, or is something else.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        let mut store = Self::connect(path, flags)?;
        migrate(&mut store.connection, path)?;
        let unusable = |source| LedgerError::Unusable { path: path.to_owned(), source };
        store.connection.pragma_update(None, "journal_mode", "wal").map_err(unusable)?;
        store.connection.pragma_update(None, "synchronous", "full").map_err(unusable)?;
        store.identity = identity(path);
        Ok(store)
    }

    /// Opens the ledger at `path` to read; a server may be writing to it.
    ///
    /// # Errors
    /// If there is none, or it cannot be read.
    pub fn open_existing(path: &Path) -> Result<Self, LedgerError> {
        if !path.exists() {
            return Err(LedgerError::Missing(path.to_owned()));
        }
        let store = Self::connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        match version(&store.connection, path)? {
            0 => Err(LedgerError::Foreign(path.to_owned())),
            _ => Ok(store),
        }
    }

    fn connect(path: &Path, flags: OpenFlags) -> Result<Self, LedgerError> {
        let connect = || {
            let connection =
                Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
            connection.busy_timeout(BUSY_TIMEOUT)?;
            Ok(connection)
        };
        let unusable = |source| LedgerError::Unusable { path: path.to_owned(), source };
        let connection = connect().map_err(unusable)?;
        Ok(Self { connection, path: path.to_owned(), identity: None })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its path still leads to it. SQLite would go on writing to a file that was deleted.
    pub(super) fn is_in_place(&self) -> bool {
        identity(&self.path) == self.identity
    }

    /// Adds all counts, or none.
    pub(super) fn add(&mut self, totals: &Totals) -> Result<(), rusqlite::Error> {
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut statement = transaction.prepare(ADD)?;
            for (Account { hour, key, model }, counts) in totals {
                statement.execute(params![
                    stored(hour.unix_seconds()),
                    key.as_ref(),
                    model.as_ref(),
                    stored(counts.requests),
                    stored(counts.errors),
                    stored(counts.prompt_tokens),
                    stored(counts.cached_tokens),
                    stored(counts.completion_tokens),
                ])?;
            }
        }
        transaction.commit()
    }

    /// Passes every line of these hours to `visit`, the earliest first.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(
        &self,
        hours: Range<Hour>,
        mut visit: impl FnMut(Account, Counts),
    ) -> Result<(), LedgerError> {
        let mut read = || {
            let mut statement = self.connection.prepare(READ)?;
            let range =
                params![stored(hours.start.unix_seconds()), stored(hours.end.unix_seconds())];
            let mut rows = statement.query(range)?;
            while let Some(row) = rows.next()? {
                let number = |index| Ok::<_, rusqlite::Error>(loaded(row.get(index)?));
                let account = Account {
                    hour: Hour(number(0)? / Hour(1).unix_seconds()),
                    key: Arc::from(row.get_ref(1)?.as_str()?),
                    model: Arc::from(row.get_ref(2)?.as_str()?),
                };
                let counts = Counts {
                    requests: number(3)?,
                    errors: number(4)?,
                    prompt_tokens: number(5)?,
                    cached_tokens: number(6)?,
                    completion_tokens: number(7)?,
                };
                visit(account, counts);
            }
            Ok(())
        };
        read().map_err(|source| LedgerError::Unusable { path: self.path.clone(), source })
    }
}

/// SQLite's integers are signed.
fn stored(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn loaded(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The version of the ledger, zero for a file without content.
fn version(connection: &Connection, path: &Path) -> Result<i32, LedgerError> {
    let number = |pragma| {
        let number = connection.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0));
        number.map_err(|source| LedgerError::Unusable { path: path.to_owned(), source })
    };
    match (number("application_id")?, number("user_version")?) {
        (APPLICATION_ID, version) if SCHEMA_VERSION < version => {
            Err(LedgerError::Newer { path: path.to_owned(), version })
        }
        (APPLICATION_ID, version) => Ok(version),
        // Nobody has written to it since it was made.
        (0, 0) if number("schema_version")? == 0 => Ok(0),
        _ => Err(LedgerError::Foreign(path.to_owned())),
    }
}

/// Brings the file to the current version. Takes the right to write in any case, so that a file
/// that cannot be written is known before the first request.
fn migrate(connection: &mut Connection, path: &Path) -> Result<(), LedgerError> {
    let unusable = |source| LedgerError::Unusable { path: path.to_owned(), source };
    let transaction =
        connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(unusable)?;
    if version(&transaction, path)? == 0 {
        transaction.execute_batch(SCHEMA).map_err(unusable)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID).map_err(unusable)?;
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(unusable)?;
    }
    transaction.commit().map_err(unusable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(hour: u64, requests: u64) -> Totals {
        let account = Account { hour: Hour(hour), key: "k".into(), model: "m".into() };
        let counts = Counts { requests, prompt_tokens: 2 * requests, ..Counts::default() };
        Totals::from([(account, counts)])
    }

    fn lines(store: &Store) -> Vec<(u64, u64)> {
        let mut lines = Vec::new();
        let all = Hour(0)..Hour::MAX;
        store.read(all, |account, counts| lines.push((account.hour.0, counts.requests))).unwrap();
        lines
    }

    #[test]
    fn what_is_added_adds_up_across_openings() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.db");
        for _ in 0..2 {
            let mut store = Store::open(&path).unwrap();
            store.add(&totals(7, 3)).unwrap();
            store.add(&totals(5, 1)).unwrap();
        }
        let store = Store::open_existing(&path).unwrap();
        assert_eq!(lines(&store), [(5, 2), (7, 6)]);
        let mut some = Vec::new();
        store.read(Hour(5)..Hour(7), |_, counts| some.push(counts.prompt_tokens)).unwrap();
        assert_eq!(some, [4]);
    }

    /// Goal: the promise about kill -9 and power cuts rests on these two settings.
    #[test]
    fn commits_are_durable_and_readers_do_not_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.db");
        let mut store = Store::open(&path).unwrap();
        let pragma = |name| {
            store
                .connection
                .pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0))
        };
        assert_eq!(pragma("journal_mode").unwrap(), "wal".to_owned().into());
        assert_eq!(pragma("synchronous").unwrap(), 2.into());
        let reader = Store::open_existing(&path).unwrap();
        let writing = store.connection.transaction_with_behavior(TransactionBehavior::Immediate);
        let writing = writing.unwrap();
        assert_eq!(lines(&reader), []);
        drop(writing);
        store.add(&totals(1, 1)).unwrap();
        assert_eq!(lines(&reader), [(1, 1)]);
    }

    #[test]
    fn what_is_no_ledger_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let refusal = || format!("{:#}", anyhow::Error::from(Store::open(&path).unwrap_err()));

        fs::write(&path, "some text that somebody may still need").unwrap();
        assert!(refusal().contains("file is not a database"), "{}", refusal());
        assert!(fs::read_to_string(&path).unwrap().starts_with("some text"));

        fs::remove_file(&path).unwrap();
        let other = Connection::open(&path).unwrap();
        other.execute_batch("CREATE TABLE notes (text)").unwrap();
        drop(other);
        assert!(refusal().ends_with("is a database, but no usage ledger"), "{}", refusal());
        assert!(matches!(Store::open_existing(&path), Err(LedgerError::Foreign(_))));

        fs::remove_file(&path).unwrap();
        assert!(matches!(Store::open_existing(&path), Err(LedgerError::Missing(_))));
        assert!(!path.exists(), "reading makes no file");
        let store = Store::open(&path).unwrap();
        store.connection.pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        assert!(refusal().contains("has version 99, newer than"), "{}", refusal());
        assert!(matches!(Store::open(folder.path()), Err(LedgerError::Unusable { .. })));
    }
}
