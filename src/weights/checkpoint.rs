//! A model's parameters under their Hugging Face names, whatever file they come from.

use std::fmt::Write as _;
use std::path::Path;

use candle_core::quantized::GgmlDType;

use super::gguf::{Gguf, GgufError, TensorBytes, TensorInfo};

/// Why a checkpoint cannot be used as the model it says it is.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file itself is unusable.
    #[error(transparent)]
    Gguf(#[from] GgufError),
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
    #[error("tensor `{name}` is stored as {dtype:?}; norms and biases must be F32, F16 or BF16")]
    VectorType {
        /// The parameter's Hugging Face name.
        name: String,
        /// The type found.
        dtype: GgmlDType,
    },
    /// The file lacks a hyperparameter or holds an impossible one.
    #[error("{0}")]
    Hyperparameter(String),
}

/// The parameters of one model file.
pub struct Checkpoint {
    gguf: Gguf,
    filling: Filling,
}

/// Where a checkpoint's weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filling {
    File,
    Random,
}

/// Where the weights of a matrix come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// They are in the file.
    Stored,
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
const MAX_PORTABLE_BYTES: usize = 2 << 30;

/// A matrix as it lies in the file.
pub struct StoredMatrix {
    /// How its values are encoded.
    pub dtype: GgmlDType,
    /// Rows (output features).
    pub num_rows: usize,
    /// Columns (input features).
    pub num_cols: usize,
    /// The encoded rows, one after another.
    pub bytes: TensorBytes,
    /// Whether these are the weights.
    pub content: Content,
}

impl Checkpoint {
    /// Maps a GGUF file and, for a split one, its siblings.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Ok(Self { gguf: Gguf::open(path)?, filling: Filling::File })
    }

    /// The same with random weights, norms of one and biases of zero instead of the file's.
    pub fn open_dummy(path: &Path) -> Result<Self, CheckpointError> {
        Ok(Self { gguf: Gguf::open(path)?, filling: Filling::Random })
    }

    /// Whether the weights are random.
    pub fn is_dummy(&self) -> bool {
        self.filling == Filling::Random
    }

    /// The file's header.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// Whether the parameter is in the file. `name` is its Hugging Face name.
    pub fn contains(&self, name: &str) -> bool {
        let GgufName { tensor, expert } = GgufName::of(name);
        match (self.gguf.tensor(&tensor), expert) {
            (Ok((info, _)), Some(index)) => info.shape.first().is_some_and(|&count| index < count),
            (found, _) => found.is_ok(),
        }
    }

    /// A matrix of the given shape. One of a single row may be stored as a vector.
    pub fn matrix(
        &self,
        name: &str,
        num_rows: usize,
        num_cols: usize,
    ) -> Result<StoredMatrix, CheckpointError> {
        let (info, bytes) = self.shaped(name, &[num_rows, num_cols])?;
        let content = self.content(name);
        Ok(StoredMatrix { dtype: info.dtype, num_rows, num_cols, bytes, content })
    }

    fn content(&self, name: &str) -> Content {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let num_bytes: usize = self.gguf.tensors().map(|tensor| tensor.num_bytes).sum();
        match self.filling {
            Filling::File => Content::Stored,
            Filling::Random if num_bytes <= MAX_PORTABLE_BYTES => Content::Random { seed },
            Filling::Random => Content::RandomInPlace { seed },
        }
    }

    /// A vector of the given length as 32-bit floats.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let (info, bytes) = self.shaped(name, &[len])?;
        if self.is_dummy() {
            let is_bias = name.rsplit('.').next() == Some("bias");
            return Ok(vec![if is_bias { 0.0 } else { 1.0 }; len]);
        }
        let bytes = bytes.as_ref();
        let values = match info.dtype {
            GgmlDType::F32 => le_words(bytes).map(f32::from_le_bytes).collect(),
            GgmlDType::F16 => {
                le_words(bytes).map(|b| half::f16::from_le_bytes(b).to_f32()).collect()
            }
            GgmlDType::BF16 => {
                le_words(bytes).map(|b| half::bf16::from_le_bytes(b).to_f32()).collect()
            }
            dtype => return Err(CheckpointError::VectorType { name: name.to_owned(), dtype }),
        };
        Ok(values)
    }

    fn shaped(
        &self,
        name: &str,
        expected: &[usize],
    ) -> Result<(&TensorInfo, TensorBytes), CheckpointError> {
        let GgufName { tensor, expert } = GgufName::of(name);
        let (info, mut bytes) = self.gguf.shared_tensor(&tensor)?;
        let is_fitting = match (expert, info.shape.as_slice()) {
            (None, found) => found == expected || expected.strip_prefix(&[1]) == Some(found),
            (Some(index), [count, found @ ..]) if index < *count => {
                bytes = bytes.part(index, *count);
                found == expected
            }
            (Some(_), _) => false,
        };
        if !is_fitting {
            return Err(CheckpointError::Shape {
                name: name.to_owned(),
                found: info.shape.clone(),
                expected: expected.to_vec(),
            });
        }
        Ok((info, bytes))
    }
}

fn le_words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    let (words, _) = bytes.as_chunks::<N>();
    words.iter().copied()
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
