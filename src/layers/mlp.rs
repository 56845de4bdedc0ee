//! The gated feed-forward part of a decoder layer (SwiGLU, Shazeer 2020).

use candle_core::Result;

use super::linear::{Linear, Projection};
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
        let gate_up = [
            Projection { name: "gate_proj", out_features: intermediate_size },
            Projection { name: "up_proj", out_features: intermediate_size },
        ];
        let down = [Projection { name: "down_proj", out_features: hidden_size }];
        Ok(Self {
            gate_up_proj: Linear::load_gated(checkpoint, prefix, &gate_up, hidden_size, device)?,
            down_proj: Linear::load(checkpoint, prefix, &down, intermediate_size, device)?,
        })
    }

    /// `[num_tokens, hidden_size]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gated = self.gate_up_proj.forward_gated(x)?; // [num_tokens, intermediate_size]
        self.down_proj.forward(&gated)
    }

    /// Memory that the weights take.
    pub fn num_bytes(&self) -> usize {
        self.gate_up_proj.num_bytes() + self.down_proj.num_bytes()
    }
}
