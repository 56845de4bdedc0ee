//! How many prompt tokens a step may compute beside sequences that generate.
//!
//! With a target for the time between tokens, the number follows what steps really take: less in
//! proportion when one took too long, a little more when the number was the limit and time was left.
//! Pure: durations come as arguments.

use std::time::Duration;

/// Prompts progress however slow the machine is.
const MIN_TOKENS: f64 = 8.0;
/// Below this part of the target there is room for more.
const ROOM: f64 = 0.9;
/// How much more is tried.
const GROWTH: f64 = 1.1;
/// The most that is given up at once: one step may be slow for a reason of its own.
const MAX_CUT: f64 = 0.5;

/// The number, and what moves it.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefillBudget {
    target: Option<Duration>,
    num_tokens: f64,
    max_tokens: f64,
}

impl PrefillBudget {
    /// Starts at `num_tokens`. Without a target that is what it remains.
    pub(super) fn new(num_tokens: usize, max_tokens: usize, target: Option<Duration>) -> Self {
        Self { target, num_tokens: num_tokens as f64, max_tokens: max_tokens as f64 }
    }

    /// Most prompt tokens of the next step.
    pub(super) fn num_tokens(&self) -> usize {
        self.num_tokens as usize
    }

    /// A step of generating sequences and so many prompt tokens took this long.
    pub(super) fn observe(&mut self, num_prompt_tokens: usize, duration: Duration) {
        let Some(target) = self.target else { return };
        if num_prompt_tokens == 0 {
            return;
        }
        let relation = duration.as_secs_f64() / target.as_secs_f64();
        if 1.0 < relation {
            let used = self.num_tokens.min(num_prompt_tokens as f64);
            let least = (self.num_tokens * MAX_CUT).max(MIN_TOKENS);
            self.num_tokens = (used / relation).max(least);
        } else if relation < ROOM && self.num_tokens() <= num_prompt_tokens {
            self.num_tokens = (self.num_tokens * GROWTH + 1.0).min(self.max_tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the time of a step settles just below its target, whatever a token costs, and follows
    /// when that changes. Method: a machine with a fixed and a proportional cost.
    #[test]
    fn steps_settle_below_their_target() {
        let target = Duration::from_millis(100);
        let mut budget = PrefillBudget::new(96, 1024, Some(target));
        for (fixed_ms, ms_per_token) in [(40.0, 1.0), (20.0, 0.2), (60.0, 2.0), (150.0, 1.0)] {
            let took = |tokens: usize| fixed_ms + ms_per_token * tokens as f64;
            let mut slow = 0;
            for step in 0..200 {
                let tokens = budget.num_tokens();
                let duration = Duration::from_secs_f64(took(tokens) / 1000.0);
                slow += usize::from(50 < step && target * 11 / 10 < duration);
                budget.observe(tokens, duration);
            }
            if fixed_ms < 100.0 {
                let settled = took(budget.num_tokens());
                assert!((70.0..110.0).contains(&settled), "{fixed_ms} {ms_per_token}: {settled}");
                assert!(slow < 8, "{slow} of 150 steps were slow");
            } else {
                assert_eq!(budget.num_tokens(), MIN_TOKENS as usize, "prompts still progress");
            }
        }
    }

    #[test]
    fn what_was_not_the_limit_changes_nothing() {
        let mut budget = PrefillBudget::new(96, 1024, Some(Duration::from_millis(100)));
        budget.observe(10, Duration::from_millis(20));
        budget.observe(0, Duration::from_millis(500));
        assert_eq!(budget.num_tokens(), 96);
        let mut fixed = PrefillBudget::new(96, 1024, None);
        fixed.observe(96, Duration::from_secs(9));
        assert_eq!(fixed.num_tokens(), 96);
    }
}
