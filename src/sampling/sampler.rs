//! Draws one token from one row of logits.
//!
//! The order is vLLM's: forbidden tokens and biases, penalties, the mask of a grammar, temperature,
//! min-p, top-k, top-p, draw. Every filter is a `Cutoff`, and the draw walks what it keeps in order of token ids, so
//! that a tiny change of the logits moves few draws.

use crate::sampling::logprobs::token_logprobs;
use crate::sampling::params::SamplingParams;
use crate::sampling::penalties::Penalties;
use crate::sampling::rng;
use crate::sampling::row::{Candidate, Cutoff, Row, exp};
use crate::scheduler::step::{NonFiniteLogits, SampleRequest, SampledToken};
use crate::text::{TokenBitmask, TokenId};

/// Buffers for drawing tokens; holds nothing of a request between calls.
#[derive(Debug, Default)]
pub struct Sampler {
    penalties: Penalties,
    /// The row as the model made it, when its log-probabilities are wanted.
    raw: Vec<f32>,
    chunk_max: Vec<f32>,
    chunk_sums: Vec<(u32, f32)>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler for rows of any length.
    pub fn new() -> Self {
        Self::default()
    }

    /// Draws a token, out of `mask` if there is one. The logits are changed in place and mean
    /// nothing afterwards.
    ///
    /// # Errors
    /// If the row holds NaN or infinity, or no token that may be drawn.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        request: &SampleRequest,
        mask: Option<&TokenBitmask>,
    ) -> Result<SampledToken, NonFiniteLogits> {
        let params = &*request.params;
        if params.logprobs.is_some() {
            self.raw.clear();
            self.raw.extend_from_slice(logits);
        }
        self.edit(logits, request, mask)?;
        let row = Row::scan(logits, &mut self.chunk_max)?;
        let id = if params.temperature == 0.0 {
            row.argmax()
        } else {
            let share = rng::uniform(params.seed, request.choice, request.num_output_tokens);
            draw(&row, params, share, (&mut self.candidates, &mut self.chunk_sums))
        };
        let logprobs = params.logprobs.map(|num_top| token_logprobs(&self.raw, id, num_top));
        Ok(SampledToken { id, logprobs })
    }

    /// Changes the logits of single tokens.
    fn edit(
        &mut self,
        logits: &mut [f32],
        request: &SampleRequest,
        mask: Option<&TokenBitmask>,
    ) -> Result<(), NonFiniteLogits> {
        // Where a grammar leaves nothing else, its end comes before `min_tokens`.
        let forbidden = match mask {
            Some(mask) if !mask.allows_beside(&request.forbidden) => &[],
            _ => request.forbidden.as_slice(),
        };
        for &token in forbidden {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            // Overwriting it must not hide that the row is broken.
            if logit.is_nan() || *logit == f32::INFINITY {
                return Err(NonFiniteLogits);
            }
            *logit = f32::NEG_INFINITY;
        }
        for &(token, bias) in &request.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if let Some(history) = &request.history {
            self.penalties.apply(logits, &request.params, history);
        }
        mask.map_or(Ok(()), |mask| apply_mask(logits, mask))
    }
}

/// Makes the tokens outside of `mask` impossible, unless one of them shows that the row is broken.
fn apply_mask(logits: &mut [f32], mask: &TokenBitmask) -> Result<(), NonFiniteLogits> {
    // Constants instead of shifts by a variable, which the oldest processors cannot do in vectors.
    const BITS: [u32; 32] = {
        let mut bits = [0; 32];
        let mut bit = 0;
        while bit < 32 {
            bits[bit] = 1 << bit;
            bit += 1;
        }
        bits
    };
    let mut is_broken = false;
    for (index, chunk) in logits.chunks_mut(32).enumerate() {
        let word = mask.word(index);
        if word == u32::MAX {
            continue;
        }
        for (logit, bit) in chunk.iter_mut().zip(BITS) {
            is_broken |= logit.is_nan();
            is_broken |= *logit == f32::INFINITY;
            *logit = if word & bit != 0 { *logit } else { f32::NEG_INFINITY };
        }
    }
    if is_broken { Err(NonFiniteLogits) } else { Ok(()) }
}

/// Draws the token at `share` of the filtered distribution.
fn draw(
    row: &Row<'_>,
    params: &SamplingParams,
    share: f64,
    (candidates, chunk_sums): (&mut Vec<Candidate>, &mut Vec<(u32, f32)>),
) -> TokenId {
    let scale = 1.0 / params.temperature;
    let mut cutoff = Cutoff::NONE;
    if 0.0 < params.min_p {
        // p >= min_p * p_max, in logits.
        cutoff = Cutoff::at(row.max() + params.temperature * params.min_p.ln());
    }
    if let Some(k) = params.top_k {
        cutoff = cutoff.and(row.top_k(k.get() as usize, candidates));
    }
    if params.top_p < 1.0 {
        let target = f64::from(params.top_p) * row.sum_exp(scale, cutoff, chunk_sums);
        cutoff = top_p(row, cutoff, (scale, target), candidates);
    }
    row.sum_exp(scale, cutoff, chunk_sums);
    row.token_at(share, scale, cutoff, chunk_sums)
}

/// Narrows `cutoff` to the first tokens whose weights reach `target`.
fn top_p(
    row: &Row<'_>,
    cutoff: Cutoff,
    (scale, target): (f32, f64),
    candidates: &mut Vec<Candidate>,
) -> Cutoff {
    let weight = |c: &Candidate| f64::from(exp((c.logit - row.max()) * scale));
    // Most distributions reach the target within a few nats of the best token; only flat ones need
    // the whole row.
    for nats in [4.0, 8.0, 16.0, f32::INFINITY] {
        let window = Cutoff::at(row.max() - nats / scale).and(cutoff);
        row.collect(window, candidates);
        let mass: f64 = candidates.iter().map(weight).sum();
        if target <= mass || window == cutoff {
            break;
        }
    }
    // The tokens before `start` are kept, those from `end` on are not needed.
    let (mut start, mut end, mut mass) = (0, candidates.len(), 0.0);
    while 32 < end - start {
        let middle = (end - start) / 2;
        candidates[start..end].select_nth_unstable_by(middle, Candidate::order);
        let half: f64 = candidates[start..start + middle].iter().map(weight).sum();
        if target <= mass + half {
            end = start + middle;
        } else {
            mass += half;
            start += middle;
        }
    }
    candidates[start..end].sort_unstable_by(Candidate::order);
    for candidate in &candidates[start..end] {
        mass += weight(candidate);
        if target <= mass {
            return Cutoff(*candidate);
        }
    }
    // Only rounding keeps the sum of all from reaching the target.
    cutoff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::step::TokenHistory;
    use std::num::NonZeroU32;
    use std::sync::Arc;

    fn request(params: SamplingParams) -> SampleRequest {
        SampleRequest {
            params: Arc::new(params),
            choice: 0,
            num_output_tokens: 0,
            forbidden: Vec::new(),
            history: None,
        }
    }

    fn sample(logits: &[f32], request: &SampleRequest) -> Result<TokenId, NonFiniteLogits> {
        Sampler::new().sample(&mut logits.to_vec(), request, None).map(|token| token.id)
    }

    /// Logits like a model's: a few large ones, a long tail, ties.
    fn model_like(len: usize, seed: u64) -> Vec<f32> {
        let exponential = |i| -(1.0 - rng::uniform(seed, 9, i)).ln();
        (0..len).map(|i| (exponential(i) * 1.2 * 32.0).round() as f32 / 32.0 - 3.0).collect()
    }

    /// The definition, in f64 with a full sort: kept ids with their probabilities.
    fn naive(logits: &[f32], params: &SamplingParams) -> Vec<(TokenId, f64)> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut kept: Vec<(TokenId, f64)> = (0..)
            .zip(logits)
            .map(|(id, &x)| (id, (f64::from(x - max) / f64::from(params.temperature)).exp()))
            .collect();
        kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        kept.retain(|&(_, weight)| f64::from(params.min_p) <= weight * (1.0 + 1e-6));
        kept.truncate(params.top_k.map_or(usize::MAX, |k| k.get() as usize));
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut mass = 0.0;
        let num_kept = kept.iter().position(|(_, weight)| {
            mass += weight / total;
            f64::from(params.top_p) <= mass
        });
        kept.truncate(num_kept.map_or(usize::MAX, |last| last + 1));
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        kept.sort_by_key(|&(id, _)| id);
        kept.into_iter().map(|(id, weight)| (id, weight / total)).collect()
    }

    /// The token at `share` by walking the naive distribution, or `None` too near a boundary for
    /// f32 to tell.
    fn naive_token_at(share: f64, distribution: &[(TokenId, f64)]) -> Option<TokenId> {
        let mut mass = 0.0;
        for &(id, p) in distribution {
            if share < mass + p {
                let clear = mass + 1e-5 < share || mass == 0.0;
                return (clear && share < mass + p - 1e-5).then_some(id);
            }
            mass += p;
        }
        None
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_id_on_a_tie() {
        let greedy = request(SamplingParams { temperature: 0.0, ..SamplingParams::default() });
        assert_eq!(sample(&[1.0, 3.0, 2.0, 3.0], &greedy), Ok(1));
        let mut logits = vec![-5.0; 151_936];
        logits[151_935] = 7.0;
        logits[70_000] = 7.0;
        assert_eq!(sample(&logits, &greedy), Ok(70_000));
    }

    #[test]
    fn draws_equal_the_naive_sampler() {
        let sets = [
            (1.0, None, 1.0, 0.0),
            (0.7, Some(20), 0.8, 0.0),
            (1.0, Some(1), 1.0, 0.0),
            (1.0, Some(50), 1.0, 0.0),
            (2.0, None, 0.99, 0.0),
            (1.0, None, 0.9, 0.0),
            (0.3, None, 0.5, 0.05),
            (1.5, Some(600), 0.95, 0.01),
            (1.0, None, 1.0, 0.2),
        ];
        let mut num_compared = 0;
        for len in [5, 300, 2048, 20_000] {
            for (number, &(temperature, top_k, top_p, min_p)) in sets.iter().enumerate() {
                let logits = model_like(len, number as u64);
                let params = SamplingParams {
                    temperature,
                    top_p,
                    min_p,
                    top_k: top_k.and_then(NonZeroU32::new),
                    seed: 5,
                    ..SamplingParams::default()
                };
                let distribution = naive(&logits, &params);
                let mut request = request(params);
                for position in 0..200 {
                    request.num_output_tokens = position;
                    let share = rng::uniform(5, 0, position);
                    let Some(expected) = naive_token_at(share, &distribution) else { continue };
                    assert_eq!(sample(&logits, &request), Ok(expected), "{len} {number}");
                    num_compared += 1;
                }
            }
        }
        assert!(6_000 < num_compared, "{num_compared}");
    }

    #[test]
    fn tiny_top_p_keeps_exactly_one() {
        let params = SamplingParams { top_p: 1e-6, temperature: 2.0, ..SamplingParams::default() };
        let mut request = request(params);
        let logits = vec![0.5; 1000];
        for position in 0..100 {
            request.num_output_tokens = position;
            assert_eq!(sample(&logits, &request), Ok(0));
        }
    }

    #[test]
    fn flat_rows_keep_the_right_number() {
        // 1000 equal tokens, of which 0.25 keeps the 250 with the lowest ids.
        let params = SamplingParams { top_p: 0.25, ..SamplingParams::default() };
        let mut request = request(params);
        let logits = vec![-2.0; 1000];
        let drawn: Vec<TokenId> = (0..5000)
            .map(|position| {
                request.num_output_tokens = position;
                sample(&logits, &request).unwrap()
            })
            .collect();
        assert_eq!(drawn.iter().max(), Some(&249));
    }

    /// Chi-square of 10^5 draws against the exact distribution of the whole pipeline.
    #[test]
    fn draws_follow_the_distribution() {
        let logits: Vec<f32> = (0..600).map(|i| -((i % 40) as f32) / 6.0).collect();
        for (top_k, top_p) in [(None, 1.0), (Some(30), 1.0), (None, 0.6), (Some(100), 0.9)] {
            let params = SamplingParams {
                temperature: 0.8,
                top_p,
                top_k: top_k.and_then(NonZeroU32::new),
                seed: 77,
                ..SamplingParams::default()
            };
            let distribution = naive(&logits, &params);
            let mut request = request(params);
            let mut sampler = Sampler::new();
            let mut counts = vec![0.0f64; logits.len()];
            let mut row = logits.clone();
            for position in 0..100_000 {
                request.num_output_tokens = position;
                counts[sampler.sample(&mut row, &request, None).unwrap().id as usize] += 1.0;
            }
            let (mut chi2, mut cells, mut total) = (0.0, 0.0, 0.0);
            for &(id, p) in &distribution {
                let (count, expected) = (counts[id as usize], p * 1e5);
                total += count;
                if 5.0 <= expected {
                    chi2 += (count - expected).powi(2) / expected;
                    cells += 1.0;
                }
            }
            assert_eq!(total, 1e5, "a filtered token was drawn");
            // Mean `cells`, variance `2 * cells`: five standard deviations.
            assert!(chi2 < cells + 5.0 * f64::sqrt(2.0 * cells), "{chi2} in {cells} cells");
        }
    }

    #[test]
    fn same_seed_same_draws_whatever_came_before() {
        let logits = model_like(3000, 1);
        let request_at = |seed, choice, position| {
            let params = SamplingParams { seed, ..SamplingParams::default() };
            SampleRequest { choice, num_output_tokens: position, ..request(params) }
        };
        let text = |seed, choice| -> Vec<TokenId> {
            (0..50).map(|i| sample(&logits, &request_at(seed, choice, i)).unwrap()).collect()
        };
        assert_eq!(text(3, 0), text(3, 0));
        assert_ne!(text(3, 0), text(4, 0));
        assert_ne!(text(3, 0), text(3, 1));
        let mut busy = Sampler::new();
        let mut penalised = request(SamplingParams {
            repetition_penalty: 1.5,
            logprobs: Some(2),
            top_p: 0.5,
            ..SamplingParams::default()
        });
        let history = TokenHistory { tokens: vec![1, 2, 3], num_prompt_tokens: 1 };
        penalised.history = Some(history);
        for (i, expected) in text(3, 0).into_iter().enumerate() {
            busy.sample(&mut model_like(900, 2), &penalised, None).unwrap();
            let drawn = busy.sample(&mut logits.clone(), &request_at(3, 0, i), None).unwrap();
            assert_eq!(drawn.id, expected);
        }
    }

    #[test]
    fn logit_bias_forces_and_forbids() {
        let logits = [1.0, 2.0, 3.0, 2.5];
        for temperature in [0.0, 1.0] {
            let bias = |logit_bias| {
                request(SamplingParams { temperature, logit_bias, ..SamplingParams::default() })
            };
            for position in 0..100 {
                let mut forced = bias(vec![(0, 100.0)]);
                forced.num_output_tokens = position;
                assert_eq!(sample(&logits, &forced), Ok(0));
                let mut banned = bias(vec![(2, -100.0)]);
                banned.num_output_tokens = position;
                assert_ne!(sample(&logits, &banned), Ok(2));
            }
        }
    }

    #[test]
    fn forbidden_tokens_are_never_drawn() {
        let mut request = request(SamplingParams::default());
        request.forbidden = vec![0, 2, 99];
        for position in 0..200 {
            request.num_output_tokens = position;
            assert_eq!(sample(&[50.0, 0.0, 50.0], &request), Ok(1));
        }
        request.forbidden = vec![0, 1, 2];
        assert_eq!(sample(&[1.0, 1.0, 1.0], &request), Err(NonFiniteLogits));
    }

    #[test]
    fn rows_that_are_not_finite_fail() {
        let mut request = request(SamplingParams::default());
        request.forbidden = vec![1];
        for bad in [f32::NAN, f32::INFINITY] {
            for position in 0..3 {
                let mut logits = [1.0; 3];
                logits[position] = bad;
                assert_eq!(sample(&logits, &request), Err(NonFiniteLogits));
            }
        }
        assert_eq!(sample(&[f32::NEG_INFINITY; 3], &request), Err(NonFiniteLogits));
    }

    #[test]
    fn logprobs_are_of_the_raw_distribution() {
        let params = SamplingParams {
            temperature: 0.0,
            logit_bias: vec![(0, 100.0)],
            logprobs: Some(2),
            ..SamplingParams::default()
        };
        let logits = [0.0, 1.0, 2.0];
        let token = Sampler::new().sample(&mut logits.clone(), &request(params), None).unwrap();
        assert_eq!(token.id, 0);
        assert_eq!(token.logprobs, Some(token_logprobs(&logits, 0, 2)));
        assert_eq!(token.logprobs.unwrap().top[0].0, 2);
    }
}
