//! What requests call a prompt, as tokens.

use crate::chat::fim::FillIn;
use crate::chat::options::check_token_ids;
use crate::chat::prompt::{PromptContext, PromptError};
use crate::openai::completion::Prompt;
use crate::text::TokenId;

/// No token of the vocabulary stands for more bytes than this, so a longer text cannot fit and is
/// not worth encoding.
const MAX_BYTES_PER_TOKEN: usize = 256;

/// Encodes a text, which must yield at least one token.
pub(super) fn encode(
    text: &str,
    param: &'static str,
    context: &PromptContext<'_>,
) -> Result<Vec<TokenId>, PromptError> {
    check_num_bytes(text, param, context)?;
    let tokens = context.model.tokenizer.encode(text);
    let tokens = tokens.map_err(|error| PromptError::Encode(error.to_string()))?;
    if tokens.is_empty() {
        return Err(PromptError::invalid(param, "must not be empty"));
    }
    Ok(tokens)
}

/// Encodes a text, which may be empty, and in which nothing is a special token.
pub(super) fn encode_literal(
    text: &str,
    param: &'static str,
    context: &PromptContext<'_>,
) -> Result<Vec<TokenId>, PromptError> {
    check_num_bytes(text, param, context)?;
    let tokens = context.model.tokenizer.encode_plain(text);
    tokens.map_err(|error| PromptError::Encode(error.to_string()))
}

fn check_num_bytes(
    text: &str,
    param: &'static str,
    context: &PromptContext<'_>,
) -> Result<(), PromptError> {
    let max_model_len = context.limits.max_model_len;
    if max_model_len.saturating_mul(MAX_BYTES_PER_TOKEN) < text.len() {
        return Err(PromptError::TooLong {
            param,
            message: format!(
                "This model's maximum context length is {max_model_len} tokens. However, your \
                 {param} has {} bytes, more than that many tokens can hold.",
                text.len()
            ),
        });
    }
    Ok(())
}

/// Tokens, and the text they were made of.
pub(super) type PromptText = (Vec<TokenId>, Option<String>);

/// The prompts of a completion.
pub(super) fn split_prompts(
    prompt: &Prompt,
    fill_in: Option<&FillIn<'_>>,
    context: &PromptContext<'_>,
) -> Result<Vec<PromptText>, PromptError> {
    let encode_text = |text: &String| {
        let tokens = match fill_in {
            None => encode(text, "prompt", context)?,
            Some(fill_in) => fill_in.wrap(&encode_literal(text, "prompt", context)?),
        };
        Ok((tokens, Some(text.clone())))
    };
    let check_ids = |ids: &Vec<TokenId>, param: &str| {
        if ids.is_empty() {
            return Err(PromptError::invalid(param, "must not be empty"));
        }
        check_token_ids(param, ids, &context.limits)?;
        Ok((fill_in.map_or_else(|| ids.clone(), |fill_in| fill_in.wrap(ids)), None))
    };
    let count = match prompt {
        Prompt::Texts(texts) => texts.len(),
        Prompt::TokenLists(lists) => lists.len(),
        Prompt::Text(_) | Prompt::Tokens(_) => 1,
    };
    if count < 1 || context.limits.max_prompts < count {
        return Err(PromptError::invalid(
            "prompt",
            format!("must hold between 1 and {} prompts, got {count}", context.limits.max_prompts),
        ));
    }
    match prompt {
        Prompt::Text(text) => Ok(vec![encode_text(text)?]),
        Prompt::Texts(texts) => texts.iter().map(encode_text).collect(),
        Prompt::Tokens(ids) => Ok(vec![check_ids(ids, "prompt")?]),
        Prompt::TokenLists(lists) => lists
            .iter()
            .enumerate()
            .map(|(index, ids)| check_ids(ids, &format!("prompt[{index}]")))
            .collect(),
    }
}
