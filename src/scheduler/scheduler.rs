//! The decisions: who leaves the queue, who gets how many tokens, who gives blocks back.

use std::time::Duration;

use crate::kv::manager::{CachedPrefix, OutOfBlocks};
use crate::kv::{BlockId, KvCacheManager};
use crate::scheduler::SeqId;
use crate::scheduler::priority::Rank;
use crate::scheduler::queue::WaitingQueue;
use crate::scheduler::sequence::{Sequence, SequenceSpec};
use crate::scheduler::snapshot::WaitReason;
use crate::scheduler::step::{
    Continuation, NonFiniteLogits, SampleError, SampledToken, ScheduledSeq, SchedulerOutput,
    SeqOutput, TokenLogprobs,
};

/// The bounds of a step.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerConfig {
    /// At most this many sequences hold blocks at a time.
    pub max_num_seqs: usize,
    /// At most this many tokens are computed in a step; at least two.
    pub max_num_batched_tokens: usize,
    /// At most this many of them belong to prompts while another sequence is generating, so that
    /// a long prompt does not stretch the time between tokens of running streams.
    pub max_prefill_tokens_while_decoding: usize,
    /// Among prompts the shortest rest goes first; a prompt that arrives a step later is treated
    /// as this many tokens longer.
    pub prefill_ageing_tokens_per_step: usize,
    /// How many steps earlier a sequence counts as having arrived for each unit of priority.
    pub steps_per_priority: u64,
    /// No sequence grows beyond this many tokens.
    pub max_model_len: usize,
}

/// What happened to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum SeqEvent {
    /// It left the queue for the first time, with so many tokens found in the cache.
    Started {
        /// Whose event.
        id: SeqId,
        /// Prompt tokens found in the prefix cache.
        num_cached_tokens: usize,
    },
    /// Log-probabilities of its next prompt tokens.
    PromptLogprobs(SeqId, Vec<TokenLogprobs>),
    /// So many tokens that were not cached before are kept in the cache for a while, as it asked.
    /// Told once, before its first token, if it asked.
    Pinned(SeqId, usize),
    /// The embedding of its prompt.
    Pooled(SeqId, Vec<f32>),
    /// It got a token.
    Token(SeqId, SampledToken),
    /// It is complete and forgotten.
    Finished(SeqId, SeqFinish),
    /// It cannot be computed and is forgotten.
    Failed(SeqId, SampleError),
}

/// Why a sequence is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeqFinish {
    /// A stop token was drawn, or its grammar is complete.
    Stop,
    /// It has as many tokens as it may have.
    Length,
}

/// How far a sequence had come when it was aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SeqPhase {
    /// In the queue.
    Waiting,
    /// Computing its prompt.
    Prefill,
    /// Generating.
    Decode,
}

/// The sequence can never run: it needs more blocks or positions than there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoesNotFit;

/// A snapshot. The counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences that hold blocks.
    pub num_running: usize,
    /// Sequences in the queue.
    pub num_waiting: usize,
    /// Blocks that sequences hold.
    pub num_held_blocks: usize,
    /// How often a sequence gave its blocks back to be recomputed later.
    pub num_preemptions: u64,
    /// Tokens looked up in the prefix cache by sequences that started.
    pub num_prefix_queries: u64,
    /// How many of them were found.
    pub num_prefix_hits: u64,
}

/// Everything that is waiting or running.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) config: SchedulerConfig,
    kv: KvCacheManager,
    pub(super) waiting: WaitingQueue,
    /// In order of their ranks. **Invariant:** the first one progresses in every step, because it always
    /// gets a token, and the last one gives its blocks back first.
    pub(super) running: Vec<Sequence>,
    started: Vec<SeqEvent>,
    num_arrivals: u64,
    pub(super) num_steps: u64,
    stats: SchedulerStats,
}

impl Scheduler {
    /// A scheduler that owns its cache's books.
    pub fn new(config: SchedulerConfig, kv: KvCacheManager) -> Self {
        assert!(0 < config.max_num_seqs);
        assert!(2 <= config.max_num_batched_tokens, "prompts progress beside running streams");
        assert!(0 < config.max_prefill_tokens_while_decoding);
        Self {
            config,
            kv,
            waiting: WaitingQueue::default(),
            running: Vec::new(),
            started: Vec::new(),
            num_arrivals: 0,
            num_steps: 0,
            stats: SchedulerStats::default(),
        }
    }

    /// The cache's books.
    pub fn kv(&self) -> &KvCacheManager {
        &self.kv
    }

    /// Whether nothing waits or runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// A snapshot for people and metrics.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            num_running: self.running.len(),
            num_waiting: self.waiting.len(),
            num_held_blocks: self.kv.num_held_blocks(),
            ..self.stats
        }
    }

    /// Puts a sequence at the end of the queue.
    pub fn add(&mut self, spec: SequenceSpec) -> Result<(), DoesNotFit> {
        let blocks = self.kv.new_sequence(spec.cache_salt.as_deref());
        let needs_room_for_output = usize::from(0 < spec.max_tokens);
        if self.config.max_model_len < spec.prompt.len() + needs_room_for_output {
            return Err(DoesNotFit);
        }
        let mut seq = Sequence::new(spec, blocks, self.config.max_model_len);
        if self.kv.num_blocks() < self.kv.blocks_for(seq.max_computed_tokens()) {
            return Err(DoesNotFit);
        }
        let arrival = (self.num_steps, self.num_arrivals);
        seq.rank = Rank::new(seq.priority(), arrival, self.config.steps_per_priority);
        self.num_arrivals += 1;
        self.waiting.insert(seq);
        Ok(())
    }

    /// Forgets a sequence and gives its blocks back at once. `None` when it is not known any more.
    pub fn abort(&mut self, id: SeqId) -> Option<SeqPhase> {
        if let Some(seq) = self.waiting.remove_id(id) {
            let was_generating = 0 < seq.num_output_tokens();
            return Some(if was_generating { SeqPhase::Decode } else { SeqPhase::Waiting });
        }
        let index = self.running.iter().position(|seq| seq.id() == id)?;
        let mut seq = self.running.remove(index);
        self.kv.free(&mut seq.blocks);
        let is_generating = 0 < seq.num_output_tokens();
        Some(if is_generating { SeqPhase::Decode } else { SeqPhase::Prefill })
    }

    /// Takes every block back and forgets all cached content: the device's memory is in doubt.
    /// Whoever was running starts again from its known tokens, without its client noticing.
    pub fn reset(&mut self) {
        while !self.running.is_empty() {
            self.preempt_youngest();
        }
        self.kv.clear();
    }

    /// Tells the time, which pins need; measured from anywhere, and never earlier than before.
    pub fn advance_to(&mut self, now: Duration) {
        self.kv.advance_to(now);
    }

    /// Decides the next step.
    pub fn schedule(&mut self) -> SchedulerOutput {
        self.num_steps += 1;
        self.admit_waiting();
        let planned = self.plan_tokens();
        self.allocate_planned(&planned)
    }

    /// Moves sequences from the queue to the running ones, in order of their ranks. Nobody overtakes a
    /// sequence that lacks room; anybody may overtake one that waits for a prefix.
    fn admit_waiting(&mut self) {
        let mut last = None;
        while self.running.len() < self.config.max_num_seqs {
            let Some(seq) = self.waiting.next_after(last) else { break };
            let rank = seq.rank;
            last = Some(rank);
            let max_cached = seq.max_cached_tokens();
            let prefix = self.kv.find_cached_prefix(&mut seq.blocks, &seq.tokens, max_cached);
            if is_being_computed(&self.running, seq, prefix, self.kv.block_size()) {
                seq.passed_over = Some((self.num_steps, WaitReason::Prefix));
                continue;
            }
            if !has_room(&self.kv, &self.running, seq, prefix) {
                seq.passed_over = Some((self.num_steps, WaitReason::Blocks));
                break;
            }
            let seq = self.waiting.remove(rank).expect("it was just seen");
            self.admit(seq, prefix);
        }
    }

    fn admit(&mut self, mut seq: Sequence, prefix: CachedPrefix) {
        let num_cached_tokens = self.kv.attach_cached_prefix(&mut seq.blocks, prefix);
        seq.num_computed_tokens = num_cached_tokens;
        if !seq.was_started {
            seq.was_started = true;
            seq.num_cached_tokens = num_cached_tokens;
            if 0 < seq.max_cached_tokens() {
                self.stats.num_prefix_queries += seq.num_prompt_tokens() as u64;
                self.stats.num_prefix_hits += num_cached_tokens as u64;
            }
            self.started.push(SeqEvent::Started { id: seq.id(), num_cached_tokens });
        }
        let index = self.running.partition_point(|other| other.rank < seq.rank);
        self.running.insert(index, seq);
        assert!(
            promised_blocks(&self.kv, &self.running) <= self.kv.num_free_blocks(),
            "what is admitted fits beside what runs"
        );
    }

    /// Shares out the token budget: one number per running sequence.
    ///
    /// The oldest always gets a token, so that something ends whatever else happens. Then comes
    /// whoever lacks a single token, longest unserved first; one token is kept back for prompts.
    /// The rest goes to the prompts, shortest rest first.
    fn plan_tokens(&self) -> Vec<usize> {
        let mut planned = vec![0; self.running.len()];
        let Some(oldest) = planned.first_mut() else { return planned };
        *oldest = 1;
        let (mut decodes, mut prefills): (Vec<usize>, Vec<usize>) =
            (0..self.running.len()).partition(|&i| self.running[i].num_uncomputed_tokens() == 1);
        let is_decoding = !decodes.is_empty();
        decodes.retain(|&i| i != 0);
        decodes.sort_by_key(|&i| (self.running[i].last_scheduled_step, i));
        let ageing = self.config.prefill_ageing_tokens_per_step;
        prefills.sort_by_key(|&i| (self.running[i].prefill_deadline(ageing), i));

        let budget = self.config.max_num_batched_tokens - 1;
        decodes.truncate(budget - usize::from(!prefills.is_empty()));
        for &index in &decodes {
            planned[index] = 1;
        }
        let mut prefill_budget = budget - decodes.len();
        if is_decoding {
            let num_given = usize::from(prefills.contains(&0));
            let allowed = self.config.max_prefill_tokens_while_decoding - num_given;
            prefill_budget = prefill_budget.min(allowed);
        }
        for index in prefills {
            let lacking = self.running[index].num_uncomputed_tokens() - planned[index];
            let num_new = lacking.min(prefill_budget);
            planned[index] += num_new;
            prefill_budget -= num_new;
        }
        planned
    }

    /// Gives every planned token a slot, oldest sequence first. Where blocks run out the youngest
    /// gives its own back; if the youngest itself lacks one, it sits the step out.
    fn allocate_planned(&mut self, planned: &[usize]) -> SchedulerOutput {
        let mut output = SchedulerOutput::default();
        let mut index = 0;
        while index < self.running.len() {
            let seq = &mut self.running[index];
            let end = seq.num_computed_tokens + planned[index];
            if planned[index] == 0 {
                index += 1;
            } else if self.kv.allocate_slots(&mut seq.blocks, end) == Err(OutOfBlocks) {
                if index + 1 == self.running.len() {
                    assert!(0 < index, "a sequence that may run at all can run alone");
                    break;
                }
                output.preempted.extend(self.preempt_youngest());
            } else {
                seq.last_scheduled_step = self.num_steps;
                output.scheduled.push(seq.schedule(planned[index]));
                index += 1;
            }
        }
        let served = output.scheduled.first().map(|scheduled| scheduled.id);
        assert_eq!(served, self.running.first().map(Sequence::id), "the oldest always progresses");
        output
    }

    /// Puts the youngest running sequence back into the queue; it recomputes later.
    fn preempt_youngest(&mut self) -> Option<SeqId> {
        let mut seq = self.running.pop()?;
        let id = seq.id();
        self.kv.free(&mut seq.blocks);
        seq.start_anew();
        self.stats.num_preemptions += 1;
        self.waiting.insert(seq);
        Some(id)
    }

    /// Events of sequences that left the queue; [`Self::update`] reports them too.
    pub fn take_started(&mut self) -> Vec<SeqEvent> {
        std::mem::take(&mut self.started)
    }

    /// Records a finished step: one output per scheduled sequence, in order.
    pub fn update(&mut self, step: &SchedulerOutput, outputs: Vec<SeqOutput>) -> Vec<SeqEvent> {
        assert_eq!(step.scheduled.len(), outputs.len(), "one output per scheduled sequence");
        let mut events = self.take_started();
        for (scheduled, output) in step.scheduled.iter().zip(outputs) {
            // Absent when it was aborted while the step ran.
            if let Some(index) = self.running.iter().position(|seq| seq.id() == scheduled.id) {
                self.update_sequence(index, scheduled, output, &mut events);
            }
        }
        events
    }

    fn update_sequence(
        &mut self,
        index: usize,
        scheduled: &ScheduledSeq,
        output: SeqOutput,
        events: &mut Vec<SeqEvent>,
    ) {
        let seq = &mut self.running[index];
        let id = seq.id();
        assert_eq!(output.sampled.is_some(), scheduled.sample.is_some(), "sampled when asked");
        assert_eq!(output.pooled.is_some(), scheduled.pool.is_some(), "pooled when asked");
        let is_broken = output.pooled.iter().flatten().any(|sum| !sum.is_finite());
        let failure = is_broken.then_some(NonFiniteLogits.into());
        if let Some(error) = failure.or_else(|| output.sampled.as_ref()?.as_ref().err().cloned()) {
            // Whatever made the logits infinite may sit in any of its blocks.
            let mut seq = self.running.remove(index);
            self.kv.discard(&mut seq.blocks);
            events.push(SeqEvent::Failed(id, error));
            return;
        }
        seq.num_computed_tokens = scheduled.end();
        self.kv.publish_full_blocks(&mut seq.blocks, &seq.tokens, seq.num_computed_tokens);
        if scheduled.prompt_logprobs.is_some() {
            // Recomputation after a preemption may score tokens a second time.
            let num_known = seq.num_prompt_logprobs.saturating_sub(scheduled.start);
            let fresh: Vec<_> = output.prompt_logprobs.into_iter().skip(num_known).collect();
            seq.num_prompt_logprobs += fresh.len();
            events.push(SeqEvent::PromptLogprobs(id, fresh));
        }
        if let Some(sum) = output.pooled {
            seq.set_pool_sum(sum);
            events.extend(seq.embedding().map(|embedding| SeqEvent::Pooled(id, embedding)));
        }
        if let Some(pins) = seq.take_due_pins() {
            let pinned = pins.iter().map(|&pin| self.kv.pin_prefix(&seq.blocks, pin)).max();
            let num_written = pinned.unwrap_or(0).saturating_sub(seq.num_cached_tokens);
            events.push(SeqEvent::Pinned(id, num_written));
        }
        let mut finish = None;
        if let Some(Ok(token)) = output.sampled {
            finish = append_tokens(seq, token, output.continuation, events);
        } else if seq.has_max_len() && seq.max_computed_tokens() <= scheduled.end() {
            finish = Some(SeqFinish::Length);
        }
        if let Some(finish) = finish {
            let mut seq = self.running.remove(index);
            self.kv.free(&mut seq.blocks);
            events.push(SeqEvent::Finished(id, finish));
        }
    }

    /// Panics unless every block is free or owned as often as its reference count says, nobody
    /// owns more than it needs, and who waits owns nothing.
    pub fn check_invariants(&self) {
        self.kv.check_invariants();
        let mut owners = vec![0; self.kv.num_blocks()];
        for id in self.running.iter().flat_map(|seq| seq.blocks.table().blocks()) {
            owners[id.0 as usize] += 1;
        }
        for (id, &num_owners) in (0..).map(BlockId).zip(&owners) {
            assert_eq!(num_owners, self.kv.ref_count(id));
        }
        assert!(self.running.len() <= self.config.max_num_seqs);
        assert!(self.running.is_sorted_by_key(|seq| seq.rank));
        for seq in &self.running {
            let needed = self.kv.blocks_for(seq.num_computed_tokens);
            assert_eq!(seq.blocks.table().blocks().len(), needed);
            assert_eq!(seq.blocks.num_published(), seq.num_computed_tokens / self.kv.block_size());
            assert!(0 < seq.num_uncomputed_tokens());
        }
        for seq in self.waiting.iter() {
            assert!(seq.blocks.table().blocks().is_empty());
            assert_eq!(seq.blocks.num_published(), 0);
            assert_eq!(seq.num_computed_tokens, 0);
        }
    }
}

/// Appends a drawn token and those that must follow it. Tells whether that ends the sequence.
fn append_tokens(
    seq: &mut Sequence,
    drawn: SampledToken,
    continuation: Continuation,
    events: &mut Vec<SeqEvent>,
) -> Option<SeqFinish> {
    let forced = continuation.forced.into_iter().map(|id| SampledToken { id, logprobs: None });
    let mut tokens = std::iter::once(drawn).chain(forced).peekable();
    while let Some(token) = tokens.next() {
        let id = token.id;
        seq.push(id);
        events.push(SeqEvent::Token(seq.id(), token));
        if seq.is_stop_token(id) {
            return Some(SeqFinish::Stop);
        }
        if seq.has_max_len() {
            let is_complete = continuation.is_complete && tokens.peek().is_none();
            return Some(if is_complete { SeqFinish::Stop } else { SeqFinish::Length });
        }
    }
    continuation.is_complete.then_some(SeqFinish::Stop)
}

/// Whether a running sequence is about to publish the block that `seq` would have to compute next.
/// Then waiting is cheaper than computing it twice. Asked anew in every step, so nobody waits for
/// a sequence that was aborted or preempted.
fn is_being_computed(
    running: &[Sequence],
    seq: &Sequence,
    prefix: CachedPrefix,
    block_size: usize,
) -> bool {
    let next = prefix.num_blocks;
    let is_shareable = (next + 1) * block_size <= seq.max_cached_tokens();
    let Some(hash) = seq.blocks.hash(next).filter(|_| is_shareable) else { return false };
    running.iter().any(|other| other.blocks.will_publish(next, hash))
}

/// Whether `seq` can have blocks for all its known tokens, and every sequence that runs already for
/// its own, and one more each. Admitting earlier would only cause preemptions.
fn has_room(
    kv: &KvCacheManager,
    running: &[Sequence],
    seq: &Sequence,
    prefix: CachedPrefix,
) -> bool {
    let needed = kv.blocks_for(seq.tokens.len()) - prefix.num_blocks + prefix.num_free_blocks;
    needed + promised_blocks(kv, running) + running.len() <= kv.num_free_blocks()
}

/// How many more blocks the running sequences need for the tokens they already know.
fn promised_blocks(kv: &KvCacheManager, running: &[Sequence]) -> usize {
    let lacking =
        |seq: &Sequence| kv.blocks_for(seq.tokens.len()) - seq.blocks.table().blocks().len();
    running.iter().map(lacking).sum()
}
