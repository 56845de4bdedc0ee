//! Tokens for a text or a conversation, and back, without generating anything.

use crate::chat::messages::checked_tools;
use crate::chat::options::check_token_ids;
use crate::chat::prompt::{PromptContext, PromptError, encode, render, render_options};
use crate::openai::tokenize::{
    DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse,
};
use crate::text::TokenId;

/// The tokens of a text, or of a conversation as a chat completion would send it to the model.
pub fn tokenize(
    request: &TokenizeRequest,
    context: &PromptContext<'_>,
) -> Result<TokenizeResponse, PromptError> {
    let tokens = match (&request.prompt, &request.messages) {
        (Some(_), Some(_)) => {
            return Err(PromptError::invalid("messages", "cannot be combined with `prompt`"));
        }
        (None, None) => {
            return Err(PromptError::invalid("prompt", "is missing: give `prompt` or `messages`"));
        }
        (Some(text), None) if text.is_empty() => Vec::new(),
        (Some(text), None) => encode(text, "prompt", context)?,
        (None, Some(messages)) => {
            let options = render_options(
                request.add_generation_prompt,
                request.continue_final_message,
                request.chat_template_kwargs.as_ref(),
            )?;
            let tools = checked_tools(request.tools.as_deref())?;
            let text = render(messages, tools.as_ref(), &options, context.model)?;
            encode(&text, "messages", context)?
        }
    };
    let token_strs = (request.return_token_strs == Some(true))
        .then(|| tokens.iter().map(|id| token_spelling(*id, context)).collect());
    Ok(TokenizeResponse {
        count: tokens.len(),
        max_model_len: context.limits.max_model_len,
        tokens,
        token_strs,
    })
}

/// The text of tokens, special ones included.
pub fn detokenize(
    request: &DetokenizeRequest,
    context: &PromptContext<'_>,
) -> Result<DetokenizeResponse, PromptError> {
    check_token_ids("tokens", &request.tokens, &context.limits)?;
    Ok(DetokenizeResponse { prompt: context.model.decode_all(&request.tokens) })
}

/// How the vocabulary spells a token.
fn token_spelling(id: TokenId, context: &PromptContext<'_>) -> String {
    context.model.tokenizer.token_text(id).map(ToString::to_string).unwrap_or_default()
}
