//! Log-probabilities under the model's own distribution.

use crate::sampling::row::{Candidate, Cutoff, Row};
use crate::scheduler::step::TokenLogprobs;
use crate::text::TokenId;

/// The log-probability of `token` and the `num_top` most likely tokens, from unmodified logits.
/// If the row is not finite, the log-probability is NaN and there are no alternatives.
pub fn token_logprobs(logits: &[f32], token: TokenId, num_top: u32) -> TokenLogprobs {
    let mut chunk_max = Vec::new();
    let Ok(row) = Row::scan(logits, &mut chunk_max) else {
        return TokenLogprobs { token, logprob: f32::NAN, top: Vec::new() };
    };
    let log_sum = row.sum_exp(1.0, Cutoff::NONE, &mut Vec::new()).ln();
    let logprob = |logit: f32| (f64::from(logit) - f64::from(row.max()) - log_sum) as f32;
    let mut top = Vec::new();
    if num_top != 0 {
        row.top_k(num_top as usize, &mut top);
        top.sort_unstable_by(Candidate::order);
    }
    TokenLogprobs {
        token,
        logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |&logit| logprob(logit)),
        top: top.into_iter().map(|found| (found.id, logprob(found.logit))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::rng::uniform;

    /// Against a log-softmax in f64, on rows where the largest logits are far from zero.
    #[test]
    fn equals_a_log_softmax_in_f64() {
        for (len, offset) in [(10, 0.0), (1000, 80.0), (151_936, -300.0)] {
            let logits: Vec<f32> =
                (0..len).map(|i| (uniform(1, 0, i) * 30.0 + offset) as f32).collect();
            let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
            let expected = |id: usize| f64::from(logits[id]) - max - sum.ln();
            let mut order: Vec<usize> = (0..len).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));

            let result = token_logprobs(&logits, 3, 5);
            assert_eq!(result.token, 3);
            assert!((f64::from(result.logprob) - expected(3)).abs() < 2e-6);
            assert_eq!(result.top.len(), 5);
            for (&(id, logprob), &expected_id) in result.top.iter().zip(&order) {
                assert_eq!(id as usize, expected_id);
                assert!((f64::from(logprob) - expected(expected_id)).abs() < 2e-6);
            }
        }
    }

    #[test]
    fn edges() {
        assert_eq!(token_logprobs(&[5.0], 0, 20).top, [(0, 0.0)]);
        assert!(token_logprobs(&[1.0, f32::NAN], 0, 1).logprob.is_nan());
        let masked = token_logprobs(&[1.0, f32::NEG_INFINITY], 1, 0);
        assert_eq!((masked.logprob, masked.top.len()), (f32::NEG_INFINITY, 0));
    }
}
