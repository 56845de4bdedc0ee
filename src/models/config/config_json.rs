//! Hyperparameters out of a repository's `config.json`.
//!
//! What the file asks for and the models here do not do is refused by name, so that nothing runs as
//! another model than it is.

use super::{ExpertsConfig, ModelConfig, SlidingWindow};
use crate::layers::attention::RopeScaling;
use crate::weights::checkpoint::CheckpointError;
use crate::weights::gguf::shown;
use crate::weights::repository::{JsonFile, Repository, RepositoryError};

/// What transformers takes where `max_window_layers` or `sliding_window` is missing.
const DEFAULT_WINDOW_LAYERS: usize = 28;
const DEFAULT_WINDOW: usize = 4096;
/// Nobody has so many layers, or experts.
const MAX_COUNT: usize = 1 << 16;

/// The architecture by its GGUF name: `qwen2_moe` is `qwen2moe` there.
pub(super) fn architecture(config: &JsonFile) -> Result<String, RepositoryError> {
    Ok(config.str("model_type")?.replace('_', ""))
}

/// Reads what transformers' configuration of the model has, with its defaults.
pub(super) fn read(repository: &Repository) -> Result<ModelConfig, CheckpointError> {
    let config = repository.config();
    check_kind(config)?;
    check_head(repository)?;
    let hidden_size = config.size("hidden_size")?;
    let num_attention_heads = config.size("num_attention_heads")?;
    let head_dim = config.optional_size("head_dim")?;
    Ok(ModelConfig {
        architecture: architecture(config)?,
        hidden_size,
        intermediate_size: config.size("intermediate_size")?,
        num_hidden_layers: config.size("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: config
            .optional_size("num_key_value_heads")?
            .unwrap_or(num_attention_heads),
        head_dim: head_dim.unwrap_or(hidden_size / num_attention_heads.max(1)),
        vocab_size: config.size("vocab_size")?,
        max_position_embeddings: config.size("max_position_embeddings")?,
        rms_norm_eps: config.f32("rms_norm_eps")?,
        rope_theta: rope_theta(config)?.unwrap_or(10_000.0),
        rope_scaling: RopeScaling::None,
        experts: experts(config)?,
        sliding_window: sliding_window(config)?,
    })
}

/// Since transformers 5 the base stands among `rope_parameters`.
fn rope_theta(config: &JsonFile) -> Result<Option<f32>, RepositoryError> {
    let parameters = config.object("rope_parameters")?;
    let newer = parameters.map(|parameters| parameters.optional_f32("rope_theta")).transpose()?;
    Ok(config.optional_f32("rope_theta")?.or(newer.flatten()))
}

/// Which layers have experts is said by the parameters that there are. transformers 5 writes their
/// number under another name for some models.
fn experts(config: &JsonFile) -> Result<Option<ExpertsConfig>, RepositoryError> {
    let stated = [config.optional_size("num_experts")?, config.optional_size("num_local_experts")?];
    let Some(num_experts) = stated.into_iter().flatten().find(|count| 0 < *count) else {
        return Ok(None);
    };
    let num_experts_per_tok = config.size("num_experts_per_tok")?;
    if MAX_COUNT < num_experts {
        return Err(config.complaint("has more experts than any model"));
    }
    if num_experts_per_tok == 0 || num_experts < num_experts_per_tok {
        return Err(config
            .complaint("has a `num_experts_per_tok` that is not between one and `num_experts`"));
    }
    let moe_intermediate_size = config.size("moe_intermediate_size")?;
    if moe_intermediate_size == 0 {
        return Err(config.complaint("has a `moe_intermediate_size` of zero"));
    }
    Ok(Some(ExpertsConfig {
        num_experts,
        num_experts_per_tok,
        moe_intermediate_size,
        shared_expert_intermediate_size: config
            .optional_size("shared_expert_intermediate_size")?
            .unwrap_or(0),
        norm_topk_prob: Some(config.optional_bool("norm_topk_prob")?.unwrap_or(false)),
    }))
}

/// Without `layer_types`, which files have since transformers 5, windows begin at the layer
/// `max_window_layers`.
fn sliding_window(config: &JsonFile) -> Result<Option<SlidingWindow>, RepositoryError> {
    if config.optional_bool("use_sliding_window")? != Some(true) {
        return Ok(None);
    }
    let is_stated = config.value().get("sliding_window").is_some();
    let stated = config.optional_size("sliding_window")?;
    let Some(num_tokens) = stated.or((!is_stated).then_some(DEFAULT_WINDOW)) else {
        return Ok(None);
    };
    if num_tokens == 0 {
        return Err(config.complaint("has a `sliding_window` of zero"));
    }
    let num_layers = config.size("num_hidden_layers")?;
    if MAX_COUNT < num_layers {
        return Err(config.complaint("has more `num_hidden_layers` than any model"));
    }
    let layers = match config.value()["layer_types"].as_array() {
        None => {
            let first = config.optional_size("max_window_layers")?.unwrap_or(DEFAULT_WINDOW_LAYERS);
            (0..num_layers).map(|layer| first <= layer).collect()
        }
        Some(types) if types.len() != num_layers => {
            return Err(config.complaint("has not one of `layer_types` for each layer"));
        }
        Some(types) => types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(false),
                Some("sliding_attention") => Ok(true),
                _ => {
                    let kind = shown(&kind.to_string());
                    Err(config.unsupported(format!("a layer of the type {kind}")))
                }
            })
            .collect::<Result<Vec<_>, _>>()?,
    };
    Ok(layers.contains(&true).then_some(SlidingWindow { num_tokens, layers }))
}

fn check_kind(config: &JsonFile) -> Result<(), RepositoryError> {
    let kinds = config.value()["architectures"].as_array();
    let is_causal =
        |kind: &serde_json::Value| kind.as_str().is_some_and(|kind| kind.ends_with("ForCausalLM"));
    if let Some(other) = kinds.and_then(|kinds| kinds.iter().find(|kind| !is_causal(kind))) {
        let what =
            format!("the model class {}, which generates no text,", shown(&other.to_string()));
        return Err(config.unsupported(what));
    }
    if let Some(activation) = config.optional_str("hidden_act")?.filter(|name| *name != "silu") {
        return Err(config.unsupported(format!("the activation `{}`", shown(activation))));
    }
    Ok(())
}

/// Without weights of its own a head is the embedding, but only where the file says so.
fn check_head(repository: &Repository) -> Result<(), RepositoryError> {
    let is_tied = repository.config().optional_bool("tie_word_embeddings")?.unwrap_or(false);
    if !is_tied && repository.info("lm_head.qweight").is_none() {
        repository.tensor("lm_head.weight")?;
    }
    Ok(())
}
