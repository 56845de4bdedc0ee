//! Paged KV-cache bookkeeping: which block belongs to whom, and which full blocks can be shared.
//!
//! Knows token ids and block ids, never a tensor. **Invariant:** a block is either free or counted
//! by exactly as many block tables as its reference count says. Start reading at
//! [`KvCacheManager`].

pub mod hash;
pub mod manager;
mod pool;
pub mod table;

pub use hash::{AdapterId, HashKey, Positions, Root};
pub use manager::{KvCacheManager, OutOfBlocks, Pin};
pub use table::SequenceBlocks;

/// Index of a block of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A sequence's blocks in token order. Append-only while the sequence runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTable(pub(crate) Vec<BlockId>);

impl BlockTable {
    /// The blocks in token order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.0
    }

    /// Physical slot of a token position.
    pub fn slot(&self, position: usize, block_size: usize) -> usize {
        self.0[position / block_size].0 as usize * block_size + position % block_size
    }
}

impl FromIterator<BlockId> for BlockTable {
    fn from_iter<I: IntoIterator<Item = BlockId>>(blocks: I) -> Self {
        Self(blocks.into_iter().collect())
    }
}
