//! How a repository stores its matrices: as floats, or quantised by one of the tools that publish.
//!
//! A `Scheme` is read from `quantization_config` in `config.json`, or from the file of its own
//! that older tools wrote. What it does not name exactly is refused: a wrong guess gives a model
//! that talks nonsense.

mod fp8;
mod grouped;

use super::checkpoint::{CheckpointError, Content, StoredMatrix};
use super::gguf::shown;
use super::repository::{JsonFile, Repository, RepositoryError};
use super::safetensors::{ElementType, TensorInfo};

use fp8::Fp8;
pub use fp8::Fp8Scales;
use grouped::Grouped;
pub use grouped::{GroupedWeights, Packing};

/// How the matrices of a repository are stored.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scheme {
    /// As floats.
    Floats,
    /// GPTQ or AWQ: integers with a scale and a zero point for each group of columns.
    Grouped(Grouped),
    /// Floats of eight bits with scales.
    Fp8(Fp8),
}

impl Scheme {
    /// Reads what a repository says about itself.
    pub(super) fn of(repository: &Repository) -> Result<Self, RepositoryError> {
        if let Some(settings) = repository.config().object("quantization_config")? {
            return match settings.str("quant_method")? {
                "gptq" => Grouped::gptq(&settings).map(Self::Grouped),
                "awq" => Grouped::awq(&settings).map(Self::Grouped),
                "fp8" => Fp8::fine_grained(&settings).map(Self::Fp8),
                "compressed-tensors" => Fp8::compressed_tensors(&settings).map(Self::Fp8),
                other => Err(settings.unsupported(format!("the quantisation `{}`", shown(other)))),
            };
        }
        if let Some(settings) = repository.json("quantize_config.json")? {
            return Grouped::gptq(&settings).map(Self::Grouped);
        }
        if let Some(settings) = repository.json("quant_config.json")? {
            return Grouped::awq(&settings).map(Self::Grouped);
        }
        Ok(Self::Floats)
    }

    /// What its publishers call it; nothing for floats.
    pub(super) fn name(&self) -> Option<String> {
        match self {
            Self::Floats => None,
            Self::Grouped(grouped) => Some(grouped.name()),
            Self::Fp8(fp8) => Some(fp8.name()),
        }
    }

    /// Whether a matrix, by its name without `.weight`, is there in this scheme's own form.
    pub(super) fn has_module(&self, repository: &Repository, module: &str) -> bool {
        let has = |suffix: &str| repository.info(&format!("{module}.{suffix}"));
        match self {
            Self::Floats => false,
            Self::Grouped(_) => has("weight").is_none() && has("qweight").is_some(),
            Self::Fp8(_) => has("weight").is_some_and(|info| info.dtype == ElementType::F8E4M3),
        }
    }

    /// A matrix that [`Self::has_module`] finds.
    pub(super) fn matrix(
        &self,
        repository: &Repository,
        module: &str,
        shape: (usize, usize),
    ) -> Result<StoredMatrix, CheckpointError> {
        match self {
            Self::Floats => unreachable!("floats are no module of their own"),
            Self::Grouped(grouped) => grouped.matrix(repository, module, shape),
            Self::Fp8(fp8) => fp8.matrix(repository, module, shape),
        }
    }

    /// Whether matrices are floats of some kind, so that they can be quantised.
    pub(super) fn is_of_floats(&self) -> bool {
        matches!(self, Self::Floats | Self::Fp8(_))
    }

    /// Weights of the model in a tensor, and the memory they take when loaded. What only helps to
    /// read others, as scales do, has none.
    pub(super) fn size(&self, tensor: &TensorInfo) -> (u64, u64) {
        let num_values = tensor.num_values() as u64;
        let ordinary = (num_values, tensor.num_bytes() as u64);
        let suffix = tensor.name.rsplit('.').next().unwrap_or_default();
        match self {
            Self::Grouped(grouped) => match suffix {
                "qweight" => {
                    let num_weights = num_values * u64::from(32 / grouped.bits);
                    let dtype = grouped.dtype();
                    let num_blocks = num_weights / dtype.block_size() as u64;
                    (num_weights, num_blocks * dtype.type_size() as u64)
                }
                "qzeros" | "scales" | "g_idx" => (0, 0),
                _ => ordinary,
            },
            Self::Fp8(fp8) if tensor.dtype == ElementType::F8E4M3 => {
                (num_values, fp8.num_bytes(tensor))
            }
            Self::Fp8(_) if suffix.contains("scale") => (0, 0),
            Self::Floats | Self::Fp8(_) => ordinary,
        }
    }
}

/// A shape that a tensor must have, or an error that names it.
fn check_shape(tensor: &TensorInfo, expected: &[usize]) -> Result<(), CheckpointError> {
    if tensor.shape == expected {
        return Ok(());
    }
    Err(CheckpointError::Shape {
        name: tensor.name.clone(),
        found: tensor.shape.clone(),
        expected: expected.to_vec(),
    })
}

/// The values of a tensor of floats.
fn floats(repository: &Repository, name: &str) -> Result<(TensorInfo, Vec<f32>), RepositoryError> {
    let (info, bytes) = repository.tensor(name)?;
    let values = info.dtype.to_f32(bytes.as_ref()).ok_or_else(|| {
        repository.complaint(name, &format!("is stored as {}, not as floats", info.dtype.name()))
    })?;
    if values.iter().any(|value| !value.is_finite()) {
        return Err(repository.complaint(name, "holds a scale that is no number"));
    }
    Ok((info.clone(), values))
}

/// A whole number of a quantisation's settings that newer and older tools name differently.
fn renamed(settings: &JsonFile, names: [&str; 2]) -> Result<i64, RepositoryError> {
    for name in names {
        if let Some(value) = settings.optional_i64(name)? {
            return Ok(value);
        }
    }
    settings.size(names[0]).map(|value| value as i64)
}
