//! Filling in the middle: a prompt of what stands before and after the cursor.
//!
//! Qwen2.5-Coder was trained on `<|fim_prefix|>before<|fim_suffix|>after<|fim_middle|>`, and ends
//! what belongs between with one of the markers of its training data. Source: the FIM example of
//! the Qwen2.5-Coder repository, which also lists the tokens to stop at.

use crate::chat::encoding::{encode, encode_literal};
use crate::chat::model::ServedModel;
use crate::chat::options::{check_refused, refuse_best_of};
use crate::chat::prompt::{Demand, Prepared, PromptContext, PromptError, Settings};
use crate::openai::completion::FimRequest;
use crate::openai::generation::GenerationFields;
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

/// Prepares what belongs at a cursor. Without text behind the cursor it is a plain completion.
pub fn prepare_fim(
    request: &FimRequest,
    fields: &GenerationFields,
    context: &PromptContext<'_>,
) -> Result<Prepared, PromptError> {
    check_refused(fields)?;
    refuse_best_of(fields)?;
    if fields.echo == Some(true) {
        return Err(PromptError::invalid("echo", "is not available here: use /v1/completions"));
    }
    let fill_in = fill_in(request.suffix.as_deref(), fields, context)?;
    let seed = fields.seed.or(request.random_seed);
    let mut settings = Settings::new(&GenerationFields { seed, ..fields.clone() }, None, context)?;
    let ends = context.model.fim.as_ref().map_or(&[][..], FimTokens::ends);
    settings.stop_at(ends, fields);
    let prompt = match &fill_in {
        None => encode(&request.prompt, "prompt", context)?,
        Some(fill_in) => fill_in.wrap(&encode_literal(&request.prompt, "prompt", context)?),
    };
    let max_tokens = request.max_tokens;
    let demand = Demand { max_tokens, default: usize::MAX, param: "max_tokens" };
    let prepared = settings.prepare(prompt, &demand, ("prompt", 0), context)?;
    settings.check_logprobs(std::slice::from_ref(&prepared), fields, 1)?;
    Ok(prepared)
}

/// What is to be filled in, if there is a suffix that is not empty.
pub(super) fn fill_in<'a>(
    suffix: Option<&str>,
    fields: &GenerationFields,
    context: &PromptContext<'a>,
) -> Result<Option<FillIn<'a>>, PromptError> {
    let Some(suffix) = suffix.filter(|suffix| !suffix.is_empty()) else { return Ok(None) };
    if fields.echo == Some(true) {
        return Err(PromptError::invalid("echo", "cannot be combined with `suffix`"));
    }
    FillIn::new(suffix, context).map(Some)
}

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
