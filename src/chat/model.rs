//! What the server knows about the model it serves, apart from the weights.

use std::sync::Arc;

use crate::chat::fim::FimTokens;
use crate::chat::template::ChatTemplate;
use crate::chat::tool_call::{BareToolCalls, ToolCallFormat};
pub use crate::config::NamePattern;
use crate::engine::request::{GenerationDefaults, Pooling};
use crate::grammar::GrammarCompiler;
use crate::text::{TokenId, Tokenizer};

/// The text side of the served model.
pub struct ServedModel {
    /// The name in answers and the first entry of `/v1/models`.
    pub name: String,
    /// Further names that requests may use.
    pub aliases: Vec<String>,
    /// Further names, in which `*` stands for any text. They are not listed.
    pub patterns: Vec<NamePattern>,
    /// Where the model came from (`root` in `/v1/models`).
    pub root: String,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Compiles what outputs must look like.
    pub grammars: GrammarCompiler,
    /// Its chat template; a base model may have none.
    pub template: Option<ChatTemplate>,
    /// Tokens that end a sequence unless `ignore_eos` is set.
    pub eos_token_ids: Vec<TokenId>,
    /// How to ask it for what stands at the cursor, if it learned that.
    pub fim: Option<FimTokens>,
    /// What its embeddings are made of.
    pub pooling: Pooling,
    /// How many numbers an embedding has.
    pub embedding_size: usize,
    /// Sampling defaults of the model's `generation_config`, used where a request is silent.
    pub sampling_defaults: GenerationDefaults,
    /// How it writes its answers.
    pub conventions: Conventions,
}

/// How a model writes its answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conventions {
    /// How it calls tools.
    pub tool_calls: ToolCallFormat,
    /// What a call without tags is.
    pub bare_tool_calls: BareToolCalls,
    /// Whether it reasons before it answers.
    pub reasoning: Reasoning,
}

/// Whether a model reasons before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reasoning {
    /// It does not: `<think>` is text like any other.
    #[default]
    No,
    /// In `<think>` tags.
    InTags,
}

impl ServedModel {
    /// Whether `name` addresses this model.
    pub fn answers_to(&self, name: &str) -> bool {
        self.names().any(|known| known == name)
            || self.patterns.iter().any(|pattern| pattern.matches(name))
    }

    /// All names, the primary one first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str()).chain(self.aliases.iter().map(String::as_str))
    }
}
