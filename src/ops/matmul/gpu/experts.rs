//! Products with the weights of experts: `kernels/quant/matmul_experts.cu`.
//!
//! Rows of activations are for different matrices, which lie side by side. Which row is for which
//! only the card knows, so nothing about a launch depends on it.

use candle_core::{DType, Result, bail};

use super::layout::{PackedFormat, TILE_ROWS};
use super::{GpuMatrix, Interleaving, Output, Segment, Stacking, Weights};
use crate::device::gpu::{Arg, DeviceBuffer, Kernel, LaunchConfig};
use crate::ops::silu_mul::{GateUpOrder, silu_mul};
use crate::ops::tensor::GpuTensor;

/// Rows of an expert that one block multiplies, as in the kernel.
pub const GROUP_ROWS: usize = 32;
/// Rows of weights of such a block, as `LARGE_ROWS`.
const LARGE_ROWS: usize = 128;
const LARGE_THREADS: u32 = 256;
/// Warps that share the columns of a choice: as many for every shape, for the order of sums.
const SMALL_WARPS: usize = 8;
/// The kernels for few choices and for rows in groups.
const DENSE: [&str; 2] = ["matmul_experts_small_dense", "matmul_experts_large_dense"];

/// Which expert each row of activations is for.
#[derive(Clone, Debug)]
pub enum RowOrder {
    /// Few tokens: results are those of the choices, `per_row` of which share a row of activations.
    Choices {
        /// The expert of each choice, `u32`.
        experts: DeviceBuffer,
        /// How many there are.
        num_choices: usize,
        /// 1 where each has a row of its own.
        per_row: usize,
    },
    /// Many: rows stand in groups of [`GROUP_ROWS`] for one expert.
    Groups {
        /// The expert of each group, `u32`; none for `0xffffffff`.
        blocks: DeviceBuffer,
    },
}

impl GpuMatrix {
    /// Each row times the matrix of its expert, `bf16`. This matrix is the first of those that lie
    /// side by side, one for each expert.
    pub(in crate::ops) fn multiply_by_experts(
        &self,
        x: &GpuTensor,
        order: &RowOrder,
    ) -> Result<GpuTensor> {
        self.check(x)?;
        let y = self.expert_results(x, order, self.num_rows)?;
        for segment in &self.segments {
            if segment.layout == Interleaving::Gated {
                bail!("the rows of gates and ups are interleaved");
            }
            segment.launch_experts(x, order, &y, Output::Bf16)?;
        }
        Ok(y)
    }

    /// `silu(x * gate^T) * (x * up^T)` of each row with the matrices of its expert.
    pub(in crate::ops) fn gate_by_experts(
        &self,
        x: &GpuTensor,
        order: &RowOrder,
    ) -> Result<GpuTensor> {
        self.check(x)?;
        match &self.segments[..] {
            [segment] if segment.layout == Interleaving::Gated => {
                let y = self.expert_results(x, order, self.num_rows / 2)?;
                segment.launch_experts(x, order, &y, Output::SiluMul)?;
                Ok(y)
            }
            _ if self.stacking == Stacking::Gated => {
                silu_mul(&self.multiply_by_experts(x, order)?, GateUpOrder::Halves)
            }
            _ => bail!("the weights are not a gate and an up projection"),
        }
    }

    fn expert_results(
        &self,
        x: &GpuTensor,
        order: &RowOrder,
        num_cols: usize,
    ) -> Result<GpuTensor> {
        let num_rows = match order {
            RowOrder::Choices { num_choices, per_row, .. } => {
                if x.num_rows * per_row != *num_choices {
                    bail!("{num_choices} choices, {per_row} for each of {} rows", x.num_rows);
                }
                *num_choices
            }
            RowOrder::Groups { blocks } => {
                if x.num_rows * size_of::<u32>() != blocks.len() * GROUP_ROWS {
                    bail!("{} rows in {} bytes of groups", x.num_rows, blocks.len());
                }
                x.num_rows
            }
        };
        GpuTensor::scratch(&self.gpu, DType::BF16, (num_rows, num_cols))
    }
}

impl Segment {
    fn launch_experts(
        &self,
        x: &GpuTensor,
        order: &RowOrder,
        y: &GpuTensor,
        output: Output,
    ) -> Result<()> {
        if x.num_rows == 0 || self.num_rows == 0 {
            return Ok(());
        }
        let (format, row_stride) = match self.weights {
            Weights::Packed(format) => (Some(format), 0),
            Weights::Dense { row_stride } => (None, row_stride),
        };
        let y_at = self.first_row * y.dtype.size_in_bytes();
        let y_buffer = y.buffer.slice(y_at..y.buffer.len());
        let (routed, count, sums) = match order {
            RowOrder::Choices { experts, per_row, .. } => (experts, *per_row, None),
            RowOrder::Groups { blocks } => (blocks, x.num_rows, group_sums(x, format)?),
        };
        let int = |value: usize| Arg::I32(value as i32);
        let mut args = vec![
            Arg::Buffer(&self.all),
            Arg::I64(self.buffer.len() as i64),
            Arg::Buffer(routed),
            Arg::Buffer(&x.buffer),
            Arg::Buffer(&y_buffer),
            int(count),
            int(self.num_kernel_rows()),
            int(x.num_cols),
            int(row_stride),
            int(y.num_cols),
            Arg::I32(output as i32),
        ];
        let index = match order {
            RowOrder::Choices { .. } => 0,
            RowOrder::Groups { .. } => {
                args.push(sums.as_ref().map_or(Arg::Null, Arg::Buffer));
                1
            }
        };
        let function = format.map_or(DENSE, |format| format.experts)[index];
        let kernel = Kernel { module: "matmul_experts", function };
        x.gpu.launch(kernel, self.expert_grid(order, y.num_rows), &args)?;
        Ok(())
    }

    fn expert_grid(&self, order: &RowOrder, num_results: usize) -> LaunchConfig {
        match order {
            RowOrder::Choices { .. } => LaunchConfig {
                grid: [self.num_kernel_rows().div_ceil(TILE_ROWS) as u32, num_results as u32, 1],
                block: [SMALL_WARPS as u32 * 32, 1, 1],
                shared_bytes: (SMALL_WARPS * self.weights.warp_bytes((1, 1), 1)) as u32,
            },
            RowOrder::Groups { .. } => LaunchConfig {
                grid: [
                    num_results.div_ceil(GROUP_ROWS) as u32,
                    self.num_kernel_rows().div_ceil(LARGE_ROWS) as u32,
                    1,
                ],
                block: [LARGE_THREADS, 1, 1],
                shared_bytes: self.weights.block_bytes(GROUP_ROWS) as u32,
            },
        }
    }
}

/// What minima need of the rows of groups.
fn group_sums(x: &GpuTensor, format: Option<&PackedFormat>) -> Result<Option<DeviceBuffer>> {
    let Some(format) = format.filter(|format| format.has_min()) else { return Ok(None) };
    super::launch::run_sums(x, format.run_len(), x.num_rows).map(Some)
}
