//! What a model's files say about text: tokenizer, chat template, when to stop, how to sample.

mod gguf;
mod repository;

use anyhow::Result;

use crate::chat::template::TemplateTokens;
use crate::sampling::params::GenerationDefaults;
use crate::text::{TokenId, Tokenizer};
use crate::weights::checkpoint::Source;

/// Tokens with which Qwen's models end a turn or a document. GGUF files name only one of them as
/// their end of sequence, the releases' `generation_config.json` names both.
const END_TOKENS: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

/// The text side of a model, the same whatever its files are.
pub(super) struct TextSide {
    pub(super) tokenizer: Tokenizer,
    /// The source of the chat template.
    pub(super) template: Option<String>,
    pub(super) template_tokens: TemplateTokens,
    /// Ascending; at least one.
    pub(super) eos_token_ids: Vec<TokenId>,
    /// What the files call the model.
    pub(super) names: Vec<String>,
    /// How the files want to be sampled from, if they say.
    pub(super) generation: Option<GenerationDefaults>,
}

impl TextSide {
    /// Reads it from files whose model has so many tokens.
    ///
    /// # Errors
    /// If there is no usable tokenizer, or something is said that cannot be followed.
    pub(super) fn read(source: &Source, vocab_size: usize) -> Result<Self> {
        match source {
            Source::Gguf(gguf) => gguf::read(gguf),
            Source::Repository(repository) => repository::read(repository, vocab_size),
        }
    }
}

/// The end tokens that a vocabulary has.
fn usual_end_tokens(tokenizer: &Tokenizer) -> impl Iterator<Item = TokenId> {
    END_TOKENS.iter().filter_map(|token| tokenizer.id_of(token))
}

/// In order, each once.
fn sorted(mut ids: Vec<TokenId>) -> Vec<TokenId> {
    ids.sort_unstable();
    ids.dedup();
    ids
}
