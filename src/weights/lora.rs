//! Adapters as PEFT saves them: a directory with `adapter_config.json` and
//! `adapter_model.safetensors`. See <https://huggingface.co/docs/peft>, "LoRA", for the fields.
//!
//! Everything that would change the numbers and is not computed here is refused, in one line that
//! names the field or the tensor and what to do.

mod config;

use std::collections::BTreeMap;
use std::path::Path;

pub use self::config::LoraConfig;
use super::gguf::shown;
use super::repository::{Problem, RepositoryError};
use super::safetensors::{ElementType, Safetensors, TensorInfo};
use super::tensor_bytes::TensorBytes;

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before the name of every module.
const PREFIX: &str = "base_model.model.";
/// What can be done with an adapter that cannot be used.
const MERGE: &str = "merge it into its model (PEFT's `merge_and_unload`) and serve that";

/// The files of an adapter, checked as far as that goes without its model.
#[derive(Debug)]
pub struct LoraFiles {
    config: LoraConfig,
    weights: Safetensors,
    pairs: BTreeMap<String, Pair>,
}

/// The two matrices of a module.
#[derive(Debug, Default)]
struct Pair {
    a: Option<TensorInfo>,
    b: Option<TensorInfo>,
}

/// What an adapter adds to a module: `scale * b a`.
#[derive(Debug)]
pub struct LoraModule<'a> {
    /// The module's name, such as `model.layers.0.self_attn.q_proj`.
    pub name: &'a str,
    /// Its rank.
    pub rank: usize,
    /// What the product is multiplied with.
    pub scale: f32,
    /// `[rank, in_features]`
    pub a: &'a TensorInfo,
    /// `[out_features, rank]`
    pub b: &'a TensorInfo,
}

impl LoraFiles {
    /// Reads the configuration and the names, types and shapes of the tensors.
    ///
    /// # Errors
    /// If a file cannot be read, is damaged, or asks for what is not supported.
    pub fn open(directory: &Path) -> Result<Self, RepositoryError> {
        let config = LoraConfig::open(&directory.join(CONFIG_FILE))?;
        let weights = Safetensors::open(&directory.join(WEIGHTS_FILE))?;
        let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
        for tensor in weights.tensors() {
            let (module, half) = split_name(&tensor.name)
                .map_err(|problem| RepositoryError::new(weights.path(), problem))?;
            let pair = pairs.entry(module.to_owned()).or_default();
            match half {
                Half::A => pair.a = Some(tensor.clone()),
                Half::B => pair.b = Some(tensor.clone()),
            }
        }
        let files = Self { config, weights, pairs };
        if files.pairs.is_empty() {
            return Err(files.complaint("it has no tensors".to_owned()));
        }
        Ok(files)
    }

    /// What the configuration says.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Every module that the adapter changes.
    ///
    /// # Errors
    /// If a module has only one matrix, or matrices whose types or ranks cannot be.
    pub fn modules(&self) -> Result<Vec<LoraModule<'_>>, RepositoryError> {
        self.pairs.iter().map(|(name, pair)| self.module(name, pair)).collect()
    }

    fn module<'a>(
        &'a self,
        name: &'a str,
        pair: &'a Pair,
    ) -> Result<LoraModule<'a>, RepositoryError> {
        let (a, b) = match pair {
            Pair { a: Some(a), b: Some(b) } => (a, b),
            Pair { a: Some(_), .. } => return Err(self.lone(name, "lora_A", "lora_B")),
            Pair { .. } => return Err(self.lone(name, "lora_B", "lora_A")),
        };
        for tensor in [a, b] {
            let is_float =
                matches!(tensor.dtype, ElementType::F32 | ElementType::F16 | ElementType::BF16);
            if !is_float {
                let problem = Problem::UnsupportedType {
                    tensor: shown(&tensor.name),
                    dtype: tensor.dtype.name().to_owned(),
                };
                return Err(RepositoryError::new(self.weights.path(), problem));
            }
        }
        let (rank, scale) = self.config.rank_and_scale(name)?;
        let has_rank = a.shape.first() == Some(&rank) && b.shape.get(1) == Some(&rank);
        if a.shape.len() != 2 || b.shape.len() != 2 || !has_rank {
            return Err(self.complaint(format!(
                "`{}` has matrices of {:?} and {:?}, which are not of rank {rank} as \
                 `{CONFIG_FILE}` says",
                shown(name),
                a.shape,
                b.shape
            )));
        }
        Ok(LoraModule { name, rank, scale, a, b })
    }

    /// The bytes of a matrix.
    ///
    /// # Errors
    /// If one of its values is not finite.
    pub fn finite_bytes(&self, tensor: &TensorInfo) -> Result<TensorBytes, RepositoryError> {
        let bytes = self.weights.bytes(tensor);
        let values = tensor.dtype.to_f32(bytes.as_ref()).unwrap_or_default();
        if values.iter().all(|value| value.is_finite()) {
            return Ok(bytes);
        }
        Err(self
            .complaint(format!("tensor `{}` has values that are not finite", shown(&tensor.name))))
    }

    /// An error about the tensors.
    pub fn complaint(&self, what: String) -> RepositoryError {
        RepositoryError::new(self.weights.path(), Problem::Setting(what))
    }

    fn lone(&self, name: &str, there: &str, missing: &str) -> RepositoryError {
        let name = shown(name);
        self.complaint(format!("`{name}` has a `{there}` but no `{missing}`; save it again"))
    }
}

/// Which matrix of a pair.
enum Half {
    A,
    B,
}

/// The module that a tensor belongs to.
fn split_name(name: &str) -> Result<(&str, Half), Problem> {
    let setting = |what: &str| Problem::Setting(format!("tensor `{}` {what}", shown(name)));
    let Some(rest) = name.strip_prefix(PREFIX) else {
        return Err(setting(&format!("does not begin with `{PREFIX}`: PEFT has not saved it")));
    };
    if let Some(module) = rest.strip_suffix(".lora_A.weight") {
        return Ok((module, Half::A));
    }
    if let Some(module) = rest.strip_suffix(".lora_B.weight") {
        return Ok((module, Half::B));
    }
    let what = match rest {
        _ if rest.contains(".lora_embedding_") => "adapts the embedding",
        _ if rest.contains(".lora_magnitude_vector") => "is of DoRA",
        _ if rest.rsplit('.').next() == Some("bias") => "is a bias",
        _ => "is none of `lora_A` and `lora_B`",
    };
    Err(setting(&format!("{what}, which is not supported; {MERGE}")))
}
