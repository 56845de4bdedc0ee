//! The decisions: who leaves the queue, who gets how many tokens, who gives blocks back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::kv::manager::OutOfBlocks;
use crate::kv::{BlockId, KvCacheManager, Positions, Root};
use crate::scheduler::fairness::Shares;
use crate::scheduler::prefill_budget::PrefillBudget;
use crate::scheduler::priority::Rank;
use crate::scheduler::queue::WaitingQueue;
use crate::scheduler::sequence::{Sequence, SequenceSpec};
use crate::scheduler::speculation::SpeculationConfig;
use crate::scheduler::step::{
    Continuation, Draw, NonFiniteLogits, SampleError, SampledToken, ScheduledSeq, SchedulerOutput,
    SeqOutput, TokenLogprobs,
};
use crate::scheduler::step_cost::StepCost;
use crate::scheduler::{Adapter, SchedulerStats, SeqId};

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
    /// After so many steps in the queue a sequence may take the place of a client's that has at
    /// least two more running than its own.
    pub fairness_patience_steps: u64,
    /// How long a step with generating sequences may take. The tokens of prompts beside them follow
    /// from it, beginning with `max_prefill_tokens_while_decoding`.
    pub target_itl: Option<Duration>,
    /// Within which time a prompt should have its first token. Half of it passed, the prompts get
    /// all the tokens of a step, unless there is a `target_itl`, which goes before.
    pub target_ttft: Option<Duration>,
    /// No sequence grows beyond this many tokens.
    pub max_model_len: usize,
    /// Sequences that may become longer than this many tokens have stretched positions, for life.
    pub stretched_beyond: Option<usize>,
    /// Present when the next tokens are guessed.
    pub speculation: Option<SpeculationConfig>,
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

/// Everything that is waiting or running.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) config: SchedulerConfig,
    pub(super) kv: KvCacheManager,
    pub(super) waiting: WaitingQueue,
    /// In order of their ranks. **Invariant:** the first one progresses in every step, because it always
    /// gets a token, and the last one gives its blocks back first.
    pub(super) running: Vec<Sequence>,
    pub(super) shares: Shares,
    /// Sequences of a step that failed, and how far each must come to be cleared.
    suspects: BTreeMap<SeqId, usize>,
    prefill_budget: PrefillBudget,
    /// Prompt tokens of the last step, if it had generating sequences too.
    num_mixed_prompt_tokens: usize,
    /// All tokens of the last step, if it had no prompt.
    num_decode_tokens: Option<usize>,
    pub(super) step_cost: StepCost,
    /// The time, measured from anywhere.
    now: Duration,
    pub(super) started: Vec<SeqEvent>,
    num_arrivals: u64,
    pub(super) num_steps: u64,
    pub(super) stats: SchedulerStats,
}

impl Scheduler {
    /// A scheduler that owns its cache's books.
    pub fn new(config: SchedulerConfig, kv: KvCacheManager) -> Self {
        assert!(0 < config.max_num_seqs);
        assert!(2 <= config.max_num_batched_tokens, "prompts progress beside running streams");
        assert!(0 < config.max_prefill_tokens_while_decoding);
        let prefill_budget = PrefillBudget::new(
            config.max_prefill_tokens_while_decoding,
            config.max_num_batched_tokens,
            config.target_itl,
        );
        Self {
            config,
            kv,
            prefill_budget,
            num_mixed_prompt_tokens: 0,
            num_decode_tokens: None,
            step_cost: StepCost::default(),
            now: Duration::ZERO,
            waiting: WaitingQueue::default(),
            running: Vec::new(),
            shares: Shares::default(),
            suspects: BTreeMap::new(),
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

    /// Puts a sequence at the end of the queue.
    pub fn add(&mut self, spec: SequenceSpec) -> Result<(), DoesNotFit> {
        let max_len = spec.max_len(self.config.max_model_len);
        let rope_start = self.config.stretched_beyond.filter(|trained| *trained < max_len);
        let positions = match rope_start {
            None => Positions::Trained,
            Some(_) => Positions::Stretched,
        };
        let adapter = spec.adapter.as_ref().map(Adapter::id);
        let blocks =
            self.kv.new_sequence(Root { salt: spec.cache_salt.as_deref(), positions, adapter });
        let needs_room_for_output = usize::from(0 < spec.max_tokens);
        if self.config.max_model_len < spec.prompt.len() + needs_room_for_output {
            return Err(DoesNotFit);
        }
        let mut seq = Sequence::new(spec, blocks, (max_len, rope_start.unwrap_or(0)));
        if self.kv.num_blocks() < self.kv.blocks_for(seq.max_computed_tokens()) {
            return Err(DoesNotFit);
        }
        let arrival = (self.num_steps, self.num_arrivals);
        seq.rank = Rank::new(seq.priority(), arrival, self.config.steps_per_priority);
        self.num_arrivals += 1;
        seq.queued_at_step = self.num_steps;
        seq.arrived_at = self.now;
        self.shares.join(seq.client());
        self.waiting.insert(seq);
        Ok(())
    }

    /// Forgets a sequence and gives its blocks back at once. `None` when it is not known any more.
    pub fn abort(&mut self, id: SeqId) -> Option<SeqPhase> {
        self.suspects.remove(&id);
        if let Some(seq) = self.waiting.remove_id(id) {
            self.shares.leave(seq.client());
            let was_generating = 0 < seq.num_output_tokens();
            return Some(if was_generating { SeqPhase::Decode } else { SeqPhase::Waiting });
        }
        let index = self.running.iter().position(|seq| seq.id() == id)?;
        let mut seq = self.remove_running(index);
        self.kv.free(&mut seq.blocks);
        let is_generating = 0 < seq.num_output_tokens();
        Some(if is_generating { SeqPhase::Decode } else { SeqPhase::Prefill })
    }

    /// Takes every block back and forgets all cached content: the device's memory is in doubt.
    /// Whoever was running starts again from its known tokens, without its client noticing.
    pub fn reset(&mut self) {
        while let Some(youngest) = self.running.len().checked_sub(1) {
            self.preempt(youngest);
        }
        self.kv.clear();
    }

    /// Takes note that a step failed, and clears everything it may have touched.
    ///
    /// One of its sequences may be the reason, so they run again one at a time; whoever fails alone
    /// is to blame, and forgotten. Returns that one.
    pub fn fail_step(&mut self, step: &SchedulerOutput) -> Option<SeqId> {
        let culprit = match step.scheduled.as_slice() {
            [only] if self.suspects.contains_key(&only.id) => Some(only.id),
            scheduled => {
                // Absent when it was aborted while the step ran.
                let live = scheduled.iter().filter(|scheduled| self.is_running(scheduled.id));
                let ends: Vec<_> = live.map(|seq| (seq.id, seq.end())).collect();
                self.suspects.extend(ends);
                None
            }
        };
        if let Some(id) = culprit {
            self.abort(id);
        }
        self.reset();
        culprit
    }

    /// The sequence that runs alone, or will, because a step with it failed.
    pub fn suspect(&self) -> Option<SeqId> {
        self.suspects.keys().next().copied()
    }

    fn is_running(&self, id: SeqId) -> bool {
        self.running.iter().any(|seq| seq.id() == id)
    }

    /// Takes a sequence out for good.
    fn remove_running(&mut self, index: usize) -> Sequence {
        let seq = self.running.remove(index);
        self.suspects.remove(&seq.id());
        self.shares.leave(seq.client());
        self.stats.num_left += 1;
        seq
    }

    /// Tells the time, which pins and targets need; measured from anywhere, and never earlier than before.
    pub fn advance_to(&mut self, now: Duration) {
        self.now = now;
        self.kv.advance_to(now);
    }

    /// Says how long the last step took.
    pub fn observe(&mut self, duration: Duration) {
        self.prefill_budget.observe(self.num_mixed_prompt_tokens, duration);
        if let Some(num_tokens) = self.num_decode_tokens {
            self.step_cost.observe(num_tokens, duration);
        }
    }

    /// Decides the next step.
    pub fn schedule(&mut self) -> SchedulerOutput {
        self.num_steps += 1;
        let displaced = match self.suspect() {
            None => self.admit_waiting(),
            Some(suspect) => self.admit_suspect(suspect),
        };
        let planned = self.plan_tokens();
        let mut output = self.allocate_planned(&planned);
        output.preempted.extend(displaced);
        self.speculate(&mut output);
        self.charge(&output);
        output
    }

    /// Books what the step costs, and whom.
    pub(super) fn charge(&mut self, output: &SchedulerOutput) {
        let num_step_tokens = output.scheduled.iter().map(|seq| seq.tokens.len()).sum();
        let (decodes, prompts): (Vec<_>, Vec<_>) =
            output.scheduled.iter().map(ScheduledSeq::num_known).partition(|&num| num == 1);
        self.num_decode_tokens = prompts.is_empty().then_some(num_step_tokens);
        self.num_mixed_prompt_tokens =
            if decodes.is_empty() { 0 } else { prompts.into_iter().sum() };
        let mut running = self.running.iter();
        for scheduled in &output.scheduled {
            // Both are in the same order.
            if let Some(seq) = running.find(|seq| seq.id() == scheduled.id) {
                self.shares.charge(seq.client(), scheduled.tokens.len(), num_step_tokens);
            }
        }
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
        let ageing = self.prefill_ageing();
        prefills.sort_by_key(|&i| (self.running[i].prefill_deadline(ageing), i));

        let budget = self.config.max_num_batched_tokens - 1;
        decodes.truncate(budget - usize::from(!prefills.is_empty()));
        for &index in &decodes {
            planned[index] = 1;
        }
        let mut prefill_budget = budget - decodes.len();
        if is_decoding {
            let num_given = usize::from(prefills.contains(&0));
            prefill_budget = prefill_budget.min(self.mixed_budget(&prefills) - num_given);
        }
        for index in prefills {
            let lacking = self.running[index].num_uncomputed_tokens() - planned[index];
            let num_new = lacking.min(prefill_budget);
            planned[index] += num_new;
            prefill_budget -= num_new;
        }
        planned
    }

    /// By how many tokens longer a prompt counts for each step that it comes later. With a target
    /// for first tokens a long prompt is overtaken only by those that come while it could have been
    /// read: it has the same time as the short ones.
    pub(super) fn prefill_ageing(&self) -> usize {
        match self.config.target_ttft {
            Some(_) => self.config.max_num_batched_tokens,
            None => self.config.prefill_ageing_tokens_per_step,
        }
    }

    /// Most prompt tokens beside generating sequences.
    fn mixed_budget(&self, prefills: &[usize]) -> usize {
        let is_late =
            |seq: &Sequence, target| target / 2 <= self.now.saturating_sub(seq.arrived_at);
        match (self.config.target_itl, self.config.target_ttft) {
            (None, Some(target)) if prefills.iter().any(|&i| is_late(&self.running[i], target)) => {
                self.config.max_num_batched_tokens
            }
            _ => self.prefill_budget.num_tokens(),
        }
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
                output.preempted.push(self.preempt(self.running.len() - 1));
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

    /// Puts a running sequence back into the queue; it recomputes later.
    pub(super) fn preempt(&mut self, index: usize) -> SeqId {
        let mut seq = self.running.remove(index);
        let id = seq.id();
        self.kv.free(&mut seq.blocks);
        seq.start_anew();
        seq.queued_at_step = self.num_steps;
        self.stats.num_preemptions += 1;
        self.waiting.insert(seq);
        id
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
            let mut seq = self.remove_running(index);
            self.kv.discard(&mut seq.blocks);
            events.push(SeqEvent::Failed(id, error));
            return;
        }
        let known_end = scheduled.start + scheduled.num_known();
        seq.num_computed_tokens = known_end;
        if self.suspects.get(&id).is_some_and(|&end| end <= scheduled.end()) {
            self.suspects.remove(&id);
        }
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
        let mut end = None;
        let num_verified = output.verified.len();
        if let Some(Ok(token)) = output.sampled {
            let drawn = Drawn { first: token, verified: output.verified };
            end = append_tokens(seq, drawn, output.continuation, events);
        } else if seq.has_max_len() && seq.max_computed_tokens() <= known_end {
            end = Some(Ok(SeqFinish::Length));
        }
        if 0 < scheduled.num_drafts {
            self.accept_drafts(index, scheduled, num_verified);
        }
        let Some(end) = end else { return };
        let mut seq = self.remove_running(index);
        match end {
            Ok(finish) => {
                self.kv.free(&mut seq.blocks);
                events.push(SeqEvent::Finished(id, finish));
            }
            Err(error) => {
                self.kv.discard(&mut seq.blocks);
                events.push(SeqEvent::Failed(id, error));
            }
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
        assert_eq!(self.shares.num_live(), self.running.len() + self.waiting.len());
        let live: BTreeSet<_> =
            self.running.iter().chain(self.waiting.iter()).map(Sequence::id).collect();
        assert!(self.suspects.keys().all(|id| live.contains(id)));
        for seq in &self.running {
            // A step that began early may hold the block of one more token.
            let num_blocks = seq.blocks.table().blocks().len();
            let needed = self.kv.blocks_for(seq.num_computed_tokens);
            let needed_ahead = self.kv.blocks_for(seq.num_computed_tokens + 1);
            assert!(num_blocks == needed || num_blocks == needed_ahead);
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

/// The tokens of a sequence that were drawn in a step.
struct Drawn {
    first: SampledToken,
    /// Behind guesses that came true.
    verified: Vec<Draw>,
}

/// Appends drawn tokens and those that must follow them. Tells whether that ends the sequence.
fn append_tokens(
    seq: &mut Sequence,
    drawn: Drawn,
    continuation: Continuation,
    events: &mut Vec<SeqEvent>,
) -> Option<Result<SeqFinish, SampleError>> {
    let forced = continuation.forced.into_iter().map(|id| Ok(SampledToken { id, logprobs: None }));
    let drawn = std::iter::once(Ok(drawn.first)).chain(drawn.verified);
    let mut tokens = drawn.chain(forced).peekable();
    while let Some(token) = tokens.next() {
        let token = match token {
            Ok(token) => token,
            Err(error) => return Some(Err(error)),
        };
        let id = token.id;
        seq.push(id);
        events.push(SeqEvent::Token(seq.id(), token));
        if seq.is_stop_token(id) {
            return Some(Ok(SeqFinish::Stop));
        }
        if seq.has_max_len() {
            let is_complete = continuation.is_complete && tokens.peek().is_none();
            return Some(Ok(if is_complete { SeqFinish::Stop } else { SeqFinish::Length }));
        }
    }
    continuation.is_complete.then_some(Ok(SeqFinish::Stop))
}
