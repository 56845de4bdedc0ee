//! From an adapter's files to terms beside the projections of a model.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::GgmlDType;

use super::ModelConfig;
use crate::layers::Device;
pub use crate::layers::lora::{AdaptedRows, LoraWeights};
use crate::layers::lora::{LayerTerms, LowRank, LowRankSource, MatrixSource, Site};
use crate::weights::gguf::shown;
use crate::weights::lora::{LoraFiles, LoraModule};
use crate::weights::safetensors::{ElementType, TensorInfo};

/// The tallest panel that a packed matrix is rounded up to.
const PANEL_ROWS: usize = 16;

/// A projection that can be adapted.
#[derive(Clone, Copy)]
struct Target {
    /// Its name behind that of the layer.
    name: &'static str,
    site: Site,
    /// Where its outputs begin among those of the site.
    first_column: usize,
    out_features: usize,
    in_features: usize,
}

/// The projections of a layer. Experts are not among them.
fn targets(config: &ModelConfig) -> Vec<Target> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let heads = config.num_attention_heads * config.head_dim;
    let kv_heads = config.num_key_value_heads * config.head_dim;
    let target = |name, site, first_column, (out_features, in_features)| Target {
        name,
        site,
        first_column,
        out_features,
        in_features,
    };
    let mut targets = vec![
        target("self_attn.q_proj", Site::Qkv, 0, (heads, hidden)),
        target("self_attn.k_proj", Site::Qkv, heads, (kv_heads, hidden)),
        target("self_attn.v_proj", Site::Qkv, heads + kv_heads, (kv_heads, hidden)),
        target("self_attn.o_proj", Site::Output, 0, (hidden, heads)),
    ];
    if config.experts.is_none() {
        targets.extend([
            target("mlp.gate_proj", Site::GateUp, 0, (inner, hidden)),
            target("mlp.up_proj", Site::GateUp, inner, (inner, hidden)),
            target("mlp.down_proj", Site::Down, 0, (hidden, inner)),
        ]);
    }
    targets
}

/// Most memory that an adapter of a rank takes.
pub fn max_adapter_bytes(config: &ModelConfig, rank: usize) -> u64 {
    let values = |target: Target| {
        let a = rank.next_multiple_of(PANEL_ROWS) * target.in_features;
        let b = target.out_features.next_multiple_of(PANEL_ROWS) * rank;
        (a + b) as u64
    };
    let per_layer: u64 = targets(config).into_iter().map(values).sum();
    per_layer * config.num_hidden_layers as u64 * size_of::<f32>() as u64
}

/// Loads an adapter for a model. Nothing is allocated before every tensor was found to fit.
///
/// # Errors
/// If its files are damaged, or ask for what is not supported, or were made for another model, or
/// its rank is above `max_rank`.
pub fn load(
    directory: &Path,
    config: &ModelConfig,
    max_rank: usize,
    device: &Device,
) -> Result<LoraWeights> {
    let files = LoraFiles::open(directory)?;
    let targets = targets(config);
    let mut modules = Vec::new();
    for module in files.modules()? {
        let place = place(&module, &targets, config).map_err(|what| files.complaint(what))?;
        check_shape(&module, place.1).map_err(|what| files.complaint(what))?;
        ensure!(
            module.rank <= max_rank,
            "{}: `{}` has rank {}, which is above `--max-lora-rank {max_rank}`",
            directory.display(),
            module.name,
            module.rank
        );
        modules.push((place, module));
    }
    check_complete(&files, &modules, &targets, config)?;
    let mut layers: Vec<LayerTerms> =
        (0..config.num_hidden_layers).map(|_| LayerTerms::default()).collect();
    for ((layer, target), module) in modules {
        layers[layer][target.site as usize].push(pack(&files, &module, target, device)?);
    }
    Ok(LoraWeights::new(layers))
}

/// The layer and the projection that a module is.
fn place<'a>(
    module: &LoraModule<'_>,
    targets: &'a [Target],
    config: &ModelConfig,
) -> Result<(usize, &'a Target), String> {
    let name = shown(module.name);
    let rest = module.name.strip_prefix("model.layers.").unwrap_or_default();
    let (number, rest) = rest.split_once('.').unwrap_or_default();
    let layer = number.parse::<usize>().ok().filter(|layer| layer.to_string() == number);
    let Some(layer) = layer else {
        return Err(format!(
            "`{name}` is no projection of a layer; adapters of the embedding and of the output head \
             are not supported"
        ));
    };
    if config.num_hidden_layers <= layer {
        let count = config.num_hidden_layers;
        return Err(format!("`{name}` is not in this model, which has {count} layers"));
    }
    if config.experts.is_some() && rest.starts_with("mlp.") {
        return Err(format!("`{name}` belongs to experts, whose adapters are not supported"));
    }
    let Some(target) = targets.iter().find(|target| target.name == rest) else {
        let names: Vec<_> = targets.iter().map(|target| target.name).collect();
        return Err(format!("`{name}` cannot be adapted here, only {}", names.join(", ")));
    };
    Ok((layer, target))
}

fn check_shape(module: &LoraModule<'_>, target: &Target) -> Result<(), String> {
    let Target { out_features, in_features, .. } = *target;
    let (inputs, outputs) = (module.a.shape[1], module.b.shape[0]);
    if (outputs, inputs) == (out_features, in_features) {
        return Ok(());
    }
    Err(format!(
        "`{}` is for a projection of {outputs} x {inputs}, but the model's is {out_features} x \
         {in_features}: it was made for another model",
        module.name
    ))
}

/// What the configuration names and what the tensors are must be the same, where it names anything.
fn check_complete(
    files: &LoraFiles,
    modules: &[((usize, &Target), LoraModule<'_>)],
    targets: &[Target],
    config: &ModelConfig,
) -> Result<()> {
    for layer in 0..config.num_hidden_layers {
        for target in targets {
            let name = format!("model.layers.{layer}.{}", target.name);
            let has_tensors = modules.iter().any(|(_, module)| module.name == name);
            match (files.config().targets(layer, &name), has_tensors) {
                (Some(true), false) => {
                    let what = format!("`{name}` is named by `target_modules`, but has no tensors");
                    return Err(files.complaint(what).into());
                }
                (Some(false), true) => {
                    let what = "has tensors, but is not named by `target_modules` and \
                                `layers_to_transform`";
                    return Err(files.complaint(format!("`{name}` {what}")).into());
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn pack(
    files: &LoraFiles,
    module: &LoraModule<'_>,
    target: &Target,
    device: &Device,
) -> Result<LowRank> {
    let (a, b) = (files.finite_bytes(module.a)?, files.finite_bytes(module.b)?);
    let matrix = |tensor: &TensorInfo, data| MatrixSource {
        format: match tensor.dtype {
            ElementType::F16 => GgmlDType::F16.into(),
            ElementType::BF16 => GgmlDType::BF16.into(),
            _ => GgmlDType::F32.into(),
        },
        data,
        num_rows: tensor.shape[0],
    };
    let source = LowRankSource {
        a: matrix(module.a, a.as_ref()),
        b: matrix(module.b, b.as_ref()),
        num_inputs: target.in_features,
        scale: module.scale,
        first_column: target.first_column,
    };
    LowRank::pack(&source, device).with_context(|| format!("cannot load `{}`", module.name))
}
