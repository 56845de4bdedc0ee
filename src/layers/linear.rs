//! `y = x Wᵀ + b`, whatever type the weights are stored in.

use std::borrow::Cow;

use anyhow::{bail, ensure};
use candle_core::Result;

use super::content::rows;
use super::lora::{Adaptation, Site};
use crate::ops::experts::{ExpertRows, ExpertWeights};
use crate::ops::gather_columns::gather_columns;
use crate::ops::indices::Indices;
pub use crate::ops::matmul::Stacking;
use crate::ops::matmul::{
    MatrixSource, RandomSource, Weights, gated_matmul, gates_and_ups, matmul, matmul_f32,
};
use crate::ops::silu_mul::{GateUpOrder, gate};
use crate::ops::tensor::{Device, Tensor};
use crate::weights::checkpoint::{Checkpoint, Content, StoredMatrix};

/// A linear projection, or several that share their input and run as one.
pub struct Linear {
    weight: Weights,
    bias: Option<Tensor>,
    /// The column of the input that each column of the weights is for, if not the same.
    column_order: Option<Box<Indices>>,
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
        let mut bias = Vec::new();
        for projection in projections {
            let name = format!("{prefix}{}.bias", projection.name);
            if checkpoint.contains(&name) {
                bias.extend(checkpoint.vector(&name, projection.out_features)?);
            }
        }
        let stacks = [in_one_order(stored(checkpoint, prefix, projections, in_features)?)];
        let column_order = column_order(&stacks[0], device)?;
        let weight = pack_each(&stacks, in_features, Stacking::Below, device)?.remove(0);
        let bias = match bias.len() {
            _ if bias.iter().all(|value| *value == 0.0) => None,
            len if len == weight.num_rows() => Some(Tensor::from_vec(bias, (1, len), device)?),
            _ => bail!("only some of the biases of `{prefix}` are in the file"),
        };
        Ok(Self { weight, bias, column_order })
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
        let mut stacks = Vec::new();
        let mut column_orders = Vec::new();
        for prefix in prefixes {
            for projection in projections {
                let name = format!("{prefix}{}.bias", projection.name);
                if checkpoint.contains(&name) {
                    let bias = checkpoint.vector(&name, projection.out_features)?;
                    ensure!(bias.iter().all(|value| *value == 0.0), "`{name}` is not supported");
                }
            }
            let stack = in_one_order(stored(checkpoint, prefix, projections, in_features)?);
            column_orders.push(column_order(&stack, device)?);
            stacks.push(stack);
        }
        let weights = pack_each(&stacks, in_features, stacking, device)?.into_iter();
        let linear = |(weight, column_order)| Self { weight, bias: None, column_order };
        Ok(weights.zip(column_orders).map(linear).collect())
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

    /// [`Linear::forward`] with what adapters add at a site.
    pub fn forward_adapted(
        &self,
        x: &Tensor,
        adapted: Adaptation<'_>,
        site: Site,
    ) -> Result<Tensor> {
        let y = self.forward(x)?;
        adapted.add(site, (&y, GateUpOrder::Halves), x)?;
        Ok(y)
    }

    /// [`Linear::forward_gated`] with what adapters add to gate and up projection.
    pub fn forward_gated_adapted(&self, x: &Tensor, adapted: Adaptation<'_>) -> Result<Tensor> {
        if adapted.is_none(Site::GateUp) {
            return self.forward_gated(x);
        }
        // Gating at once or afterwards gives the same bits, so others in the batch notice nothing.
        let (gate_up, order) = gates_and_ups(&*self.ordered(x)?, &self.weight)?;
        adapted.add(Site::GateUp, (&gate_up, order), x)?;
        gate(&gate_up, order)
    }

    /// [`Linear::forward`] of each expert's rows with the projection of that expert.
    pub fn forward_each<'a>(
        each: impl Iterator<Item = &'a Self>,
        rows: &ExpertRows,
    ) -> Result<ExpertRows> {
        rows.matmul(&each.map(Self::of_expert).collect::<Vec<_>>())
    }

    /// [`Linear::forward_gated`] of each expert's rows with the projections of that expert.
    pub fn forward_gated_each<'a>(
        each: impl Iterator<Item = &'a Self>,
        rows: &ExpertRows,
    ) -> Result<ExpertRows> {
        rows.gated_matmul(&each.map(Self::of_expert).collect::<Vec<_>>())
    }

    fn of_expert(&self) -> ExpertWeights<'_> {
        ExpertWeights { weights: &self.weight, column_order: self.column_order.as_deref() }
    }

    /// The input with its columns where the weights have them.
    fn ordered<'a>(&self, x: &'a Tensor) -> Result<Cow<'a, Tensor>> {
        match &self.column_order {
            None => Ok(Cow::Borrowed(x)),
            Some(order) => gather_columns(x, order).map(Cow::Owned),
        }
    }

    /// Whether the columns of the input are put into another order first.
    pub fn has_column_order(&self) -> bool {
        self.column_order.is_some()
    }

    /// Memory that the weights take.
    pub fn num_bytes(&self) -> usize {
        self.weight.num_bytes()
    }
}

/// Matrices of one input, which comes with its columns in one order: if they want different ones,
/// in none.
fn in_one_order(stack: Vec<StoredMatrix>) -> Vec<StoredMatrix> {
    let first = stack.first().and_then(StoredMatrix::column_order);
    if stack.iter().all(|matrix| matrix.column_order() == first) {
        return stack;
    }
    stack.into_iter().map(StoredMatrix::unsorted).collect()
}

/// The order of a stack's columns, where the device finds it.
fn column_order(stack: &[StoredMatrix], device: &Device) -> Result<Option<Box<Indices>>> {
    let Some(order) = stack.first().and_then(StoredMatrix::column_order) else { return Ok(None) };
    let mut order = Indices::from(order.to_vec());
    if let Device::Gpu(gpu) = device {
        order.upload_to(gpu.alloc(order.len() * size_of::<u32>())?)?;
    }
    Ok(Some(Box::new(order)))
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

/// The packed weights replace the pages they were read from.
fn pack_each(
    stacks: &[Vec<StoredMatrix>],
    in_features: usize,
    stacking: Stacking,
    device: &Device,
) -> Result<Vec<Weights>> {
    if let Some(random) =
        stacks.iter().map(|stored| random_sources(stored)).collect::<Option<Vec<_>>>()
    {
        return Weights::random_each(&random, in_features, stacking, device);
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
    let weights = Weights::pack_each(&sources, in_features, stacking, device)?;
    stacks.iter().flatten().for_each(|matrix| matrix.bytes.release());
    Ok(weights)
}

fn source<'a>(matrix: &StoredMatrix, rows: &'a [u8]) -> MatrixSource<'a> {
    MatrixSource { format: matrix.row_format(), data: rows, num_rows: matrix.num_rows }
}

/// What to make up of matrices that are best made up in place.
fn random_sources(stored: &[StoredMatrix]) -> Option<Vec<RandomSource>> {
    let sources = stored.iter().map(|matrix| match matrix.content {
        Content::RandomInPlace { seed } => {
            Some(RandomSource { format: matrix.dtype.into(), num_rows: matrix.num_rows, seed })
        }
        _ => None,
    });
    sources.collect()
}
