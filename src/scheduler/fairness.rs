//! Shares the engine among those on whose behalf sequences run.
//!
//! Every step is charged to the clients whose tokens it computed, by their part of them; the client
//! that was charged least is the next to leave the queue. Whoever comes back after a while counts as
//! having used as much as the one who used least meanwhile: there is nothing to be saved up. This is
//! the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (2024),
//! with the time of a step as its unit of cost.

use std::collections::BTreeMap;
use std::sync::Arc;

/// On whose behalf a sequence runs. All sequences without a name belong together.
pub type FairnessId = Option<Arc<str>>;

/// The unit of service.
pub(super) const PARTS_PER_STEP: u64 = 1 << 20;

/// What every client has used of the engine.
#[derive(Debug, Default)]
pub(super) struct Shares {
    accounts: BTreeMap<FairnessId, Account>,
}

#[derive(Debug, Default)]
struct Account {
    /// Parts of steps.
    used: u64,
    /// Sequences that wait or run.
    num_live: usize,
}

impl Shares {
    /// Another sequence of this client has arrived.
    pub(super) fn join(&mut self, client: &FairnessId) {
        let is_idle = self.accounts.get(client).is_none_or(|account| account.num_live == 0);
        let least = self.live().map(|account| account.used).min();
        let account = self.accounts.entry(client.clone()).or_default();
        if is_idle {
            account.used = account.used.max(least.unwrap_or(0));
        }
        account.num_live += 1;
    }

    /// One of its sequences is gone.
    pub(super) fn leave(&mut self, client: &FairnessId) {
        let account = self.accounts.get_mut(client).expect("who leaves has joined");
        account.num_live -= 1;
        if self.live().next().is_none() {
            // Nobody is left to compare with.
            self.accounts.clear();
        }
    }

    /// A step computed `num_tokens` of its `num_step_tokens` tokens for this client.
    pub(super) fn charge(
        &mut self,
        client: &FairnessId,
        num_tokens: usize,
        num_step_tokens: usize,
    ) {
        if let Some(account) = self.accounts.get_mut(client) {
            account.used += PARTS_PER_STEP * num_tokens as u64 / num_step_tokens.max(1) as u64;
        }
    }

    /// What this client has used, in parts of steps.
    pub(super) fn used(&self, client: &FairnessId) -> u64 {
        self.accounts.get(client).map_or(0, |account| account.used)
    }

    /// Whether more than one client has sequences here.
    pub(super) fn has_rivals(&self) -> bool {
        self.live().nth(1).is_some()
    }

    fn live(&self) -> impl Iterator<Item = &Account> {
        self.accounts.values().filter(|account| 0 < account.num_live)
    }

    /// Sequences of all clients.
    pub(super) fn num_live(&self) -> usize {
        self.accounts.values().map(|account| account.num_live).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_saves_up_and_nobody_loses_a_debt_by_pausing() {
        let (a, b): (FairnessId, FairnessId) = (Some("a".into()), Some("b".into()));
        let mut shares = Shares::default();
        shares.join(&a);
        assert!(!shares.has_rivals());
        shares.charge(&a, 3, 4);
        shares.charge(&a, 4, 4);
        assert_eq!(shares.used(&a), PARTS_PER_STEP / 4 * 7);
        shares.join(&b);
        assert!(shares.has_rivals());
        assert_eq!(shares.used(&b), shares.used(&a), "b begins where a is");
        shares.charge(&b, 1, 1);
        shares.leave(&b);
        shares.join(&b);
        assert_eq!(shares.used(&b), shares.used(&a) + PARTS_PER_STEP, "its debt is remembered");
        shares.leave(&b);
        shares.leave(&a);
        assert_eq!((shares.used(&a), shares.num_live()), (0, 0));
    }
}
