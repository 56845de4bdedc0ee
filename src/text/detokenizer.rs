//! Decoding one token at a time, byte for byte the same text as decoding all tokens at once.

use std::sync::Arc;

use super::TokenId;
use super::tokenizer::{SpecialTokens, Tokenizer};

/// Turns a stream of tokens into a stream of whole characters.
///
/// A token may end in the middle of a character; those bytes wait for the rest of it. Bytes that
/// can no longer become a character turn into U+FFFD exactly as `String::from_utf8_lossy` has it.
#[derive(Clone, Debug)]
pub struct IncrementalDetokenizer {
    tokenizer: Arc<Tokenizer>,
    special_tokens: SpecialTokens,
    /// The beginning of a character; at most three bytes between calls.
    pending: Vec<u8>,
}

impl IncrementalDetokenizer {
    /// A detokenizer at the beginning of a text.
    pub fn new(tokenizer: Arc<Tokenizer>, special_tokens: SpecialTokens) -> Self {
        Self { tokenizer, special_tokens, pending: Vec::new() }
    }

    /// Takes the next token and returns the characters it completes, possibly none.
    pub fn push(&mut self, id: TokenId) -> String {
        self.pending.extend_from_slice(self.tokenizer.shown_bytes(id, self.special_tokens));
        let mut text = String::new();
        let mut consumed = 0;
        loop {
            match std::str::from_utf8(&self.pending[consumed..]) {
                Ok(valid) => {
                    text.push_str(valid);
                    consumed = self.pending.len();
                    break;
                }
                Err(error) => {
                    let valid = &self.pending[consumed..consumed + error.valid_up_to()];
                    text.push_str(&String::from_utf8_lossy(valid));
                    consumed += error.valid_up_to();
                    let Some(invalid_len) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    consumed += invalid_len;
                }
            }
        }
        self.pending.drain(..consumed);
        text
    }

    /// Ends the text and returns what was held back: nothing, or U+FFFD for part of a character.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tokenizer::tests::tiny_spec;
    use super::*;

    fn tokenizer() -> Arc<Tokenizer> {
        Arc::new(Tokenizer::from_spec(tiny_spec()).unwrap())
    }

    #[test]
    fn a_character_over_several_tokens_comes_out_whole() {
        let mut detokenizer = IncrementalDetokenizer::new(tokenizer(), SpecialTokens::Skip);
        let pushed: Vec<String> =
            "🎉a".bytes().map(|byte| detokenizer.push(TokenId::from(byte))).collect();
        assert_eq!(pushed, ["", "", "", "🎉", "a"]);
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn half_a_character_at_the_end_is_one_replacement_character() {
        let mut detokenizer = IncrementalDetokenizer::new(tokenizer(), SpecialTokens::Skip);
        assert_eq!(detokenizer.push(0xf0), "");
        assert_eq!(detokenizer.push(0x9f), "");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
        assert_eq!(detokenizer.finish(), "");
    }

    // Goal: pushes and finish together are the lossy decoding of the whole, special tokens and
    // broken bytes included. Method: random ids, dense in lead and continuation bytes.
    proptest! {
        #[test]
        fn pushes_add_up_to_the_whole(
            ids in prop::collection::vec(
                prop_oneof![0u32..300, 0x80u32..0xc0, 0xe0u32..0xf8, 256u32..268], 0..40),
            keep in any::<bool>(),
        ) {
            let tokenizer = tokenizer();
            let special_tokens = if keep { SpecialTokens::Keep } else { SpecialTokens::Skip };
            let mut detokenizer = IncrementalDetokenizer::new(tokenizer.clone(), special_tokens);
            let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
            text.push_str(&detokenizer.finish());
            prop_assert_eq!(text, tokenizer.decode(&ids, special_tokens));
        }
    }
}
