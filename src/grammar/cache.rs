//! Compiled grammars by constraint: the least recently used go first.

use std::sync::Arc;

use super::matcher::Grammar;

/// Most compiled grammars that are kept.
const MAX_GRAMMARS: usize = 64;
/// Most bytes that all of them may take together.
const MAX_BYTES: usize = 256 << 20;
/// An automaton grows while it is used. From this many states on it is built afresh, long before
/// it reaches the limit at which it would fail.
const MAX_STATES: usize = super::compile::MAX_LEXER_STATES / 2;

type Key = [u8; 32];

/// Compiled grammars, most recently used last.
#[derive(Default)]
pub(super) struct GrammarCache {
    entries: Vec<(Key, Arc<Grammar>)>,
}

impl GrammarCache {
    pub(super) fn get(&mut self, key: &Key) -> Option<Arc<Grammar>> {
        let index = self.entries.iter().position(|(known, _)| known == key)?;
        let (_, grammar) = self.entries.remove(index);
        // One that has grown too large or was hurt by a panic is left to those who use it.
        let (_, num_states) = grammar.size()?;
        if MAX_STATES < num_states {
            return None;
        }
        self.entries.push((*key, Arc::clone(&grammar)));
        Some(grammar)
    }

    pub(super) fn insert(&mut self, key: Key, grammar: Arc<Grammar>) {
        self.entries.retain(|(known, _)| *known != key);
        self.entries.push((key, grammar));
        let mut num_bytes = 0;
        let mut num_kept = 0;
        // Sizes are taken anew, because grammars grow.
        for (_, grammar) in self.entries.iter().rev().take(MAX_GRAMMARS) {
            num_bytes += grammar.size().map_or(MAX_BYTES, |(bytes, _)| bytes);
            if MAX_BYTES < num_bytes && 0 < num_kept {
                break;
            }
            num_kept += 1;
        }
        let num_old = self.entries.len() - num_kept;
        self.entries.drain(..num_old);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}
