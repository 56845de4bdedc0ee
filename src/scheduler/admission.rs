//! Who leaves the queue.

use std::collections::BTreeMap;

use crate::kv::manager::CachedPrefix;
use crate::kv::{BlockId, KvCacheManager};
use crate::scheduler::fairness::{FairnessId, PARTS_PER_STEP};
use crate::scheduler::priority::Rank;
use crate::scheduler::sequence::Sequence;
use crate::scheduler::snapshot::WaitReason;
use crate::scheduler::{Scheduler, SeqEvent, SeqId};

/// What happened while one step's sequences were let in.
#[derive(Default)]
struct Turns {
    /// How many of a client's sequences were let in.
    num_admitted: BTreeMap<FairnessId, u64>,
    /// The client's last sequence that was passed over.
    passed_over: BTreeMap<FairnessId, Rank>,
}

impl Scheduler {
    /// Moves sequences from the queue to the running ones: the client's that has used least, and of
    /// its own the first by rank. Nobody overtakes a sequence that lacks room; anybody may overtake
    /// one that waits for a prefix. Returns the sequences that had to make room.
    pub(super) fn admit_waiting(&mut self) -> Vec<SeqId> {
        let mut displaced = Vec::new();
        let mut turns = Turns::default();
        while let Some((client, rank)) = self.next_in_turn(&turns) {
            let seq = self.waiting.get_mut(&client, rank).expect("it was just seen");
            if displaced.contains(&seq.id()) {
                turns.passed_over.insert(client, rank);
                continue;
            }
            let max_cached = seq.max_cached_tokens();
            let mut prefix = self.kv.find_cached_prefix(&mut seq.blocks, &seq.tokens, max_cached);
            if is_being_computed(&self.running, seq, prefix, self.kv.block_size()) {
                seq.passed_over = Some((self.num_steps, WaitReason::Prefix));
                turns.passed_over.insert(client, rank);
                continue;
            }
            let is_full = self.running.len() == self.config.max_num_seqs;
            if is_full || !has_room(&self.kv, self.running.iter(), seq, prefix, 0) {
                seq.passed_over = Some((self.num_steps, WaitReason::Blocks));
                let Some(victims) = self.victims_for(&client, rank, prefix) else { break };
                displaced.extend(victims.into_iter().map(|index| self.preempt(index)));
                let seq = self.waiting.get_mut(&client, rank).expect("it still waits");
                prefix = self.kv.find_cached_prefix(&mut seq.blocks, &seq.tokens, max_cached);
                // What was freed may be the prefix itself, which is needed now.
                if !has_room(&self.kv, self.running.iter(), seq, prefix, 0) {
                    break;
                }
            }
            let seq = self.waiting.remove(&client, rank).expect("it was just seen");
            self.admit(seq, prefix);
            *turns.num_admitted.entry(client).or_default() += 1;
        }
        displaced
    }

    /// The waiting sequence whose turn it is. Clients that are let in count as having used a step
    /// more until they are charged, so that several free places do not all go to one of them.
    fn next_in_turn(&self, turns: &Turns) -> Option<(FairnessId, Rank)> {
        let steps_per_priority = self.config.steps_per_priority;
        let heads = self.waiting.clients().filter_map(|client| {
            let seq = self.waiting.next_after(client, turns.passed_over.get(client).copied())?;
            let num_admitted = turns.num_admitted.get(client).copied().unwrap_or(0);
            let delay = seq.priority().delay(steps_per_priority).saturating_add(num_admitted);
            let used = self.shares.used(client).saturating_add(delay * PARTS_PER_STEP);
            Some((used, seq.rank, client))
        });
        heads.min().map(|(_, rank, client)| (client.clone(), rank))
    }

    /// While sequences are suspected of having broken a step, one of them at a time runs alone.
    /// Returns the sequences that had to make room.
    pub(super) fn admit_suspect(&mut self, id: SeqId) -> Vec<SeqId> {
        let mut displaced = Vec::new();
        while let Some(index) = self.running.iter().rposition(|seq| seq.id() != id) {
            displaced.push(self.preempt(index));
        }
        if let Some(mut seq) = self.waiting.remove_id(id) {
            let max_cached = seq.max_cached_tokens();
            let prefix = self.kv.find_cached_prefix(&mut seq.blocks, &seq.tokens, max_cached);
            self.admit(seq, prefix);
        }
        displaced
    }

    fn admit(&mut self, mut seq: Sequence, prefix: CachedPrefix) {
        let num_cached_tokens = self.kv.attach_cached_prefix(&mut seq.blocks, prefix);
        seq.num_computed_tokens = num_cached_tokens;
        if !seq.was_started {
            seq.was_started = true;
            seq.num_cached_tokens = num_cached_tokens;
            if 0 < seq.max_cached_tokens() {
                self.stats.num_prefix_queries += seq.num_prompt_tokens() as u64;
                self.stats.num_prefix_hits += num_cached_tokens as u64;
            }
            self.started.push(SeqEvent::Started { id: seq.id(), num_cached_tokens });
        }
        let index = self.running.partition_point(|other| other.rank < seq.rank);
        self.running.insert(index, seq);
        assert!(
            promised_blocks(&self.kv, self.running.iter()) <= self.kv.num_free_blocks(),
            "what is admitted fits beside what runs"
        );
    }

    /// Who must make room for a sequence that has waited for long, while others of one client hold
    /// more than their share: always the youngest of the client that has most running, as long as it
    /// has at least two more than the one that waits. Highest index first; `None` if that is not
    /// enough, or nobody has to.
    fn victims_for(
        &self,
        client: &FairnessId,
        rank: Rank,
        prefix: CachedPrefix,
    ) -> Option<Vec<usize>> {
        let seq = self.waiting.get(client, rank)?;
        let has_waited = seq.queued_at_step + self.config.fairness_patience_steps <= self.num_steps;
        if !has_waited || !self.shares.has_rivals() {
            return None;
        }
        let mut num_running: BTreeMap<&FairnessId, usize> = BTreeMap::new();
        for other in &self.running {
            *num_running.entry(other.client()).or_default() += 1;
        }
        let own = num_running.get(client).copied().unwrap_or(0);
        let mut victims: Vec<usize> = Vec::new();
        let mut num_freed = 0;
        loop {
            let (&largest, &count) = num_running.iter().max_by_key(|(_, count)| **count)?;
            if count < own + 2 {
                return None;
            }
            // The oldest stays, so that something ends whatever else happens.
            let is_candidate = |index: &usize| {
                self.running[*index].client() == largest && !victims.contains(index)
            };
            let index = (1..self.running.len()).rev().find(is_candidate)?;
            num_running.insert(largest, count - 1);
            num_freed += self.num_own_blocks(&self.running[index]);
            victims.push(index);
            let rest = self.running.iter().enumerate().filter(|(i, _)| !victims.contains(i));
            if has_room(&self.kv, rest.map(|(_, seq)| seq), seq, prefix, num_freed) {
                victims.sort_unstable_by(|a, b| b.cmp(a));
                return Some(victims);
            }
        }
    }

    /// Blocks that are free when this sequence gives its own back.
    fn num_own_blocks(&self, seq: &Sequence) -> usize {
        let is_own = |id: &&BlockId| self.kv.ref_count(**id) == 1;
        seq.blocks.table().blocks().iter().filter(is_own).count()
    }
}

/// Whether a running sequence is about to publish the block that `seq` would have to compute next.
/// Then waiting is cheaper than computing it twice. Asked anew in every step, so nobody waits for
/// a sequence that was aborted or preempted.
fn is_being_computed(
    running: &[Sequence],
    seq: &Sequence,
    prefix: CachedPrefix,
    block_size: usize,
) -> bool {
    let next = prefix.num_blocks;
    let is_shareable = (next + 1) * block_size <= seq.max_cached_tokens();
    let Some(hash) = seq.blocks.hash(next).filter(|_| is_shareable) else { return false };
    running.iter().any(|other| other.blocks.will_publish(next, hash))
}

/// Whether `seq` can have blocks for all its known tokens, and every sequence that runs already for
/// its own, and one more each, if `num_freed` blocks more were free. Admitting earlier would only
/// cause preemptions.
fn has_room<'a>(
    kv: &KvCacheManager,
    running: impl Iterator<Item = &'a Sequence> + Clone,
    seq: &Sequence,
    prefix: CachedPrefix,
    num_freed: usize,
) -> bool {
    let needed = kv.blocks_for(seq.tokens.len()) - prefix.num_blocks + prefix.num_free_blocks;
    let num_running = running.clone().count();
    needed + promised_blocks(kv, running) + num_running <= kv.num_free_blocks() + num_freed
}

/// How many more blocks the running sequences need for the tokens they already know.
fn promised_blocks<'a>(kv: &KvCacheManager, running: impl Iterator<Item = &'a Sequence>) -> usize {
    let lacking =
        |seq: &Sequence| kv.blocks_for(seq.tokens.len()) - seq.blocks.table().blocks().len();
    running.map(lacking).sum()
}
