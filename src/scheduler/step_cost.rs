//! How long a step takes that only generates: a fixed part and one for each token. Pure: durations
//! come as arguments.
//!
//! A line through the latest steps by least squares, drawn towards an expectation as long as all
//! of them have about as many tokens.

use std::time::Duration;

/// How much an observation counts after a later one.
const FADING: f64 = 0.97;
/// The part of a step that one more token is expected to cost.
const EXPECTED_SHARE: f64 = 0.1;
/// How much that expectation counts, in squared tokens.
const EXPECTATION_WEIGHT: f64 = 2.0;
/// What takes so many times longer than expected has another reason.
const OUTLIER: f64 = 3.0;

/// Sums over the observed steps, the latest counting most.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StepCost {
    weight: f64,
    tokens: f64,
    seconds: f64,
    tokens_tokens: f64,
    tokens_seconds: f64,
}

/// Durations in any unit: only their relation counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cost {
    /// Of a step, whatever it computes.
    pub(super) fixed: f64,
    /// Of each of its tokens.
    pub(super) per_token: f64,
}

impl Cost {
    /// Of a whole step.
    pub(super) fn of(self, num_tokens: usize) -> f64 {
        self.fixed + self.per_token * num_tokens as f64
    }
}

impl StepCost {
    /// A step of so many tokens took this long.
    pub(super) fn observe(&mut self, num_tokens: usize, duration: Duration) {
        let tokens = num_tokens as f64;
        let mut seconds = duration.as_secs_f64();
        if 0.0 < self.weight {
            seconds = seconds.min(self.line().of(num_tokens) * OUTLIER);
        }
        for (sum, value) in [
            (&mut self.weight, 1.0),
            (&mut self.tokens, tokens),
            (&mut self.seconds, seconds),
            (&mut self.tokens_tokens, tokens * tokens),
            (&mut self.tokens_seconds, tokens * seconds),
        ] {
            *sum = *sum * FADING + value;
        }
    }

    /// Whether costs are in seconds: some step was observed.
    pub(super) fn is_known(&self) -> bool {
        0.0 < self.seconds
    }

    /// What a step is expected to cost.
    pub(super) fn line(&self) -> Cost {
        if !self.is_known() {
            return Cost { fixed: 1.0, per_token: EXPECTED_SHARE };
        }
        let (tokens, seconds) = (self.tokens / self.weight, self.seconds / self.weight);
        let variance = self.tokens_tokens / self.weight - tokens * tokens;
        let covariance = self.tokens_seconds / self.weight - tokens * seconds;
        let expected = EXPECTED_SHARE * seconds / (1.0 + EXPECTED_SHARE * (tokens - 1.0));
        let slope = (self.weight * covariance + EXPECTATION_WEIGHT * expected)
            / (self.weight * variance + EXPECTATION_WEIGHT);
        let per_token = slope.clamp(0.0, seconds / tokens);
        Cost { fixed: seconds - per_token * tokens, per_token }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(cost: Cost) -> f64 {
        cost.per_token / cost.of(1)
    }

    #[test]
    fn a_line_is_found_where_steps_differ_and_expected_where_they_do_not() {
        let mut cost = StepCost::default();
        assert!((share(cost.line()) - 0.1 / 1.1).abs() < 1e-9);
        let took = |tokens: usize| Duration::from_secs_f64(0.02 + 0.005 * tokens as f64);
        for _ in 0..50 {
            cost.observe(1, took(1));
        }
        assert!((cost.line().of(1) - 0.025).abs() < 1e-9);
        assert!((share(cost.line()) - EXPECTED_SHARE).abs() < 1e-3, "{}", share(cost.line()));
        for step in 0..50 {
            cost.observe(1 + step % 5, took(1 + step % 5));
        }
        let Cost { fixed, per_token } = cost.line();
        assert!(
            (fixed - 0.02).abs() < 2e-3 && (per_token - 0.005).abs() < 5e-4,
            "{:?}",
            cost.line()
        );
    }

    #[test]
    fn a_step_that_was_interrupted_spoils_nothing() {
        let mut cost = StepCost::default();
        for step in 0..60 {
            let tokens = 1 + step % 4;
            let interrupted = if step == 55 { 30.0 } else { 0.0 };
            cost.observe(
                tokens,
                Duration::from_secs_f64(0.02 + 0.002 * tokens as f64 + interrupted),
            );
        }
        assert!(cost.line().of(1) < 0.03, "{:?}", cost.line());
        assert!((0.0..0.02).contains(&cost.line().per_token), "{:?}", cost.line());
    }
}
