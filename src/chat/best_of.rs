//! `best_of`: which of several candidates are the most likely.

use std::ops::Range;

use crate::engine::event::SampledToken;

/// The log-probability of a candidate so far.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    sum: f64,
    num_tokens: usize,
}

impl Score {
    /// Per token, so that a short answer is not preferred for being short.
    fn mean(self) -> f64 {
        if self.num_tokens == 0 { f64::NEG_INFINITY } else { self.sum / self.num_tokens as f64 }
    }
}

/// Scores of the candidates of a request, all prompts together.
#[derive(Clone, Debug)]
pub struct Scores(Vec<Score>);

impl Scores {
    /// Nothing was said yet.
    pub fn new(num_candidates: usize) -> Self {
        Self(vec![Score::default(); num_candidates])
    }

    /// Takes in more tokens of a candidate; they carry their log-probabilities.
    pub fn add(&mut self, candidate: usize, tokens: &[SampledToken]) {
        let score = &mut self.0[candidate];
        for entry in tokens.iter().filter_map(|token| token.logprobs.as_ref()) {
            score.sum += f64::from(entry.logprob);
            score.num_tokens += 1;
        }
    }

    /// The `n` best of some candidates, best first; of equals the first.
    pub fn best(&self, candidates: Range<usize>, n: usize) -> Vec<usize> {
        let mut ranked: Vec<usize> = candidates.collect();
        ranked.sort_by(|&a, &b| self.0[b].mean().total_cmp(&self.0[a].mean()));
        ranked.truncate(n);
        ranked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::event::TokenLogprobs;

    fn tokens(logprobs: &[f32]) -> Vec<SampledToken> {
        let token = |&logprob: &f32| SampledToken {
            id: 1,
            logprobs: Some(TokenLogprobs { token: 1, logprob, top: Vec::new() }),
        };
        logprobs.iter().map(token).collect()
    }

    #[test]
    fn the_best_per_token_win_within_their_prompt() {
        let mut scores = Scores::new(5);
        scores.add(0, &tokens(&[-1.0]));
        scores.add(1, &tokens(&[-0.1, -0.1, -0.1]));
        scores.add(1, &tokens(&[-0.1; 20]));
        scores.add(2, &tokens(&[-1.0]));
        scores.add(3, &tokens(&[-0.01]));
        assert_eq!(scores.best(0..3, 2), [1, 0]);
        assert_eq!(scores.best(3..5, 1), [3], "nothing said ranks last");
    }
}
