//! Everything that an engine has to do, for people.

use std::sync::Arc;
use std::time::Duration;

pub use crate::scheduler::snapshot::{SeqSnapshot, SeqState, WaitReason};

/// A sequence and the request it belongs to. No tokens, only numbers of them.
#[derive(Clone, Debug)]
pub struct SequenceReport {
    /// The request's id.
    pub request_id: Arc<str>,
    /// On whose behalf it runs.
    pub client: Option<Arc<str>>,
    /// Which of the request's choices this is.
    pub choice: u32,
    /// Since the request was submitted.
    pub age: Duration,
    /// What the scheduler knows of it.
    pub sequence: SeqSnapshot,
}
