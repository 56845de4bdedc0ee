//! Who records, and everybody else.
//!
//! While one thread records a step, what others upload, zero or free would become part of the recording
//! or spoil it. So they wait for its end; among each other they do not.

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, ThreadId};

/// Whether something is being recorded on a card.
#[derive(Default)]
pub(super) struct Recordings {
    /// Written to while something is.
    lock: RwLock<()>,
    recorder: Mutex<Option<ThreadId>>,
}

impl Recordings {
    /// As long as it is held no other thread records. The thread that records does not wait.
    pub(super) fn outside(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let is_recorder = *self.recorder() == Some(thread::current().id());
        (!is_recorder).then(|| self.lock.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes the calling thread the one that records, as long as it is held.
    pub(super) fn begin(&self) -> Recorder<'_> {
        let lock = self.lock.write().unwrap_or_else(PoisonError::into_inner);
        *self.recorder() = Some(thread::current().id());
        Recorder { recordings: self, _lock: lock }
    }

    fn recorder(&self) -> MutexGuard<'_, Option<ThreadId>> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Recordings::begin`].
pub(super) struct Recorder<'a> {
    recordings: &'a Recordings,
    _lock: RwLockWriteGuard<'a, ()>,
}

impl Drop for Recorder<'_> {
    fn drop(&mut self) {
        *self.recordings.recorder() = None;
    }
}
