//! Who goes first. Pure.

/// How urgent a sequence is; lower is earlier, as in vLLM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Priority(i32);

impl Priority {
    /// OpenAI's `flex`: cheap, and late when there is much to do.
    pub const FLEX: Self = Self(10);
    /// OpenAI's `priority`.
    pub const URGENT: Self = Self(-10);

    const LIMIT: i32 = 100;

    /// A number beyond 100 on either side counts as 100.
    pub fn new(number: i64) -> Self {
        let limit = i64::from(Self::LIMIT);
        Self(number.clamp(-limit, limit) as i32)
    }

    /// This, but no more urgent than `bound`.
    #[must_use]
    pub fn at_most(self, bound: Self) -> Self {
        Self(self.0.max(bound.0))
    }

    /// How many steps later than the most urgent one it counts as having arrived.
    pub(super) fn delay(self, steps_per_priority: u64) -> u64 {
        u64::from((self.0 + Self::LIMIT).unsigned_abs()) * steps_per_priority
    }

    /// The number, within its limits.
    pub fn number(self) -> i32 {
        self.0
    }
}

/// A sequence's place in the queue and among the running, for life: by `step`, then `arrival`.
///
/// Priority is an advantage in steps: a sequence counts as if it had arrived earlier or later.
/// That is ageing too, because whoever comes much later comes behind, however urgent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// The step it counts as having arrived in, moved so that it is never negative.
    pub(super) step: u64,
    /// Order of arrival; unique.
    pub(super) arrival: u64,
}

impl Rank {
    pub(super) fn new(
        priority: Priority,
        (step, arrival): (u64, u64),
        steps_per_priority: u64,
    ) -> Self {
        Self { step: step + priority.delay(steps_per_priority), arrival }
    }

    /// The order of prefills: fewer tokens first, but everyone who arrives a step later starts
    /// `ageing_tokens_per_step` tokens behind. So only finitely many can overtake a long prompt.
    pub(super) fn prefill_deadline(self, num_tokens: usize, ageing_tokens_per_step: usize) -> u64 {
        let waited = self.step.saturating_mul(ageing_tokens_per_step as u64);
        waited.saturating_add(num_tokens as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urgent_ones_overtake_for_a_while() {
        let usual = Rank::new(Priority::default(), (1000, 1), 100);
        assert!(usual < Rank::new(Priority::default(), (1000, 2), 100));
        assert!(Rank::new(Priority::URGENT, (1999, 2), 100) < usual);
        assert!(usual < Rank::new(Priority::URGENT, (2000, 2), 100));
        assert!(usual < Rank::new(Priority::FLEX, (1, 0), 100));
        assert!(
            Rank::new(Priority::FLEX, (1, 0), 100) < Rank::new(Priority::default(), (1002, 2), 100)
        );
        assert_eq!(Priority::new(i64::MIN), Priority::new(-100));
    }
}
