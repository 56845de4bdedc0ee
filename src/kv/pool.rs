//! The blocks themselves: reference counts, the order of reuse, and the index of published blocks.

use std::collections::{BTreeMap, HashMap};

use crate::kv::BlockId;
use crate::kv::hash::BlockHash;

#[derive(Debug, Default)]
struct Block {
    ref_count: u32,
    /// Set once the block is full and published; kept while the block is free, until it is reused.
    hash: Option<BlockHash>,
    /// Key into `BlockPool::evictable` while the block is there.
    freed_at: u64,
}

/// All blocks of one cache.
///
/// Free blocks without a name are reused first, the last freed one before the others: it is the
/// warmest, and memory never touched stays untouched. Then named ones, least recently used first.
#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    blank: Vec<BlockId>,
    evictable: BTreeMap<u64, BlockId>,
    published: HashMap<BlockHash, BlockId>,
    clock: u64,
}

impl BlockPool {
    pub(super) fn new(num_blocks: u32) -> Self {
        let mut blocks = Vec::new();
        blocks.resize_with(num_blocks as usize, Block::default);
        Self {
            blocks,
            blank: (0..num_blocks).rev().map(BlockId).collect(),
            evictable: BTreeMap::new(),
            published: HashMap::new(),
            clock: 0,
        }
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn num_free(&self) -> usize {
        self.blank.len() + self.evictable.len()
    }

    pub(super) fn ref_count(&self, id: BlockId) -> u32 {
        self.block(id).ref_count
    }

    pub(super) fn find(&self, hash: BlockHash) -> Option<BlockId> {
        self.published.get(&hash).copied()
    }

    fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }

    /// Takes the free block that is least worth keeping and forgets what it held.
    pub(super) fn allocate(&mut self) -> Option<BlockId> {
        let id =
            self.blank.pop().or_else(|| self.evictable.pop_first().map(|(_, evicted)| evicted))?;
        assert_eq!(self.block(id).ref_count, 0, "a free block has no owner");
        self.unpublish(id);
        self.block_mut(id).ref_count = 1;
        Some(id)
    }

    /// One more owner of a published block, which may be free.
    pub(super) fn retain(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.hash.is_some(), "only published blocks are shared");
        block.ref_count += 1;
        if block.ref_count == 1 {
            let freed_at = block.freed_at;
            let removed = self.evictable.remove(&freed_at);
            assert_eq!(removed, Some(id));
        }
    }

    /// One owner less.
    pub(super) fn release(&mut self, id: BlockId) {
        let freed_at = self.clock;
        let block = self.block_mut(id);
        assert!(0 < block.ref_count, "released more often than taken");
        block.ref_count -= 1;
        if 0 < block.ref_count {
            return;
        }
        if block.hash.is_none() {
            self.blank.push(id);
        } else {
            block.freed_at = freed_at;
            self.clock += 1;
            self.evictable.insert(freed_at, id);
        }
    }

    /// Makes a full block findable. The first block to publish a hash keeps it.
    pub(super) fn publish(&mut self, id: BlockId, hash: BlockHash) {
        assert!(0 < self.block(id).ref_count, "only an owner knows what a block holds");
        if self.block(id).hash.is_none() && !self.published.contains_key(&hash) {
            self.block_mut(id).hash = Some(hash);
            self.published.insert(hash, id);
        }
    }

    /// Makes a block impossible to find. Its owners keep it.
    pub(super) fn unpublish(&mut self, id: BlockId) {
        if let Some(hash) = self.block_mut(id).hash.take() {
            let removed = self.published.remove(&hash);
            assert_eq!(removed, Some(id));
        }
    }

    /// Forgets the content of every block.
    pub(super) fn unpublish_all(&mut self) {
        self.published.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
        self.blank.extend(std::mem::take(&mut self.evictable).into_values());
    }

    /// Panics unless the pool's books agree with each other.
    pub(super) fn check_invariants(&self) {
        let free = self.blank.iter().chain(self.evictable.values());
        for &id in free {
            assert_eq!(self.block(id).ref_count, 0);
        }
        assert!(self.blank.iter().all(|&id| self.block(id).hash.is_none()));
        for (hash, &id) in &self.published {
            assert_eq!(self.block(id).hash.as_ref(), Some(hash));
        }
        let num_owned = self.blocks.iter().filter(|block| 0 < block.ref_count).count();
        assert_eq!(num_owned + self.num_free(), self.num_blocks());
    }
}
