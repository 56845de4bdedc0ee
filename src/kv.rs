//! Paged KV-cache bookkeeping: which block belongs to whom, and which full blocks can be shared.

/// Index of a block of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
