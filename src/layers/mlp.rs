//! The gated feed-forward part of a decoder layer (SwiGLU, Shazeer 2020).

use candle_core::Result;

use super::linear::{Linear, Projection, Stacking};
use super::lora::{Adaptation, Site};
use crate::ops::experts::ExpertRows;
use crate::ops::tensor::{Device, Tensor};
use crate::weights::checkpoint::Checkpoint;

/// `down(silu(gate(x)) * up(x))`.
pub struct Mlp {
    gate_up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    /// Loads `<prefix>gate_proj` and its siblings.
    pub fn load(
        checkpoint: &Checkpoint,
        prefix: &str,
        hidden_size: usize,
        intermediate_size: usize,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let shape = (hidden_size, intermediate_size);
        Ok(Self::load_each(checkpoint, &[prefix.to_owned()], shape, device)?.remove(0))
    }

    /// Loads one for each prefix, all of the same shape, side by side in memory.
    pub fn load_each(
        checkpoint: &Checkpoint,
        prefixes: &[String],
        (hidden_size, intermediate_size): (usize, usize),
        device: &Device,
    ) -> anyhow::Result<Vec<Self>> {
        let gate_up = ["gate_proj", "up_proj"]
            .map(|name| Projection { name, out_features: intermediate_size });
        let down = [Projection { name: "down_proj", out_features: hidden_size }];
        let gated = (Stacking::Gated, device);
        let plain = (Stacking::Below, device);
        let gate_ups = Linear::load_each(checkpoint, prefixes, &gate_up, hidden_size, gated)?;
        let downs = Linear::load_each(checkpoint, prefixes, &down, intermediate_size, plain)?;
        let pairs = gate_ups.into_iter().zip(downs);
        Ok(pairs.map(|(gate_up_proj, down_proj)| Self { gate_up_proj, down_proj }).collect())
    }

    /// Whether a projection has its columns in another order than its input.
    pub fn has_column_order(&self) -> bool {
        [&self.gate_up_proj, &self.down_proj].into_iter().any(Linear::has_column_order)
    }

    /// `[num_tokens, hidden_size]` to the same shape.
    pub fn forward(&self, x: &Tensor, adapted: Adaptation<'_>) -> Result<Tensor> {
        // [num_tokens, intermediate_size]
        let gated = self.gate_up_proj.forward_gated_adapted(x, adapted)?;
        self.down_proj.forward_adapted(&gated, adapted, Site::Down)
    }

    /// [`Mlp::forward`] of each expert's rows with that expert.
    pub fn forward_each(each: &[Self], rows: &ExpertRows) -> Result<ExpertRows> {
        let gate_ups = each.iter().map(|mlp| &mlp.gate_up_proj);
        let gated = Linear::forward_gated_each(gate_ups, rows)?; // intermediate_size columns
        Linear::forward_each(each.iter().map(|mlp| &mlp.down_proj), &gated)
    }

    /// Memory that the weights take.
    pub fn num_bytes(&self) -> usize {
        self.gate_up_proj.num_bytes() + self.down_proj.num_bytes()
    }
}
