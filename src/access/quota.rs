//! How much a key has left. Pure: every call says what time it is.
//!
//! Requests and tokens are buckets that fill evenly up to what a minute allows, so an idle holder
//! may ask for a whole minute's worth at once. **Invariant:** in any span of time, what is let in
//! is at most one bucket and what flowed into it. Completions are charged when they are over and
//! may leave a debt, which delays the next request.

use std::num::NonZeroU64;
use std::time::Duration;

const NANOS_PER_MINUTE: i128 = 60_000_000_000;
/// Advised when all seats of a holder are taken: nobody knows when one becomes free.
const SEAT_WAIT: Duration = Duration::from_secs(1);

/// What a key may ask for; nothing set means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests.
    pub requests_per_minute: Option<NonZeroU64>,
    /// Tokens, of prompts and completions together.
    pub tokens_per_minute: Option<NonZeroU64>,
    /// Requests at a time.
    pub max_concurrent: Option<NonZeroU64>,
}

/// What runs out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Requests per minute.
    Requests,
    /// Tokens per minute.
    Tokens,
    /// Requests at a time.
    Seats,
}

/// Why a request is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It would be after `wait`.
    Wait {
        /// What has run out.
        resource: Resource,
        /// How much there is of it when there is most.
        limit: u64,
        /// Until there is enough.
        wait: Duration,
    },
    /// It asks for more tokens than there ever are.
    Never {
        /// The most tokens there ever are.
        limit: u64,
    },
}

/// What a holder has of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// What it is of.
    pub resource: Resource,
    /// Per minute.
    pub limit: u64,
    /// What is left.
    pub remaining: u64,
    /// Until all of it is there again.
    pub reset: Duration,
}

/// What one key has left.
#[derive(Clone, Debug)]
pub struct Quota {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    max_concurrent: Option<NonZeroU64>,
    num_inside: u64,
}

impl Quota {
    /// A quota of which nothing was used. `now` is the time since any fixed moment.
    pub fn new(limits: Limits, now: Duration) -> Self {
        Self {
            requests: limits.requests_per_minute.map(|limit| Bucket::full(limit, now)),
            tokens: limits.tokens_per_minute.map(|limit| Bucket::full(limit, now)),
            max_concurrent: limits.max_concurrent,
            num_inside: 0,
        }
    }

    /// Takes other limits. What was used stays used, and who is inside stays inside.
    pub fn set_limits(&mut self, limits: Limits, now: Duration) {
        let resize = |bucket: &mut Option<Bucket>, limit: Option<NonZeroU64>| {
            *bucket = match (bucket.take(), limit) {
                (Some(bucket), Some(limit)) => Some(bucket.resized(limit, now)),
                (None, Some(limit)) => Some(Bucket::full(limit, now)),
                (_, None) => None,
            };
        };
        resize(&mut self.requests, limits.requests_per_minute);
        resize(&mut self.tokens, limits.tokens_per_minute);
        self.max_concurrent = limits.max_concurrent;
    }

    /// Lets a request in; [`Self::leave`] must follow if it may.
    pub fn enter(&mut self, now: Duration) -> Result<(), Refusal> {
        if let Some(limit) = self.max_concurrent.filter(|limit| limit.get() <= self.num_inside) {
            let (resource, limit) = (Resource::Seats, limit.get());
            return Err(Refusal::Wait { resource, limit, wait: SEAT_WAIT });
        }
        if let Some(bucket) = &mut self.requests {
            bucket.take(1, now).map_err(|wait| Refusal::Wait {
                resource: Resource::Requests,
                limit: bucket.limit,
                wait,
            })?;
        }
        self.num_inside += 1;
        Ok(())
    }

    /// A request that was let in is over.
    pub fn leave(&mut self) {
        assert!(0 < self.num_inside, "only who entered leaves");
        self.num_inside -= 1;
    }

    /// Takes the tokens of a prompt.
    pub fn reserve(&mut self, num_tokens: u64, now: Duration) -> Result<(), Refusal> {
        let Some(bucket) = &mut self.tokens else { return Ok(()) };
        if bucket.limit < num_tokens {
            return Err(Refusal::Never { limit: bucket.limit });
        }
        bucket.take(num_tokens, now).map_err(|wait| Refusal::Wait {
            resource: Resource::Tokens,
            limit: bucket.limit,
            wait,
        })
    }

    /// Puts back tokens of a prompt that was not computed.
    pub fn give_back(&mut self, num_tokens: u64, now: Duration) {
        if let Some(bucket) = &mut self.tokens {
            bucket.add(num_tokens, now);
        }
    }

    /// Takes the tokens of a completion, which may leave a debt.
    pub fn charge(&mut self, num_tokens: u64, now: Duration) {
        if let Some(bucket) = &mut self.tokens {
            bucket.charge(num_tokens, now);
        }
    }

    /// What is left of what is limited by the minute.
    pub fn allowances(&self, now: Duration) -> impl Iterator<Item = Allowance> {
        let allowance = |resource, bucket: Option<&Bucket>| {
            bucket.map(|bucket| bucket.allowance(resource, now))
        };
        let requests = allowance(Resource::Requests, self.requests.as_ref());
        let tokens = allowance(Resource::Tokens, self.tokens.as_ref());
        requests.into_iter().chain(tokens)
    }
}

/// What flows in at `limit` per minute, up to `limit`. Counted in parts of which one flows in per
/// nanosecond and unit of the limit, so that nothing is ever rounded.
#[derive(Clone, Debug)]
struct Bucket {
    limit: u64,
    /// Negative while there is a debt.
    level: i128,
    updated: Duration,
}

impl Bucket {
    fn full(limit: NonZeroU64, now: Duration) -> Self {
        Self { limit: limit.get(), level: parts(limit.get()), updated: now }
    }

    fn resized(&self, limit: NonZeroU64, now: Duration) -> Self {
        let used = parts(self.limit) - self.level(now);
        let limit = limit.get();
        Self { limit, level: parts(limit) - used, updated: now }
    }

    fn level(&self, now: Duration) -> i128 {
        // A clock that went back stands still.
        let elapsed = now.saturating_sub(self.updated).as_nanos() as i128;
        let inflow = elapsed.saturating_mul(i128::from(self.limit));
        self.level.saturating_add(inflow).min(parts(self.limit))
    }

    fn refill(&mut self, now: Duration) {
        self.level = self.level(now);
        self.updated = self.updated.max(now);
    }

    /// Takes `amount`, or says how long until there is that much.
    fn take(&mut self, amount: u64, now: Duration) -> Result<(), Duration> {
        self.refill(now);
        if self.level < parts(amount) {
            return Err(self.time_for(parts(amount) - self.level));
        }
        self.level -= parts(amount);
        Ok(())
    }

    fn charge(&mut self, amount: u64, now: Duration) {
        self.refill(now);
        self.level = self.level.saturating_sub(parts(amount));
    }

    fn add(&mut self, amount: u64, now: Duration) {
        self.refill(now);
        self.level = (self.level + parts(amount)).min(parts(self.limit));
    }

    /// How long until this much has flowed in, rounded up.
    fn time_for(&self, missing: i128) -> Duration {
        let limit = i128::from(self.limit);
        let nanos = missing / limit + i128::from(missing % limit != 0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn allowance(&self, resource: Resource, now: Duration) -> Allowance {
        let level = self.level(now);
        let reset = self.time_for(parts(self.limit) - level);
        let remaining = level.max(0) / NANOS_PER_MINUTE;
        Allowance { resource, limit: self.limit, remaining: remaining as u64, reset }
    }
}

fn parts(amount: u64) -> i128 {
    i128::from(amount) * NANOS_PER_MINUTE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NANO: Duration = Duration::from_nanos(1);
    const SECOND: Duration = Duration::from_secs(1);

    fn limits(requests: u64, tokens: u64, concurrent: u64) -> Limits {
        Limits {
            requests_per_minute: NonZeroU64::new(requests),
            tokens_per_minute: NonZeroU64::new(tokens),
            max_concurrent: NonZeroU64::new(concurrent),
        }
    }

    #[test]
    fn a_minutes_worth_at_once_and_then_one_by_one() {
        let mut quota = Quota::new(limits(6, 0, 0), Duration::ZERO);
        for _ in 0..6 {
            quota.enter(Duration::ZERO).unwrap();
        }
        let wait = 10 * SECOND;
        let refusal = Refusal::Wait { resource: Resource::Requests, limit: 6, wait };
        assert_eq!(quota.enter(Duration::ZERO), Err(refusal));
        // Being refused costs nothing, and who waits as long as he was told is let in.
        assert!(quota.enter(wait.saturating_sub(NANO)).is_err());
        assert_eq!(quota.enter(wait), Ok(()));
        assert!(quota.enter(wait).is_err());
    }

    #[test]
    fn completions_leave_a_debt_that_time_pays() {
        let mut quota = Quota::new(limits(0, 60, 0), Duration::ZERO);
        quota.reserve(50, Duration::ZERO).unwrap();
        quota.charge(40, Duration::ZERO);
        let allowances: Vec<Allowance> = quota.allowances(Duration::ZERO).collect();
        let (resource, limit, remaining) = (Resource::Tokens, 60, 0);
        assert_eq!(allowances, [Allowance { resource, limit, remaining, reset: 90 * SECOND }]);
        let refusal = Refusal::Wait { resource, limit, wait: 31 * SECOND };
        assert_eq!(quota.reserve(1, Duration::ZERO), Err(refusal));
        assert_eq!(quota.reserve(1, 31 * SECOND), Ok(()));
        quota.give_back(1, 31 * SECOND);
        assert_eq!(quota.reserve(60, 90 * SECOND), Ok(()));
    }

    #[test]
    fn what_can_never_fit_is_not_told_to_wait() {
        let mut quota = Quota::new(limits(0, 60, 0), Duration::ZERO);
        assert_eq!(quota.reserve(61, Duration::ZERO), Err(Refusal::Never { limit: 60 }));
        assert_eq!(quota.reserve(60, Duration::ZERO), Ok(()));
        let mut free = Quota::new(Limits::default(), Duration::ZERO);
        assert_eq!(free.reserve(u64::MAX, Duration::ZERO), Ok(()));
        assert_eq!(free.allowances(Duration::ZERO).count(), 0);
    }

    #[test]
    fn other_limits_keep_what_was_used() {
        let mut quota = Quota::new(limits(0, 100, 2), Duration::ZERO);
        quota.enter(Duration::ZERO).unwrap();
        quota.enter(Duration::ZERO).unwrap();
        quota.reserve(90, Duration::ZERO).unwrap();
        quota.set_limits(limits(1, 200, 1), Duration::ZERO);
        assert!(quota.reserve(111, Duration::ZERO).is_err());
        quota.reserve(110, Duration::ZERO).unwrap();
        quota.leave();
        assert!(matches!(
            quota.enter(Duration::ZERO),
            Err(Refusal::Wait { resource: Resource::Seats, .. })
        ));
        quota.leave();
        quota.enter(Duration::ZERO).unwrap();
    }

    #[test]
    fn the_largest_limits_for_the_longest_time_do_not_overflow() {
        let mut quota = Quota::new(limits(u64::MAX, u64::MAX, 0), Duration::ZERO);
        for _ in 0..3 {
            quota.charge(u64::MAX, Duration::ZERO);
        }
        assert!(quota.reserve(u64::MAX, Duration::ZERO).is_err());
        assert_eq!(quota.reserve(u64::MAX, Duration::MAX), Ok(()));
    }

    proptest! {
        /// Goal: no schedule gets more than the limits say. Method: try requests of random sizes
        /// at random times, and count what was let in within every span of time.
        #[test]
        fn no_span_of_time_lets_in_more_than_a_bucket_and_its_inflow(
            per_minute in 1u64..500,
            tries in prop::collection::vec((0u64..20_000, 1u64..100), 1..120),
        ) {
            let mut quota = Quota::new(limits(0, per_minute, 0), Duration::ZERO);
            let mut now = Duration::ZERO;
            let mut taken: Vec<(Duration, u64)> = Vec::new();
            for (pause, num_tokens) in tries {
                now += Duration::from_millis(pause);
                match quota.reserve(num_tokens, now) {
                    Ok(()) => taken.push((now, num_tokens)),
                    Err(Refusal::Never { .. }) => prop_assert!(per_minute < num_tokens),
                    Err(Refusal::Wait { wait, .. }) => {
                        // The advice is exact: one nanosecond less is too early.
                        let mut later = quota.clone();
                        prop_assert!(
                            later.reserve(num_tokens, (now + wait).saturating_sub(NANO)).is_err()
                        );
                        prop_assert!(later.reserve(num_tokens, now + wait).is_ok());
                    }
                }
            }
            for (first, (start, _)) in taken.iter().enumerate() {
                let mut sum = 0;
                for (end, num_tokens) in &taken[first..] {
                    sum += num_tokens;
                    let span = end.saturating_sub(*start).as_nanos();
                    let inflow = u128::from(per_minute) * span;
                    let most = u128::from(per_minute) * NANOS_PER_MINUTE as u128 + inflow;
                    prop_assert!(u128::from(sum) * NANOS_PER_MINUTE as u128 <= most);
                }
            }
        }

        /// Completions delay, but over time all that was computed fits the limit too.
        #[test]
        fn with_debts_the_long_run_keeps_the_limit(
            per_minute in 60u64..500,
            completions in prop::collection::vec(0u64..300, 1..60),
        ) {
            let mut quota = Quota::new(limits(0, per_minute, 0), Duration::ZERO);
            let mut now = Duration::ZERO;
            let mut sum = 0u64;
            for completion in completions {
                let refused = quota.reserve(10, now);
                if let Err(Refusal::Wait { wait, .. }) = refused {
                    now += wait;
                    prop_assert_eq!(quota.reserve(10, now), Ok(()));
                }
                sum += 10;
                // When a request enters, everything before it is paid for.
                let most = u128::from(per_minute) * (NANOS_PER_MINUTE as u128 + now.as_nanos());
                prop_assert!(u128::from(sum) * NANOS_PER_MINUTE as u128 <= most);
                quota.charge(completion, now);
                sum += completion;
            }
        }

        #[test]
        fn seats_are_counted_exactly(
            max in 1u64..8,
            steps in prop::collection::vec(any::<bool>(), 1..200),
        ) {
            let mut quota = Quota::new(limits(0, 0, max), Duration::ZERO);
            let mut inside = 0;
            for enters in steps {
                if enters {
                    let entered = quota.enter(Duration::ZERO).is_ok();
                    prop_assert_eq!(entered, inside < max);
                    inside += u64::from(entered);
                } else if 0 < inside {
                    quota.leave();
                    inside -= 1;
                }
            }
            prop_assert_eq!(quota.num_inside, inside);
        }
    }
}
