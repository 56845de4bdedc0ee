//! What the engine says about itself.

use std::time::Duration;

use crate::engine::core::Phase;

/// What a request may ask for. Fixed when the engine starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// Prompt and generated tokens of one sequence together.
    pub max_model_len: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Sequences that run at a time.
    pub max_num_seqs: usize,
    /// Sequences that may wait beside them.
    pub max_queue: usize,
    /// Prompt tokens that may wait.
    pub max_queue_tokens: usize,
    /// Who would wait longer for a first token is refused.
    pub target_ttft: Option<Duration>,
    /// Token ids are below this.
    pub vocab_size: usize,
}

/// A snapshot taken after a step. The counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences that hold blocks.
    pub num_running: usize,
    /// Sequences in the queue.
    pub num_waiting: usize,
    /// Sequences that have no token yet, in the queue or not.
    pub num_pending: usize,
    /// Blocks that no sequence holds, whatever is cached in them.
    pub num_free_blocks: usize,
    /// All blocks.
    pub num_blocks: usize,
    /// Steps taken.
    pub num_steps: u64,
    /// How often a sequence gave its blocks back to be recomputed later.
    pub num_preemptions: u64,
    /// Steps that failed.
    pub num_failed_steps: u64,
    /// Whether somebody waits because all places are taken, or the blocks.
    pub is_full: bool,
    /// Tokens of prompts that are computed before a short one that comes now.
    pub num_tokens_ahead: usize,
    /// Tokens of prompts that the engine has seen and not begun.
    pub num_unstarted_tokens: usize,
    /// How long each of them takes; zero as long as nobody knows.
    pub wait_per_token: Duration,
    /// How long it takes until one of the running sequences ends; zero as long as nobody knows.
    pub wait_per_place: Duration,
}

/// Whether the engine does its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It progresses, or has nothing to do.
    Alive,
    /// A step has been running for longer than its size allows.
    Stalled {
        /// Since when.
        running_for: Duration,
        /// At what.
        phase: Phase,
    },
    /// It has given up; the process must be restarted.
    Dead {
        /// Why.
        reason: String,
    },
}

/// Where the engine thread stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lifecycle {
    /// The runner is being built.
    Loading,
    Running,
    /// Drained; everything was answered.
    Ended,
    Dead {
        reason: String,
    },
}
