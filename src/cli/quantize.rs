//! `qwen-server quantize`: writes a repository's weights into a GGUF file, in fewer bits.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, IntoInnerError, IsTerminal, Write, stderr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::GgmlDType;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::text_side::TextSide;
use crate::config::RopeScalingChoice;
use crate::device::threads::ThreadPool;
use crate::layers::attention::{RopeScaling, YarnScaling};
use crate::layers::content::{gguf_rows, rows};
use crate::models::config::{ExpertsConfig, SLIDING_WINDOW_KEYS};
use crate::models::{ModelConfig, registry};
use crate::ops::gguf_blocks::{dequantize_row, row_bytes};
use crate::text::TokenizerSpec;
use crate::weights::checkpoint::{Checkpoint, Source, StoredMatrix, gguf_name};
use crate::weights::gguf::printable;
use crate::weights::gguf::writer::{ALIGNMENT, Writer};
use crate::weights::quantize::Quantization;
use crate::weights::repository::Repository;

/// Quantise a model into a GGUF file
///
/// Reads a directory as Hugging Face has them, with weights in BF16, F16, F32 or FP8. The file is
/// served like any other GGUF file. `serve --quantization` does the same to weights as they are
/// loaded, each time, and keeps no file; it also knows fp8, which GGUF files do not have.
#[derive(Clone, Debug, clap::Args)]
pub struct QuantizeArgs {
    /// The directory, with config.json, tokenizer.json and safetensors.
    #[arg(value_name = "DIRECTORY")]
    pub input: PathBuf,

    /// The file to write; it must not exist yet.
    #[arg(value_name = "OUT.gguf")]
    pub output: PathBuf,

    /// What projections become: q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k or q8_0.
    ///
    /// Output head and embedding get at least six bits. Rows that are no multiple of 256 get the
    /// next larger type that needs none.
    #[arg(long = "type", value_name = "TYPE")]
    pub quantization: Quantization,

    /// Threads that compute; all by default.
    #[arg(long, value_name = "N")]
    pub num_threads: Option<usize>,
}

/// A tensor of the file to be written.
struct Output {
    /// The Hugging Face names of what it holds: of one parameter, or of the matrices of all
    /// experts in their order.
    parts: Vec<String>,
    gguf_name: String,
    /// Of a part.
    shape: Vec<usize>,
    dtype: GgmlDType,
    /// Of all parts.
    num_bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// If the directory holds no model that can be served, or not as floats, or the file cannot be
/// written.
pub fn run(args: QuantizeArgs) -> Result<()> {
    let QuantizeArgs { input, output, quantization, num_threads } = args;
    ensure!(!output.exists(), "{} exists already; name another file", output.display());
    ensure!(
        input.is_dir(),
        "{} is no directory; pass one with config.json and safetensors",
        input.display()
    );
    let file_type = quantization.file_type().with_context(|| {
        format!("GGUF files have no {quantization}; pass q8_0, or use `serve --quantization {quantization}`")
    })?;
    let checkpoint = Checkpoint::open(&input)?.quantized(quantization)?;
    let Source::Repository(repository) = checkpoint.source() else {
        bail!("{} is no repository with safetensors", input.display());
    };
    registry::check_architecture(&ModelConfig::architecture_of(&checkpoint)?)?;
    let config = ModelConfig::from_checkpoint(&checkpoint, RopeScalingChoice::Auto)?;
    let num_experts = config.experts.map_or(0, |experts| experts.num_experts);
    let outputs = outputs(&checkpoint, repository, num_experts)?;
    let mut writer = metadata(repository, &checkpoint, &config)?
        .u32("general.file_type", file_type)
        .u32("general.quantization_version", 2);
    for output in &outputs {
        writer =
            writer.hole(&output.gguf_name, &output.dimensions(), output.dtype, output.num_bytes);
    }
    let default_threads = || std::thread::available_parallelism().map_or(1, usize::from);
    let pool = ThreadPool::new(num_threads.unwrap_or_else(default_threads));
    let num_bytes = pool.install(|| write(&output, &writer, &checkpoint, &outputs))?;
    println!("{}: {quantization}, {}", output.display(), HumanBytes(num_bytes));
    Ok(())
}

impl Output {
    /// Innermost first, as the file has them.
    fn dimensions(&self) -> Vec<u64> {
        let mut dimensions: Vec<u64> = self.shape.iter().rev().map(|&size| size as u64).collect();
        if is_of_experts(&self.gguf_name) {
            dimensions.push(self.parts.len() as u64);
        } else if is_router(&self.gguf_name) && dimensions.get(1) == Some(&1) {
            // The gate of the shared expert is a vector there.
            dimensions.pop();
        }
        dimensions
    }
}

fn is_of_experts(gguf_name: &str) -> bool {
    gguf_name.contains("_exps.")
}

/// Whether a tensor chooses experts. It is small, and an error sends a token to the wrong one.
fn is_router(gguf_name: &str) -> bool {
    gguf_name.contains("ffn_gate_inp")
}

/// Every parameter, with the type that it will have; the matrices of a layer's experts are one
/// tensor, where the first of them stands.
fn outputs(
    checkpoint: &Checkpoint,
    repository: &Repository,
    num_experts: usize,
) -> Result<Vec<Output>> {
    let mut outputs = Vec::<Output>::new();
    let mut stacks = HashMap::<String, usize>::new();
    for tensor in repository.tensors() {
        let is_tied_head = tensor.name == "lm_head.weight" && repository.is_head_tied();
        // Scales only help to read others; the angles of old checkpoints are computed.
        let is_parameter = 0 < checkpoint.num_parameters(tensor);
        if is_tied_head || !is_parameter || tensor.name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        let shown = printable(&tensor.name);
        let (gguf_name, expert) = gguf_name(&tensor.name)
            .with_context(|| format!("a GGUF file has no tensor like `{shown}`"))?;
        let mut output = output(checkpoint, &tensor.name, gguf_name, &tensor.shape)?;
        let Some(expert) = expert else {
            outputs.push(output);
            continue;
        };
        ensure!(expert < num_experts, "`{shown}` is of an expert beyond the {num_experts}");
        let index = *stacks.entry(output.gguf_name.clone()).or_insert(outputs.len());
        if index == outputs.len() {
            let first = std::mem::take(&mut output.parts);
            output.parts = vec![String::new(); num_experts];
            output.parts[expert].clone_from(&first[0]);
            output.num_bytes *= num_experts as u64;
            outputs.push(output);
            continue;
        }
        let stack = &mut outputs[index];
        let is_alike = (stack.dtype, &stack.shape) == (output.dtype, &output.shape);
        ensure!(is_alike, "`{shown}` differs in shape or type from that of another expert");
        stack.parts[expert] = output.parts.remove(0);
    }
    for output in &outputs {
        let is_whole = output.parts.iter().all(|part| !part.is_empty());
        ensure!(is_whole, "`{}` would lack the matrices of some experts", output.gguf_name);
    }
    Ok(outputs)
}

/// A parameter by itself.
fn output(
    checkpoint: &Checkpoint,
    name: &str,
    gguf_name: String,
    shape: &[usize],
) -> Result<Output> {
    let (dtype, num_rows) = match *shape {
        [_] => (GgmlDType::F32, 1),
        [num_rows, _] if is_router(&gguf_name) => (GgmlDType::F32, num_rows),
        [num_rows, num_cols] => {
            (row_dtype(&checkpoint.matrix(name, num_rows, num_cols)?), num_rows)
        }
        _ => bail!("the tensor `{}` has {} dimensions", printable(name), shape.len()),
    };
    let num_cols = shape.last().copied().unwrap_or(0);
    let num_bytes = (row_bytes(dtype, num_cols)? * num_rows) as u64;
    let (parts, shape) = (vec![name.to_owned()], shape.to_vec());
    Ok(Output { parts, gguf_name, shape, dtype, num_bytes })
}

/// What a matrix is written as: floats of eight bits that are not quantised become larger ones.
fn row_dtype(matrix: &StoredMatrix) -> GgmlDType {
    matrix.row_format().gguf().unwrap_or(matrix.dtype)
}

/// The keys that serving and other programs read, by the GGUF specification.
fn metadata(
    repository: &Repository,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
) -> Result<Writer> {
    // How far stretched positions go follows from the keys that say how they are stretched.
    let unstretched = ModelConfig::from_checkpoint(checkpoint, RopeScalingChoice::None)?;
    let text = TextSide::read(checkpoint.source(), config.vocab_size)?;
    let json = repository.file("tokenizer.json")?.context("tokenizer.json is missing")?;
    let spec = TokenizerSpec::from_json(&json, config.vocab_size)?;
    let architecture = &config.architecture;
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    let name = text.names.first().cloned().unwrap_or_else(|| {
        let directory = repository.directory().canonicalize().unwrap_or_default();
        directory.file_name().unwrap_or_default().to_string_lossy().into_owned()
    });
    let tokens: Vec<&str> = spec.tokens.iter().map(String::as_str).collect();
    let merges: Vec<&str> = spec.merges.iter().map(String::as_str).collect();
    let stated = text.template_tokens.eos_token.as_deref();
    let eos = stated.and_then(|token| text.tokenizer.id_of(token));
    let eos = eos.filter(|id| text.eos_token_ids.contains(id)).unwrap_or(text.eos_token_ids[0]);
    let mut writer = Writer::new()
        .string("general.architecture", architecture)
        .string("general.name", &name)
        .u32(&key("block_count"), config.num_hidden_layers as u32)
        .u32(&key("context_length"), unstretched.max_position_embeddings as u32)
        .u32(&key("embedding_length"), config.hidden_size as u32)
        .u32(&key("feed_forward_length"), config.intermediate_size as u32)
        .u32(&key("attention.head_count"), config.num_attention_heads as u32)
        .u32(&key("attention.head_count_kv"), config.num_key_value_heads as u32)
        .u32(&key("attention.key_length"), config.head_dim as u32)
        .u32(&key("attention.value_length"), config.head_dim as u32)
        .f32(&key("attention.layer_norm_rms_epsilon"), config.rms_norm_eps)
        .f32(&key("rope.freq_base"), config.rope_theta)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", &spec.pre)
        .strings("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &spec.token_types)
        .strings("tokenizer.ggml.merges", &merges)
        .u32("tokenizer.ggml.eos_token_id", eos)
        .bool("tokenizer.ggml.add_bos_token", false);
    if let RopeScaling::Yarn(yarn) = &config.rope_scaling {
        writer = write_yarn(writer, architecture, yarn)?;
    }
    if let Some(sliding) = &config.sliding_window {
        let [length, layers] = SLIDING_WINDOW_KEYS.map(key);
        writer = writer.u32(&length, sliding.num_tokens as u32).bools(&layers, &sliding.layers);
    }
    if let Some(experts) = &config.experts {
        writer = write_experts(writer, architecture, experts);
    }
    let bos = text.template_tokens.bos_token.as_deref();
    if let Some(bos) = bos.and_then(|token| text.tokenizer.id_of(token)) {
        writer = writer.u32("tokenizer.ggml.bos_token_id", bos);
    }
    if let Some(template) = &text.template {
        writer = writer.string("tokenizer.chat_template", template);
    }
    Ok(writer)
}

fn write_experts(writer: Writer, architecture: &str, experts: &ExpertsConfig) -> Writer {
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    let mut writer = writer
        .u32(&key("expert_count"), experts.num_experts as u32)
        .u32(&key("expert_used_count"), experts.num_experts_per_tok as u32)
        .u32(&key("expert_feed_forward_length"), experts.moe_intermediate_size as u32);
    if 0 < experts.shared_expert_intermediate_size {
        let size = experts.shared_expert_intermediate_size as u32;
        writer = writer.u32(&key("expert_shared_feed_forward_length"), size);
    }
    if let Some(norm) = experts.norm_topk_prob {
        writer = writer.bool(&key("expert_weights_norm"), norm);
    }
    writer
}

/// `<architecture>.rope.scaling.*` of the GGUF specification, and llama.cpp's names for the rest.
fn write_yarn(writer: Writer, architecture: &str, yarn: &YarnScaling) -> Result<Writer> {
    let &YarnScaling {
        factor,
        original_max_position_embeddings,
        beta_fast,
        beta_slow,
        attention_factor,
    } = yarn;
    ensure!(
        attention_factor.is_none(),
        "an `attention_factor` of its own in `rope_scaling` has no place in a GGUF file; \
         `serve --quantization` quantises such a model"
    );
    let key = |suffix: &str| format!("{architecture}.rope.scaling.{suffix}");
    let numbers =
        [("factor", factor), ("yarn_beta_fast", beta_fast), ("yarn_beta_slow", beta_slow)];
    let mut writer = writer
        .string(&key("type"), "yarn")
        .u32(&key("original_context_length"), original_max_position_embeddings as u32);
    for (name, number) in numbers {
        ensure!(
            f64::from(number as f32) == number,
            "{number} in `rope_scaling` has more digits than a GGUF file holds; \
             `serve --quantization` quantises such a model"
        );
        writer = writer.f32(&key(name), number as f32);
    }
    Ok(writer)
}

/// Writes the file under another name first, so that what has its name is complete. Gives its size.
fn write(path: &Path, writer: &Writer, checkpoint: &Checkpoint, outputs: &[Output]) -> Result<u64> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = write_all(&partial, writer, checkpoint, outputs)
        .and_then(|num_bytes| {
            std::fs::rename(&partial, path)?;
            Ok(num_bytes)
        })
        .with_context(|| format!("cannot write {}", path.display()));
    if written.is_err() {
        // Best effort: what is left is named as incomplete.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

fn write_all(
    path: &Path,
    writer: &Writer,
    checkpoint: &Checkpoint,
    outputs: &[Output],
) -> Result<u64> {
    let bar = if stderr().is_terminal() {
        let style = ProgressStyle::with_template("quantising [{bar:40}] {pos}/{len} {eta}")?;
        ProgressBar::new(outputs.len() as u64).with_style(style)
    } else {
        ProgressBar::hidden()
    };
    let (header, num_bytes) = writer.header();
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&header)?;
    for output in outputs {
        let padding = output.num_bytes.next_multiple_of(ALIGNMENT) - output.num_bytes;
        for name in &output.parts {
            write_tensor(&mut file, checkpoint, output, name)
                .with_context(|| format!("tensor `{}`", printable(name)))?;
        }
        file.write_all(&vec![0; padding as usize])?;
        bar.inc(1);
    }
    file.into_inner().map_err(IntoInnerError::into_error)?.sync_all()?;
    bar.finish_and_clear();
    Ok(num_bytes)
}

fn write_tensor(
    file: &mut impl Write,
    checkpoint: &Checkpoint,
    output: &Output,
    name: &str,
) -> Result<()> {
    let [num_rows, num_cols] = output.shape[..] else {
        for value in checkpoint.vector(name, output.shape[0])? {
            file.write_all(&value.to_le_bytes())?;
        }
        return Ok(());
    };
    let matrix = checkpoint.matrix(name, num_rows, num_cols)?;
    let dtype = row_dtype(&matrix);
    let data = if matrix.row_format() == dtype.into() { rows } else { gguf_rows }(&matrix)?;
    if output.dtype == dtype {
        file.write_all(&data)?;
    } else {
        let mut values = vec![0.0_f32; num_rows * num_cols];
        dequantize_row(dtype, &data, &mut values)?;
        for value in values {
            file.write_all(&value.to_le_bytes())?;
        }
    }
    matrix.bytes.release();
    Ok(())
}
