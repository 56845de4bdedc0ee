//! What the scheduler asks of a device and what it gets back: plain data both ways.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::kv::BlockTable;
use crate::sampling::params::SamplingParams;
pub use crate::scheduler::Adapter;
use crate::scheduler::SeqId;
use crate::text::{TokenBitmask, TokenId};

/// What the runner must compute in one step. Plain data; cheap to log and to compare in tests.
#[derive(Clone, Debug, Default)]
pub struct SchedulerOutput {
    /// The sequences of this step, each at most once.
    pub scheduled: Vec<ScheduledSeq>,
    /// Sequences whose blocks were taken back in this step.
    pub preempted: Vec<SeqId>,
}

impl SchedulerOutput {
    /// Whether the runner began with it during the step before.
    pub fn is_begun(&self) -> bool {
        self.scheduled.first().is_some_and(|seq| seq.drawn_by.is_some())
    }

    /// Puts in the tokens that the step before has drawn. Where that failed nothing comes of this
    /// step either.
    pub fn fill_drawn(&mut self, outputs: &[SeqOutput]) {
        for seq in &mut self.scheduled {
            let drawn =
                seq.drawn_by.and_then(|index| outputs[index].sampled.as_ref()?.as_ref().ok());
            seq.tokens[0] = drawn.map_or(seq.tokens[0], |token| token.id);
        }
    }
}

/// A run of consecutive tokens of one sequence whose keys and values the step computes.
#[derive(Clone, Debug)]
pub struct ScheduledSeq {
    /// Whose tokens.
    pub id: SeqId,
    /// Position of the first token of `tokens` in its sequence.
    pub start: usize,
    /// The tokens to compute; never empty.
    pub tokens: Vec<TokenId>,
    /// How many of them, the last ones, are guesses of what will be drawn. They stand behind the
    /// sequence's last token.
    pub num_drafts: usize,
    /// The token before the first, where a model that guesses may not have computed it yet.
    pub token_before: Option<TokenId>,
    /// Where keys and values of positions `0..end()` live.
    pub blocks: BlockTable,
    /// Where the rotary table has the sequence's position zero: behind the trained positions if the
    /// sequence may become longer than those.
    pub rope_start: usize,
    /// Present when the step reaches the sequence's last token, whose logits are then sampled.
    pub sample: Option<SampleRequest>,
    /// Present when log-probabilities of prompt tokens are wanted.
    pub prompt_logprobs: Option<PromptLogprobsRequest>,
    /// Present when hidden states are wanted instead of logits.
    pub pool: Option<PoolRequest>,
    /// What the tokens are computed with beside the model.
    pub adapter: Option<Adapter>,
    /// Present when the runner begins with the step while the one before is still drawing its only
    /// token: the place of the sequence there. Until it is drawn `tokens` holds [`UNDRAWN`], and
    /// `sample` is absent.
    pub drawn_by: Option<usize>,
}

/// Stands where a token will be.
pub const UNDRAWN: TokenId = 0;

impl ScheduledSeq {
    /// One past the last scheduled position, guesses included.
    pub fn end(&self) -> usize {
        self.start + self.tokens.len()
    }

    /// How many of the tokens are no guesses.
    pub fn num_known(&self) -> usize {
        self.tokens.len() - self.num_drafts
    }

    /// The guesses.
    pub fn drafts(&self) -> &[TokenId] {
        &self.tokens[self.num_known()..]
    }

    /// How many guesses came true: each is what was drawn before it.
    fn num_verified(&self, first: Option<&Draw>, behind_drafts: &[Draw]) -> usize {
        let drawn = first.into_iter().chain(behind_drafts);
        let is_true = |(draft, drawn): &(&TokenId, &Draw)| {
            drawn.as_ref().is_ok_and(|drawn| drawn.id == **draft)
        };
        self.drafts().iter().zip(drawn).take_while(is_true).count()
    }
}

/// How to draw the next token of a sequence.
#[derive(Clone, Debug)]
pub struct SampleRequest {
    /// The request's parameters.
    pub params: Arc<SamplingParams>,
    /// Which of the request's `n` choices this is; part of the random counter.
    pub choice: u32,
    /// How many tokens were generated before this one; part of the random counter.
    pub num_output_tokens: usize,
    /// Tokens that may not be drawn yet (`min_tokens`); usually empty.
    pub forbidden: Vec<TokenId>,
    /// All tokens so far, present when [`SamplingParams::needs_history`].
    pub history: Option<TokenHistory>,
}

impl SampleRequest {
    /// How to draw the token after these, if they are what is drawn next.
    #[must_use]
    pub fn after(&self, drafts: &[TokenId]) -> Self {
        let mut request = self.clone();
        request.num_output_tokens += drafts.len();
        if self.params.min_tokens <= request.num_output_tokens {
            request.forbidden.clear();
        }
        if let Some(history) = &mut request.history {
            history.tokens.extend(drafts);
        }
        request
    }
}

/// The tokens a penalty looks at.
#[derive(Clone, Debug)]
pub struct TokenHistory {
    /// Prompt and generated tokens.
    pub tokens: Vec<TokenId>,
    /// How many of them belong to the prompt.
    pub num_prompt_tokens: usize,
}

/// Log-probabilities wanted for prompt tokens.
#[derive(Clone, Debug)]
pub struct PromptLogprobsRequest {
    /// How many of the most likely tokens to report beside the given one.
    pub num_top: u32,
    /// The prompt tokens at positions `start + 1 ..= end()`, as far as they belong to the prompt:
    /// entry `i` is scored by the logits of scheduled token `i`.
    pub targets: Vec<TokenId>,
}

/// Which final hidden states an embedding is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over all tokens.
    Mean,
    /// The last token's.
    Last,
}

/// Hidden states to add up. The sum so far travels with the request, so that a runner keeps
/// nothing between steps, and a prompt in pieces is added up in the same order as a whole one.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolRequest {
    /// Which of the scheduled tokens count, from the first; never empty.
    pub rows: Range<usize>,
    /// The sum over earlier tokens; empty when there are none.
    pub sum: Vec<f64>,
}

/// A token's log-probability and the most likely tokens at its position.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token this is about.
    pub token: TokenId,
    /// Its natural-log probability under the model's own distribution (before temperature).
    pub logprob: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub id: TokenId,
    /// Present when the request asked for log-probabilities.
    pub logprobs: Option<TokenLogprobs>,
}

/// The logits of a row were not finite; only its request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model produced a logit that is not a finite number")]
pub struct NonFiniteLogits;

/// Why a sequence got no token; only its request fails.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// There is nothing to draw from.
    #[error(transparent)]
    NonFiniteLogits(#[from] NonFiniteLogits),
    /// Its grammar could not be followed.
    #[error("the grammar failed: {0}")]
    Grammar(String),
}

/// What follows a drawn token without any choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Continuation {
    /// The tokens that must come next.
    pub forced: Vec<TokenId>,
    /// Whether the sequence is complete after them.
    pub is_complete: bool,
}

/// What came of drawing a token.
pub type Draw = Result<SampledToken, SampleError>;

/// What one [`ScheduledSeq`] yielded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SeqOutput {
    /// Present exactly when [`ScheduledSeq::sample`] was.
    pub sampled: Option<Draw>,
    /// The tokens drawn behind those guesses that came true, in order.
    pub verified: Vec<Draw>,
    /// One entry per target of [`ScheduledSeq::prompt_logprobs`].
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// What the sequence's grammar adds to the drawn token. The runner leaves it empty.
    pub continuation: Continuation,
    /// The sum of [`ScheduledSeq::pool`] and the rows it names; present exactly when that was.
    pub pooled: Option<Vec<f64>>,
}

impl SeqOutput {
    /// Adds what was drawn behind the next row.
    pub fn push_draw(&mut self, draw: Draw) {
        match self.sampled {
            None => self.sampled = Some(draw),
            Some(_) => self.verified.push(draw),
        }
    }

    /// Drops what was drawn behind guesses that did not come true.
    pub fn keep_verified(&mut self, seq: &ScheduledSeq) {
        let num_verified = seq.num_verified(self.sampled.as_ref(), &self.verified);
        self.verified.truncate(num_verified);
    }
}

/// The tokens that each sequence may draw; one that is absent may draw any.
pub type TokenMasks = BTreeMap<SeqId, TokenBitmask>;

/// All that the engine knows about tensors.
///
/// Two calls, so that work of the CPU can happen between them while a device computes.
pub trait Runner {
    /// Why a step failed. The cache's content is in doubt after an error.
    type Error: std::fmt::Display;

    /// Starts computing keys, values and the wanted logits of a step.
    fn launch(&mut self, step: &SchedulerOutput) -> Result<(), Self::Error>;

    /// Finishes the launched step: one entry per scheduled sequence, in order. No sequence draws a
    /// token outside of its mask.
    fn sample(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, Self::Error>;

    /// [`Runner::sample`], and [`Runner::launch`] of the step after it, whose tokens `step` draws. A
    /// device goes on computing while the drawn tokens are recorded.
    fn sample_ahead(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
        next: &SchedulerOutput,
    ) -> Result<Vec<SeqOutput>, Self::Error> {
        sample_then_launch(self, step, masks, next)
    }

    /// Does something else with the threads that compute, which have nothing to do between the calls
    /// of a step: [`parallel_for`](crate::device::threads::parallel_for) finds them.
    fn with_threads(&self, work: &mut dyn FnMut()) {
        work();
    }

    /// Whether a launched step is computed by itself, so that it pays to begin the next one early.
    fn is_asynchronous(&self) -> bool {
        false
    }

    /// Blocks that the cache really has, if they became fewer than was planned.
    fn num_blocks(&self) -> Option<u32> {
        None
    }

    /// Whether the last error left the device unusable. The engine ends then, so that whoever
    /// watches over the process starts it anew.
    fn is_broken(&self) -> bool {
        false
    }
}

/// What [`Runner::sample_ahead`] comes to, one after the other.
pub fn sample_then_launch<R: Runner + ?Sized>(
    runner: &mut R,
    step: &SchedulerOutput,
    masks: &TokenMasks,
    next: &SchedulerOutput,
) -> Result<Vec<SeqOutput>, R::Error> {
    let outputs = runner.sample(step, masks)?;
    let mut next = next.clone();
    next.fill_drawn(&outputs);
    runner.launch(&next)?;
    Ok(outputs)
}
