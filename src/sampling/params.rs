//! How a request wants its tokens drawn. Pure data, checked once when it is built.

use std::num::NonZeroU32;

use crate::text::TokenId;

/// The sampling parameters of one request, already validated: nothing later re-checks them.
///
/// Field names and meanings are those of vLLM's `SamplingParams`. Build one with
/// [`SamplingParams::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; zero means greedy. In `0.0..=2.0`.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this share. In `(0.0, 1.0]`.
    pub top_p: f32,
    /// Keep this many of the most likely tokens; `None` keeps all.
    pub top_k: Option<NonZeroU32>,
    /// Drop tokens less likely than this share of the most likely one. In `0.0..=1.0`.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of every token seen (CTRL paper). Positive.
    pub repetition_penalty: f32,
    /// Subtracted once from every token generated so far. In `-2.0..=2.0`.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence from every token generated so far. In `-2.0..=2.0`.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens, in `-100.0..=100.0`. Sorted, without duplicates.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the counter-based generator: same seed, same position, same draw.
    pub seed: u64,
    /// Report the log-probability of each sampled token and this many of the most likely ones.
    pub logprobs: Option<u32>,
    /// The same for every token of the prompt after the first.
    pub prompt_logprobs: Option<u32>,
    /// Stop tokens cannot be drawn before this many tokens were generated.
    pub min_tokens: usize,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
            min_tokens: 0,
        }
    }
}

impl SamplingParams {
    /// Whether drawing needs to know which tokens the sequence holds.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}
