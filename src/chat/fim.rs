//! Filling in the middle: a prompt of what stands before and after the cursor.
//!
//! Qwen2.5-Coder was trained on `<|fim_prefix|>before<|fim_suffix|>after<|fim_middle|>`, and ends
//! what belongs between with one of the markers of its training data. Source: the FIM example of
//! the Qwen2.5-Coder repository, which also lists the tokens to stop at.

use crate::chat::model::ServedModel;
use crate::chat::prompt::{PromptContext, PromptError, encode_literal};
use crate::text::{TokenId, Tokenizer};

/// Markers of the training data that end a middle, beside the end of the document.
const ENDS: [&str; 6] = [
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// The tokens with which a model is asked to fill in the middle.
#[derive(Clone, Debug)]
pub struct FimTokens {
    prefix: TokenId,
    suffix: TokenId,
    middle: TokenId,
    ends: Vec<TokenId>,
}

impl FimTokens {
    /// The tokens, if the vocabulary has them.
    pub fn find(tokenizer: &Tokenizer) -> Option<Self> {
        Some(Self {
            prefix: tokenizer.id_of("<|fim_prefix|>")?,
            suffix: tokenizer.id_of("<|fim_suffix|>")?,
            middle: tokenizer.id_of("<|fim_middle|>")?,
            ends: ENDS.iter().filter_map(|token| tokenizer.id_of(token)).collect(),
        })
    }

    /// Drawing one of these ends a middle.
    pub(super) fn ends(&self) -> &[TokenId] {
        &self.ends
    }
}

/// What stands after the cursor, ready to be put around prompts.
pub(super) struct FillIn<'a> {
    tokens: &'a FimTokens,
    suffix: Vec<TokenId>,
}

impl<'a> FillIn<'a> {
    /// Refuses models that never learned it: they would ramble on behind the markers.
    pub(super) fn new(suffix: &str, context: &PromptContext<'a>) -> Result<Self, PromptError> {
        let tokens = fim_tokens(context.model)?;
        Ok(Self { tokens, suffix: encode_literal(suffix, "suffix", context)? })
    }

    /// The prompt that asks for what belongs between `prefix` and the suffix.
    pub(super) fn wrap(&self, prefix: &[TokenId]) -> Vec<TokenId> {
        let FimTokens { prefix: before, suffix: after, middle, .. } = *self.tokens;
        [&[before], prefix, &[after], &self.suffix, &[middle]].concat()
    }

    /// Drawing one of these ends the middle.
    pub(super) fn ends(&self) -> &'a [TokenId] {
        self.tokens.ends()
    }
}

fn fim_tokens(model: &ServedModel) -> Result<&FimTokens, PromptError> {
    model.fim.as_ref().ok_or_else(|| {
        PromptError::invalid(
            "suffix",
            "this model was not trained to fill in the middle: serve a Qwen2.5-Coder model, or \
             leave `suffix` away",
        )
    })
}
