//! `qwen-server quantize`: writes a repository's weights into a GGUF file, in fewer bits.

use std::fs::File;
use std::io::{BufWriter, IntoInnerError, IsTerminal, Write, stderr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::GgmlDType;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::text_side::TextSide;
use crate::config::RopeScalingChoice;
use crate::device::threads::ThreadPool;
use crate::layers::attention::RopeScaling;
use crate::layers::content::rows;
use crate::models::{ModelConfig, registry};
use crate::ops::gguf_blocks::row_bytes;
use crate::text::TokenizerSpec;
use crate::weights::checkpoint::{Checkpoint, Source, gguf_name};
use crate::weights::gguf::printable;
use crate::weights::gguf::writer::{ALIGNMENT, Writer};
use crate::weights::quantize::Quantization;
use crate::weights::repository::Repository;

/// Quantise a model into a GGUF file
///
/// Reads a directory as Hugging Face has them, with weights in BF16, F16, F32 or FP8. The file is
/// served like any other GGUF file. `serve --quantization` does the same to weights as they are
/// loaded, each time, and keeps no file.
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
    /// Its Hugging Face name.
    name: String,
    gguf_name: String,
    shape: Vec<usize>,
    dtype: GgmlDType,
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
    let checkpoint = Checkpoint::open(&input)?.quantized(quantization)?;
    let Source::Repository(repository) = checkpoint.source() else {
        bail!("{} is no repository with safetensors", input.display());
    };
    registry::check_architecture(&ModelConfig::architecture_of(&checkpoint)?)?;
    let config = ModelConfig::from_checkpoint(&checkpoint, RopeScalingChoice::Auto)?;
    refuse_what_is_not_written(&config)?;
    let outputs = outputs(&checkpoint, repository)?;
    let mut writer = metadata(repository, &checkpoint, &config)?
        .u32("general.file_type", quantization.file_type())
        .u32("general.quantization_version", 2);
    for output in &outputs {
        let dimensions: Vec<u64> = output.shape.iter().rev().map(|&size| size as u64).collect();
        writer = writer.hole(&output.gguf_name, &dimensions, output.dtype, output.num_bytes);
    }
    let default_threads = || std::thread::available_parallelism().map_or(1, usize::from);
    let pool = ThreadPool::new(num_threads.unwrap_or_else(default_threads));
    let num_bytes = pool.install(|| write(&output, &writer, &checkpoint, &outputs))?;
    println!("{}: {quantization}, {}", output.display(), HumanBytes(num_bytes));
    Ok(())
}

fn refuse_what_is_not_written(config: &ModelConfig) -> Result<()> {
    let what = if config.experts.is_some() {
        "a model with experts"
    } else if config.rope_scaling != RopeScaling::None {
        "a model with stretched positions (`rope_scaling`)"
    } else {
        return Ok(());
    };
    bail!("{what} cannot be written to a GGUF file; `serve --quantization` quantises it")
}

/// Every parameter, with the type that it will have.
fn outputs(checkpoint: &Checkpoint, repository: &Repository) -> Result<Vec<Output>> {
    let mut outputs = Vec::new();
    for tensor in repository.tensors() {
        let is_tied_head = tensor.name == "lm_head.weight" && repository.is_head_tied();
        // Scales only help to read others; the angles of old checkpoints are computed.
        let is_parameter = 0 < checkpoint.num_parameters(tensor);
        if is_tied_head || !is_parameter || tensor.name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
        let shown = printable(&name);
        let gguf_name = gguf_name(&name)
            .with_context(|| format!("a GGUF file has no tensor like `{shown}`"))?;
        let (dtype, num_rows) = match shape[..] {
            [_] => (GgmlDType::F32, 1),
            [num_rows, num_cols] => {
                (checkpoint.matrix(&name, num_rows, num_cols)?.row_dtype(), num_rows)
            }
            _ => bail!("the tensor `{shown}` has {} dimensions", shape.len()),
        };
        let num_cols = shape.last().copied().unwrap_or(0);
        let num_bytes = (row_bytes(dtype, num_cols)? * num_rows) as u64;
        outputs.push(Output { name, gguf_name, shape, dtype, num_bytes });
    }
    Ok(outputs)
}

/// The keys that serving and other programs read, by the GGUF specification.
fn metadata(
    repository: &Repository,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
) -> Result<Writer> {
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
        .u32(&key("context_length"), config.max_position_embeddings as u32)
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
    let bos = text.template_tokens.bos_token.as_deref();
    if let Some(bos) = bos.and_then(|token| text.tokenizer.id_of(token)) {
        writer = writer.u32("tokenizer.ggml.bos_token_id", bos);
    }
    if let Some(template) = &text.template {
        writer = writer.string("tokenizer.chat_template", template);
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
        write_tensor(&mut file, checkpoint, output)
            .with_context(|| format!("tensor `{}`", printable(&output.name)))?;
        file.write_all(&vec![0; padding as usize])?;
        bar.inc(1);
    }
    file.into_inner().map_err(IntoInnerError::into_error)?.sync_all()?;
    bar.finish_and_clear();
    Ok(num_bytes)
}

fn write_tensor(file: &mut impl Write, checkpoint: &Checkpoint, output: &Output) -> Result<()> {
    match output.shape[..] {
        [num_rows, num_cols] => {
            let matrix = checkpoint.matrix(&output.name, num_rows, num_cols)?;
            file.write_all(&rows(&matrix)?)?;
            matrix.bytes.release();
        }
        _ => {
            for value in checkpoint.vector(&output.name, output.shape[0])? {
                file.write_all(&value.to_le_bytes())?;
            }
        }
    }
    Ok(())
}
