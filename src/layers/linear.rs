//! `y = x Wᵀ + b`, whatever type the weights are stored in.

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::bail;
use candle_core::Result;

use super::content::rows;
use crate::ops::gather_columns::gather_columns;
use crate::ops::matmul::{
    MatrixSource, RandomSource, Stacking, Weights, gated_matmul, matmul, matmul_f32,
};
use crate::ops::tensor::{Device, Tensor};
use crate::weights::checkpoint::{Checkpoint, Content, StoredMatrix};

/// A linear projection, or several that share their input and run as one.
pub struct Linear {
    weight: Weights,
    bias: Option<Tensor>,
    /// The column of the input that each column of the weights is for, if not the same.
    column_order: Option<Arc<[u32]>>,
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
    /// Biases are read where the file has them; a stack has either all or none. Those of zero are
    /// left out: some tools that quantise add them to projections that have none.
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
        let column_order = column_order(&stored, prefix, device)?;
        let weight = pack(&stored, in_features, stacking, device)?;
        // The packed weights replace the pages they were read from.
        stored.iter().for_each(|matrix| matrix.bytes.release());
        let bias = match bias.len() {
            _ if bias.iter().all(|value| *value == 0.0) => None,
            len if len == weight.num_rows() => Some(Tensor::from_vec(bias, (1, len), device)?),
            _ => bail!("only some of the biases of `{prefix}` are in the file"),
        };
        if stacking == Stacking::Gated && bias.is_some() {
            bail!("a gated projection with a bias, as `{prefix}` has, is not supported");
        }
        Ok(Self { weight, bias, column_order })
    }

    /// `[num_tokens, in_features]` to `[num_tokens, out_features]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        matmul(&*self.ordered(x)?, &self.weight, self.bias.as_ref())
    }

    /// [`Linear::forward`] with a result in `f32` on every device.
    pub fn forward_f32(&self, x: &Tensor) -> Result<Tensor> {
        matmul_f32(&*self.ordered(x)?, &self.weight, self.bias.as_ref())
    }

    /// Of a stack of gate and up projection without biases, `silu(gate(x)) * up(x)`:
    /// `[num_tokens, in_features]` to `[num_tokens, out_features / 2]`.
    pub fn forward_gated(&self, x: &Tensor) -> Result<Tensor> {
        gated_matmul(&*self.ordered(x)?, &self.weight)
    }

    /// The input with its columns where the weights have them.
    fn ordered<'a>(&self, x: &'a Tensor) -> Result<Cow<'a, Tensor>> {
        match &self.column_order {
            None => Ok(Cow::Borrowed(x)),
            Some(order) => gather_columns(x, order).map(Cow::Owned),
        }
    }

    /// Memory that the weights take.
    pub fn num_bytes(&self) -> usize {
        self.weight.num_bytes()
    }
}

/// The one order of a stack's columns.
fn column_order(
    stored: &[StoredMatrix],
    prefix: &str,
    device: &Device,
) -> anyhow::Result<Option<Arc<[u32]>>> {
    let mut orders = stored.iter().map(StoredMatrix::column_order);
    let first = orders.next().flatten();
    if orders.any(|order| order != first) {
        bail!(
            "the projections of `{prefix}` have their columns in different orders (`g_idx`), which \
             is not supported"
        );
    }
    if first.is_some() && matches!(device, Device::Gpu(_)) {
        bail!(
            "`{prefix}` has its columns ordered by activation (`desc_act`), which runs on the CPU \
             only; pass `--device cpu`, or use a checkpoint without it"
        );
    }
    Ok(first.cloned())
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
        _ => None,
    });
    sources.collect()
}
