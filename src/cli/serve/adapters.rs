//! The adapters that are there from the start, and how others are loaded.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::chat::model::NamePattern;
use crate::cli::Hinted;
use crate::config::Config;
use crate::http::{Adapters, LoadedAdapter};
use crate::runner::load::PlannedModel;

/// Loads what `--lora-modules` names; `names` are the model's, and `patterns` of further ones.
///
/// # Errors
/// If one cannot be used. Nothing is served with an adapter missing.
pub(super) fn load(
    config: &Config,
    planned: &Arc<PlannedModel>,
    (names, patterns): &(Vec<String>, Vec<NamePattern>),
) -> Result<Adapters> {
    let lora = &config.lora;
    if !lora.is_on() {
        return Ok(Adapters::default());
    }
    let to_load = Arc::clone(planned);
    let adapters = Adapters::new(lora.max_loras, move |directory| {
        let weights = to_load.load_adapter(directory);
        let weights = weights.map_err(|error| format!("{error:#}"))?;
        Ok(LoadedAdapter { num_bytes: weights.num_bytes(), weights })
    });
    let (taken, like) = (names.clone(), patterns.clone());
    let mut adapters = adapters.beside(move |name| {
        taken.iter().any(|taken| taken == name) || like.iter().any(|like| like.matches(name))
    });
    if let Some(root) = &lora.root {
        adapters = adapters.below(root).with_context(|| {
            format!("`--lora-root {}` is no directory that can be read", root.display())
        })?;
    }
    for module in &lora.modules {
        if let Some(base) = module.base_model_name.as_ref().filter(|base| !names.contains(base)) {
            let message = format!(
                "`--lora-modules`: `{}` is for `{base}`, which this server does not have",
                module.name
            );
            let hint = format!("it has `{}`", names.join("`, `"));
            return Err(Hinted { message, hint }.into());
        }
        adapters
            .add(&module.name, &module.path)
            .with_context(|| format!("`--lora-modules`: cannot load `{}`", module.name))?;
    }
    Ok(adapters)
}
