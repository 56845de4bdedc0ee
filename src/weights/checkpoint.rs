//! A model's parameters under their Hugging Face names, whatever files they come from.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;

use super::gguf::{Gguf, GgufError, dtype_name};
use super::quantize::{Quantization, num_layers};
use super::repository::{Repository, RepositoryError};
use super::safetensors::{ElementType, TensorInfo};
use super::scheme::{Fp8Scales, GroupedWeights, Scheme};
use super::tensor_bytes::TensorBytes;
use crate::ops::row_format::RowFormat;

/// Why a checkpoint cannot be used as the model it says it is.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file itself is unusable.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The repository itself is unusable.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// A parameter has another shape than the hyperparameters demand.
    #[error("tensor `{name}` has shape {found:?}, the model's hyperparameters need {expected:?}")]
    Shape {
        /// The parameter's Hugging Face name.
        name: String,
        /// Its shape in the file, outermost dimension first.
        found: Vec<usize>,
        /// The shape the architecture needs.
        expected: Vec<usize>,
    },
    /// A vector (norm weight or bias) is stored in a type that is not a plain float.
    #[error("tensor `{name}` is stored as {dtype}; norms and biases must be F32, F16 or BF16")]
    VectorType {
        /// The parameter's Hugging Face name.
        name: String,
        /// The name of the type found.
        dtype: &'static str,
    },
    /// The weights have been quantised before.
    #[error(
        "the weights are {found} already; only floats (BF16, F16, F32 or FP8) can be quantised"
    )]
    NotFloats {
        /// What they are.
        found: String,
    },
    /// The file lacks a hyperparameter or holds an impossible one.
    #[error("{0}")]
    Hyperparameter(String),
}

/// The parameters of one model.
pub struct Checkpoint {
    source: Source,
    scheme: Scheme,
    filling: Filling,
    quantization: Option<Quantization>,
    /// Layers of a model that is quantised.
    num_layers: usize,
}

/// The files of a checkpoint.
#[derive(Debug)]
pub enum Source {
    /// GGUF files.
    Gguf(Gguf),
    /// A directory with safetensors and JSON.
    Repository(Repository),
}

/// Where a checkpoint's weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filling {
    File,
    Random,
}

/// Where the weights of a matrix come from.
#[derive(Clone, Debug)]
pub enum Content {
    /// They are in the file.
    Stored,
    /// They are integers in the file that mean this.
    Grouped(Arc<GroupedWeights>),
    /// The same with columns that are sorted by group, put back into the order of the file.
    Unsorted(Arc<GroupedWeights>),
    /// They are floats of eight bits in the file that are scaled by this.
    Fp8(Arc<Fp8Scales>),
    /// They are random, and the same on every device; the file's bytes mean nothing.
    Random {
        /// Makes them differ from those of other matrices.
        seed: u64,
    },
    /// The same of a model so large that its weights are best made where they are used.
    RandomInPlace {
        /// Makes them differ from those of other matrices.
        seed: u64,
    },
}

/// A dummy with more bytes is made in place: it takes the processor longer than anyone waits.
const MAX_PORTABLE_BYTES: u64 = 2 << 30;

/// A matrix as it lies in the file.
pub struct StoredMatrix {
    /// What the bytes are as rows of a GGUF file, maybe after something was done with them.
    pub dtype: GgmlDType,
    /// What such rows are to be quantised to then.
    pub quantize_to: Option<RowFormat>,
    /// Rows (output features).
    pub num_rows: usize,
    /// Columns (input features).
    pub num_cols: usize,
    /// The encoded rows, one after another, or what they are made of.
    pub bytes: TensorBytes,
    /// What the bytes are.
    pub content: Content,
}

/// A parameter as it is stored.
struct Stored {
    dtype: GgmlDType,
    shape: Vec<usize>,
    bytes: TensorBytes,
}

impl StoredMatrix {
    /// How its rows are encoded after all has been done.
    pub fn row_format(&self) -> RowFormat {
        match (self.kept_fp8(), self.quantize_to) {
            (Some(_), _) => RowFormat::Fp8,
            (None, Some(to)) => to,
            (None, None) => self.dtype.into(),
        }
    }

    /// The scales of floats of eight bits that stay what they are.
    pub fn kept_fp8(&self) -> Option<&Fp8Scales> {
        match (&self.content, self.quantize_to) {
            (Content::Fp8(fp8), None | Some(RowFormat::Fp8)) => {
                Some(&**fp8).filter(|fp8| fp8.fit_rows(self.num_cols))
            }
            _ => None,
        }
    }

    /// The same with rows that need no [`StoredMatrix::column_order`]: floats, if they needed one.
    #[must_use]
    pub fn unsorted(self) -> Self {
        match self.content {
            Content::Grouped(grouped) if grouped.order.is_some() => {
                Self { dtype: GgmlDType::F16, content: Content::Unsorted(grouped), ..self }
            }
            _ => self,
        }
    }

    /// The order in which the columns of its rows are to be found among activations, if it is not
    /// the usual one.
    pub fn column_order(&self) -> Option<&Arc<[u32]>> {
        match &self.content {
            Content::Grouped(grouped) => grouped.order.as_ref(),
            _ => None,
        }
    }
}

impl Checkpoint {
    /// Maps a GGUF file with its siblings, or the files of a repository's directory.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let filling = Filling::File;
        if !path.is_dir() {
            let source = Source::Gguf(Gguf::open(path)?);
            let scheme = Scheme::Floats;
            return Ok(Self { source, scheme, filling, quantization: None, num_layers: 0 });
        }
        let repository = Repository::open(path)?;
        let scheme = Scheme::of(&repository)?;
        let source = Source::Repository(repository);
        Ok(Self { source, scheme, filling, quantization: None, num_layers: 0 })
    }

    /// A GGUF file with random weights, norms of one and biases of zero instead of its own.
    pub fn open_dummy(path: &Path) -> Result<Self, CheckpointError> {
        let source = Source::Gguf(Gguf::open(path)?);
        let filling = Filling::Random;
        let scheme = Scheme::Floats;
        Ok(Self { source, scheme, filling, quantization: None, num_layers: 0 })
    }

    /// The same with matrices that are quantised when they are read.
    ///
    /// # Errors
    /// If they are not floats.
    pub fn quantized(mut self, to: Quantization) -> Result<Self, CheckpointError> {
        let is_of_floats = match &self.source {
            Source::Gguf(gguf) => gguf.tensors().all(|tensor| tensor.dtype.block_size() == 1),
            Source::Repository(_) => self.scheme.is_of_floats(),
        };
        if !is_of_floats {
            return Err(CheckpointError::NotFloats { found: self.quantization() });
        }
        self.quantization = Some(to);
        self.num_layers = match &self.source {
            Source::Gguf(gguf) => num_layers(gguf.tensors().map(|tensor| tensor.name.as_str())),
            Source::Repository(repository) => {
                num_layers(repository.tensors().map(|tensor| tensor.name.as_str()))
            }
        };
        Ok(self)
    }

    /// Whether the weights are random.
    pub fn is_dummy(&self) -> bool {
        self.filling == Filling::Random
    }

    /// The files, with what they say beside the weights.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// What the weights are stored as, in the words of those who publish them, and what is made of
    /// that.
    pub fn quantization(&self) -> String {
        let stored = match &self.source {
            Source::Gguf(gguf) => gguf.quantization(),
            Source::Repository(repository) => {
                self.scheme.name().unwrap_or_else(|| repository.quantization())
            }
        };
        match self.quantization {
            None => stored,
            Some(to) => format!("{stored}, quantised to {to}"),
        }
    }

    /// The size of the files with weights.
    pub fn num_file_bytes(&self) -> u64 {
        match &self.source {
            Source::Gguf(gguf) => gguf.num_file_bytes() as u64,
            Source::Repository(repository) => repository.num_file_bytes() as u64,
        }
    }

    /// Memory that the weights take when they are loaded.
    pub fn num_weight_bytes(&self) -> u64 {
        match &self.source {
            Source::Gguf(gguf) => {
                let tensors = gguf.tensors();
                tensors.map(|t| self.size_in_memory(&t.name, &t.shape, t.num_bytes as u64)).sum()
            }
            Source::Repository(repository) => repository
                .tensors()
                .map(|t| self.size_in_memory(&t.name, &t.shape, self.scheme.size(t).1))
                .sum(),
        }
    }

    /// Bytes of a tensor that has so many as it is stored. An embedding with a head beside it stays
    /// as it is.
    fn size_in_memory(&self, name: &str, shape: &[usize], num_bytes: u64) -> u64 {
        // A GGUF file has the matrices of all experts in one tensor.
        let (Some(to), [sizes @ .., num_cols]) = (self.quantization, shape) else {
            return num_bytes;
        };
        if sizes.is_empty() || num_bytes == 0 {
            return num_bytes;
        }
        let num_rows: usize = sizes.iter().product();
        let role = match name {
            "model.embed_tokens.weight" | "token_embd.weight"
                if self.contains("lm_head.weight") =>
            {
                return num_bytes;
            }
            "model.embed_tokens.weight" | "token_embd.weight" | "output.weight" => {
                "lm_head.weight".to_owned()
            }
            // The names of projections in GGUF files have other endings.
            name if matches!(self.source, Source::Gguf(_)) => {
                let layer = name.strip_suffix(".weight").and_then(|name| name.rsplit_once('.'));
                match layer {
                    Some((layer, "attn_v")) => format!("{layer}.v_proj.weight"),
                    Some((layer, "ffn_down" | "ffn_down_exps" | "ffn_down_shexp")) => {
                        format!("{layer}.down_proj.weight")
                    }
                    _ => "q_proj.weight".to_owned(),
                }
            }
            name => name.to_owned(),
        };
        let target = to.target(&role, *num_cols, self.num_layers);
        let row_bytes = target.and_then(|format| format.packed_bytes(*num_cols).ok());
        row_bytes.map_or(num_bytes, |row_bytes| (num_rows * row_bytes) as u64)
    }

    /// How many weights of the model a repository's tensor holds.
    pub fn num_parameters(&self, tensor: &TensorInfo) -> u64 {
        self.scheme.size(tensor).0
    }

    /// Gives back the memory of all pages of the files; reading on is possible, from the disk.
    pub fn release_pages(&self) {
        match &self.source {
            Source::Gguf(gguf) => gguf.release_pages(),
            Source::Repository(repository) => repository.release_pages(),
        }
    }

    /// Whether the parameter is in the files. `name` is its Hugging Face name.
    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Gguf(gguf) => {
                let GgufName { tensor, expert } = GgufName::of(name);
                match (gguf.tensor(&tensor), expert) {
                    (Ok((info, _)), Some(index)) => {
                        info.shape.first().is_some_and(|&count| index < count)
                    }
                    (found, _) => found.is_ok(),
                }
            }
            Source::Repository(repository) => {
                repository.has_parameter(name)
                    || self.quantized_module(name).is_some_and(|(_, module)| {
                        !(module == "lm_head" && repository.is_head_tied())
                    })
            }
        }
    }

    /// A matrix of the given shape. One of a single row may be stored as a vector.
    pub fn matrix(
        &self,
        name: &str,
        num_rows: usize,
        num_cols: usize,
    ) -> Result<StoredMatrix, CheckpointError> {
        if let Some((repository, module)) = self.quantized_module(name) {
            let mut matrix = self.scheme.matrix(repository, module, (num_rows, num_cols))?;
            matrix.quantize_to = self.target(name, num_cols);
            return Ok(matrix);
        }
        let Stored { dtype, bytes, .. } = self.shaped(name, &[num_rows, num_cols])?;
        let content = self.content(name);
        let quantize_to = self.target(name, num_cols);
        Ok(StoredMatrix { dtype, quantize_to, num_rows, num_cols, bytes, content })
    }

    fn target(&self, name: &str, num_cols: usize) -> Option<RowFormat> {
        self.quantization?.target(name, num_cols, self.num_layers)
    }

    /// Where a matrix is stored in another form than rows of its own.
    fn quantized_module<'a>(&self, name: &'a str) -> Option<(&Repository, &'a str)> {
        let Source::Repository(repository) = &self.source else { return None };
        let module = name.strip_suffix(".weight")?;
        self.scheme.has_module(repository, module).then_some((repository, module))
    }

    fn content(&self, name: &str) -> Content {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        match self.filling {
            Filling::File => Content::Stored,
            Filling::Random if self.num_weight_bytes() <= MAX_PORTABLE_BYTES => {
                Content::Random { seed }
            }
            Filling::Random => Content::RandomInPlace { seed },
        }
    }

    /// A vector of the given length as 32-bit floats.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let stored = self.shaped(name, &[len])?;
        if self.is_dummy() {
            let is_bias = name.rsplit('.').next() == Some("bias");
            return Ok(vec![if is_bias { 0.0 } else { 1.0 }; len]);
        }
        let bytes = stored.bytes.as_ref();
        let values = match stored.dtype {
            GgmlDType::F32 => le_words(bytes).map(f32::from_le_bytes).collect(),
            GgmlDType::F16 => {
                le_words(bytes).map(|b| half::f16::from_le_bytes(b).to_f32()).collect()
            }
            GgmlDType::BF16 => {
                le_words(bytes).map(|b| half::bf16::from_le_bytes(b).to_f32()).collect()
            }
            dtype => {
                let dtype = dtype_name(dtype);
                return Err(CheckpointError::VectorType { name: name.to_owned(), dtype });
            }
        };
        Ok(values)
    }

    /// A parameter of the expected shape. One row may be stored as a vector.
    fn shaped(&self, name: &str, expected: &[usize]) -> Result<Stored, CheckpointError> {
        let mut stored = match &self.source {
            Source::Gguf(gguf) => stored_in_gguf(gguf, name)?,
            Source::Repository(repository) => {
                let (info, bytes) = repository.tensor(name)?;
                let dtype = float_type(info.dtype).ok_or_else(|| {
                    let what = format!("is stored as {}, not as floats", info.dtype.name());
                    repository.complaint(name, &what)
                })?;
                Stored { dtype, shape: info.shape.clone(), bytes }
            }
        };
        if expected.strip_prefix(&[1]) == Some(&stored.shape) {
            stored.shape.insert(0, 1);
        }
        if stored.shape != expected {
            return Err(CheckpointError::Shape {
                name: name.to_owned(),
                found: stored.shape,
                expected: expected.to_vec(),
            });
        }
        Ok(stored)
    }
}

/// A tensor of the file, or the part of it that is one expert's.
fn stored_in_gguf(gguf: &Gguf, name: &str) -> Result<Stored, CheckpointError> {
    let GgufName { tensor, expert } = GgufName::of(name);
    let (info, bytes) = gguf.shared_tensor(&tensor)?;
    let whole = Stored { dtype: info.dtype, shape: info.shape.clone(), bytes };
    Ok(match (expert, info.shape.as_slice()) {
        (Some(index), [count, shape @ ..]) if index < *count => {
            Stored { shape: shape.to_vec(), bytes: whole.bytes.part(index, *count), ..whole }
        }
        _ => whole,
    })
}

/// The floats that products are computed with, under ggml's name.
fn float_type(dtype: ElementType) -> Option<GgmlDType> {
    match dtype {
        ElementType::F32 => Some(GgmlDType::F32),
        ElementType::F16 => Some(GgmlDType::F16),
        ElementType::BF16 => Some(GgmlDType::BF16),
        _ => None,
    }
}

fn le_words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    let (words, _) = bytes.as_chunks::<N>();
    words.iter().copied()
}

/// What a parameter is called in GGUF files, if there is such a tensor, and which part of it a
/// matrix of one expert is.
pub(crate) fn gguf_name(name: &str) -> Option<(String, Option<usize>)> {
    let GgufName { tensor, expert } = GgufName::of(name);
    (tensor != name).then_some((tensor, expert))
}

/// Where a GGUF file has a parameter, by the table of llama.cpp's converter for Qwen models.
#[derive(Debug, PartialEq, Eq)]
struct GgufName {
    tensor: String,
    /// Which matrix of the tensor, where it holds those of all experts.
    expert: Option<usize>,
}

impl GgufName {
    fn of(name: &str) -> Self {
        const GLOBAL: &[(&str, &str)] = &[
            ("model.embed_tokens.", "token_embd."),
            ("model.norm.", "output_norm."),
            ("lm_head.", "output."),
        ];
        const LAYER: &[(&str, &str)] = &[
            ("input_layernorm.", "attn_norm."),
            ("self_attn.q_proj.", "attn_q."),
            ("self_attn.k_proj.", "attn_k."),
            ("self_attn.v_proj.", "attn_v."),
            ("self_attn.q_norm.", "attn_q_norm."),
            ("self_attn.k_norm.", "attn_k_norm."),
            ("self_attn.o_proj.", "attn_output."),
            ("post_attention_layernorm.", "ffn_norm."),
            ("mlp.gate_proj.", "ffn_gate."),
            ("mlp.up_proj.", "ffn_up."),
            ("mlp.down_proj.", "ffn_down."),
            ("mlp.gate.", "ffn_gate_inp."),
            ("mlp.shared_expert_gate.", "ffn_gate_inp_shexp."),
            ("mlp.shared_expert.gate_proj.", "ffn_gate_shexp."),
            ("mlp.shared_expert.up_proj.", "ffn_up_shexp."),
            ("mlp.shared_expert.down_proj.", "ffn_down_shexp."),
        ];
        const EXPERT: &[(&str, &str)] = &[
            ("gate_proj.", "ffn_gate_exps."),
            ("up_proj.", "ffn_up_exps."),
            ("down_proj.", "ffn_down_exps."),
        ];
        let mut tensor = String::new();
        let (mut table, mut rest, mut expert) = (GLOBAL, name, None);
        if let Some((index, part)) = numbered(name, "model.layers.") {
            let _ = write!(tensor, "blk.{index}.");
            (table, rest) = (LAYER, part);
        }
        if let Some((index, part)) = numbered(rest, "mlp.experts.") {
            (table, rest, expert) = (EXPERT, part, Some(index));
        }
        match table.iter().find_map(|(hf, gg)| rest.strip_prefix(hf).map(|kind| (gg, kind))) {
            Some((prefix, kind)) => Self { tensor: tensor + prefix + kind, expert },
            None => Self { tensor: name.to_owned(), expert: None },
        }
    }
}

/// The number after a prefix, and what follows it.
fn numbered<'a>(name: &'a str, prefix: &str) -> Option<(usize, &'a str)> {
    let (index, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    Some((index.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::GgufName;

    #[test]
    fn hugging_face_names_map_to_the_names_in_gguf_files() {
        for (name, tensor, expert) in [
            ("model.embed_tokens.weight", "token_embd.weight", None),
            ("model.layers.17.self_attn.k_proj.bias", "blk.17.attn_k.bias", None),
            ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight", None),
            ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight", None),
            ("model.layers.2.mlp.gate.weight", "blk.2.ffn_gate_inp.weight", None),
            ("model.layers.2.mlp.gate_proj.weight", "blk.2.ffn_gate.weight", None),
            (
                "model.layers.9.mlp.shared_expert_gate.weight",
                "blk.9.ffn_gate_inp_shexp.weight",
                None,
            ),
            ("model.layers.9.mlp.shared_expert.up_proj.weight", "blk.9.ffn_up_shexp.weight", None),
            (
                "model.layers.4.mlp.experts.127.down_proj.weight",
                "blk.4.ffn_down_exps.weight",
                Some(127),
            ),
            ("lm_head.weight", "output.weight", None),
            ("unheard.of", "unheard.of", None),
        ] {
            assert_eq!(GgufName::of(name), GgufName { tensor: tensor.to_owned(), expert });
        }
    }
}
