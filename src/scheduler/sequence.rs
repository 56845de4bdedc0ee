//! One token stream: the prompt, what was generated, and how far the cache lags behind.

use std::sync::Arc;
use std::time::Duration;

use crate::kv::{Pin, SequenceBlocks};
use crate::sampling::params::SamplingParams;
use crate::scheduler::acceptance::Acceptance;
use crate::scheduler::fairness::FairnessId;
use crate::scheduler::priority::{Priority, Rank};
use crate::scheduler::snapshot::WaitReason;
use crate::scheduler::step::{
    PoolRequest, Pooling, PromptLogprobsRequest, SampleRequest, ScheduledSeq, TokenHistory, UNDRAWN,
};
use crate::scheduler::{Adapter, SeqId};
use crate::text::TokenId;

/// What a sequence is to become: one choice of a request.
#[derive(Clone, Debug)]
pub struct SequenceSpec {
    /// Must be unique for the lifetime of the engine.
    pub id: SeqId,
    /// The prompt; never empty.
    pub prompt: Arc<[TokenId]>,
    /// How tokens are drawn.
    pub params: Arc<SamplingParams>,
    /// Which of the request's choices this is.
    pub choice: u32,
    /// At most this many tokens are generated. Zero only computes the prompt.
    pub max_tokens: usize,
    /// Drawing one of these ends the sequence.
    pub stop_token_ids: Arc<[TokenId]>,
    /// How many top log-probabilities to report for every prompt token, if any.
    pub prompt_logprobs: Option<u32>,
    /// Prefixes are shared only between sequences with the same salt.
    pub cache_salt: Option<Arc<str>>,
    /// How urgent it is.
    pub priority: Priority,
    /// On whose behalf it runs.
    pub fairness_id: FairnessId,
    /// Beginnings of the prompt to keep in the cache for a while.
    pub pins: Arc<[Pin]>,
    /// Present when the prompt's embedding is wanted; then nothing is generated.
    pub pooling: Option<Pooling>,
    /// Whether something else than its parameters, as a grammar, says what may come; then nothing is
    /// guessed.
    pub is_guided: bool,
    /// What it is computed with beside the model.
    pub adapter: Option<Adapter>,
}

impl SequenceSpec {
    /// How many tokens it has at the end, at most.
    pub(super) fn max_len(&self, max_model_len: usize) -> usize {
        self.prompt.len().saturating_add(self.max_tokens).min(max_model_len)
    }
}

/// A sequence the scheduler knows.
#[derive(Debug)]
pub(super) struct Sequence {
    spec: SequenceSpec,
    pub(super) tokens: Vec<TokenId>,
    max_len: usize,
    rope_start: usize,
    /// Decides who is admitted, who is served first and who is preempted; long prompts age from
    /// its step. Kept for life.
    pub(super) rank: Rank,
    /// When it was added.
    pub(super) arrived_at: Duration,
    /// The step in which it came into the queue, the last time.
    pub(super) queued_at_step: u64,
    /// The last step that computed something.
    pub(super) last_scheduled_step: u64,
    /// The step in which it was looked at and left in the queue, and why.
    pub(super) passed_over: Option<(u64, WaitReason)>,
    /// Whether it ever left the queue.
    pub(super) was_started: bool,
    /// Tokens whose keys and values are in the cache. **Invariant:** `<= tokens.len()`.
    pub(super) num_computed_tokens: usize,
    /// Prompt tokens whose log-probability was reported. Survives preemption.
    pub(super) num_prompt_logprobs: usize,
    /// Prompt tokens found in the cache when it first left the queue.
    pub(super) num_cached_tokens: usize,
    /// Whether its pins were set.
    pub(super) is_pinned: bool,
    /// Sum of the hidden states of the computed tokens.
    pool_sum: Vec<f64>,
    /// How often guesses of its tokens came true.
    pub(super) acceptance: Acceptance,
    /// Whether a model that guesses has not computed the last computed token, because that was its
    /// own last guess.
    pub(super) is_drafter_behind: bool,
    pub(super) blocks: SequenceBlocks,
}

impl Sequence {
    pub(super) fn new(
        spec: SequenceSpec,
        blocks: SequenceBlocks,
        (max_len, rope_start): (usize, usize),
    ) -> Self {
        assert!(!spec.prompt.is_empty(), "a prompt has a token");
        let tokens = spec.prompt.to_vec();
        Self {
            spec,
            tokens,
            max_len,
            rope_start,
            rank: Rank::default(),
            arrived_at: Duration::ZERO,
            queued_at_step: 0,
            last_scheduled_step: 0,
            passed_over: None,
            was_started: false,
            num_computed_tokens: 0,
            num_prompt_logprobs: 0,
            num_cached_tokens: 0,
            is_pinned: false,
            pool_sum: Vec::new(),
            acceptance: Acceptance::default(),
            is_drafter_behind: false,
            blocks,
        }
    }

    pub(super) fn id(&self) -> SeqId {
        self.spec.id
    }

    pub(super) fn priority(&self) -> Priority {
        self.spec.priority
    }

    pub(super) fn client(&self) -> &FairnessId {
        &self.spec.fairness_id
    }

    pub(super) fn choice(&self) -> u32 {
        self.spec.choice
    }

    pub(super) fn max_tokens(&self) -> usize {
        self.max_len - self.num_prompt_tokens()
    }

    pub(super) fn num_prompt_tokens(&self) -> usize {
        self.spec.prompt.len()
    }

    pub(super) fn num_output_tokens(&self) -> usize {
        self.tokens.len() - self.num_prompt_tokens()
    }

    /// How far the cache lags behind the tokens. Prefill and decode differ only in this number.
    pub(super) fn num_uncomputed_tokens(&self) -> usize {
        self.tokens.len() - self.num_computed_tokens
    }

    /// The most tokens it will ever have in the cache. The last one is never fed back.
    pub(super) fn max_computed_tokens(&self) -> usize {
        if self.spec.max_tokens == 0 { self.num_prompt_tokens() } else { self.max_len - 1 }
    }

    /// How much of its beginning may come from the cache: never all of it, because the last token
    /// must yield logits, and nothing whose logits are still owed. The cache holds no hidden
    /// states, so a mean over all of them uses none of it.
    pub(super) fn max_cached_tokens(&self) -> usize {
        if self.spec.pooling == Some(Pooling::Mean) {
            return 0;
        }
        let max_hit = self.tokens.len() - 1;
        if self.owes_prompt_logprobs() { max_hit.min(self.num_prompt_logprobs) } else { max_hit }
    }

    fn owes_prompt_logprobs(&self) -> bool {
        self.spec.prompt_logprobs.is_some()
            && self.num_prompt_logprobs + 1 < self.num_prompt_tokens()
    }

    /// Nothing of it is in the cache any more.
    pub(super) fn start_anew(&mut self) {
        self.num_computed_tokens = 0;
        self.is_drafter_behind = false;
        self.pool_sum.clear();
    }

    /// The pins to set now that its tokens up to the last of them are computed.
    pub(super) fn take_due_pins(&mut self) -> Option<Arc<[Pin]>> {
        let end = self.spec.pins.iter().map(|pin| pin.num_tokens).max()?;
        let is_due =
            !self.is_pinned && end.min(self.num_prompt_tokens()) <= self.num_computed_tokens;
        self.is_pinned |= is_due;
        is_due.then(|| Arc::clone(&self.spec.pins))
    }

    /// Takes in the sum over the tokens computed so far.
    pub(super) fn set_pool_sum(&mut self, sum: Vec<f64>) {
        self.pool_sum = sum;
    }

    /// The embedding, once every token is computed.
    pub(super) fn embedding(&self) -> Option<Vec<f32>> {
        let count = match self.spec.pooling? {
            Pooling::Mean => self.num_prompt_tokens() as f64,
            Pooling::Last => 1.0,
        };
        let is_complete = self.num_prompt_tokens() <= self.num_computed_tokens;
        is_complete.then(|| self.pool_sum.iter().map(|sum| (sum / count) as f32).collect())
    }

    pub(super) fn push(&mut self, token: TokenId) {
        assert!(self.tokens.len() < self.max_len, "a finished sequence grows no more");
        self.tokens.push(token);
    }

    pub(super) fn is_stop_token(&self, token: TokenId) -> bool {
        self.spec.stop_token_ids.contains(&token)
    }

    pub(super) fn has_max_len(&self) -> bool {
        self.max_len <= self.tokens.len()
    }

    /// The order of prefills, see [`Rank::prefill_deadline`].
    pub(super) fn prefill_deadline(&self, ageing_tokens_per_step: usize) -> u64 {
        self.rank.prefill_deadline(self.num_uncomputed_tokens(), ageing_tokens_per_step)
    }

    /// The next `num_new_tokens` tokens as an order to the runner.
    pub(super) fn schedule(&self, num_new_tokens: usize) -> ScheduledSeq {
        let start = self.num_computed_tokens;
        let end = start + num_new_tokens;
        assert!(start < end && end <= self.tokens.len(), "only known tokens are computed");
        let is_sampled = end == self.tokens.len() && !self.has_max_len();
        ScheduledSeq {
            id: self.id(),
            start,
            tokens: self.tokens[start..end].to_vec(),
            num_drafts: 0,
            token_before: None,
            blocks: self.blocks.table().clone(),
            rope_start: self.rope_start,
            sample: is_sampled.then(|| self.sample_request()),
            prompt_logprobs: self.prompt_logprobs_request(start, end),
            pool: self.pool_request(start, end),
            adapter: self.spec.adapter.clone(),
            drawn_by: None,
        }
    }

    /// The token that will be drawn next as an order to the runner; `drawn_by` is the sequence's
    /// place in the step that draws it.
    pub(super) fn schedule_undrawn(&self, drawn_by: usize) -> ScheduledSeq {
        ScheduledSeq {
            id: self.id(),
            start: self.tokens.len(),
            tokens: vec![UNDRAWN],
            num_drafts: 0,
            token_before: None,
            blocks: self.blocks.table().clone(),
            rope_start: self.rope_start,
            sample: None,
            prompt_logprobs: None,
            pool: None,
            adapter: self.spec.adapter.clone(),
            drawn_by: Some(drawn_by),
        }
    }

    /// How many of the tokens behind the next one it may have.
    pub(super) fn max_drafts(&self) -> usize {
        if self.spec.is_guided { 0 } else { self.max_len.saturating_sub(self.tokens.len() + 1) }
    }

    /// Whether the next token is the last one, whatever it is.
    pub(super) fn ends_with_next_token(&self) -> bool {
        self.max_len <= self.tokens.len() + 1
    }

    fn pool_request(&self, start: usize, end: usize) -> Option<PoolRequest> {
        let num_tokens = end - start;
        let rows = match self.spec.pooling? {
            Pooling::Mean => 0..num_tokens,
            Pooling::Last if end == self.num_prompt_tokens() => num_tokens - 1..num_tokens,
            Pooling::Last => return None,
        };
        Some(PoolRequest { rows, sum: self.pool_sum.clone() })
    }

    pub(super) fn sample_request(&self) -> SampleRequest {
        let params = &self.spec.params;
        let num_output_tokens = self.num_output_tokens();
        let may_stop = params.min_tokens <= num_output_tokens;
        SampleRequest {
            params: Arc::clone(params),
            choice: self.spec.choice,
            num_output_tokens,
            forbidden: if may_stop { Vec::new() } else { self.spec.stop_token_ids.to_vec() },
            history: params.needs_history().then(|| TokenHistory {
                tokens: self.tokens.clone(),
                num_prompt_tokens: self.num_prompt_tokens(),
            }),
        }
    }

    /// The logits of token `i` score token `i + 1`. Absent when all of them were reported before a
    /// preemption.
    fn prompt_logprobs_request(&self, start: usize, end: usize) -> Option<PromptLogprobsRequest> {
        let num_top = self.spec.prompt_logprobs?;
        let last = end.min(self.num_prompt_tokens() - 1);
        (self.num_prompt_logprobs < last).then(|| PromptLogprobsRequest {
            num_top,
            targets: self.tokens[start + 1..=last].to_vec(),
        })
    }
}
