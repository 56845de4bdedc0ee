//! Which positions a model has beyond those it was trained for.
//!
//! The trained ones go as far as `original_max_position_embeddings`; sequences that keep within them
//! are computed as if nothing was stretched.

use super::ModelConfig;
use crate::config::{RopeScalingChoice, Yarn};
use crate::layers::attention::{RopeScaling, YarnScaling};
use crate::weights::checkpoint::{CheckpointError, Source};
use crate::weights::gguf::Metadata;
use crate::weights::repository::Repository;

impl ModelConfig {
    /// Stretches positions as the user wants, or else as the file says.
    pub(super) fn stretch(
        &mut self,
        choice: RopeScalingChoice,
        source: &Source,
    ) -> Result<(), CheckpointError> {
        let yarn = match choice {
            RopeScalingChoice::None => None,
            RopeScalingChoice::YarnWith(yarn) => Some(yarn),
            RopeScalingChoice::Auto | RopeScalingChoice::Yarn => match source {
                Source::Gguf(gguf) => yarn_of_gguf(gguf.metadata(), &self.architecture)?,
                Source::Repository(repository) => yarn_of_repository(repository)?,
            },
        };
        if yarn.is_none() && choice == RopeScalingChoice::Yarn {
            return Err(CheckpointError::Hyperparameter(
                "neither the file nor the catalogue says how the model's positions are stretched; \
                 say it with `--rope-scaling yarn:factor=4,original=32768`"
                    .to_owned(),
            ));
        }
        let Some(yarn) = yarn.filter(|yarn| 1.0 < yarn.factor) else { return Ok(()) };
        let original = yarn.original.unwrap_or(self.max_position_embeddings);
        let usual = YarnScaling::new(yarn.factor, original);
        self.rope_scaling = RopeScaling::Yarn(YarnScaling {
            beta_fast: yarn.beta_fast.unwrap_or(usual.beta_fast),
            beta_slow: yarn.beta_slow.unwrap_or(usual.beta_slow),
            attention_factor: yarn.attention_factor,
            ..usual
        });
        self.max_position_embeddings = (yarn.factor * original as f64) as usize;
        Ok(())
    }

    /// Sequences that may become longer than this have stretched positions.
    pub fn stretched_beyond(&self) -> Option<usize> {
        match self.rope_scaling {
            RopeScaling::None => None,
            RopeScaling::Yarn(yarn) => Some(yarn.original_max_position_embeddings),
        }
    }
}

/// `<architecture>.rope.scaling.*` of the GGUF specification, and llama.cpp's names for the rest.
fn yarn_of_gguf(metadata: &Metadata, architecture: &str) -> Result<Option<Yarn>, CheckpointError> {
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    let number = |name: &str| -> Result<Option<f64>, CheckpointError> {
        Ok(metadata.optional(&key(name), Metadata::f32)?.map(f64::from))
    };
    let bad = |what: String| Err(CheckpointError::Hyperparameter(what));
    match metadata.optional(&key("type"), Metadata::str)? {
        None | Some("none") => return Ok(None),
        Some("yarn") => {}
        Some(_) => {
            return bad("the file's RoPE scaling is not YaRN, which is not supported; \
                        `--rope-scaling none` ignores it"
                .to_owned());
        }
    }
    let original = metadata.optional(&key("original_context_length"), Metadata::u32)?;
    let factor = number("factor")?.unwrap_or(0.0);
    if !(factor.is_finite() && 1.0 <= factor) || original == Some(0) {
        return bad("the parameters of the file's YaRN are not usable".to_owned());
    }
    // Qwen's files have none of these; another meaning of them would change every number.
    for name in ["attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"] {
        let neutral = if name == "yarn_log_multiplier" { 0.1 } else { 1.0 };
        if number(name)?.is_some_and(|value| 1e-6 < (value - neutral).abs()) {
            return bad(format!("`{}` is not supported", key(name)));
        }
    }
    Ok(Some(Yarn {
        factor,
        original: original.map(|original| original as usize),
        beta_fast: number("yarn_beta_fast")?,
        beta_slow: number("yarn_beta_slow")?,
        attention_factor: None,
    }))
}

/// `rope_scaling` of `config.json`, or `rope_parameters` as transformers 5 has it.
fn yarn_of_repository(repository: &Repository) -> Result<Option<Yarn>, CheckpointError> {
    let config = repository.config();
    let Some(stated) = config.object("rope_scaling")?.or(config.object("rope_parameters")?) else {
        return Ok(None);
    };
    // Before there were types, an object without one meant nothing.
    let kinds = [stated.optional_str("rope_type")?, stated.optional_str("type")?];
    let (Some(_), Some(scaling)) = (kinds.into_iter().flatten().next(), stated.value().as_object())
    else {
        return Ok(None);
    };
    let unusable = |what| config.complaint(&format!("has no usable `rope_scaling`: {what}"));
    Ok(RopeScalingChoice::from_json(scaling).map_err(unusable)?)
}
