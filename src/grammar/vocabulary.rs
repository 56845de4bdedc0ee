//! The model's vocabulary as llguidance wants it: a trie of the bytes of all tokens.

use std::sync::Arc;

use llguidance::toktrie::{TokRxInfo, TokTrie, TokenizerEnv};

use crate::text::{TokenId, Tokenizer};

/// A trie of all tokens, and the tokenizer that knows how text is usually cut.
pub(super) struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

impl Vocabulary {
    /// Added tokens are entered under a marker that no text contains: text never spells them.
    pub(super) fn new(tokenizer: Arc<Tokenizer>, eos_token_ids: &[TokenId]) -> Self {
        let vocab_size = tokenizer.vocab_size() as u32;
        let words: Vec<Vec<u8>> = (0..vocab_size)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                if !tokenizer.is_added(id) {
                    return bytes.to_vec();
                }
                let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                word.extend_from_slice(bytes);
                word
            })
            .collect();
        let info = TokRxInfo::new(vocab_size, eos_token_ids[0]);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(eos_token_ids);
        Self { tokenizer, trie }
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            let tokens = self.tokenizer.encode_exact(text);
            tokens.unwrap_or_else(|_| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }
}
