//! Sequences that hold no blocks, in order of arrival.

use std::collections::BTreeMap;

use crate::scheduler::SeqId;
use crate::scheduler::sequence::Sequence;

/// A preempted sequence returns to the place its arrival gives it: before everyone who came later.
#[derive(Debug, Default)]
pub(super) struct WaitingQueue(BTreeMap<u64, Sequence>);

impl WaitingQueue {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn insert(&mut self, seq: Sequence) {
        assert_eq!(seq.num_computed_tokens, 0, "who waits holds nothing");
        let previous = self.0.insert(seq.arrival, seq);
        assert!(previous.is_none(), "arrivals are unique");
    }

    /// The first sequence that arrived at `arrival` or later.
    pub(super) fn next_from(&mut self, arrival: u64) -> Option<&mut Sequence> {
        self.0.range_mut(arrival..).next().map(|(_, seq)| seq)
    }

    pub(super) fn remove(&mut self, arrival: u64) -> Option<Sequence> {
        self.0.remove(&arrival)
    }

    pub(super) fn remove_id(&mut self, id: SeqId) -> Option<Sequence> {
        let arrival = self.iter().find(|seq| seq.id() == id)?.arrival;
        self.0.remove(&arrival)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.0.values()
    }
}
