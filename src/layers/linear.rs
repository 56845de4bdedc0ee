//! `y = x Wᵀ + b`, whatever type the weights are stored in.

use candle_core::Result;

use super::content::rows;
use crate::ops::matmul::{
    MatrixSource, RandomSource, Stacking, Weights, gated_matmul, matmul, matmul_f32,
};
use crate::ops::tensor::{Device, Tensor};
use crate::weights::checkpoint::{Checkpoint, Content, StoredMatrix};

/// A linear projection, or several that share their input and run as one.
pub struct Linear {
    weight: Weights,
    bias: Option<Tensor>,
}

/// What a projection is called and how many features it puts out.
pub struct Projection<'a> {
    /// Hugging Face name without `.weight`.
    pub name: &'a str,
    /// Number of output features.
    pub out_features: usize,
}

impl Linear {
    /// Loads projections of the same input and stacks their outputs in the given order.
    ///
    /// Biases are read where the file has them; a stack has either all or none.
    pub fn load(
        checkpoint: &Checkpoint,
        prefix: &str,
        projections: &[Projection<'_>],
        in_features: usize,
        device: &Device,
    ) -> anyhow::Result<Self> {
        Self::load_stacked(
            (checkpoint, prefix),
            projections,
            in_features,
            (Stacking::Below, device),
        )
    }

    /// Loads a gate and an up projection for [`Linear::forward_gated`].
    pub fn load_gated(
        checkpoint: &Checkpoint,
        prefix: &str,
        projections: &[Projection<'_>; 2],
        in_features: usize,
        device: &Device,
    ) -> anyhow::Result<Self> {
        Self::load_stacked(
            (checkpoint, prefix),
            projections,
            in_features,
            (Stacking::Gated, device),
        )
    }

    fn load_stacked(
        (checkpoint, prefix): (&Checkpoint, &str),
        projections: &[Projection<'_>],
        in_features: usize,
        (stacking, device): (Stacking, &Device),
    ) -> anyhow::Result<Self> {
        let mut stored = Vec::new();
        let mut bias = Vec::new();
        for projection in projections {
            let name = format!("{prefix}{}", projection.name);
            stored.push(checkpoint.matrix(
                &format!("{name}.weight"),
                projection.out_features,
                in_features,
            )?);
            let bias_name = format!("{name}.bias");
            if checkpoint.contains(&bias_name) {
                bias.extend(checkpoint.vector(&bias_name, projection.out_features)?);
            }
        }
        let weight = pack(&stored, in_features, stacking, device)?;
        let bias = match bias.len() {
            0 => None,
            len if len == weight.num_rows() => Some(Tensor::from_vec(bias, (1, len), device)?),
            _ => anyhow::bail!("only some of the biases of `{prefix}` are in the file"),
        };
        Ok(Self { weight, bias })
    }

    /// `[num_tokens, in_features]` to `[num_tokens, out_features]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        matmul(x, &self.weight, self.bias.as_ref())
    }

    /// [`Linear::forward`] with a result in `f32` on every device.
    pub fn forward_f32(&self, x: &Tensor) -> Result<Tensor> {
        matmul_f32(x, &self.weight, self.bias.as_ref())
    }

    /// Of a stack of gate and up projection without biases, `silu(gate(x)) * up(x)`:
    /// `[num_tokens, in_features]` to `[num_tokens, out_features / 2]`.
    pub fn forward_gated(&self, x: &Tensor) -> Result<Tensor> {
        if self.bias.is_some() {
            candle_core::bail!("a gated projection with a bias is not supported");
        }
        gated_matmul(x, &self.weight)
    }

    /// Memory that the weights take.
    pub fn num_bytes(&self) -> usize {
        self.weight.num_bytes()
    }
}

fn pack(
    stored: &[StoredMatrix],
    in_features: usize,
    stacking: Stacking,
    device: &Device,
) -> Result<Weights> {
    if let Some(random) = random_sources(stored) {
        return Weights::random(&random, in_features, stacking, device);
    }
    let rows = stored.iter().map(rows).collect::<Result<Vec<_>>>()?;
    let sources: Vec<_> = stored
        .iter()
        .zip(&rows)
        .map(|(matrix, rows)| MatrixSource {
            dtype: matrix.dtype,
            data: rows,
            num_rows: matrix.num_rows,
        })
        .collect();
    Weights::pack(&sources, in_features, stacking, device)
}

/// What to make up of matrices that are best made up in place.
fn random_sources(stored: &[StoredMatrix]) -> Option<Vec<RandomSource>> {
    let sources = stored.iter().map(|matrix| match matrix.content {
        Content::RandomInPlace { seed } => {
            Some(RandomSource { dtype: matrix.dtype, num_rows: matrix.num_rows, seed })
        }
        Content::Stored | Content::Random { .. } => None,
    });
    sources.collect()
}
