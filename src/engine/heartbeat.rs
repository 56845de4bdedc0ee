//! What the engine thread is doing, for those who must not wait for it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::engine::core::{Phase, PhaseCell};
use crate::engine::thread::now;

/// Since when a step has been running, and how far it is.
#[derive(Debug)]
pub(super) struct Heartbeat {
    pub(super) origin: Instant,
    /// Milliseconds after `origin` at which the running step is overdue; zero between steps.
    overdue_at_ms: AtomicU64,
    started_at_ms: AtomicU64,
    num_steps: AtomicU64,
    num_seqs: AtomicU64,
    num_tokens: AtomicU64,
    phase: OnceLock<Arc<PhaseCell>>,
}

/// A step that takes too long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Overdue {
    pub(super) running_for: Duration,
    pub(super) phase: Phase,
    /// Steps before it.
    pub(super) num_steps: u64,
    pub(super) num_seqs: u64,
    pub(super) num_tokens: u64,
}

impl Heartbeat {
    pub(super) fn new() -> Self {
        Self {
            origin: now(),
            overdue_at_ms: AtomicU64::new(0),
            started_at_ms: AtomicU64::new(0),
            num_steps: AtomicU64::new(0),
            num_seqs: AtomicU64::new(0),
            num_tokens: AtomicU64::new(0),
            phase: OnceLock::new(),
        }
    }

    /// Where the engine says what it is doing.
    pub(super) fn watch(&self, phase: &Arc<PhaseCell>) {
        let _ = self.phase.set(Arc::clone(phase));
    }

    fn elapsed_ms(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }

    /// A step begins that should take no longer than `allowed`.
    pub(super) fn begin(&self, (num_seqs, num_tokens): (usize, u32), allowed: Duration) {
        let started_at_ms = self.elapsed_ms();
        self.num_seqs.store(num_seqs as u64, Ordering::Relaxed);
        self.num_tokens.store(u64::from(num_tokens), Ordering::Relaxed);
        self.started_at_ms.store(started_at_ms, Ordering::SeqCst);
        let overdue_at_ms = started_at_ms + (allowed.as_millis() as u64).max(1);
        self.overdue_at_ms.store(overdue_at_ms, Ordering::SeqCst);
    }

    pub(super) fn end(&self) {
        self.num_steps.fetch_add(1, Ordering::Relaxed);
        self.overdue_at_ms.store(0, Ordering::SeqCst);
    }

    /// How long the running step has been running.
    pub(super) fn running_for(&self) -> Option<Duration> {
        let is_running = self.overdue_at_ms.load(Ordering::SeqCst) != 0;
        let started_at_ms = self.started_at_ms.load(Ordering::SeqCst);
        is_running.then(|| Duration::from_millis(self.elapsed_ms().saturating_sub(started_at_ms)))
    }

    /// The running step, if it takes too long.
    pub(super) fn overdue(&self) -> Option<Overdue> {
        let overdue_at_ms = self.overdue_at_ms.load(Ordering::SeqCst);
        let now_ms = self.elapsed_ms();
        if overdue_at_ms == 0 || now_ms < overdue_at_ms {
            return None;
        }
        let started_at_ms = self.started_at_ms.load(Ordering::SeqCst);
        Some(Overdue {
            running_for: Duration::from_millis(now_ms.saturating_sub(started_at_ms)),
            phase: self.phase.get().map_or(Phase::BetweenSteps, |phase| phase.get()),
            num_steps: self.num_steps.load(Ordering::Relaxed),
            num_seqs: self.num_seqs.load(Ordering::Relaxed),
            num_tokens: self.num_tokens.load(Ordering::Relaxed),
        })
    }
}
