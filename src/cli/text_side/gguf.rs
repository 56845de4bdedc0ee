//! The text side in the metadata of a GGUF file.

use anyhow::{Context, Result};

use super::{TextSide, sorted, usual_end_tokens};
use crate::chat::template::TemplateTokens;
use crate::text::{Tokenizer, TokenizerSpec};
use crate::weights::gguf::{Gguf, GgufError, Metadata};

pub(super) fn read(gguf: &Gguf) -> Result<TextSide> {
    let metadata = gguf.metadata();
    let tokenizer =
        Tokenizer::from_spec(tokenizer_spec(metadata)?).context("the tokenizer is unusable")?;
    let text_of = |key: &str| tokenizer.token_text(metadata.u32(key).ok()?);
    let template_tokens = TemplateTokens {
        bos_token: text_of("tokenizer.ggml.bos_token_id"),
        eos_token: text_of("tokenizer.ggml.eos_token_id"),
    };
    let stated = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    let stated = stated.iter().filter_map(|key| metadata.u32(key).ok());
    let eos_token_ids = sorted(stated.chain(usual_end_tokens(&tokenizer)).collect());
    let template = metadata.optional("tokenizer.chat_template", Metadata::str)?;
    let names = ["general.name", "general.basename"];
    Ok(TextSide {
        template: template.map(str::to_owned),
        template_tokens,
        eos_token_ids,
        names: names.iter().filter_map(|key| metadata.str(key).ok()).map(str::to_owned).collect(),
        generation: None,
        tokenizer,
    })
}

fn tokenizer_spec(metadata: &Metadata) -> Result<TokenizerSpec, GgufError> {
    Ok(TokenizerSpec {
        tokens: metadata.strings("tokenizer.ggml.tokens")?,
        merges: metadata.strings("tokenizer.ggml.merges")?,
        token_types: metadata.i32s("tokenizer.ggml.token_type")?,
        pre: metadata.str("tokenizer.ggml.pre")?.to_owned(),
    })
}
