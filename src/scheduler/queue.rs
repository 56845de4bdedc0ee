//! Sequences that hold no blocks: per client, in order of their ranks.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::scheduler::SeqId;
use crate::scheduler::fairness::FairnessId;
use crate::scheduler::priority::Rank;
use crate::scheduler::sequence::Sequence;

/// A preempted sequence returns to the place its rank gives it: before everyone of its client who
/// came later.
#[derive(Debug, Default)]
pub(super) struct WaitingQueue {
    /// **Invariant:** no client without a sequence.
    clients: BTreeMap<FairnessId, BTreeMap<Rank, Sequence>>,
    len: usize,
}

impl WaitingQueue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn insert(&mut self, seq: Sequence) {
        assert_eq!(seq.num_computed_tokens, 0, "who waits holds nothing");
        let sequences = self.clients.entry(seq.client().clone()).or_default();
        let previous = sequences.insert(seq.rank, seq);
        assert!(previous.is_none(), "ranks are unique");
        self.len += 1;
    }

    pub(super) fn clients(&self) -> impl Iterator<Item = &FairnessId> {
        self.clients.keys()
    }

    /// The client's sequence behind the one with this rank, or its first one.
    pub(super) fn next_after(&self, client: &FairnessId, rank: Option<Rank>) -> Option<&Sequence> {
        let from = rank.map_or(Bound::Unbounded, Bound::Excluded);
        self.clients.get(client)?.range((from, Bound::Unbounded)).next().map(|(_, seq)| seq)
    }

    pub(super) fn get(&self, client: &FairnessId, rank: Rank) -> Option<&Sequence> {
        self.clients.get(client)?.get(&rank)
    }

    pub(super) fn get_mut(&mut self, client: &FairnessId, rank: Rank) -> Option<&mut Sequence> {
        self.clients.get_mut(client)?.get_mut(&rank)
    }

    pub(super) fn remove(&mut self, client: &FairnessId, rank: Rank) -> Option<Sequence> {
        let sequences = self.clients.get_mut(client)?;
        let seq = sequences.remove(&rank)?;
        if sequences.is_empty() {
            self.clients.remove(client);
        }
        self.len -= 1;
        Some(seq)
    }

    pub(super) fn remove_id(&mut self, id: SeqId) -> Option<Sequence> {
        let seq = self.iter().find(|seq| seq.id() == id)?;
        let (client, rank) = (seq.client().clone(), seq.rank);
        self.remove(&client, rank)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.clients.values().flat_map(BTreeMap::values)
    }
}
