//! The keys in force, and what each has used.
//!
//! Keys are looked up by a digest that takes the same time to compare wherever it differs, and
//! with every key, so that the time says nothing about which one was meant.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::state::unix_seconds;
use crate::access::{
    Allowance, Digest, Key, KeyFile, KeyFileError, KeyName, Quota, Refusal, Timestamp,
};

/// What the key of a server with only one is called.
const ONLY_KEY: &str = "default";

/// All keys.
pub struct KeyRing {
    file: Option<PathBuf>,
    holders: RwLock<Vec<Arc<Holder>>>,
    /// Of every key there ever was, by name: who is gone for a moment has used what it used.
    quotas: Mutex<BTreeMap<KeyName, Arc<Mutex<Quota>>>>,
    clock: Clock,
}

/// Time as quotas count it.
#[derive(Clone, Copy, Debug)]
struct Clock(Instant);

impl Clock {
    fn now(self) -> Duration {
        self.0.elapsed()
    }
}

/// Who has a key, with what is left of its quota.
pub(super) struct Holder {
    pub(super) key: Key,
    /// Shared with the holder of the same name before the file was read again.
    quota: Arc<Mutex<Quota>>,
    clock: Clock,
}

impl KeyRing {
    /// The keys of the file at `path`.
    ///
    /// # Errors
    /// If it cannot be read or understood.
    pub fn open(path: &Path) -> Result<Self, KeyFileError> {
        let keys = KeyFile::read(path)?.into_keys();
        Ok(Self { file: Some(path.to_owned()), ..Self::new(keys) })
    }

    /// One key that opens everything.
    pub fn only(secret: &str) -> Self {
        let name: KeyName = ONLY_KEY.parse().expect("it is plain");
        Self::new(vec![Key::unlimited(name, Digest::of(secret.as_bytes()))])
    }

    /// These keys.
    pub fn new(keys: Vec<Key>) -> Self {
        let ring = Self {
            file: None,
            holders: RwLock::default(),
            quotas: Mutex::default(),
            clock: Clock(Instant::now()),
        };
        ring.replace(keys);
        ring
    }

    /// The file they came from.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.holders.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether there is no key, so that nobody gets in.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads the file again. Requests that were let in are not disturbed, and what a key has used
    /// stays used.
    ///
    /// # Errors
    /// If the file cannot be used; then the keys stay as they are.
    pub fn reload(&self) -> Result<(), KeyFileError> {
        if let Some(file) = &self.file {
            self.replace(KeyFile::read(file)?.into_keys());
        }
        Ok(())
    }

    fn replace(&self, keys: Vec<Key>) {
        let now = self.clock.now();
        let mut quotas = self.quotas.lock().unwrap_or_else(PoisonError::into_inner);
        let mut quota = |key: &Key| {
            let fresh = || Arc::new(Mutex::new(Quota::new(key.limits, now)));
            let quota = quotas.entry(key.name.clone()).or_insert_with(fresh);
            quota.lock().unwrap_or_else(PoisonError::into_inner).set_limits(key.limits, now);
            Arc::clone(quota)
        };
        let clock = self.clock;
        let new = keys.into_iter().map(|key| Arc::new(Holder { quota: quota(&key), key, clock }));
        let new = new.collect();
        *self.holders.write().unwrap_or_else(PoisonError::into_inner) = new;
    }

    /// Who has the key with this secret, if it works.
    pub(super) fn find(&self, secret: &[u8]) -> Option<Arc<Holder>> {
        let digest = Digest::of(secret);
        let holders = self.holders.read().unwrap_or_else(PoisonError::into_inner);
        let found = holders.iter().fold(None, |found, holder| {
            if holder.key.digest == digest { Some(holder) } else { found }
        });
        let now = Timestamp(unix_seconds());
        found.filter(|holder| !holder.key.has_expired(now)).cloned()
    }
}

impl Holder {
    /// Lets a request in.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Admission, Refusal> {
        self.quota().enter(self.clock.now())?;
        Ok(Admission(Arc::clone(self)))
    }

    pub(super) fn reserve(&self, num_tokens: usize) -> Result<(), Refusal> {
        self.quota().reserve(num_tokens as u64, self.clock.now())
    }

    pub(super) fn give_back(&self, num_tokens: usize) {
        self.quota().give_back(num_tokens as u64, self.clock.now());
    }

    pub(super) fn charge(&self, num_tokens: usize) {
        self.quota().charge(num_tokens as u64, self.clock.now());
    }

    pub(super) fn allowances(&self) -> Vec<Allowance> {
        self.quota().allowances(self.clock.now()).collect()
    }

    fn quota(&self) -> MutexGuard<'_, Quota> {
        // Nothing panics halfway through a change.
        self.quota.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that was let in. It has left when this is dropped.
pub(super) struct Admission(Arc<Holder>);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.quota().leave();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::access::Refusal;

    fn entry(name: &str, more: &str) -> String {
        format!("[[key]]\nname = '{name}'\ndigest = '{}'\n{more}\n", Digest::of(name.as_bytes()))
    }

    #[test]
    fn a_broken_file_leaves_the_keys_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        fs::write(&path, entry("a", "") + &entry("b", "")).unwrap();
        let ring = KeyRing::open(&path).unwrap();
        assert!(ring.find(b"a").is_some() && ring.find(b"c").is_none());
        fs::write(&path, entry("c", "") + "nonsense").unwrap();
        assert!(ring.reload().is_err());
        assert!(ring.find(b"a").is_some() && ring.find(b"c").is_none());
        fs::write(&path, entry("b", "") + &entry("c", "")).unwrap();
        ring.reload().unwrap();
        assert!(ring.find(b"a").is_none() && ring.find(b"c").is_some());
        fs::remove_file(&path).unwrap();
        assert!(ring.reload().is_err());
        assert_eq!(ring.len(), 2);
    }

    #[test]
    fn reading_the_file_again_forgives_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        fs::write(&path, entry("a", "max_concurrent = 1")).unwrap();
        let ring = KeyRing::open(&path).unwrap();
        let inside = ring.find(b"a").unwrap().enter().ok().unwrap();
        ring.reload().unwrap();
        let again = ring.find(b"a").unwrap();
        assert!(matches!(again.enter().err(), Some(Refusal::Wait { .. })));
        drop(inside);
        assert!(again.enter().is_ok());
    }

    #[test]
    fn expired_keys_open_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let (old, new) = ("expires = 2020-01-01", "expires = 9999-01-01");
        fs::write(&path, entry("old", old) + &entry("new", new)).unwrap();
        let ring = KeyRing::open(&path).unwrap();
        assert!(ring.find(b"old").is_none() && ring.find(b"new").is_some());
    }
}
