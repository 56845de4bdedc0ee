//! A model of random weights, for `--load-format dummy`.

use std::path::Path;

use anyhow::{Context, Result};

use super::rope_scaling;
use crate::cli::Hinted;
use crate::config::temporary_folder;
use crate::runner::load::{LoadOptions, PlannedModel};
use crate::weights::catalogue::{Catalogue, DEFAULT_QUANTIZATION, split_name};
use crate::weights::dummy::{Quantization, write};
use crate::weights::resolve::ResolvedModel;

/// Plans a model of the shape of a catalogue's entry or of a GGUF file.
///
/// # Errors
/// If there is no such model or quantisation, or it does not fit into memory.
pub(super) fn make_up(name: &str, options: LoadOptions) -> Result<(ResolvedModel, PlannedModel)> {
    tracing::warn!("the weights are random (--load-format dummy): every answer is noise");
    let path = Path::new(name);
    if path.is_file() {
        let planned = PlannedModel::open_dummy(path, options)
            .with_context(|| format!("cannot load `{name}`"))?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        return Ok((ResolvedModel { path: path.to_path_buf(), name: stem, entry: None }, planned));
    }
    let catalogue = Catalogue::builtin();
    let (_, quantization) = split_name(name);
    let quantization: Quantization = quantization.unwrap_or(DEFAULT_QUANTIZATION).parse()?;
    let Some(entry) = catalogue.find(name) else {
        return Err(Hinted {
            message: format!("`--load-format dummy` knows no model `{name}`"),
            hint: "pass a name of `qwen-server models`, with a quantisation such as `:bf16`, or a \
                   GGUF file"
                .to_owned(),
        }
        .into());
    };
    let folder = temporary_folder();
    let file = write(entry, quantization, &folder)
        .with_context(|| format!("cannot write a dummy model into `{}`", folder.display()))?;
    let rope_scaling = rope_scaling(options.rope_scaling, Some(entry));
    let options = LoadOptions { rope_scaling, ..options };
    let planned = PlannedModel::open_dummy(file.path(), options)
        .with_context(|| format!("cannot make up `{name}`"))?;
    let path = file.path().to_path_buf();
    let name = entry.model.name.clone();
    Ok((ResolvedModel { path, name, entry: Some(entry.clone()) }, planned))
}
