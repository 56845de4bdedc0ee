//! The cache as the scheduler sees it.

use std::time::Duration;

use crate::kv::hash::{HashChain, HashKey, Root};
use crate::kv::pool::BlockPool;
use crate::kv::table::SequenceBlocks;
use crate::kv::{BlockId, BlockTable};
use crate::text::TokenId;

/// Not enough free blocks; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBlocks;

/// What the cache knows of a sequence's beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedPrefix {
    /// How many leading blocks can be taken from the cache.
    pub num_blocks: usize,
    /// How many of them nobody holds: taking them makes as many free blocks disappear.
    pub num_free_blocks: usize,
}

/// A beginning to keep for a while after everyone who uses it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// How many tokens; only full blocks are kept.
    pub num_tokens: usize,
    /// How long after the last use.
    pub ttl: Duration,
}

/// Hands out blocks, shares full ones by content, takes them back.
#[derive(Debug)]
pub struct KvCacheManager {
    block_size: usize,
    key: HashKey,
    pool: BlockPool,
    shares_prefixes: bool,
}

impl KvCacheManager {
    /// A cache of blank blocks. `key` should be random and unknown to clients.
    pub fn new(num_blocks: u32, block_size: usize, key: HashKey) -> Self {
        assert!(0 < num_blocks, "a cache has blocks");
        assert!(0 < block_size, "a block has slots");
        Self { block_size, key, pool: BlockPool::new(num_blocks), shares_prefixes: true }
    }

    /// The same cache, but every sequence computes its own blocks.
    #[must_use]
    pub fn without_sharing(self) -> Self {
        Self { shares_prefixes: false, ..self }
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// All blocks.
    pub fn num_blocks(&self) -> usize {
        self.pool.num_blocks()
    }

    /// Blocks that no sequence holds. Some may still have content worth finding.
    pub fn num_free_blocks(&self) -> usize {
        self.pool.num_free()
    }

    /// Blocks that sequences hold.
    pub fn num_held_blocks(&self) -> usize {
        self.num_blocks() - self.num_free_blocks()
    }

    /// How many sequences hold a block.
    pub fn ref_count(&self, id: BlockId) -> u32 {
        self.pool.ref_count(id)
    }

    /// Blocks needed for a number of tokens.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// The state of a sequence that holds nothing yet.
    pub fn new_sequence(&self, root: Root<'_>) -> SequenceBlocks {
        SequenceBlocks {
            table: BlockTable::default(),
            chain: HashChain::new(&self.key, root),
            num_published: 0,
        }
    }

    /// Looks up the longest known prefix of at most `max_tokens` tokens; changes nothing but the
    /// sequence's memory of its own hashes.
    pub fn find_cached_prefix(
        &self,
        blocks: &mut SequenceBlocks,
        tokens: &[TokenId],
        max_tokens: usize,
    ) -> CachedPrefix {
        let mut prefix = CachedPrefix { num_blocks: 0, num_free_blocks: 0 };
        if !self.shares_prefixes {
            return prefix;
        }
        blocks.chain.extend(&self.key, tokens, self.block_size);
        let max_blocks = max_tokens / self.block_size;
        let hashes = blocks.chain.hashes().iter().take(max_blocks);
        for id in hashes.map_while(|&hash| self.pool.find(hash)) {
            prefix.num_blocks += 1;
            prefix.num_free_blocks += usize::from(self.pool.ref_count(id) == 0);
        }
        prefix
    }

    /// Points a fresh sequence at the blocks that [`Self::find_cached_prefix`] has just found.
    /// Returns how many tokens need not be computed.
    pub fn attach_cached_prefix(
        &mut self,
        blocks: &mut SequenceBlocks,
        prefix: CachedPrefix,
    ) -> usize {
        assert!(blocks.table.0.is_empty(), "only a fresh sequence takes cached blocks");
        for &hash in &blocks.chain.hashes()[..prefix.num_blocks] {
            let id = self.pool.find(hash).expect("nothing happened since the lookup");
            self.pool.retain(id);
            blocks.table.0.push(id);
        }
        blocks.num_published = prefix.num_blocks;
        prefix.num_blocks * self.block_size
    }

    /// Extends the block table so that the first `num_tokens` tokens have a slot.
    pub fn allocate_slots(
        &mut self,
        blocks: &mut SequenceBlocks,
        num_tokens: usize,
    ) -> Result<(), OutOfBlocks> {
        let needed = self.blocks_for(num_tokens);
        let missing = needed.saturating_sub(blocks.table.0.len());
        if self.num_free_blocks() < missing {
            return Err(OutOfBlocks);
        }
        for _ in 0..missing {
            blocks.table.0.extend(self.pool.allocate());
        }
        assert!(needed <= blocks.table.0.len(), "every token has a slot");
        Ok(())
    }

    /// Gives back the blocks behind the first `num_tokens` tokens. None of them was published.
    pub fn trim(&mut self, blocks: &mut SequenceBlocks, num_tokens: usize) {
        let needed = self.blocks_for(num_tokens);
        assert!(blocks.num_published <= needed, "what is published was computed");
        while needed < blocks.table.0.len() {
            self.pool.release(blocks.table.0.pop().expect("it is longer than that"));
        }
    }

    /// Publishes the blocks that the first `num_computed_tokens` tokens fill completely.
    pub fn publish_full_blocks(
        &mut self,
        blocks: &mut SequenceBlocks,
        tokens: &[TokenId],
        num_computed_tokens: usize,
    ) {
        assert!(num_computed_tokens <= tokens.len(), "only known tokens are computed");
        let num_full = num_computed_tokens / self.block_size;
        if !self.shares_prefixes || num_full <= blocks.num_published {
            return;
        }
        blocks.chain.extend(&self.key, tokens, self.block_size);
        for index in blocks.num_published..num_full {
            self.pool.publish(blocks.table.0[index], blocks.chain.hashes()[index]);
        }
        blocks.num_published = num_full;
    }

    /// Tells the time, from which pins are counted. It never runs backwards.
    pub fn advance_to(&mut self, now: Duration) {
        self.pool.advance_to(now);
    }

    /// Blocks that are kept because someone asked for it.
    pub fn num_pinned_blocks(&self) -> usize {
        self.pool.num_pinned()
    }

    /// Keeps the published blocks of a beginning, as many as there is room for: a share of the
    /// cache is for others. Returns how many tokens they hold.
    pub fn pin_prefix(&mut self, blocks: &SequenceBlocks, pin: Pin) -> usize {
        let num_blocks = (pin.num_tokens / self.block_size).min(blocks.num_published);
        let hashes = blocks.chain.hashes().iter().take(num_blocks);
        let ids = hashes.map_while(|&hash| self.pool.find(hash)).collect::<Vec<_>>();
        let pinned = ids.into_iter().take_while(|&id| self.pool.pin(id, pin.ttl));
        pinned.count() * self.block_size
    }

    /// Gives all blocks back, last block first: the tail of a prefix is the least likely to be
    /// reused, so it must be the first to be evicted.
    pub fn free(&mut self, blocks: &mut SequenceBlocks) {
        while let Some(id) = blocks.table.0.pop() {
            self.pool.release(id);
        }
        blocks.num_published = 0;
    }

    /// Gives all blocks back and makes sure that nobody finds their content.
    pub fn discard(&mut self, blocks: &mut SequenceBlocks) {
        for &id in &blocks.table.0 {
            self.pool.unpublish(id);
        }
        self.free(blocks);
    }

    /// Forgets the content of every block: no prefix is found until it is computed again. Holders
    /// keep their blocks.
    pub fn clear(&mut self) {
        self.pool.unpublish_all();
    }

    /// Panics unless the cache's books agree with each other.
    pub fn check_invariants(&self) {
        self.pool.check_invariants();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::Positions;

    const KEY: HashKey = HashKey([7; 32]);

    fn root(salt: Option<&str>) -> Root<'_> {
        Root { salt, positions: Positions::Trained, adapter: None }
    }

    fn computed(kv: &mut KvCacheManager, salt: Option<&str>, tokens: &[TokenId]) -> SequenceBlocks {
        let mut blocks = kv.new_sequence(root(salt));
        let prefix = kv.find_cached_prefix(&mut blocks, tokens, tokens.len() - 1);
        kv.attach_cached_prefix(&mut blocks, prefix);
        kv.allocate_slots(&mut blocks, tokens.len()).expect("enough blocks");
        kv.publish_full_blocks(&mut blocks, tokens, tokens.len());
        blocks
    }

    /// Goal: full blocks are shared while held and after, but a full hit leaves a token to compute.
    #[test]
    fn shares_full_blocks() {
        let mut kv = KvCacheManager::new(8, 2, KEY);
        let mut first = computed(&mut kv, None, &[1, 2, 3, 4]);
        let hash = first.hash(1).expect("a full block");
        assert!(!first.will_publish(1, hash), "it has already");
        let mut second = computed(&mut kv, None, &[1, 2, 3, 4]);
        assert_eq!(first.table().blocks()[0], second.table().blocks()[0]);
        assert_ne!(first.table().blocks()[1], second.table().blocks()[1]);
        assert_eq!(kv.num_held_blocks(), 3);
        kv.free(&mut first);
        kv.free(&mut second);
        assert_eq!(kv.num_held_blocks(), 0);
        let mut fresh = kv.new_sequence(root(None));
        let prefix = kv.find_cached_prefix(&mut fresh, &[1, 2, 3, 4, 5], 4);
        assert_eq!(prefix, CachedPrefix { num_blocks: 2, num_free_blocks: 2 });
        let mut salted = kv.new_sequence(root(Some("tenant")));
        assert_eq!(kv.find_cached_prefix(&mut salted, &[1, 2, 3, 4, 5], 4).num_blocks, 0);
        kv.check_invariants();
    }

    /// Goal: without sharing, equal prompts have nothing in common, not even a hash to wait for.
    #[test]
    fn shares_nothing_when_told_so() {
        let mut kv = KvCacheManager::new(8, 2, KEY).without_sharing();
        let mut first = computed(&mut kv, None, &[1, 2, 3, 4]);
        let mut second = computed(&mut kv, None, &[1, 2, 3, 4]);
        assert_eq!(kv.num_held_blocks(), 4);
        assert_eq!(first.hash(0), None);
        kv.free(&mut first);
        kv.free(&mut second);
        kv.check_invariants();
    }

    /// Goal: blank blocks are reused before cached ones, and cached ones tail first.
    #[test]
    fn evicts_the_tail_first() {
        let mut kv = KvCacheManager::new(4, 2, KEY);
        let tokens = [1, 2, 3, 4, 5];
        let mut blocks = computed(&mut kv, None, &tokens);
        kv.free(&mut blocks);
        let mut other = kv.new_sequence(root(None));
        kv.allocate_slots(&mut other, 6).expect("enough blocks");
        let mut fresh = kv.new_sequence(root(None));
        assert_eq!(kv.find_cached_prefix(&mut fresh, &tokens, 4).num_blocks, 1);
        assert_eq!(kv.allocate_slots(&mut other, 10), Err(OutOfBlocks));
        assert_eq!(kv.num_free_blocks(), 1);
        kv.free(&mut other);
        kv.check_invariants();
    }

    /// Goal: discarded and cleared content is never found again.
    #[test]
    fn forgets() {
        let mut kv = KvCacheManager::new(4, 2, KEY);
        let mut blocks = computed(&mut kv, None, &[1, 2, 3]);
        kv.discard(&mut blocks);
        let mut fresh = kv.new_sequence(root(None));
        assert_eq!(kv.find_cached_prefix(&mut fresh, &[1, 2, 3], 2).num_blocks, 0);
        let mut blocks = computed(&mut kv, None, &[1, 2, 3]);
        kv.free(&mut blocks);
        kv.clear();
        assert_eq!(kv.find_cached_prefix(&mut fresh, &[1, 2, 3], 2).num_blocks, 0);
        assert_eq!(kv.num_free_blocks(), 4);
        kv.check_invariants();
    }
}
