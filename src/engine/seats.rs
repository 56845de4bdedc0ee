//! The door: how many sequences and prompt tokens may be inside, and whose.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::engine::request::Request;
use crate::engine::stats::EngineLimits;
use crate::scheduler::FairnessId;

/// Of the seats that are free a client may have so many times as many as are left then. So however
/// many come with more than there is room for, some is left for others: one of them gets two thirds
/// of the seats, two get two fifths each. (Choudhury and Hahne, "Dynamic queue length thresholds",
/// 1998.)
const SHARE_OF_FREE: usize = 2;

/// What a request takes.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) client: FairnessId,
    pub(super) num_seqs: usize,
    /// Of its prompt, as long as it waits.
    pub(super) num_tokens: usize,
}

impl Claim {
    pub(super) fn of(request: &Request) -> Self {
        Self {
            client: request.fairness_id.clone(),
            num_seqs: request.n as usize,
            num_tokens: request.prompt.len(),
        }
    }
}

/// Counts live sequences, from `generate` until their end, and closes the door.
#[derive(Debug, Default)]
pub(super) struct Seats {
    taken: Mutex<Taken>,
    is_closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Taken {
    all: Amount,
    /// Who holds anything.
    clients: BTreeMap<FairnessId, Amount>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Amount {
    num_seqs: usize,
    num_waiting_tokens: usize,
}

impl Taken {
    /// Other clients.
    fn num_others(&self, claim: &Claim) -> usize {
        self.clients.keys().filter(|other| **other != claim.client).count()
    }

    /// Takes a claim back, or what is left of it.
    fn give_back(&mut self, claim: &Claim) {
        self.all.num_seqs -= claim.num_seqs;
        self.all.num_waiting_tokens -= claim.num_tokens;
        if let Some(own) = self.clients.get_mut(&claim.client) {
            own.num_seqs -= claim.num_seqs;
            own.num_waiting_tokens -= claim.num_tokens;
            if *own == Amount::default() {
                self.clients.remove(&claim.client);
            }
        }
    }
}

impl Seats {
    /// Takes seats unless that makes too many. A single request that is larger than the house is let
    /// in when the house is empty: it could never enter otherwise. So is one prompt of any length
    /// when no other waits.
    pub(super) fn take(&self, claim: &Claim, limits: &EngineLimits) -> bool {
        let mut taken = self.taken();
        let all = taken.all;
        let own = taken.clients.get(&claim.client).copied().unwrap_or_default();
        let fits = |own: usize, wanted: usize, free: usize| {
            let is_fair = claim.client.is_none() || own + wanted <= SHARE_OF_FREE * free;
            wanted <= free && is_fair
        };
        let num_seats = limits.max_num_seqs + limits.max_queue;
        let free_seats = num_seats.saturating_sub(all.num_seqs);
        let has_seats = all.num_seqs == 0 || fits(own.num_seqs, claim.num_seqs, free_seats);
        let free_tokens = limits.max_queue_tokens.saturating_sub(all.num_waiting_tokens);
        let has_room = all.num_waiting_tokens == 0
            || fits(own.num_waiting_tokens, claim.num_tokens, free_tokens);
        if !has_seats || !has_room {
            return false;
        }
        let Taken { all, clients } = &mut *taken;
        for amount in [all, clients.entry(claim.client.clone()).or_default()] {
            amount.num_seqs += claim.num_seqs;
            amount.num_waiting_tokens += claim.num_tokens;
        }
        true
    }

    /// A request left the queue: its prompt waits no more.
    pub(super) fn started(&self, client: &FairnessId, num_tokens: usize) {
        self.taken().give_back(&Claim { client: client.clone(), num_seqs: 0, num_tokens });
    }

    /// Gives back what is left of a claim, or a part of it.
    pub(super) fn give_back(&self, claim: &Claim) {
        self.taken().give_back(claim);
    }

    /// Prompt tokens that wait.
    pub(super) fn num_waiting_tokens(&self) -> usize {
        self.taken().all.num_waiting_tokens
    }

    /// How many sequences begin before another request of this client at most, as clients take
    /// turns, if so many wait.
    pub(super) fn num_seqs_before(&self, claim: &Claim, num_waiting: usize) -> usize {
        let taken = self.taken();
        let own = taken.clients.get(&claim.client).copied().unwrap_or_default().num_seqs;
        num_waiting.min(own + (own + claim.num_seqs) * taken.num_others(claim))
    }

    /// How many waiting tokens are computed before those of another request of this client at most,
    /// as clients take turns.
    pub(super) fn num_tokens_before(&self, claim: &Claim) -> usize {
        let taken = self.taken();
        let own = taken.clients.get(&claim.client).copied().unwrap_or_default().num_waiting_tokens;
        let in_turns = own + (own + claim.num_tokens) * taken.num_others(claim);
        taken.all.num_waiting_tokens.min(in_turns)
    }

    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// Live sequences.
    pub(super) fn num_taken(&self) -> usize {
        self.taken().all.num_seqs
    }

    /// Nobody is inside and nobody can come in. Whoever takes seats looks at the door afterwards,
    /// so no submission can slip between the two looks.
    pub(super) fn are_closed_and_empty(&self) -> bool {
        self.is_closed() && self.num_taken() == 0
    }

    /// Nothing panics while it holds the counts, so they are right even behind a panic.
    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> EngineLimits {
        EngineLimits {
            max_model_len: 100,
            num_blocks: 10,
            block_size: 16,
            max_num_seqs: 10,
            max_queue: 20,
            max_queue_tokens: 1000,
            target_ttft: None,
            vocab_size: 10,
        }
    }

    fn claim(client: Option<&str>, num_seqs: usize, num_tokens: usize) -> Claim {
        Claim { client: client.map(Into::into), num_seqs, num_tokens }
    }

    /// How many seats a client gets that takes all it can.
    fn flood(seats: &Seats, client: Option<&str>) -> usize {
        std::iter::repeat_with(|| seats.take(&claim(client, 1, 0), &limits()))
            .take_while(|is_in| *is_in)
            .count()
    }

    #[test]
    fn who_has_no_name_may_take_every_seat() {
        let seats = Seats::default();
        assert_eq!(flood(&seats, None), 30);
        assert_eq!(flood(&seats, Some("late")), 0);
    }

    #[test]
    fn something_is_left_for_others() {
        let seats = Seats::default();
        assert_eq!(flood(&seats, Some("a")), 20);
        let b = flood(&seats, Some("b"));
        assert!((6..=7).contains(&b), "{b}");
        assert!(seats.take(&claim(Some("c"), 1, 0), &limits()));
        for _ in 0..20 {
            seats.give_back(&claim(Some("a"), 1, 0));
        }
        assert_eq!(seats.num_taken(), b + 1);
    }

    #[test]
    fn waiting_tokens_are_shared_too() {
        let seats = Seats::default();
        let mut num_taken = 0;
        while seats.take(&claim(Some("a"), 0, 50), &limits()) {
            num_taken += 50;
        }
        assert!((600..=700).contains(&num_taken), "{num_taken}");
        assert!(seats.take(&claim(Some("b"), 1, 200), &limits()));
        seats.started(&Some("b".into()), 200);
        assert!(seats.take(&claim(Some("b"), 1, 200), &limits()));
    }

    #[test]
    fn who_has_little_inside_is_served_before_who_has_much() {
        let seats = Seats::default();
        assert!(seats.take(&claim(Some("a"), 1, 500), &limits()));
        let before = |client, num_tokens| seats.num_tokens_before(&claim(client, 1, num_tokens));
        assert_eq!((before(Some("a"), 10), before(Some("b"), 10)), (500, 10));
        assert_eq!(before(Some("b"), 800), 500, "no more than there is");
        assert_eq!(before(None, 20), 20);
        assert!(seats.take(&claim(Some("b"), 1, 100), &limits()));
        assert_eq!(before(Some("c"), 10), 20, "each of the others as much");
        assert_eq!(before(Some("b"), 10), 100 + 110);
        let begin_before = |client| seats.num_seqs_before(&claim(client, 3, 0), 1000);
        assert_eq!((begin_before(Some("a")), begin_before(Some("c"))), (1 + 4, 6));
        assert_eq!(seats.num_seqs_before(&claim(Some("c"), 3, 0), 5), 5);
    }

    #[test]
    fn waiting_tokens_are_bounded_but_for_one_prompt() {
        let seats = Seats::default();
        assert!(seats.take(&claim(None, 40, 5000), &limits()), "the house is empty");
        assert!(!seats.take(&claim(None, 1, 1), &limits()));
        seats.give_back(&claim(None, 39, 0));
        assert!(!seats.take(&claim(None, 1, 1), &limits()), "tokens");
        seats.started(&None, 5000);
        assert!(seats.take(&claim(None, 1, 900), &limits()));
        assert!(!seats.take(&claim(None, 1, 101), &limits()));
        assert!(seats.take(&claim(None, 1, 100), &limits()));
    }
}
