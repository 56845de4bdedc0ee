//! Root-mean-square normalisation (Zhang and Sennrich, 2019).

use candle_core::Result;

use crate::ops::rms_norm::{add_rms_norm, rms_norm};
use crate::ops::tensor::{Device, Tensor};
use crate::weights::checkpoint::Checkpoint;

/// `x / rms(x) * weight`.
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// Loads `<name>.weight`.
    pub fn load(
        checkpoint: &Checkpoint,
        name: &str,
        size: usize,
        eps: f32,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let weight = checkpoint.vector(&format!("{name}.weight"), size)?;
        Ok(Self { weight: Tensor::from_vec(weight, (1, size), device)?, eps })
    }

    /// `[num_tokens, size]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.weight, self.eps)
    }

    /// Adds `x` to the residual stream; gives the new stream and its normalisation.
    pub fn add_forward(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        add_rms_norm(x, residual, &self.weight, self.eps)
    }
}
