//! What every sequence is doing, and why. Pure; for people who wonder why a request takes so long.

use crate::scheduler::sequence::Sequence;
use crate::scheduler::{Scheduler, SeqId};

/// Why a sequence is still in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// As many sequences run as may.
    Slots,
    /// The cache lacks blocks for its prompt beside what runs.
    Blocks,
    /// Another sequence is computing the beginning of its prompt.
    Prefix,
    /// It has just come, or others are before it.
    Turn,
}

/// What a sequence is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeqState {
    /// In the queue.
    Waiting(WaitReason),
    /// Computing its prompt, or computing again what a preemption took from it.
    Prefill,
    /// Generating.
    Decode,
}

/// A sequence as it is between two steps. No tokens, only numbers of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeqSnapshot {
    /// Which sequence.
    pub id: SeqId,
    /// What it is doing.
    pub state: SeqState,
    /// Tokens of its prompt.
    pub num_prompt_tokens: usize,
    /// Tokens whose keys and values are in the cache.
    pub num_computed_tokens: usize,
    /// Tokens it has generated.
    pub num_generated_tokens: usize,
    /// Most tokens it may generate.
    pub max_tokens: usize,
    /// Blocks it holds, shared ones too.
    pub num_blocks: usize,
    /// Its priority; lower is earlier.
    pub priority: i32,
}

impl Scheduler {
    /// Every sequence: first those that run, then those that wait.
    pub fn snapshot(&self) -> Vec<SeqSnapshot> {
        let running = self.running.iter().map(|seq| snapshot(seq, running_state(seq)));
        let waiting =
            self.waiting.iter().map(|seq| snapshot(seq, SeqState::Waiting(self.wait_reason(seq))));
        running.chain(waiting).collect()
    }

    fn wait_reason(&self, seq: &Sequence) -> WaitReason {
        if self.config.max_num_seqs <= self.running.len() {
            return WaitReason::Slots;
        }
        match seq.passed_over {
            Some((step, reason)) if step == self.num_steps => reason,
            _ => WaitReason::Turn,
        }
    }
}

fn running_state(seq: &Sequence) -> SeqState {
    let is_generating = 0 < seq.num_output_tokens() && seq.num_uncomputed_tokens() == 1;
    if is_generating { SeqState::Decode } else { SeqState::Prefill }
}

fn snapshot(seq: &Sequence, state: SeqState) -> SeqSnapshot {
    SeqSnapshot {
        id: seq.id(),
        state,
        num_prompt_tokens: seq.num_prompt_tokens(),
        num_computed_tokens: seq.num_computed_tokens,
        num_generated_tokens: seq.num_output_tokens(),
        max_tokens: seq.max_tokens(),
        num_blocks: seq.blocks.table().blocks().len(),
        priority: seq.priority().number(),
    }
}
