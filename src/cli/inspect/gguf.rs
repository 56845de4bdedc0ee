//! What a GGUF file's metadata says.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{Report, SpecialToken, TensorLine, TokenizerSummary};
use crate::weights::gguf::{Gguf, GgufError, Metadata, TensorInfo, Value, dtype_name};

pub(super) fn report(gguf: &Gguf) -> Result<Report, GgufError> {
    let metadata = gguf.metadata();
    let architecture = metadata.str("general.architecture")?.to_owned();
    let number =
        |suffix: &str| metadata.optional(&format!("{architecture}.{suffix}"), Metadata::u32);
    Ok(Report {
        files: gguf.paths().map(PathBuf::from).collect(),
        format: format!("GGUF version {}", gguf.version()),
        gguf_version: Some(gguf.version()),
        name: metadata.optional("general.name", Metadata::str)?.map(str::to_owned),
        num_layers: number("block_count")?,
        hidden_size: number("embedding_length")?,
        num_attention_heads: number("attention.head_count")?,
        num_key_value_heads: number("attention.head_count_kv")?,
        head_dim: number("attention.key_length")?,
        context_length: number("context_length")?,
        tokenizer: tokenizer(metadata)?,
        metadata: metadata.iter().map(|(key, value)| (key.to_owned(), json(value))).collect(),
        metadata_lines: metadata
            .iter()
            .map(|(key, value)| (key.to_owned(), value.to_string()))
            .collect(),
        tensors: gguf.tensors().map(line).collect(),
        architecture,
        ..Report::default()
    })
}

fn line(tensor: &TensorInfo) -> TensorLine {
    TensorLine {
        name: tensor.name.clone(),
        dtype: dtype_name(tensor.dtype),
        shape: tensor.shape.clone(),
        num_bytes: tensor.num_bytes,
        num_parameters: tensor.shape.iter().map(|&n| n as u64).product(),
    }
}

fn tokenizer(metadata: &Metadata) -> Result<TokenizerSummary, GgufError> {
    const PREFIX: &str = "tokenizer.ggml.";
    const SUFFIX: &str = "_token_id";
    let text =
        |key: &str| metadata.optional(key, Metadata::str).map(|found| found.map(str::to_owned));
    let tokens = metadata.optional("tokenizer.ggml.tokens", Metadata::strings)?;
    let mut special_tokens = BTreeMap::new();
    for (key, _) in metadata.iter() {
        let name = key.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
        if let Some(name) = name {
            let id = metadata.u32(key)?;
            let text = tokens.as_ref().and_then(|tokens| tokens.get(id as usize)).cloned();
            special_tokens.insert(name.to_owned(), SpecialToken { id, text });
        }
    }
    Ok(TokenizerSummary {
        kind: text("tokenizer.ggml.model")?,
        pre_tokenizer: text("tokenizer.ggml.pre")?,
        vocab_size: tokens.map(|tokens| tokens.len()),
        has_chat_template: metadata.contains("tokenizer.chat_template"),
        special_tokens,
    })
}

/// A value as JSON; arrays only say what they hold.
fn json(value: &Value) -> serde_json::Value {
    match value {
        Value::Unsigned(number) => (*number).into(),
        Value::Signed(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Bool(value) => (*value).into(),
        Value::String(text) => text.as_str().into(),
        Value::Array { element, len, .. } => {
            serde_json::json!({ "array_of": element.to_string(), "len": len })
        }
    }
}
