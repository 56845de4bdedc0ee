//! From an adapter's files to terms beside the projections of a model.

use anyhow::{Context, Result};
use candle_core::quantized::GgmlDType;

use super::ModelConfig;
use crate::layers::Device;
pub use crate::layers::lora::{AdaptedRows, LoraWeights};
use crate::layers::lora::{LayerTerms, LowRank, LowRankSource, MatrixSource, Site};
use crate::weights::gguf::shown;
use crate::weights::lora::{LoraFiles, LoraModule};
use crate::weights::safetensors::{ElementType, TensorInfo};

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

impl Target {
    fn max_bytes(self, rank: usize, device: &Device) -> u64 {
        LowRank::max_bytes(rank, self.in_features, self.out_features, device)
    }
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
pub fn max_adapter_bytes(config: &ModelConfig, rank: usize, device: &Device) -> u64 {
    let bytes = |target: Target| target.max_bytes(rank, device);
    targets(config).into_iter().map(bytes).sum::<u64>() * config.num_hidden_layers as u64
}

/// An adapter whose tensors were all found to fit a model, before anything is allocated for it.
pub struct FittingAdapter<'a> {
    files: &'a LoraFiles,
    modules: Vec<(Place, LoraModule<'a>)>,
    num_layers: usize,
}

/// A projection of a layer.
type Place = (usize, Target);

impl<'a> FittingAdapter<'a> {
    /// Holds an adapter's files against a model.
    ///
    /// # Errors
    /// If they ask for what is not supported, or were made for another model, or the rank is above
    /// `max_rank`.
    pub fn new(files: &'a LoraFiles, config: &ModelConfig, max_rank: usize) -> Result<Self> {
        let targets = targets(config);
        let mut modules = Vec::new();
        for module in files.modules()? {
            let place = place(&module, &targets, config).map_err(|what| files.complaint(what))?;
            check_shape(&module, &place.1).map_err(|what| files.complaint(what))?;
            if max_rank < module.rank {
                let (name, rank) = (module.name, module.rank);
                let what = format!(
                    "`{name}` has rank {rank}, which is above `--max-lora-rank {max_rank}`"
                );
                return Err(files.complaint(what).into());
            }
            modules.push((place, module));
        }
        check_complete(files, &modules, &targets, config)?;
        Ok(Self { files, modules, num_layers: config.num_hidden_layers })
    }

    /// Most memory that it will take.
    pub fn max_bytes(&self, device: &Device) -> u64 {
        let bytes =
            |((_, target), module): &(Place, LoraModule<'_>)| target.max_bytes(module.rank, device);
        self.modules.iter().map(bytes).sum()
    }

    /// Packs its weights for the device that the model is on.
    ///
    /// # Errors
    /// If a value is not finite, or there is no memory.
    pub fn pack(&self, device: &Device) -> Result<LoraWeights> {
        let bytes = |(_, module): &(Place, LoraModule<'_>)| {
            Ok([self.files.finite_bytes(module.a)?, self.files.finite_bytes(module.b)?])
        };
        let bytes = self.modules.iter().map(bytes).collect::<Result<Vec<_>>>()?;
        let sources: Vec<_> = self
            .modules
            .iter()
            .zip(&bytes)
            .map(|(((_, target), module), [a, b])| LowRankSource {
                a: matrix(module.a, a.as_ref()),
                b: matrix(module.b, b.as_ref()),
                num_inputs: target.in_features,
                scale: module.scale,
                first_column: target.first_column,
            })
            .collect();
        let terms = LowRank::pack_each(&sources, device).context("cannot load the adapter")?;
        let mut layers: Vec<LayerTerms> =
            (0..self.num_layers).map(|_| LayerTerms::default()).collect();
        for (((layer, target), _), term) in self.modules.iter().zip(terms) {
            layers[*layer][target.site as usize].push(term);
        }
        Ok(LoraWeights::new(layers))
    }
}

fn matrix<'a>(tensor: &TensorInfo, data: &'a [u8]) -> MatrixSource<'a> {
    let format = match tensor.dtype {
        ElementType::F16 => GgmlDType::F16.into(),
        ElementType::BF16 => GgmlDType::BF16.into(),
        _ => GgmlDType::F32.into(),
    };
    MatrixSource { format, data, num_rows: tensor.shape[0] }
}

/// The layer and the projection that a module is.
fn place(
    module: &LoraModule<'_>,
    targets: &[Target],
    config: &ModelConfig,
) -> Result<Place, String> {
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
    Ok((layer, *target))
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
    modules: &[(Place, LoraModule<'_>)],
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
