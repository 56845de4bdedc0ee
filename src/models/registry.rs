//! From the architecture's name in a file to the code that runs it.

use anyhow::bail;

use super::qwen2::Qwen2;
use super::{Model, ModelConfig};
use crate::layers::Device;
use crate::weights::checkpoint::Checkpoint;
use crate::weights::gguf::printable;

/// The architectures this build can run, by their GGUF names.
pub const SUPPORTED_ARCHITECTURES: &[&str] = &["qwen2"];

/// Refuses an architecture that cannot be run.
pub fn check_architecture(architecture: &str) -> anyhow::Result<()> {
    if SUPPORTED_ARCHITECTURES.contains(&architecture) {
        return Ok(());
    }
    bail!(
        "architecture `{}` is not supported; this build runs: {}",
        printable(architecture),
        SUPPORTED_ARCHITECTURES.join(", ")
    )
}

/// Loads a model; `on_layer` hears how many of its layers are done.
pub fn load(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    max_model_len: usize,
    device: &Device,
    on_layer: &mut dyn FnMut(usize),
) -> anyhow::Result<Box<dyn Model>> {
    check_architecture(&config.architecture)?;
    Ok(Box::new(Qwen2::load(checkpoint, config, max_model_len, device, on_layer)?))
}
