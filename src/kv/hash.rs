//! Names for the content of full blocks.
//!
//! **Invariant:** equal hashes mean equal tokens, equal predecessors and an equal [`Root`]. A collision
//! would serve one client's keys and values to another, so the hash is cryptographic and keyed: a
//! client can neither find a collision nor learn from a hash what someone else sent.

use std::fmt;

use crate::text::TokenId;

/// Secret of one process. Hashes of different keys have nothing in common.
#[derive(Clone, Copy)]
pub struct HashKey(pub [u8; 32]);

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(..)")
    }
}

/// Identifies the tokens of a full block *and* everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 16]);

/// How the keys of a sequence are rotated: blocks that differ in this have nothing in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// As trained.
    Trained,
    /// Stretched, so that more of them can be told apart.
    Stretched,
}

/// The weights that keys and values were computed with beside the model's own. Every load of an
/// adapter has a number of its own, so nothing outlives the load it was computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(pub u64);

/// What sequences must have in common to share anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root<'a> {
    /// What the client sent to be kept apart.
    pub salt: Option<&'a str>,
    /// How its keys are rotated.
    pub positions: Positions,
    /// What it is computed with beside the model.
    pub adapter: Option<AdapterId>,
}

/// The hashes of a sequence's full blocks, each chained to the one before it. Every block is hashed
/// once, however often the cache is asked about it.
#[derive(Debug)]
pub(super) struct HashChain {
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

// The first byte of every hashed message says what follows, so that no salt can imitate a block.
const ROOT: u8 = 0;
const SALTED_ROOT: u8 = 1;
const BLOCK: u8 = 2;
const STRETCHED_ROOT: u8 = 3;
const STRETCHED_SALTED_ROOT: u8 = 4;
/// Added to a root's byte where the number of an adapter follows, before any salt.
const ADAPTED: u8 = 8;

impl HashChain {
    /// The empty chain of a root: sequences with different roots never share a hash.
    pub(super) fn new(key: &HashKey, root: Root<'_>) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        let kind = match (root.positions, root.salt) {
            (Positions::Trained, None) => ROOT,
            (Positions::Trained, Some(_)) => SALTED_ROOT,
            (Positions::Stretched, None) => STRETCHED_ROOT,
            (Positions::Stretched, Some(_)) => STRETCHED_SALTED_ROOT,
        };
        match root.adapter {
            None => hasher.update(&[kind]),
            Some(id) => hasher.update(&[kind | ADAPTED]).update(&id.0.to_le_bytes()),
        };
        hasher.update(root.salt.unwrap_or_default().as_bytes());
        Self { root: BlockHash::finish(&hasher), hashes: Vec::new() }
    }

    /// Hashes the full blocks of `tokens` that are not hashed yet. `tokens` only ever grows.
    pub(super) fn extend(&mut self, key: &HashKey, tokens: &[TokenId], block_size: usize) {
        assert!(self.hashes.len() <= tokens.len() / block_size, "a sequence never shrinks");
        for block in tokens[self.hashes.len() * block_size..].chunks_exact(block_size) {
            let parent = self.hashes.last().unwrap_or(&self.root);
            let mut hasher = blake3::Hasher::new_keyed(&key.0);
            hasher.update(&[BLOCK]).update(&parent.0);
            for token in block {
                hasher.update(&token.to_le_bytes());
            }
            let hash = BlockHash::finish(&hasher);
            self.hashes.push(hash);
        }
    }

    pub(super) fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}

impl BlockHash {
    fn finish(hasher: &blake3::Hasher) -> Self {
        let mut truncated = [0; 16];
        truncated.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(truncated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Root<'_> = Root { salt: None, positions: Positions::Trained, adapter: None };

    fn hashes(key: u8, salt: Option<&str>, tokens: &[TokenId]) -> Vec<BlockHash> {
        let key = HashKey([key; 32]);
        let mut chain = HashChain::new(&key, Root { salt, ..PLAIN });
        chain.extend(&key, tokens, 2);
        chain.hashes().to_vec()
    }

    /// Goal: a hash names tokens, predecessors, salt and key. Method: change one at a time.
    #[test]
    fn everything_counts() {
        let base = hashes(1, None, &[1, 2, 3, 4, 5]);
        assert_eq!(base.len(), 2);
        assert_eq!(base, hashes(1, None, &[1, 2, 3, 4]));
        assert_eq!(base[0], hashes(1, None, &[1, 2, 9, 9])[0]);
        assert_ne!(base[1], hashes(1, None, &[9, 2, 3, 4])[1]);
        assert_ne!(base[0], hashes(2, None, &[1, 2])[0]);
        assert_ne!(base[0], hashes(1, Some(""), &[1, 2])[0]);
        assert_ne!(hashes(1, Some("a"), &[1, 2]), hashes(1, Some("b"), &[1, 2]));
        let zeros = hashes(1, None, &[0; 6]);
        assert!(zeros[0] != zeros[1] && zeros[1] != zeros[2]);
    }

    /// Goal: nothing is shared between keys that are rotated in different ways or computed with other
    /// weights. Method: the same tokens, with every pair of roots; salts that look like numbers.
    #[test]
    fn roots_count() {
        let key = HashKey([1; 32]);
        let mut roots = Vec::new();
        for positions in [Positions::Trained, Positions::Stretched] {
            for salt in [None, Some(""), Some("a"), Some("\u{1}\0\0\0\0\0\0\0")] {
                for adapter in [None, Some(AdapterId(0)), Some(AdapterId(1))] {
                    let root = Root { salt, positions, adapter };
                    let mut chain = HashChain::new(&key, root);
                    chain.extend(&key, &[1, 2], 2);
                    assert!(!roots.contains(&chain.hashes()[0]), "{root:?}");
                    roots.push(chain.hashes()[0]);
                }
            }
        }
    }

    /// Goal: growing a chain equals hashing at once. Method: extend token by token.
    #[test]
    fn grows() {
        let tokens: Vec<_> = (0..9).collect();
        let key = HashKey([3; 32]);
        let mut chain = HashChain::new(&key, Root { salt: Some("salt"), ..PLAIN });
        for end in 0..=tokens.len() {
            chain.extend(&key, &tokens[..end], 2);
        }
        assert_eq!(chain.hashes(), hashes(3, Some("salt"), &tokens));
    }
}
