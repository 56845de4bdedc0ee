//! `qwen-server inspect`: says what is in a model file.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::bail;
use indicatif::HumanBytes;
use serde::Serialize;

use super::hub_from_environment;
use super::models::WORKSPACE_BYTES;
use crate::weights::gguf::{Gguf, GgufError, Metadata, TensorInfo, Value, dtype_name, printable};
use crate::weights::hub::{Hub, HubError, Reason};
use crate::weights::resolve::{ResolveError, resolve};

/// Show what is in a model file: architecture, quantisation, tensors, tokenizer, memory needed.
///
/// The file is checked as serving it would check it; a damaged one is an error of one line.
#[derive(Clone, Debug, clap::Args)]
pub struct InspectArgs {
    /// A GGUF file or directory, or the name of a model that was pulled.
    #[arg(value_name = "FILE|NAME")]
    pub model: String,

    /// List every tensor.
    #[arg(long)]
    pub tensors: bool,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Everything that is shown.
#[derive(Debug, Serialize)]
struct Report {
    files: Vec<PathBuf>,
    num_bytes: usize,
    gguf_version: u32,
    architecture: String,
    name: Option<String>,
    quantization: String,
    num_parameters: u64,
    num_layers: Option<u32>,
    hidden_size: Option<u32>,
    num_attention_heads: Option<u32>,
    num_key_value_heads: Option<u32>,
    context_length: Option<u32>,
    kv_cache_bytes_per_token: Option<u64>,
    memory_bytes: u64,
    memory_bytes_full_context: Option<u64>,
    tokenizer: TokenizerSummary,
    tensors_by_type: BTreeMap<&'static str, TypeSummary>,
    metadata: serde_json::Map<String, serde_json::Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<TensorLine>,
}

#[derive(Debug, Serialize)]
struct TokenizerSummary {
    kind: Option<String>,
    pre_tokenizer: Option<String>,
    vocab_size: Option<usize>,
    has_chat_template: bool,
    special_tokens: BTreeMap<String, SpecialToken>,
}

#[derive(Debug, Serialize)]
struct SpecialToken {
    id: u32,
    text: Option<String>,
}

#[derive(Debug, Default, Serialize)]
struct TypeSummary {
    num_tensors: usize,
    num_bytes: usize,
}

#[derive(Debug, Serialize)]
struct TensorLine {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    num_bytes: usize,
}

/// Runs the command.
pub fn run(args: InspectArgs) -> anyhow::Result<()> {
    let InspectArgs { model, tensors, json } = args;
    let gguf = Gguf::open(&find(&model)?)?;
    let report = report(&gguf, tensors)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", text(&report, gguf.metadata()));
    }
    Ok(())
}

/// Like `--model`, but never fetches.
fn find(model: &str) -> anyhow::Result<PathBuf> {
    let mut config = hub_from_environment()?.config().clone();
    config.offline = true;
    match resolve(model, &Hub::new(config)?, &mut ()) {
        Ok(resolved) => Ok(resolved.gguf),
        Err(ResolveError::Hub(HubError { reason: Reason::Offline { .. }, .. })) => {
            bail!("`{model}` is not on this machine; `qwen-server pull {model}` fetches it")
        }
        Err(error) => Err(error.into()),
    }
}

fn report(gguf: &Gguf, lists_tensors: bool) -> Result<Report, GgufError> {
    let metadata = gguf.metadata();
    let architecture = metadata.str("general.architecture")?.to_owned();
    let number =
        |suffix: &str| metadata.optional(&format!("{architecture}.{suffix}"), Metadata::u32);
    let num_layers = number("block_count")?;
    let hidden_size = number("embedding_length")?;
    let num_attention_heads = number("attention.head_count")?;
    let num_key_value_heads = number("attention.head_count_kv")?.or(num_attention_heads);
    let context_length = number("context_length")?;
    let head_dim = match number("attention.key_length")? {
        Some(head_dim) => Some(head_dim),
        None => hidden_size.zip(num_attention_heads).and_then(|(size, n)| size.checked_div(n)),
    };
    let kv_cache_bytes_per_token =
        num_layers.zip(num_key_value_heads).zip(head_dim).map(|((layers, heads), head_dim)| {
            let num_values = u64::from(layers).saturating_mul(heads.into());
            num_values.saturating_mul(u64::from(head_dim).saturating_mul(4))
        });
    let memory_bytes = gguf.num_file_bytes() as u64 + WORKSPACE_BYTES;
    let memory_bytes_full_context =
        kv_cache_bytes_per_token.zip(context_length).map(|(per_token, length)| {
            memory_bytes.saturating_add(per_token.saturating_mul(length.into()))
        });
    let mut tensors_by_type: BTreeMap<&'static str, TypeSummary> = BTreeMap::new();
    for tensor in gguf.tensors() {
        let summary = tensors_by_type.entry(dtype_name(tensor.dtype)).or_default();
        summary.num_tensors += 1;
        summary.num_bytes += tensor.num_bytes;
    }
    Ok(Report {
        files: gguf.paths().map(PathBuf::from).collect(),
        num_bytes: gguf.num_file_bytes(),
        gguf_version: gguf.version(),
        name: metadata.optional("general.name", Metadata::str)?.map(str::to_owned),
        quantization: gguf.quantization(),
        num_parameters: num_parameters(gguf),
        num_layers,
        hidden_size,
        num_attention_heads,
        num_key_value_heads,
        context_length,
        kv_cache_bytes_per_token,
        memory_bytes,
        memory_bytes_full_context,
        tokenizer: tokenizer(metadata)?,
        tensors_by_type,
        metadata: metadata.iter().map(|(key, value)| (key.to_owned(), json(value))).collect(),
        tensors: if lists_tensors { tensor_lines(gguf) } else { Vec::new() },
        architecture,
    })
}

/// All values; an output layer that only repeats the embedding is a copy, so it counts.
fn num_parameters(gguf: &Gguf) -> u64 {
    let sizes =
        gguf.tensors().map(|tensor| tensor.shape.iter().map(|&n| n as u64).product::<u64>());
    sizes.sum()
}

fn tensor_lines(gguf: &Gguf) -> Vec<TensorLine> {
    let line = |tensor: &TensorInfo| TensorLine {
        name: tensor.name.clone(),
        dtype: dtype_name(tensor.dtype),
        shape: tensor.shape.clone(),
        num_bytes: tensor.num_bytes,
    };
    gguf.tensors().map(line).collect()
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

fn text(report: &Report, metadata: &Metadata) -> String {
    let mut lines: Vec<(&str, String)> = Vec::new();
    for path in &report.files {
        lines.push(("file", path.display().to_string()));
    }
    let size = HumanBytes(report.num_bytes as u64);
    lines.push(("size", format!("{size}, GGUF version {}", report.gguf_version)));
    lines.extend(report.name.iter().map(|name| ("name", printable(name))));
    lines.push(("architecture", printable(&report.architecture)));
    let billions = report.num_parameters as f64 / 1e9;
    lines.push(("quantisation", report.quantization.clone()));
    lines.push(("parameters", format!("{billions:.2}B stored")));
    let shape = [
        ("layers", report.num_layers),
        ("hidden size", report.hidden_size),
        ("heads", report.num_attention_heads),
        ("KV heads", report.num_key_value_heads),
        ("context", report.context_length),
    ];
    lines.extend(shape.into_iter().filter_map(|(name, n)| Some((name, n?.to_string()))));
    lines.extend(tokenizer_lines(&report.tokenizer));
    lines.push(("memory", memory_text(report)));
    let mut text = String::new();
    for (name, value) in lines {
        writeln!(text, "{name:<14} {value}").expect("writing to a string cannot fail");
    }
    text.push_str("\ntensors\n");
    for (dtype, summary) in &report.tensors_by_type {
        let size = HumanBytes(summary.num_bytes as u64).to_string();
        writeln!(text, "  {dtype:<6}{:>6}  {size:>12}", summary.num_tensors)
            .expect("writing to a string cannot fail");
    }
    for tensor in &report.tensors {
        let TensorLine { name, dtype, shape, .. } = tensor;
        writeln!(text, "  {:<40} {dtype:<6} {shape:?}", printable(name))
            .expect("writing to a string cannot fail");
    }
    text.push_str("\nmetadata\n");
    for (key, value) in metadata.iter() {
        writeln!(text, "  {} = {value}", printable(key)).expect("writing to a string cannot fail");
    }
    text
}

fn tokenizer_lines(tokenizer: &TokenizerSummary) -> Vec<(&'static str, String)> {
    let kind = tokenizer.kind.as_deref().map_or_else(|| "none".to_owned(), printable);
    let pre = tokenizer.pre_tokenizer.as_deref().map(printable);
    let pre = pre.map_or_else(String::new, |pre| format!(", pre-tokenizer {pre}"));
    let size = tokenizer.vocab_size.map_or_else(String::new, |size| format!(", {size} tokens"));
    let template = if tokenizer.has_chat_template { "present" } else { "absent" };
    let special = tokenizer.special_tokens.iter().map(|(name, token)| match &token.text {
        Some(text) => format!("{} = {} `{}`", printable(name), token.id, printable(text)),
        None => format!("{} = {}", printable(name), token.id),
    });
    vec![
        ("tokenizer", format!("{kind}{pre}{size}")),
        ("chat template", template.to_owned()),
        ("special", special.collect::<Vec<_>>().join(", ")),
    ]
}

fn memory_text(report: &Report) -> String {
    let mut text = HumanBytes(report.memory_bytes).to_string();
    if let Some(per_token) = report.kv_cache_bytes_per_token {
        write!(text, " and {} of KV cache per token", HumanBytes(per_token))
            .expect("writing to a string cannot fail");
    }
    if let Some(full) = report.memory_bytes_full_context {
        write!(text, "; {} for one sequence of full length", HumanBytes(full))
            .expect("writing to a string cannot fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::gguf::writer::Writer;

    fn open(writer: &Writer) -> (tempfile::TempDir, Gguf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        std::fs::write(&path, writer.build()).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        (directory, gguf)
    }

    fn tiny() -> Writer {
        Writer::new()
            .string("general.architecture", "qwen2")
            .string("general.name", "evil\u{1b}[2J\nname")
            .u32("general.file_type", 15)
            .u32("qwen2.block_count", 2)
            .u32("qwen2.embedding_length", 128)
            .u32("qwen2.attention.head_count", 2)
            .u32("qwen2.attention.head_count_kv", 1)
            .u32("qwen2.context_length", 1000)
            .string("tokenizer.ggml.model", "gpt2")
            .string("tokenizer.ggml.pre", "qwen2")
            .strings("tokenizer.ggml.tokens", &["a", "<|im_end|>"])
            .u32("tokenizer.ggml.eos_token_id", 1)
            .u32("tokenizer.ggml.bos_token_id", 7)
            .string("tokenizer.chat_template", "{{ x }}")
            .tensor("t", &[4, 2], 0, &[0; 32])
            .tensor("u", &[4], 1, &[0; 8])
    }

    #[test]
    fn the_report_says_what_is_inside() {
        let (_directory, gguf) = open(&tiny());
        let report = report(&gguf, true).unwrap();
        assert_eq!(report.quantization, "Q4_K_M");
        assert_eq!(report.num_parameters, 12);
        // Two layers, one head of 64, keys and values of two bytes.
        assert_eq!(report.kv_cache_bytes_per_token, Some(2 * 64 * 2 * 2));
        assert_eq!(
            report.memory_bytes_full_context,
            Some(report.memory_bytes + 1000 * 2 * 64 * 2 * 2)
        );
        assert_eq!(report.tensors_by_type["F32"].num_bytes, 32);
        let special = &report.tokenizer.special_tokens;
        assert_eq!(special["eos"].text.as_deref(), Some("<|im_end|>"));
        assert_eq!((special["bos"].id, special["bos"].text.as_deref()), (7, None));
        let text = text(&report, gguf.metadata());
        assert!(text.contains("special        bos = 7, eos = 1 `<|im_end|>`"));
        assert!(text.contains("chat template  present"));
        assert!(!text.contains('\u{1b}'));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["metadata"]["tokenizer.ggml.tokens"]["len"], 2);
        assert_eq!(json["tensors"][0]["shape"], serde_json::json!([2, 4]));
    }

    #[test]
    fn a_file_that_is_no_model_is_an_error() {
        let (_directory, gguf) = open(&Writer::new());
        let message = report(&gguf, false).unwrap_err().to_string();
        assert!(message.contains("`general.architecture` is missing"), "{message}");
        let (_directory, gguf) = open(
            &Writer::new()
                .string("general.architecture", "x")
                .u32("x.attention.head_count", 0)
                .u32("x.embedding_length", u32::MAX)
                .u32("x.block_count", u32::MAX)
                .u32("x.attention.key_length", u32::MAX)
                .u32("x.context_length", u32::MAX),
        );
        assert!(report(&gguf, false).is_ok());
    }
}
