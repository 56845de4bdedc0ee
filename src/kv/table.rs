//! A sequence's side of the cache.

use crate::kv::BlockTable;
use crate::kv::hash::{BlockHash, HashChain};

/// What one sequence has in the cache: its blocks, and the names of its full blocks.
///
/// ```text
/// tokens   t0 t1 t2 t3 | t4 t5 t6 t7 | t8 t9          (block size 4)
/// hashes   h0          | h1 <- h0    |
/// table    block 7     | block 2     | block 5
///          published   | not yet: being computed
/// ```
#[derive(Debug)]
pub struct SequenceBlocks {
    pub(super) table: BlockTable,
    pub(super) chain: HashChain,
    /// How many leading blocks were offered to the cache or came from it.
    pub(super) num_published: usize,
}

impl SequenceBlocks {
    /// The blocks in token order.
    pub fn table(&self) -> &BlockTable {
        &self.table
    }

    /// How many leading blocks were offered to the cache or came from it.
    pub fn num_published(&self) -> usize {
        self.num_published
    }

    /// Name of a full block, if its tokens were known when the cache last looked at the sequence.
    pub fn hash(&self, block_index: usize) -> Option<BlockHash> {
        self.chain.hashes().get(block_index).copied()
    }

    /// Whether this sequence will publish `hash` as its block `block_index`, but has not yet.
    pub fn will_publish(&self, block_index: usize, hash: BlockHash) -> bool {
        self.num_published <= block_index && self.hash(block_index) == Some(hash)
    }
}
