//! Changes to single logits: tokens that may not be drawn, biases, and penalties for tokens that
//! were seen.

use crate::sampling::params::SamplingParams;
use crate::scheduler::step::TokenHistory;
use crate::text::TokenId;

/// Applies a request's penalties to rows of logits.
#[derive(Debug, Default)]
pub(crate) struct Penalties {
    /// How often each token was seen. All zero between calls, so that a call costs as much as the
    /// history is long, not as the vocabulary is large.
    counts: Vec<u32>,
}

impl Penalties {
    /// Penalises the tokens of `history`: repetition over all of them, presence and frequency over
    /// the generated ones. Tokens without a logit are skipped.
    pub(crate) fn apply(
        &mut self,
        logits: &mut [f32],
        params: &SamplingParams,
        history: &TokenHistory,
    ) {
        if self.counts.len() < logits.len() {
            self.counts.resize(logits.len(), 0);
        }
        if params.repetition_penalty != 1.0 {
            self.for_each_seen(&history.tokens, logits, |logit, _| {
                if *logit > 0.0 {
                    *logit /= params.repetition_penalty;
                } else {
                    *logit *= params.repetition_penalty;
                }
            });
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            let start = history.num_prompt_tokens.min(history.tokens.len());
            self.for_each_seen(&history.tokens[start..], logits, |logit, count| {
                *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
            });
        }
    }

    /// Calls `change` once per distinct token, with how often it occurs.
    fn for_each_seen(
        &mut self,
        tokens: &[TokenId],
        logits: &mut [f32],
        change: impl Fn(&mut f32, u32),
    ) {
        let has_logit = |token: &&TokenId| (**token as usize) < logits.len();
        for &token in tokens.iter().filter(has_logit) {
            self.counts[token as usize] += 1;
        }
        for &token in tokens {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            let count = std::mem::take(&mut self.counts[token as usize]);
            if count != 0 {
                change(logit, count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(tokens: &[TokenId], num_prompt_tokens: usize) -> TokenHistory {
        TokenHistory { tokens: tokens.to_vec(), num_prompt_tokens }
    }

    #[test]
    fn repetition_looks_at_prompt_and_output_once_per_token() {
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
        let mut logits = [1.0, -1.0, 4.0, 0.0];
        Penalties::default().apply(&mut logits, &params, &history(&[0, 0, 1, 2, 2, 3], 3));
        assert_eq!(logits, [0.5, -2.0, 2.0, 0.0]);
    }

    #[test]
    fn presence_and_frequency_look_at_the_output_only() {
        let params = SamplingParams {
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..SamplingParams::default()
        };
        let mut logits = [1.0; 4];
        Penalties::default().apply(&mut logits, &params, &history(&[0, 0, 1, 2, 1, 1], 3));
        assert_eq!(logits, [1.0, 0.0, 0.25, 1.0]);
    }

    /// One instance serves rows of different requests and sizes; nothing may leak between them.
    #[test]
    fn nothing_is_left_behind_between_rows() {
        let params = SamplingParams { frequency_penalty: 1.0, ..SamplingParams::default() };
        let mut penalties = Penalties::default();
        for len in [4, 8, 2] {
            let mut logits = vec![0.0; len];
            penalties.apply(&mut logits, &params, &history(&[1, 1, 900], 0));
            assert_eq!(logits[1], -2.0);
            assert!(penalties.counts.iter().all(|&count| count == 0));
        }
    }
}
