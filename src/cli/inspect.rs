//! `qwen-server inspect`: says what is in a model's files.

mod gguf;
mod repository;
mod speed;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use indicatif::HumanBytes;
use serde::Serialize;

use speed::ExpectedSpeed;

use super::find_here;
use super::models::WORKSPACE_BYTES;
use crate::config::RopeScalingChoice;
use crate::models::ModelConfig;
use crate::weights::checkpoint::{Checkpoint, Source};
use crate::weights::gguf::printable;

/// Show what is in a model's files: architecture, quantisation, tensors, tokenizer, memory needed.
///
/// The files are checked as serving them would check them; a damaged one is an error of one line.
#[derive(Clone, Debug, clap::Args)]
pub struct InspectArgs {
    /// A GGUF file, a directory with one or with safetensors, or the name of a model that was
    /// pulled.
    #[arg(value_name = "FILE|DIRECTORY|NAME")]
    pub model: String,

    /// List every tensor.
    #[arg(long)]
    pub tensors: bool,

    /// Do not measure how fast this machine would run it, which takes a second.
    #[arg(long)]
    pub no_speed: bool,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Everything that is shown.
#[derive(Debug, Default, Serialize)]
struct Report {
    files: Vec<PathBuf>,
    num_bytes: u64,
    /// Such as `GGUF version 3`.
    format: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    gguf_version: Option<u32>,
    architecture: String,
    name: Option<String>,
    quantization: String,
    num_parameters: u64,
    num_layers: Option<u32>,
    hidden_size: Option<u32>,
    num_attention_heads: Option<u32>,
    num_key_value_heads: Option<u32>,
    #[serde(skip)]
    head_dim: Option<u32>,
    context_length: Option<u32>,
    kv_cache_bytes_per_token: Option<u64>,
    memory_bytes: u64,
    memory_bytes_full_context: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_speed: Option<ExpectedSpeed>,
    tokenizer: TokenizerSummary,
    tensors_by_type: BTreeMap<&'static str, TypeSummary>,
    metadata: serde_json::Map<String, serde_json::Value>,
    /// The same for people to read.
    #[serde(skip)]
    metadata_lines: Vec<(String, String)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<TensorLine>,
}

#[derive(Debug, Default, Serialize)]
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
    /// Weights of the model that it holds.
    #[serde(skip)]
    num_parameters: u64,
}

/// Runs the command.
pub fn run(args: InspectArgs) -> anyhow::Result<()> {
    let InspectArgs { model, tensors, no_speed, json } = args;
    let checkpoint = Checkpoint::open(&find_here(&model)?.path)?;
    let mut report = report(&checkpoint)?;
    if !no_speed {
        // The files are what was asked about.
        report.expected_speed = expected_speed(&checkpoint, &report).unwrap_or_else(|error| {
            eprintln!("this machine's speed could not be measured: {error:#}");
            None
        });
    }
    if !tensors {
        report.tensors.clear();
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(())
}

/// Of a model that can be run.
fn expected_speed(
    checkpoint: &Checkpoint,
    report: &Report,
) -> anyhow::Result<Option<ExpectedSpeed>> {
    let Ok(config) = ModelConfig::from_checkpoint(checkpoint, RopeScalingChoice::Auto) else {
        return Ok(None);
    };
    let experts = config.experts.map(|experts| (experts.num_experts_per_tok, experts.num_experts));
    speed::expect(&report.tensors, experts)
}

fn report(checkpoint: &Checkpoint) -> anyhow::Result<Report> {
    let mut report = match checkpoint.source() {
        Source::Gguf(gguf) => gguf::report(gguf)?,
        Source::Repository(repository) => repository::report(checkpoint, repository)?,
    };
    report.num_bytes = checkpoint.num_file_bytes();
    report.quantization = checkpoint.quantization();
    let head_dim = match report.head_dim {
        Some(head_dim) => Some(head_dim),
        None => report
            .hidden_size
            .zip(report.num_attention_heads)
            .and_then(|(size, n)| size.checked_div(n)),
    };
    report.num_key_value_heads = report.num_key_value_heads.or(report.num_attention_heads);
    report.kv_cache_bytes_per_token =
        report.num_layers.zip(report.num_key_value_heads).zip(head_dim).map(
            |((layers, heads), head_dim)| {
                let num_values = u64::from(layers).saturating_mul(heads.into());
                num_values.saturating_mul(u64::from(head_dim).saturating_mul(4))
            },
        );
    report.memory_bytes = checkpoint.num_weight_bytes() + WORKSPACE_BYTES;
    report.memory_bytes_full_context =
        report.kv_cache_bytes_per_token.zip(report.context_length).map(|(per_token, length)| {
            report.memory_bytes.saturating_add(per_token.saturating_mul(length.into()))
        });
    for tensor in &report.tensors {
        let summary = report.tensors_by_type.entry(tensor.dtype).or_default();
        summary.num_tensors += 1;
        summary.num_bytes += tensor.num_bytes;
        // An output layer that only repeats the embedding is a copy, so it counts.
        report.num_parameters += tensor.num_parameters;
    }
    Ok(report)
}

fn text(report: &Report) -> String {
    let mut lines: Vec<(&str, String)> = Vec::new();
    for path in &report.files {
        lines.push(("file", path.display().to_string()));
    }
    let size = HumanBytes(report.num_bytes);
    lines.push(("size", format!("{size}, {}", report.format)));
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
    lines.extend(report.expected_speed.iter().map(|speed| ("speed", speed_text(speed))));
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
    for (key, value) in &report.metadata_lines {
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

fn speed_text(speed: &ExpectedSpeed) -> String {
    let rounded = |rate: f64| if rate < 10.0 { format!("{rate:.1}") } else { format!("{rate:.0}") };
    let decode = rounded(speed.decode_tokens_per_second);
    let prefill = rounded(speed.prefill_tokens_per_second);
    format!(
        "up to {decode} tokens/s of one answer, {prefill} of a prompt, while texts are short ({})",
        speed.device
    )
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

    fn open(writer: &Writer) -> (tempfile::TempDir, Checkpoint) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        std::fs::write(&path, writer.build()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        (directory, checkpoint)
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
        let (_directory, checkpoint) = open(&tiny());
        let report = report(&checkpoint).unwrap();
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
        let text = text(&report);
        assert!(text.contains("special        bos = 7, eos = 1 `<|im_end|>`"));
        assert!(text.contains("chat template  present"));
        assert!(!text.contains('\u{1b}'));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["metadata"]["tokenizer.ggml.tokens"]["len"], 2);
        assert_eq!(json["tensors"][0]["shape"], serde_json::json!([2, 4]));
    }

    #[test]
    fn a_file_that_is_no_model_is_an_error() {
        let (_directory, checkpoint) = open(&Writer::new());
        let message = report(&checkpoint).unwrap_err().to_string();
        assert!(message.contains("`general.architecture` is missing"), "{message}");
        let (_directory, checkpoint) = open(
            &Writer::new()
                .string("general.architecture", "x")
                .u32("x.attention.head_count", 0)
                .u32("x.embedding_length", u32::MAX)
                .u32("x.block_count", u32::MAX)
                .u32("x.attention.key_length", u32::MAX)
                .u32("x.context_length", u32::MAX),
        );
        assert!(report(&checkpoint).is_ok());
    }

    #[test]
    fn a_repository_is_shown_like_a_file() {
        let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/hf-sharded");
        let report = report(&Checkpoint::open(&tiny).unwrap()).unwrap();
        assert_eq!((report.files.len(), report.quantization.as_str()), (3, "BF16"));
        assert_eq!(report.kv_cache_bytes_per_token, Some(2 * 64 * 2 * 2));
        assert_eq!(report.tokenizer.special_tokens["eos"].text.as_deref(), Some("<|im_end|>"));
        let text = text(&report);
        for line in [
            "architecture   qwen2",
            "tokenizer      BPE, 288 tokens",
            "chat template  present",
            "  rms_norm_eps = 1e-6",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
