//! What a scheduler counts. Pure.

use crate::scheduler::Scheduler;
use crate::scheduler::priority::{Priority, Rank};
use crate::scheduler::snapshot::WaitReason;
use crate::scheduler::speculation::MAX_DRAFTS;

/// A snapshot. The counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences that hold blocks.
    pub num_running: usize,
    /// Sequences in the queue.
    pub num_waiting: usize,
    /// Sequences of both kinds that have no token yet.
    pub num_pending: usize,
    /// Tokens of their prompts that are not in the cache yet; of a request with several choices only
    /// the first one's, because they share it.
    pub num_pending_tokens: usize,
    /// Those of them that are computed before a short prompt that comes now.
    pub num_tokens_ahead: usize,
    /// Tokens of prompts that have never left the queue.
    pub num_unstarted_tokens: usize,
    /// Whether somebody waits because all places are taken, or the blocks.
    pub is_full: bool,
    /// Sequences that have run and are gone. Only grows.
    pub num_left: u64,
    /// Blocks that sequences hold.
    pub num_held_blocks: usize,
    /// How often a sequence gave its blocks back to be recomputed later.
    pub num_preemptions: u64,
    /// Tokens looked up in the prefix cache by sequences that started.
    pub num_prefix_queries: u64,
    /// How many of them were found.
    pub num_prefix_hits: u64,
    /// What came of guesses.
    pub speculation: SpeculationStats,
}

/// What came of guesses of the next tokens. Only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpeculationStats {
    /// How often a sequence had guesses in a step.
    pub num_drafts: u64,
    /// All guesses.
    pub num_draft_tokens: u64,
    /// Those that came true, by their place behind the sequence's last token.
    pub num_accepted_per_position: [u64; MAX_DRAFTS],
}

impl SpeculationStats {
    /// What has been added since.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let mut added = *self;
        added.num_drafts = added.num_drafts.saturating_sub(before.num_drafts);
        added.num_draft_tokens = added.num_draft_tokens.saturating_sub(before.num_draft_tokens);
        let per_position = added.num_accepted_per_position.iter_mut();
        for (count, before) in per_position.zip(before.num_accepted_per_position) {
            *count = count.saturating_sub(before);
        }
        added
    }
}

impl Scheduler {
    /// A snapshot for people, metrics and the door.
    pub fn stats(&self) -> SchedulerStats {
        let mut stats = SchedulerStats {
            num_running: self.running.len(),
            num_waiting: self.waiting.len(),
            num_held_blocks: self.kv.num_held_blocks(),
            ..self.stats
        };
        let full = Some((self.num_steps, WaitReason::Blocks));
        stats.is_full = self.waiting.iter().any(|seq| seq.passed_over == full);
        let newcomer = self.deadline_of_newcomer();
        let all = self.running.iter().chain(self.waiting.iter());
        for seq in all.filter(|seq| seq.num_output_tokens() == 0) {
            stats.num_pending += 1;
            if seq.choice() == 0 {
                let num_tokens = seq.num_uncomputed_tokens();
                let is_ahead = seq.prefill_deadline(self.prefill_ageing()) <= newcomer;
                stats.num_pending_tokens += num_tokens;
                stats.num_tokens_ahead += if is_ahead { num_tokens } else { 0 };
                stats.num_unstarted_tokens += if seq.was_started { 0 } else { num_tokens };
            }
        }
        stats
    }

    /// The most tokens that one sequence can have in one step.
    pub fn max_step_tokens(&self) -> usize {
        let num_slots = self.kv.num_blocks() * self.kv.block_size();
        self.config.max_num_batched_tokens.min(self.config.max_model_len).min(num_slots)
    }

    /// Where a prompt that fills one step would stand if it came now, see
    /// [`Sequence::prefill_deadline`].
    fn deadline_of_newcomer(&self) -> u64 {
        let arrival = (self.num_steps, u64::MAX);
        let rank = Rank::new(Priority::default(), arrival, self.config.steps_per_priority);
        rank.prefill_deadline(self.config.max_num_batched_tokens, self.prefill_ageing())
    }
}
