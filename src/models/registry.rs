//! From the architecture's name in a file to the code that runs it.

use anyhow::bail;

use super::decoder::{Architecture, Decoder};
use super::qwen2::QWEN2;
use super::qwen2_moe::QWEN2_MOE;
use super::qwen3::QWEN3;
use super::qwen3_moe::QWEN3_MOE;
use super::{Model, ModelConfig};
use crate::layers::Device;
use crate::weights::checkpoint::Checkpoint;
use crate::weights::gguf::printable;

/// The architectures this build can run.
const SUPPORTED: [Architecture; 4] = [QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE];

/// Refuses an architecture that this build does not know.
pub fn check_architecture(name: &str) -> anyhow::Result<()> {
    find(name).map(|_| ())
}

fn find(name: &str) -> anyhow::Result<Architecture> {
    let Some(found) = SUPPORTED.into_iter().find(|architecture| architecture.name == name) else {
        let names = SUPPORTED.map(|architecture| architecture.name).join(", ");
        bail!("architecture `{}` is not supported; this build runs: {names}", printable(name));
    };
    Ok(found)
}

/// Loads a model; `on_layer` hears how many of its layers are done.
pub fn load(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    max_model_len: usize,
    device: &Device,
    on_layer: &mut dyn FnMut(usize),
) -> anyhow::Result<Box<dyn Model>> {
    let architecture = find(&config.architecture)?;
    let shape = (config, max_model_len);
    Ok(Box::new(Decoder::load(&architecture, checkpoint, shape, device, on_layer)?))
}
