//! Who records, and everybody else.
//!
//! While one thread records a step, what others upload, zero or free would become part of the recording
//! or spoil it. So they wait for its end; among each other they do not.

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, ThreadId};

use super::GpuError;
use super::backend::{Backend, Graph};

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

/// A capture that was begun must be ended, also after an error or a panic: until then nothing is
/// done that others ask for.
pub(super) struct Capture<'a> {
    backend: Option<&'a dyn Backend>,
}

impl<'a> Capture<'a> {
    pub(super) fn begin(backend: &'a dyn Backend) -> Result<Self, GpuError> {
        backend.begin_capture()?;
        Ok(Self { backend: Some(backend) })
    }

    pub(super) fn end(mut self) -> Result<Graph, GpuError> {
        self.backend.take().expect("it is ended once").end_capture()
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if let Some(backend) = self.backend.take() {
            // The panic that led here says more than a failure to end would.
            let _ = backend.end_capture();
        }
    }
}
