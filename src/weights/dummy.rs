//! Model files without weights, so that the speed of any published model can be measured without
//! downloading it.
//!
//! [`write()`] makes a GGUF file with everything but the weights: their place is a hole, which takes
//! no disk. [`super::checkpoint::Checkpoint::open_dummy`] reads such a file as one of random
//! weights; the bytes of the hole are never looked at.

mod vocabulary;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::quantized::GgmlDType;

use self::vocabulary::Vocabulary;
use super::catalogue::{Entry, Model};
use super::gguf::writer::Writer;

/// Rows of an MLP are filled up to a multiple of this, as the published files of the 72B model are:
/// otherwise its rows would not consist of whole blocks.
const INTERMEDIATE_MULTIPLE: u64 = 256;

const CHAT_TEMPLATE: &str = "\
{%- for message in messages %}\
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

/// Which types the matrices of a file have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// All BF16.
    Bf16,
    /// All F16.
    F16,
    /// All Q8_0.
    Q8_0,
    /// Q4_0 with a Q6_K head.
    Q4_0,
    /// Q5_0 with a Q6_K head.
    Q5_0,
    /// Q4_K with Q6_K where it matters most.
    Q4KM,
    /// Q5_K with Q6_K where it matters most.
    Q5KM,
    /// All Q6_K.
    Q6K,
}

/// A quantisation that no random weights can be made of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("random weights have no quantisation `{name}`; there are {}", Quantization::names())]
pub struct UnknownQuantization {
    name: String,
}

impl Quantization {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Bf16, "bf16"),
        (Self::F16, "f16"),
        (Self::Q8_0, "q8_0"),
        (Self::Q4_0, "q4_0"),
        (Self::Q5_0, "q5_0"),
        (Self::Q4KM, "q4_k_m"),
        (Self::Q5KM, "q5_k_m"),
        (Self::Q6K, "q6_k"),
    ];

    fn names() -> String {
        Self::ALL.map(|(_, name)| name).join(", ")
    }

    /// The type of all matrices that nothing is said about.
    fn base(self) -> GgmlDType {
        match self {
            Self::Bf16 => GgmlDType::BF16,
            Self::F16 => GgmlDType::F16,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q4KM => GgmlDType::Q4K,
            Self::Q5KM => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    fn head(self) -> GgmlDType {
        match self {
            Self::Bf16 | Self::F16 | Self::Q8_0 => self.base(),
            _ => GgmlDType::Q6K,
        }
    }

    /// The type of the value and down projections of a layer. llama.cpp gives those of the first
    /// and last eighth of the layers and of every third one between more bits.
    fn sensitive(self, layer: u64, num_layers: u64) -> GgmlDType {
        let is_mixed = matches!(self, Self::Q4KM | Self::Q5KM);
        let eighth = num_layers / 8;
        let has_more_bits =
            layer < eighth || 7 * num_layers / 8 <= layer || layer.saturating_sub(eighth) % 3 == 2;
        if is_mixed && has_more_bits { GgmlDType::Q6K } else { self.base() }
    }

    /// The number that files of this mixture carry.
    fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q4KM => 15,
            Self::Q5KM => 17,
            Self::Q6K => 18,
            Self::Bf16 => 32,
        }
    }
}

impl FromStr for Quantization {
    type Err = UnknownQuantization;

    fn from_str(text: &str) -> Result<Self, UnknownQuantization> {
        let lower = text.to_ascii_lowercase();
        // The published half-precision files are named so.
        let wanted = if lower == "fp16" { "f16" } else { &lower };
        let found = Self::ALL.into_iter().find(|(_, name)| *name == wanted);
        found.map(|(found, _)| found).ok_or_else(|| UnknownQuantization { name: text.to_owned() })
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = Self::ALL.iter().find(|(quantization, _)| quantization == self);
        f.write_str(found.expect("all are listed").1)
    }
}

/// A model file without weights. It is deleted when this is dropped; whoever has mapped it keeps
/// the mapping.
#[derive(Debug)]
pub struct DummyFile {
    path: PathBuf,
}

impl DummyFile {
    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for DummyFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot delete the dummy model");
        }
    }
}

/// Writes a file of this shape into a folder.
///
/// # Errors
/// If the folder is not writable, or its file system has no files that large.
pub fn write(entry: &Entry, quantization: Quantization, folder: &Path) -> io::Result<DummyFile> {
    let (header, len) = describe(entry, quantization).header();
    let (file, dummy) = create(&format!("{}-{quantization}", entry.model.name), folder)?;
    (&file).write_all(&header)?;
    file.set_len(len)?;
    Ok(dummy)
}

/// A file of a name that nobody has.
fn create(stem: &str, folder: &Path) -> io::Result<(File, DummyFile)> {
    let mut number = std::process::id();
    loop {
        let path = folder.join(format!("dummy-{number}-{stem}.gguf"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, DummyFile { path })),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                number = number.wrapping_add(1);
            }
            Err(error) => return Err(error),
        }
    }
}

fn describe(entry: &Entry, quantization: Quantization) -> Writer {
    let (model, sizes) = (&entry.model, Sizes::of(&entry.model));
    let mut file = Description { writer: add_metadata(entry, quantization), quantization };
    let embedding = [sizes.hidden, sizes.vocabulary];
    let has_biases = entry.architecture.starts_with("qwen2");
    // Published files of Qwen2.5 have a head of their own also where the model ties it.
    if has_biases || !model.tie_word_embeddings {
        file.matrix("token_embd.weight", &embedding, quantization.base());
        file.matrix("output.weight", &embedding, quantization.head());
    } else {
        file.matrix("token_embd.weight", &embedding, quantization.head());
    }
    file.vector("output_norm.weight", sizes.hidden);
    for layer in 0..sizes.num_layers {
        file.add_attention(layer, &sizes, has_biases);
        file.add_feed_forward(layer, &sizes, model);
    }
    file.writer
}

/// A file in the making.
struct Description {
    writer: Writer,
    quantization: Quantization,
}

impl Description {
    fn add_attention(&mut self, layer: u64, sizes: &Sizes, has_biases: bool) {
        let Sizes { hidden, query, key, num_layers, .. } = *sizes;
        let base = self.quantization.base();
        let value = value_dtype(self.quantization.sensitive(layer, num_layers), num_layers);
        for (part, shape, dtype) in [
            ("q", [hidden, query], base),
            ("k", [hidden, key], base),
            ("v", [hidden, key], value),
            ("output", [query, hidden], base),
        ] {
            self.matrix(&format!("blk.{layer}.attn_{part}.weight"), &shape, dtype);
        }
        self.vector(&format!("blk.{layer}.attn_norm.weight"), hidden);
        if has_biases {
            for (part, len) in [("q", query), ("k", key), ("v", key)] {
                self.vector(&format!("blk.{layer}.attn_{part}.bias"), len);
            }
        } else {
            for part in ["q", "k"] {
                self.vector(&format!("blk.{layer}.attn_{part}_norm.weight"), sizes.head_dim);
            }
        }
    }

    fn add_feed_forward(&mut self, layer: u64, sizes: &Sizes, model: &Model) {
        let Sizes { hidden, intermediate, num_layers, .. } = *sizes;
        let base = self.quantization.base();
        let sensitive = self.quantization.sensitive(layer, num_layers);
        self.vector(&format!("blk.{layer}.ffn_norm.weight"), hidden);
        let Some(experts) = &model.experts else {
            let shapes = [("gate", base), ("up", base)];
            for (part, dtype) in shapes {
                let name = format!("blk.{layer}.ffn_{part}.weight");
                self.matrix(&name, &[hidden, intermediate], dtype);
            }
            let name = format!("blk.{layer}.ffn_down.weight");
            return self.matrix(&name, &[intermediate, hidden], sensitive);
        };
        let count = u64::from(experts.num_experts);
        let width = u64::from(experts.moe_intermediate_size);
        self.matrix(&format!("blk.{layer}.ffn_gate_inp.weight"), &[hidden, count], GgmlDType::F32);
        for (part, shape, dtype) in [
            ("gate", [hidden, width, count], base),
            ("up", [hidden, width, count], base),
            ("down", [width, hidden, count], sensitive),
        ] {
            self.matrix(&format!("blk.{layer}.ffn_{part}_exps.weight"), &shape, dtype);
        }
        let width = u64::from(experts.shared_expert_intermediate_size);
        if width == 0 {
            return;
        }
        self.vector(&format!("blk.{layer}.ffn_gate_inp_shexp.weight"), hidden);
        for (part, shape, dtype) in [
            ("gate", [hidden, width], base),
            ("up", [hidden, width], base),
            ("down", [width, hidden], sensitive),
        ] {
            self.matrix(&format!("blk.{layer}.ffn_{part}_shexp.weight"), &shape, dtype);
        }
    }

    /// One matrix, or as many as the last dimension says; columns first.
    fn matrix(&mut self, name: &str, dimensions: &[u64], dtype: GgmlDType) {
        let (num_cols, num_rows) = (dimensions[0], dimensions[1..].iter().product::<u64>());
        let dtype = fitting(dtype, num_cols);
        let num_blocks = num_rows * num_cols.div_ceil(dtype.block_size() as u64);
        self.hole(name, dimensions, dtype, num_blocks * dtype.type_size() as u64);
    }

    fn vector(&mut self, name: &str, len: u64) {
        self.hole(name, &[len], GgmlDType::F32, 4 * len);
    }

    fn hole(&mut self, name: &str, dimensions: &[u64], dtype: GgmlDType, num_bytes: u64) {
        let writer = std::mem::take(&mut self.writer);
        self.writer = writer.hole(name, dimensions, dtype, num_bytes);
    }
}

/// The 72B model's value projections are small beside the rest, so llama.cpp spends a bit more.
fn value_dtype(dtype: GgmlDType, num_layers: u64) -> GgmlDType {
    match dtype {
        GgmlDType::Q4K if num_layers == 80 => GgmlDType::Q5K,
        dtype => dtype,
    }
}

/// What llama.cpp takes instead where a row does not consist of whole blocks.
fn fitting(dtype: GgmlDType, num_cols: u64) -> GgmlDType {
    if num_cols.is_multiple_of(dtype.block_size() as u64) {
        return dtype;
    }
    match dtype {
        GgmlDType::Q4K => GgmlDType::Q5_0,
        GgmlDType::Q5K => GgmlDType::Q5_1,
        GgmlDType::Q6K => GgmlDType::Q8_0,
        dtype => dtype,
    }
}

struct Sizes {
    vocabulary: u64,
    hidden: u64,
    query: u64,
    key: u64,
    head_dim: u64,
    intermediate: u64,
    num_layers: u64,
}

impl Sizes {
    fn of(model: &Model) -> Self {
        let head_dim = u64::from(model.values_per_head());
        Self {
            head_dim,
            vocabulary: model.vocab_size.into(),
            hidden: model.hidden_size.into(),
            query: head_dim * u64::from(model.num_attention_heads),
            key: head_dim * u64::from(model.num_key_value_heads),
            intermediate: u64::from(model.intermediate_size)
                .next_multiple_of(INTERMEDIATE_MULTIPLE),
            num_layers: model.num_hidden_layers.into(),
        }
    }
}

fn add_metadata(entry: &Entry, quantization: Quantization) -> Writer {
    let Entry { architecture, model, .. } = entry;
    let key = |name: &str| format!("{architecture}.{name}");
    let vocabulary = Vocabulary::new(model.vocab_size);
    let tokens: Vec<&str> = vocabulary.tokens.iter().map(String::as_str).collect();
    let mut writer = Writer::new()
        .string("general.architecture", architecture)
        .string("general.type", "model")
        .string("general.name", &format!("{} with random weights", model.title))
        .u32("general.file_type", quantization.file_type())
        .u32("general.quantization_version", 2);
    let intermediate = Sizes::of(model).intermediate as u32;
    for (name, value) in [
        ("block_count", Some(model.num_hidden_layers)),
        ("context_length", Some(model.context_length)),
        ("embedding_length", Some(model.hidden_size)),
        ("feed_forward_length", Some(intermediate)),
        ("attention.head_count", Some(model.num_attention_heads)),
        ("attention.head_count_kv", Some(model.num_key_value_heads)),
        ("attention.key_length", model.head_dim),
        ("attention.value_length", model.head_dim),
        ("expert_count", model.experts.as_ref().map(|experts| experts.num_experts)),
        ("expert_used_count", model.experts.as_ref().map(|experts| experts.num_experts_per_tok)),
        (
            "expert_feed_forward_length",
            model.experts.as_ref().map(|experts| experts.moe_intermediate_size),
        ),
        (
            "expert_shared_feed_forward_length",
            (model.experts.as_ref())
                .map(|experts| experts.shared_expert_intermediate_size)
                .filter(|width| 0 < *width),
        ),
    ] {
        if let Some(value) = value {
            writer = writer.u32(&key(name), value);
        }
    }
    writer
        .f32(&key("rope.freq_base"), model.rope_theta as f32)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-6)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "qwen2")
        .strings("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &vocabulary.types)
        .strings("tokenizer.ggml.merges", &[])
        .u32("tokenizer.ggml.eos_token_id", vocabulary.end_of_turn)
        .u32("tokenizer.ggml.padding_token_id", vocabulary.end_of_text)
        .u32("tokenizer.ggml.bos_token_id", vocabulary.end_of_text)
        .bool("tokenizer.ggml.add_bos_token", false)
        .string("tokenizer.chat_template", CHAT_TEMPLATE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::catalogue::Catalogue;
    use crate::weights::gguf::Gguf;

    fn num_tensor_bytes(name: &str, quantization: &str) -> u64 {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::builtin();
        let entry = catalogue.find(name).unwrap();
        let file = write(entry, quantization.parse().unwrap(), folder.path()).unwrap();
        let gguf = Gguf::open(file.path()).unwrap();
        assert_eq!(gguf.quantization().to_lowercase(), quantization);
        // Tensors start at multiples of 32 bytes.
        gguf.tensors().map(|tensor| (tensor.num_bytes as u64).next_multiple_of(32)).sum()
    }

    /// Goal: a dummy has the types that the published files have. Method: what their sizes leave
    /// for the header, which is a vocabulary of 6 MB, must be the same for all.
    #[test]
    fn files_are_as_large_as_published_ones() {
        for (name, quantization, published) in [
            ("qwen2.5-0.5b-instruct", "q4_k_m", 491_400_032),
            ("qwen2.5-0.5b-instruct", "q4_0", 428_730_208),
            ("qwen2.5-0.5b-instruct", "q5_k_m", 522_186_592),
            ("qwen2.5-0.5b-instruct", "q6_k", 650_379_104),
            ("qwen2.5-0.5b-instruct", "q8_0", 675_710_816),
            ("qwen2.5-0.5b-instruct", "f16", 1_266_425_696),
            ("qwen2.5-3b-instruct", "q5_k_m", 2_438_740_384),
            ("qwen2.5-7b-instruct", "q4_k_m", 4_683_073_632),
            ("qwen2.5-7b-instruct", "q5_0", 5_315_176_576),
            ("qwen2.5-32b-instruct", "q4_k_m", 19_851_336_384),
            ("qwen2.5-72b-instruct", "q4_k_m", 44_010_465_472),
        ] {
            let header = published - num_tensor_bytes(name, quantization);
            assert!((5_940_000..6_000_000).contains(&header), "{name} {quantization}: {header}");
        }
    }

    /// Goal: a file takes no disk and goes when it is dropped, and two have names of their own.
    #[test]
    fn holes_take_no_disk_and_files_go() {
        use std::os::unix::fs::MetadataExt as _;
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::builtin();
        let entry = catalogue.find("qwen2.5-72b-instruct").unwrap();
        let first = write(entry, Quantization::Bf16, folder.path()).unwrap();
        let second = write(entry, Quantization::Bf16, folder.path()).unwrap();
        assert_ne!(first.path(), second.path());
        let metadata = std::fs::metadata(first.path()).unwrap();
        assert!(140_000_000_000 < metadata.len());
        assert!(metadata.blocks() * 512 < 16 << 20, "{} blocks", metadata.blocks());
        drop((first, second));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn quantizations_have_the_names_of_the_catalogue() {
        for (quantization, name) in Quantization::ALL {
            assert_eq!(name.to_uppercase().parse(), Ok(quantization));
            assert_eq!(quantization.to_string(), name);
        }
        assert_eq!("fp16".parse(), Ok(Quantization::F16));
        let error = "q2_k".parse::<Quantization>().unwrap_err().to_string();
        assert!(error.contains("q4_k_m"), "{error}");
    }
}
