//! Sequences that hold no blocks, in order of their ranks.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::scheduler::SeqId;
use crate::scheduler::priority::Rank;
use crate::scheduler::sequence::Sequence;

/// A preempted sequence returns to the place its rank gives it: before everyone who came later.
#[derive(Debug, Default)]
pub(super) struct WaitingQueue(BTreeMap<Rank, Sequence>);

impl WaitingQueue {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn insert(&mut self, seq: Sequence) {
        assert_eq!(seq.num_computed_tokens, 0, "who waits holds nothing");
        let previous = self.0.insert(seq.rank, seq);
        assert!(previous.is_none(), "ranks are unique");
    }

    /// The sequence behind the one with this rank, or the first one.
    pub(super) fn next_after(&mut self, rank: Option<Rank>) -> Option<&mut Sequence> {
        let from = rank.map_or(Bound::Unbounded, Bound::Excluded);
        self.0.range_mut((from, Bound::Unbounded)).next().map(|(_, seq)| seq)
    }

    pub(super) fn remove(&mut self, rank: Rank) -> Option<Sequence> {
        self.0.remove(&rank)
    }

    pub(super) fn remove_id(&mut self, id: SeqId) -> Option<Sequence> {
        let rank = self.iter().find(|seq| seq.id() == id)?.rank;
        self.0.remove(&rank)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.0.values()
    }
}
