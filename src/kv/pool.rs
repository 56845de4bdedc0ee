//! The blocks themselves: reference counts, the order of reuse, and the index of published blocks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use crate::kv::BlockId;
use crate::kv::hash::BlockHash;

#[derive(Debug, Default)]
struct Block {
    ref_count: u32,
    /// Set once the block is full and published; kept while the block is free, until it is reused.
    hash: Option<BlockHash>,
    /// Key into `BlockPool::evictable` or `BlockPool::kept` while the block is there.
    freed_at: u64,
    pin: Option<BlockPin>,
}

#[derive(Clone, Copy, Debug)]
struct BlockPin {
    ttl: Duration,
    until: Duration,
}

/// Pinned blocks are at most one in so many.
const PINNED_SHARE: usize = 4;

/// All blocks of one cache.
///
/// Free blocks without a name are reused first, the last freed one before the others: it is the
/// warmest, and memory never touched stays untouched. Then named ones, least recently used first,
/// and when there is nothing else, pinned ones in the same order: nobody is refused for a pin.
#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    blank: Vec<BlockId>,
    evictable: BTreeMap<u64, BlockId>,
    /// Free blocks that are pinned.
    kept: BTreeMap<u64, BlockId>,
    /// All pinned blocks by when their pins end.
    pins: BTreeSet<(Duration, BlockId)>,
    published: HashMap<BlockHash, BlockId>,
    clock: u64,
    now: Duration,
}

impl BlockPool {
    pub(super) fn new(num_blocks: u32) -> Self {
        let mut blocks = Vec::new();
        blocks.resize_with(num_blocks as usize, Block::default);
        Self {
            blocks,
            blank: (0..num_blocks).rev().map(BlockId).collect(),
            evictable: BTreeMap::new(),
            kept: BTreeMap::new(),
            pins: BTreeSet::new(),
            published: HashMap::new(),
            clock: 0,
            now: Duration::ZERO,
        }
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn num_free(&self) -> usize {
        self.blank.len() + self.evictable.len() + self.kept.len()
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
        let evicted = |free: &mut BTreeMap<u64, BlockId>| free.pop_first().map(|(_, id)| id);
        let id = self.blank.pop();
        let id = id.or_else(|| evicted(&mut self.evictable));
        let id = id.or_else(|| evicted(&mut self.kept))?;
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
        let (is_first, freed_at, pin) = (block.ref_count == 1, block.freed_at, block.pin);
        if is_first {
            let removed = self.named_free(pin.is_some()).remove(&freed_at);
            assert_eq!(removed, Some(id));
        }
        // Whoever is used lives on.
        if let Some(pin) = pin {
            self.pin(id, pin.ttl);
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
            let is_pinned = block.pin.is_some();
            self.clock += 1;
            self.named_free(is_pinned).insert(freed_at, id);
        }
    }

    /// Where free blocks with a name are.
    fn named_free(&mut self, is_pinned: bool) -> &mut BTreeMap<u64, BlockId> {
        if is_pinned { &mut self.kept } else { &mut self.evictable }
    }

    pub(super) fn num_pinned(&self) -> usize {
        self.pins.len()
    }

    /// Ends pins whose time has come.
    pub(super) fn advance_to(&mut self, now: Duration) {
        self.now = self.now.max(now);
        while let Some(&(until, id)) = self.pins.first()
            && until <= self.now
        {
            self.unpin(id);
            if self.block(id).ref_count == 0 {
                let freed_at = self.block(id).freed_at;
                self.kept.remove(&freed_at);
                self.evictable.insert(freed_at, id);
            }
        }
    }

    /// Keeps a published block for so long from now, unless too many are kept already. A pin that
    /// lasts longer stays.
    pub(super) fn pin(&mut self, id: BlockId, ttl: Duration) -> bool {
        let until = self.now.saturating_add(ttl);
        match self.block(id).pin {
            Some(pin) if until <= pin.until => return true,
            Some(pin) => {
                self.pins.remove(&(pin.until, id));
            }
            None if self.num_blocks() / PINNED_SHARE <= self.pins.len() => return false,
            None if self.block(id).ref_count == 0 => {
                let freed_at = self.block(id).freed_at;
                self.evictable.remove(&freed_at);
                self.kept.insert(freed_at, id);
            }
            None => {}
        }
        self.pins.insert((until, id));
        self.block_mut(id).pin = Some(BlockPin { ttl, until });
        true
    }

    fn unpin(&mut self, id: BlockId) {
        if let Some(pin) = self.block_mut(id).pin.take() {
            self.pins.remove(&(pin.until, id));
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
        self.unpin(id);
        if let Some(hash) = self.block_mut(id).hash.take() {
            let removed = self.published.remove(&hash);
            assert_eq!(removed, Some(id));
        }
    }

    /// Forgets the content of every block.
    pub(super) fn unpublish_all(&mut self) {
        self.published.clear();
        self.pins.clear();
        for block in &mut self.blocks {
            block.hash = None;
            block.pin = None;
        }
        self.blank.extend(std::mem::take(&mut self.evictable).into_values());
        self.blank.extend(std::mem::take(&mut self.kept).into_values());
    }

    /// Panics unless the pool's books agree with each other.
    pub(super) fn check_invariants(&self) {
        let free = self.blank.iter().chain(self.evictable.values()).chain(self.kept.values());
        for &id in free {
            assert_eq!(self.block(id).ref_count, 0);
        }
        assert!(self.blank.iter().all(|&id| self.block(id).hash.is_none()));
        for (hash, &id) in &self.published {
            assert_eq!(self.block(id).hash.as_ref(), Some(hash));
        }
        assert!(self.evictable.values().all(|&id| self.block(id).pin.is_none()));
        assert!(self.kept.values().all(|&id| self.block(id).pin.is_some()));
        for &(until, id) in &self.pins {
            assert!(self.block(id).hash.is_some());
            assert_eq!(self.block(id).pin.map(|pin| pin.until), Some(until));
        }
        assert!(self.pins.len() <= self.num_blocks() / PINNED_SHARE);
        let num_owned = self.blocks.iter().filter(|block| 0 < block.ref_count).count();
        assert_eq!(num_owned + self.num_free(), self.num_blocks());
    }
}
