//! `y = x Wᵀ + b`, whatever type the weights are stored in.

use candle_core::Result;

use super::content::rows;
pub use crate::ops::matmul::Stacking;

use crate::ops::matmul::{MatrixSource, RandomSource, Weights, gated_matmul, matmul, matmul_f32};
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
        let mut bias = Vec::new();
        for projection in projections {
            let name = format!("{prefix}{}.bias", projection.name);
            if checkpoint.contains(&name) {
                bias.extend(checkpoint.vector(&name, projection.out_features)?);
            }
        }
        let stored = stored(checkpoint, prefix, projections, in_features)?;
        let weight = pack_each(&[stored], in_features, Stacking::Below, device)?.remove(0);
        let bias = match bias.len() {
            0 => None,
            len if len == weight.num_rows() => Some(Tensor::from_vec(bias, (1, len), device)?),
            _ => anyhow::bail!("only some of the biases of `{prefix}` are in the file"),
        };
        Ok(Self { weight, bias })
    }

    /// Loads the same projections of several modules, each under a prefix of its own, into one piece
    /// of memory; a gate and an up projection stacked as such are for [`Linear::forward_gated`].
    ///
    /// # Errors
    /// If one has a bias, beside those of reading and packing.
    pub fn load_each(
        checkpoint: &Checkpoint,
        prefixes: &[String],
        projections: &[Projection<'_>],
        in_features: usize,
        (stacking, device): (Stacking, &Device),
    ) -> anyhow::Result<Vec<Self>> {
        for (prefix, projection) in
            prefixes.iter().flat_map(|p| projections.iter().map(move |q| (p, q)))
        {
            let name = format!("{prefix}{}.bias", projection.name);
            anyhow::ensure!(!checkpoint.contains(&name), "`{name}` is not supported");
        }
        let stored = prefixes
            .iter()
            .map(|prefix| stored(checkpoint, prefix, projections, in_features))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let weights = pack_each(&stored, in_features, stacking, device)?;
        Ok(weights.into_iter().map(|weight| Self { weight, bias: None }).collect())
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

fn stored(
    checkpoint: &Checkpoint,
    prefix: &str,
    projections: &[Projection<'_>],
    in_features: usize,
) -> anyhow::Result<Vec<StoredMatrix>> {
    let matrix = |projection: &Projection<'_>| {
        let name = format!("{prefix}{}.weight", projection.name);
        Ok(checkpoint.matrix(&name, projection.out_features, in_features)?)
    };
    projections.iter().map(matrix).collect()
}

fn pack_each(
    stacks: &[Vec<StoredMatrix>],
    in_features: usize,
    stacking: Stacking,
    device: &Device,
) -> Result<Vec<Weights>> {
    if let Some(random) =
        stacks.iter().map(|stored| random_sources(stored)).collect::<Option<Vec<_>>>()
    {
        let make_up = |sources: &Vec<_>| Weights::random(sources, in_features, stacking, device);
        return random.iter().map(make_up).collect();
    }
    let rows = stacks
        .iter()
        .map(|stored| stored.iter().map(rows).collect::<Result<Vec<_>>>())
        .collect::<Result<Vec<_>>>()?;
    let sources: Vec<Vec<_>> = stacks
        .iter()
        .zip(&rows)
        .map(|(stored, rows)| {
            stored.iter().zip(rows).map(|(matrix, rows)| source(matrix, rows)).collect()
        })
        .collect();
    Weights::pack_each(&sources, in_features, stacking, device)
}

fn source<'a>(matrix: &StoredMatrix, rows: &'a [u8]) -> MatrixSource<'a> {
    MatrixSource { dtype: matrix.dtype, data: rows, num_rows: matrix.num_rows }
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
