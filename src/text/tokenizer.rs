//! The tokenizer of the Qwen family: byte-level BPE behind Qwen's pre-tokenisation.
//!
//! Text goes through four stages, each exact to the official tokenizer: added tokens are cut out
//! (`added_tokens`), the rest is normalised and cut into pieces (`pre_tokenizer`), a piece is
//! spelled in the byte-level alphabet (`byte_level`) and merged (the `tokenizers` crate).
//! **Invariant:** once built, a tokenizer encodes any text and decodes any ids without failing.

use thiserror::Error;
use tokenizers::Model;
use tokenizers::models::bpe::BPE;

use super::TokenId;
use super::added_tokens::{AddedTokens, Segment};
use super::byte_level;
use super::pre_tokenizer::{self, PreTokenizer};
use super::vocabulary::{EntryKind, Vocabulary};

/// What a GGUF file says about its tokenizer.
#[derive(Clone, Debug, Default)]
pub struct TokenizerSpec {
    /// `tokenizer.ggml.tokens`: the vocabulary in id order.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.merges`: `left right`, most important first.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.token_type`: 1 normal, 3 control, 4 user-defined, 5 unused.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.pre`: the name of the pre-tokenisation.
    pub pre: String,
}

/// Why a tokenizer could not be built or used.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// There are no tokens at all.
    #[error("the vocabulary is empty")]
    EmptyVocabulary,
    /// The pre-tokenisation is not one we know.
    #[error("unsupported pre-tokenizer `{0}`, expected `qwen2`")]
    UnsupportedPreTokenizer(String),
    /// `tokenizer.json` asks for something the Qwen family does not use.
    #[error("unsupported in the tokenizer file: {0}")]
    Unsupported(String),
    /// The list of token types does not belong to the list of tokens.
    #[error("{num_types} token types for {num_tokens} tokens")]
    TypeCount {
        /// Number of tokens.
        num_tokens: usize,
        /// Number of types.
        num_types: usize,
    },
    /// A token type that has no meaning in a byte-level vocabulary.
    #[error("token {id} has the unknown type {token_type}")]
    UnknownTokenType {
        /// The token.
        id: usize,
        /// Its type.
        token_type: i32,
    },
    /// A token that stands for nothing.
    #[error("token {id} is empty")]
    EmptyToken {
        /// The token.
        id: usize,
    },
    /// Two ids for one text.
    #[error("token `{0}` is listed twice")]
    DuplicateToken(String),
    /// Two texts for one id.
    #[error("tokens `{first}` and `{second}` share the id {id}")]
    DuplicateId {
        /// The id.
        id: TokenId,
        /// One text.
        first: String,
        /// The other text.
        second: String,
    },
    /// The byte-level alphabet has a hole.
    #[error("the vocabulary has no token for byte {0:#04x}")]
    MissingByte(u8),
    /// A merge that is not a pair.
    #[error("merge `{0}` is not a pair of tokens")]
    MalformedMerge(String),
    /// A merge of, or into, something that is not a token.
    #[error("merge `{merge}` needs `{token}`, which is not in the vocabulary")]
    UnknownMergeToken {
        /// The merge.
        merge: String,
        /// What is missing.
        token: String,
    },
    /// `tokenizer.json` is not what it should be.
    #[error("cannot read the tokenizer file")]
    Json(#[from] serde_json::Error),
    /// The merging itself failed.
    #[error("cannot merge tokens")]
    Merge(#[source] tokenizers::Error),
}

/// What decoding does with special tokens such as `<|im_end|>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Leave them out.
    Skip,
    /// Write them like other tokens.
    Keep,
}

/// Turns text into token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    model: BPE,
    pieces: PreTokenizer,
    added_tokens: AddedTokens,
    kinds: Vec<EntryKind>,
    bytes: Vec<u8>,
    starts: Vec<u32>,
}

impl Tokenizer {
    /// Rebuilds the tokenizer that a GGUF file describes.
    pub fn from_spec(spec: TokenizerSpec) -> Result<Self, TokenizerError> {
        Self::new(Vocabulary::from_spec(spec)?)
    }

    /// Reads the content of a `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        Self::new(Vocabulary::from_json(json)?)
    }

    fn new(vocabulary: Vocabulary) -> Result<Self, TokenizerError> {
        let model = BPE::builder()
            .vocab_and_merges(vocabulary.normal, vocabulary.merges)
            // The crate's cache is one map per thread that is never dropped; merging a piece afresh
            // costs about as much as looking it up.
            .cache_capacity(0)
            .build()
            .map_err(TokenizerError::Merge)?;
        Ok(Self {
            model,
            pieces: PreTokenizer::new(),
            added_tokens: AddedTokens::new(vocabulary.added),
            kinds: vocabulary.kinds,
            bytes: vocabulary.bytes,
            starts: vocabulary.starts,
        })
    }

    /// Adds ids that stand for no text, until there are `vocab_size`: a model may know more ids than
    /// its tokenizer has tokens.
    pub fn pad_to(&mut self, vocab_size: usize) {
        let end = self.bytes.len() as u32;
        for _ in self.kinds.len()..vocab_size {
            self.kinds.push(EntryKind::Unused);
            self.starts.push(end);
        }
    }

    /// The ids of `text`, in which added tokens (`<|im_start|>`, `<tool_call>`) are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        for segment in self.added_tokens.split(text) {
            match segment {
                Segment::Text(text) => {
                    self.append_exact(&pre_tokenizer::normalize(text), &mut ids)?;
                }
                Segment::Token(id) => ids.push(id),
            }
        }
        Ok(ids)
    }

    /// The ids of `text` taken literally: what looks like an added token is text like any other.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        self.encode_exact(&pre_tokenizer::normalize(text))
    }

    /// Like [`Self::encode_plain`], but without normalising: the tokens stand for exactly the
    /// bytes of `text`.
    pub fn encode_exact(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.append_exact(text, &mut ids)?;
        Ok(ids)
    }

    fn append_exact(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let mut spelled = String::new();
        self.pieces.visit_pieces(text, |piece| {
            byte_level::spell(piece, &mut spelled);
            let tokens = self.model.tokenize(&spelled).map_err(TokenizerError::Merge)?;
            ids.extend(tokens.into_iter().map(|token| token.id));
            Ok(())
        })
    }

    /// The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids without a text are left out.
    pub fn decode(&self, ids: &[TokenId], special_tokens: SpecialTokens) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.shown_bytes(id, special_tokens));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that `id` adds to decoded text, none for a hidden or unknown token.
    pub(super) fn shown_bytes(&self, id: TokenId, special_tokens: SpecialTokens) -> &[u8] {
        if special_tokens == SpecialTokens::Skip && self.is_special(id) {
            return &[];
        }
        self.token_bytes(id).unwrap_or_default()
    }

    /// The bytes that `id` stands for; `None` for padding and ids outside the vocabulary.
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        let index = id as usize;
        if *self.kinds.get(index)? == EntryKind::Unused {
            return None;
        }
        Some(&self.bytes[self.starts[index] as usize..self.starts[index + 1] as usize])
    }

    /// The text that `id` stands for, U+FFFD where it holds only part of a character.
    pub fn token_text(&self, id: TokenId) -> Option<String> {
        self.token_bytes(id).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    /// Whether `id` is a special token such as `<|im_end|>`.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.kinds.get(id as usize) == Some(&EntryKind::Special)
    }

    /// Whether `id` was added beside the merges, special or not: it is never part of plain text.
    pub fn is_added(&self, id: TokenId) -> bool {
        let kind = self.kinds.get(id as usize);
        matches!(kind, Some(EntryKind::Special | EntryKind::Added))
    }

    /// The id of the token whose whole text is `token`, as in `<|im_end|>` or ` the`.
    pub fn id_of(&self, token: &str) -> Option<TokenId> {
        self.added_tokens.id_of(token).or_else(|| {
            let mut spelled = String::new();
            byte_level::spell(token, &mut spelled);
            self.model.token_to_id(&spelled)
        })
    }

    /// Number of ids, padding included.
    pub fn vocab_size(&self) -> usize {
        self.kinds.len()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// All bytes, a few merges, two special tokens, a visible one and padding.
    pub(crate) fn tiny_spec() -> TokenizerSpec {
        let mut tokens: Vec<String> =
            (0..=u8::MAX).map(|byte| byte_level::char_of(byte).to_string()).collect();
        let merges = ["h e", "l l", "he ll", "Ġ hell", "ä ¸", "ä¸ Ń"];
        tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
        let mut token_types = vec![1; tokens.len()];
        for (token, token_type) in [
            ("<|im_start|>", 3),
            ("<|im_end|>", 3),
            ("<tool_call>", 4),
            ("<|fim_pad|>", 3),
            ("[PAD266]", 5),
        ] {
            tokens.push(token.to_owned());
            token_types.push(token_type);
        }
        TokenizerSpec {
            tokens,
            merges: merges.iter().map(ToString::to_string).collect(),
            token_types,
            pre: "qwen2".to_owned(),
        }
    }

    fn tiny() -> Tokenizer {
        Tokenizer::from_spec(tiny_spec()).unwrap()
    }

    fn error_of(change: impl FnOnce(&mut TokenizerSpec)) -> String {
        let mut spec = tiny_spec();
        change(&mut spec);
        Tokenizer::from_spec(spec).unwrap_err().to_string()
    }

    #[test]
    fn encodes_with_merges_and_added_tokens() {
        let tokenizer = tiny();
        let ids = tokenizer.encode("hello hell<|im_end|>中").unwrap();
        let texts: Vec<_> = ids.iter().map(|&id| tokenizer.token_text(id).unwrap()).collect();
        assert_eq!(texts, ["hell", "o", " hell", "<|im_end|>", "中"]);
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Keep), "hello hell<|im_end|>中");
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Skip), "hello hell中");
    }

    #[test]
    fn plain_encoding_takes_added_tokens_literally() {
        let tokenizer = tiny();
        let text = "<|im_end|><tool_call>";
        let ids = tokenizer.encode_plain(text).unwrap();
        // One token per byte but for `ll`, which is a merge.
        assert_eq!(ids.len(), text.len() - 1);
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Skip), text);
    }

    #[test]
    fn only_control_tokens_that_the_official_tokenizer_hides_are_special() {
        let tokenizer = tiny();
        let is_special = |text| tokenizer.is_special(tokenizer.id_of(text).unwrap());
        assert!(is_special("<|im_start|>"));
        assert!(!is_special("<tool_call>"));
        assert!(!is_special("<|fim_pad|>"));
        assert!(!is_special("a"));
    }

    #[test]
    fn padding_stands_for_no_text() {
        let tokenizer = tiny();
        let padding = tokenizer.vocab_size() as TokenId - 1;
        assert_eq!(tokenizer.token_bytes(padding), None);
        assert_eq!(tokenizer.token_bytes(padding + 1), None);
        assert_eq!(tokenizer.decode(&[padding, padding + 1], SpecialTokens::Keep), "");
        assert_eq!(tokenizer.id_of("[PAD266]"), None);
        assert_eq!(tokenizer.encode("[PAD266]").unwrap().len(), 8);
        let (mut padded, last) = (tiny(), padding - 1);
        padded.pad_to(300);
        padded.pad_to(3);
        assert_eq!(padded.vocab_size(), 300);
        assert_eq!(padded.decode(&[last, 299, 300], SpecialTokens::Keep), "<|fim_pad|>");
    }

    #[test]
    fn inconsistent_metadata_is_an_error_that_names_the_trouble() {
        assert!(
            error_of(|spec| *spec = TokenizerSpec { pre: "qwen2".into(), ..Default::default() })
                .contains("empty")
        );
        assert!(error_of(|spec| spec.pre = "llama-bpe".into()).contains("`llama-bpe`"));
        assert!(error_of(|spec| spec.token_types.truncate(3)).contains("3 token types for 267"));
        assert!(
            error_of(|spec| spec.token_types[7] = 9).contains("token 7 has the unknown type 9")
        );
        assert!(error_of(|spec| spec.tokens[264].clear()).contains("token 264 is empty"));
        assert!(error_of(|spec| spec.tokens[257] = "A".into()).contains("`A` is listed twice"));
        assert!(error_of(|spec| spec.tokens[263] = "<|im_start|>".into()).contains("twice"));
        assert!(error_of(|spec| spec.tokens[65] = "zz".into()).contains("byte 0x41"));
        assert!(error_of(|spec| spec.merges[0] = "he".into()).contains("not a pair"));
        assert!(error_of(|spec| spec.merges[0] = "x yz".into()).contains("needs `yz`"));
        // A result longer than every token of the vocabulary.
        let long = "<|im_start|>";
        assert!(error_of(|spec| spec.merges.push(format!("{long} {long}"))).contains(long));
        assert!(error_of(|spec| spec.merges.push("Ġhell Ġhell".into())).contains("ĠhellĠhell"));
    }

    #[test]
    fn a_broken_tokenizer_file_is_an_error() {
        for json in ["", "{}", "[]", r#"{"model":{"vocab":{"a":4294967295},"merges":[]}}"#] {
            assert!(Tokenizer::from_json(json.as_bytes()).is_err(), "{json}");
        }
    }
}
