//! Reading a vocabulary from GGUF metadata or `tokenizer.json` into one checked form.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use tokenizers::models::bpe::{Merges, Vocab};

use super::TokenId;
use super::byte_level;
use super::pre_tokenizer::PUBLISHED_PATTERN;
use super::tokenizer::{TokenizerError, TokenizerSpec};

/// Added tokens that GGUF files mark as control tokens because they look like ones, while the
/// official tokenizers do not treat them as special: they stay visible in decoded text.
const VISIBLE_CONTROL_TOKENS: [&str; 12] = [
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
];

/// No vocabulary of the family comes near this; a `tokenizer.json` may not make us allocate more.
const MAX_VOCAB_SIZE: usize = 1 << 22;

/// What an entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// Made by merges from the byte-level alphabet.
    Normal,
    /// Added beside the merges, hidden in decoded text on request.
    Special,
    /// Added beside the merges, always visible.
    Added,
    /// Padding of the embedding matrix; stands for no text.
    Unused,
}

/// A vocabulary whose parts fit together.
pub(super) struct Vocabulary {
    /// The model's own tokens, in the byte-level alphabet.
    pub(super) normal: Vocab,
    /// Pairs in order of priority; both sides and the result are in `normal`.
    pub(super) merges: Merges,
    /// Added tokens by content.
    pub(super) added: Vec<(String, TokenId)>,
    /// One for every id.
    pub(super) kinds: Vec<EntryKind>,
    /// The bytes of all tokens end to end.
    pub(super) bytes: Vec<u8>,
    /// Token `i` is `bytes[starts[i]..starts[i + 1]]`.
    pub(super) starts: Vec<u32>,
}

impl Vocabulary {
    /// From GGUF metadata.
    pub(super) fn from_spec(spec: TokenizerSpec) -> Result<Self, TokenizerError> {
        if spec.pre != "qwen2" {
            return Err(TokenizerError::UnsupportedPreTokenizer(spec.pre));
        }
        if spec.token_types.len() != spec.tokens.len() {
            return Err(TokenizerError::TypeCount {
                num_tokens: spec.tokens.len(),
                num_types: spec.token_types.len(),
            });
        }
        let mut entries = Vec::with_capacity(spec.tokens.len());
        for (id, (text, token_type)) in spec.tokens.into_iter().zip(spec.token_types).enumerate() {
            let kind = match token_type {
                1 => EntryKind::Normal,
                3 if VISIBLE_CONTROL_TOKENS.contains(&text.as_str()) => EntryKind::Added,
                3 => EntryKind::Special,
                4 => EntryKind::Added,
                5 => EntryKind::Unused,
                _ => return Err(TokenizerError::UnknownTokenType { id, token_type }),
            };
            entries.push((text, kind));
        }
        let merges = spec
            .merges
            .iter()
            .map(|merge| match merge.split_once(' ') {
                Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
                None => Err(TokenizerError::MalformedMerge(merge.clone())),
            })
            .collect::<Result<Merges, _>>()?;
        Self::check(entries, merges)
    }

    /// From the text of a `tokenizer.json`.
    pub(super) fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let (entries, merges) = Self::entries_from_json(json)?;
        Self::check(entries, merges)
    }

    /// Tokens with their kinds in the order of their ids, and merges, not yet checked.
    fn entries_from_json(
        json: &[u8],
    ) -> Result<(Vec<(String, EntryKind)>, Merges), TokenizerError> {
        let file: TokenizerFile = serde_json::from_slice(json)?;
        file.check_pipeline()?;
        let ids = file.model.vocab.values().chain(file.added_tokens.iter().map(|added| &added.id));
        let vocab_size = ids.max().map_or(0, |&max| max as usize + 1);
        if MAX_VOCAB_SIZE < vocab_size {
            return Err(TokenizerError::Unsupported(format!("{vocab_size} tokens")));
        }
        let mut entries = vec![(String::new(), EntryKind::Unused); vocab_size];
        for (text, id) in file.model.vocab {
            fill(&mut entries, id, (text, EntryKind::Normal))?;
        }
        for added in file.added_tokens {
            added.check()?;
            let kind = if added.special { EntryKind::Special } else { EntryKind::Added };
            fill(&mut entries, added.id, (added.content, kind))?;
        }
        let merges = file
            .model
            .merges
            .into_iter()
            .map(|merge| match merge {
                MergeEntry::Pair(left, right) => Ok((left, right)),
                MergeEntry::Text(text) => match text.split_once(' ') {
                    Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
                    None => Err(TokenizerError::MalformedMerge(text)),
                },
            })
            .collect::<Result<Merges, _>>()?;
        Ok((entries, merges))
    }

    fn check(entries: Vec<(String, EntryKind)>, merges: Merges) -> Result<Self, TokenizerError> {
        if entries.is_empty() {
            return Err(TokenizerError::EmptyVocabulary);
        }
        let mut vocabulary = Self {
            normal: Vocab::default(),
            merges,
            added: Vec::new(),
            kinds: Vec::with_capacity(entries.len()),
            bytes: Vec::new(),
            starts: Vec::with_capacity(entries.len() + 1),
        };
        let mut added_texts = HashSet::new();
        for (id, (text, kind)) in entries.into_iter().enumerate() {
            vocabulary.starts.push(vocabulary.bytes.len() as u32);
            vocabulary.kinds.push(kind);
            if kind == EntryKind::Unused {
                continue;
            }
            if text.is_empty() {
                return Err(TokenizerError::EmptyToken { id });
            }
            if kind == EntryKind::Normal {
                byte_level::append_bytes(&text, &mut vocabulary.bytes);
                if vocabulary.normal.contains_key(&text) {
                    return Err(TokenizerError::DuplicateToken(text));
                }
                vocabulary.normal.insert(text, id as TokenId);
            } else {
                vocabulary.bytes.extend_from_slice(text.as_bytes());
                if !added_texts.insert(text.clone()) {
                    return Err(TokenizerError::DuplicateToken(text));
                }
                vocabulary.added.push((text, id as TokenId));
            }
        }
        vocabulary.starts.push(vocabulary.bytes.len() as u32);
        vocabulary.check_alphabet()?;
        vocabulary.check_merges()?;
        Ok(vocabulary)
    }

    /// Without a token for every byte some text would silently vanish.
    fn check_alphabet(&self) -> Result<(), TokenizerError> {
        let mut spelled = String::new();
        for byte in 0..=u8::MAX {
            spelled.clear();
            spelled.push(byte_level::char_of(byte));
            if !self.normal.contains_key(&spelled) {
                return Err(TokenizerError::MissingByte(byte));
            }
        }
        Ok(())
    }

    fn check_merges(&self) -> Result<(), TokenizerError> {
        let mut merged = String::new();
        for (left, right) in &self.merges {
            merged.clear();
            merged.push_str(left);
            merged.push_str(right);
            for token in [left, right, &merged] {
                if !self.normal.contains_key(token) {
                    return Err(TokenizerError::UnknownMergeToken {
                        merge: format!("{left} {right}"),
                        token: token.clone(),
                    });
                }
            }
        }
        Ok(())
    }
}

impl TokenizerSpec {
    /// What a GGUF file would say of the tokenizer in a `tokenizer.json`, padded to a vocabulary.
    ///
    /// # Errors
    /// As [`super::Tokenizer::from_json`], for what concerns the list of tokens.
    pub fn from_json(json: &[u8], vocab_size: usize) -> Result<Self, TokenizerError> {
        let (mut entries, merges) = Vocabulary::entries_from_json(json)?;
        let padding = (String::new(), EntryKind::Unused);
        entries.resize(vocab_size.max(entries.len()), padding);
        let mut spec = Self { pre: "qwen2".to_owned(), ..Self::default() };
        for (id, (text, kind)) in entries.into_iter().enumerate() {
            let (text, token_type) = match kind {
                EntryKind::Normal => (text, 1),
                EntryKind::Special => (text, 3),
                EntryKind::Added => (text, 4),
                EntryKind::Unused => (format!("[PAD{id}]"), 5),
            };
            spec.tokens.push(text);
            spec.token_types.push(token_type);
        }
        spec.merges = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
        Ok(spec)
    }
}

/// Puts an entry at its id. Two tokens with one id contradict each other, unless they are the same
/// token, listed as part of the model and as an added one.
fn fill(
    entries: &mut [(String, EntryKind)],
    id: TokenId,
    entry: (String, EntryKind),
) -> Result<(), TokenizerError> {
    let place = &mut entries[id as usize];
    if place.1 != EntryKind::Unused && place.0 != entry.0 {
        return Err(TokenizerError::DuplicateId { id, first: place.0.clone(), second: entry.0 });
    }
    *place = entry;
    Ok(())
}

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedTokenEntry>,
    normalizer: Option<serde_json::Value>,
    pre_tokenizer: Option<serde_json::Value>,
    #[serde(default)]
    post_processor: serde_json::Value,
    #[serde(default)]
    decoder: serde_json::Value,
    model: ModelEntry,
}

#[derive(Deserialize)]
struct AddedTokenEntry {
    id: TokenId,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    special: bool,
}

#[derive(Deserialize)]
struct ModelEntry {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, TokenId>,
    merges: Vec<MergeEntry>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum MergeEntry {
    Text(String),
    Pair(String, String),
}

impl TokenizerFile {
    /// Refuses a file that describes another pipeline than ours.
    fn check_pipeline(&self) -> Result<(), TokenizerError> {
        let unsupported = |what: &str| Err(TokenizerError::Unsupported(what.to_owned()));
        if self.model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
            return unsupported("a model other than BPE");
        }
        if self.model.byte_fallback || self.model.ignore_merges {
            return unsupported("byte_fallback or ignore_merges");
        }
        if self.model.dropout.is_some_and(|dropout| dropout != 0.0) {
            return unsupported("a BPE model with dropout");
        }
        let affixes = [&self.model.continuing_subword_prefix, &self.model.end_of_word_suffix];
        if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
            return unsupported("continuing_subword_prefix or end_of_word_suffix");
        }
        for (part, value) in [("post-processor", &self.post_processor), ("decoder", &self.decoder)]
        {
            if !value.is_null() && value["type"] != "ByteLevel" {
                return unsupported(&format!("a {part} other than ByteLevel"));
            }
        }
        let normalizer = self.normalizer.as_ref().and_then(|value| value["type"].as_str());
        if normalizer != Some("NFC") {
            return unsupported("a normalizer other than NFC");
        }
        let Some(pre_tokenizer) = &self.pre_tokenizer else {
            return unsupported("no pre-tokenizer");
        };
        let split = &pre_tokenizer["pretokenizers"][0];
        let byte_level = &pre_tokenizer["pretokenizers"][1];
        let num_parts = pre_tokenizer["pretokenizers"].as_array().map(Vec::len);
        let is_ours = num_parts == Some(2)
            && split["pattern"]["Regex"] == PUBLISHED_PATTERN
            && split["behavior"] == "Isolated"
            && split["invert"] == false
            && byte_level["type"] == "ByteLevel"
            && byte_level["add_prefix_space"] == false
            && byte_level["use_regex"] == false;
        if is_ours { Ok(()) } else { unsupported("a pre-tokenizer other than Qwen2's") }
    }
}

impl AddedTokenEntry {
    fn check(&self) -> Result<(), TokenizerError> {
        if self.single_word || self.lstrip || self.rstrip || self.normalized {
            let content = &self.content;
            return Err(TokenizerError::Unsupported(format!("the flags of `{content}`")));
        }
        Ok(())
    }
}
