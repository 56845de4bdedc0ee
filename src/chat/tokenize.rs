//! Tokens for a text or a conversation, and back, without generating anything.

use crate::chat::encoding::encode;
use crate::chat::messages::is_partial;
use crate::chat::options::check_token_ids;
use crate::chat::prompt::{PromptContext, PromptError, render, render_options};
use crate::chat::tools::read_tools;
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
            let is_partial = is_partial(messages)?.then_some(true);
            let options = render_options(
                request.add_generation_prompt,
                request.continue_final_message.or(is_partial),
                request.chat_template_kwargs.as_ref(),
            )?;
            let tools = request.tools.as_deref().unwrap_or_default();
            read_tools(tools)?;
            let tools = (!tools.is_empty()).then(|| tools.to_vec().into());
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

/// How the vocabulary spells a token: byte by byte, a printable character for each.
fn token_spelling(id: TokenId, context: &PromptContext<'_>) -> String {
    let bytes = context.model.tokenizer.token_bytes(id).unwrap_or_default();
    bytes.iter().map(|byte| byte_level_char(*byte)).collect()
}

/// The byte-level alphabet: printable Latin-1 stands for itself, the others in order for the
/// characters from U+0100 on.
pub(super) fn byte_level_char(byte: u8) -> char {
    let offset = match byte {
        0..=0x20 => 0x100,
        0x7f..=0xa0 => 0x121 - 0x7f,
        0xad => 0x143 - 0xad,
        _ => 0,
    };
    char::from_u32(u32::from(byte) + offset).expect("code points below 0x144 are characters")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spelled_as_in_the_vocabulary() {
        let spelled: String =
            [b' ', b'\n', b'a', 0x7f, 0xa0, 0xad, 0xff].map(byte_level_char).iter().collect();
        assert_eq!(spelled, "\u{120}\u{10a}a\u{121}\u{142}\u{143}\u{ff}");
    }
}
