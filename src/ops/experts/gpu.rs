//! Experts on a card: `kernels/experts/*.cu` and `kernels/quant/matmul_experts.cu`.
//!
//! For few tokens each choice is a product of its own. For more, a token's row is copied to each of
//! its experts, whose rows stand together, in groups that one block multiplies.

#[cfg(test)]
mod tests;

use candle_core::{DType, Result, bail};

use crate::device::gpu::{Arg, DeviceBuffer, Gpu, Kernel, LaunchConfig};
use crate::ops::grid::over_rows;
use crate::ops::matmul::{GROUP_ROWS, GpuMatrix, RowOrder};
use crate::ops::tensor::GpuTensor;

/// Experts of a token at most, as many as a warp has lanes.
pub const MAX_CHOSEN: usize = 32;
/// The most tokens whose choices are multiplied one by one. As with dense weights, so that decode
/// steps of few sequences do not depend on their company.
const SMALL_TOKENS: usize = 16;
const WARP_SIZE: usize = 32;
const NUM_THREADS: u32 = 128;

/// The experts of each token, in a card's memory.
#[derive(Clone, Debug)]
pub struct GpuRoutes {
    gpu: Gpu,
    /// `u32` `[num_tokens, num_chosen]`, of each token in ascending order.
    experts: DeviceBuffer,
    /// `f32`, of the same shape.
    weights: DeviceBuffer,
    num_tokens: usize,
    num_chosen: usize,
    groups: Option<Groups>,
}

/// Where the choices of many tokens are multiplied.
#[derive(Clone, Debug)]
struct Groups {
    /// The token of each row, see [`max_group_rows`].
    rows: DeviceBuffer,
    /// The row of each choice.
    sources: DeviceBuffer,
    /// The expert of [`GROUP_ROWS`] rows each.
    blocks: DeviceBuffer,
    num_rows: usize,
}

/// Rows of activations on a card, each for one expert.
#[derive(Clone, Debug)]
pub struct GpuRows {
    rows: GpuTensor,
    order: RowOrder,
}

/// The most rows that groups of so many choices can take: each expert may leave one group not full.
pub fn max_group_rows(num_choices: usize, num_experts: usize) -> usize {
    let partly_empty = num_experts.min(num_choices) * (GROUP_ROWS - 1);
    (num_choices + partly_empty) / GROUP_ROWS * GROUP_ROWS
}

/// A warp for each of so many things.
fn warps(count: usize) -> LaunchConfig {
    LaunchConfig::linear((count * WARP_SIZE).div_ceil(NUM_THREADS as usize), NUM_THREADS)
}

fn int(value: usize) -> Arg<'static> {
    Arg::I32(value as i32)
}

/// `kernels/experts/choose_experts.cu`
pub(super) fn choose(logits: &GpuTensor, num_chosen: usize, normalised: bool) -> Result<GpuRoutes> {
    let GpuTensor { gpu, num_rows: num_tokens, num_cols: num_experts, .. } = logits.clone();
    if logits.dtype != DType::F32 || MAX_CHOSEN < num_chosen {
        bail!("{num_chosen} experts by logits in {:?}: at most {MAX_CHOSEN} by F32", logits.dtype);
    }
    let num_choices = num_tokens * num_chosen;
    let experts = gpu.scratch(num_choices * size_of::<u32>())?;
    let weights = gpu.scratch(num_choices * size_of::<f32>())?;
    let args = [
        Arg::Buffer(&logits.buffer),
        Arg::Buffer(&experts),
        Arg::Buffer(&weights),
        int(num_tokens),
        int(num_experts),
        int(num_chosen),
        int(usize::from(normalised)),
    ];
    if num_tokens != 0 {
        let kernel = Kernel { module: "choose_experts", function: "choose_experts" };
        gpu.launch(kernel, warps(num_tokens), &args)?;
    }
    let mut routes = GpuRoutes { gpu, experts, weights, num_tokens, num_chosen, groups: None };
    if SMALL_TOKENS < num_tokens {
        routes.groups = Some(routes.group(num_experts)?);
    }
    Ok(routes)
}

impl GpuRoutes {
    /// `kernels/experts/group_by_expert.cu`
    fn group(&self, num_experts: usize) -> Result<Groups> {
        let num_choices = self.num_tokens * self.num_chosen;
        let num_rows = max_group_rows(num_choices, num_experts);
        let num_blocks = num_rows / GROUP_ROWS;
        let words = |count: usize| self.gpu.scratch(count * size_of::<u32>());
        let counts = words(num_experts)?;
        let groups = Groups {
            rows: words(num_rows)?,
            sources: words(num_choices)?,
            blocks: words(num_blocks)?,
            num_rows,
        };
        let module = "group_by_expert";
        let args =
            [Arg::Buffer(&self.experts), Arg::Buffer(&counts), int(num_choices), int(num_experts)];
        let kernel = Kernel { module, function: "count_choices" };
        self.gpu.launch(kernel, warps(num_experts), &args)?;
        let args = [
            Arg::Buffer(&self.experts),
            Arg::Buffer(&counts),
            Arg::Buffer(&groups.rows),
            Arg::Buffer(&groups.sources),
            Arg::Buffer(&groups.blocks),
            int(num_choices),
            int(self.num_chosen),
            int(num_experts),
            int(num_blocks),
        ];
        let kernel = Kernel { module, function: "place_choices" };
        self.gpu.launch(kernel, warps(num_experts), &args)?;
        Ok(groups)
    }

    pub(super) fn spread(&self, x: &GpuTensor) -> Result<GpuRows> {
        if x.num_rows != self.num_tokens {
            bail!("{} tokens, experts were chosen for {}", x.num_rows, self.num_tokens);
        }
        let Some(groups) = &self.groups else {
            let order = RowOrder::Choices {
                experts: self.experts.clone(),
                num_choices: self.num_tokens * self.num_chosen,
                per_row: self.num_chosen,
            };
            return Ok(GpuRows { rows: x.clone(), order });
        };
        let rows = gather_by_card(x, &groups.rows, groups.num_rows)?;
        Ok(GpuRows { rows, order: RowOrder::Groups { blocks: groups.blocks.clone() } })
    }

    /// `kernels/experts/combine_experts.cu`
    pub(super) fn combine(&self, made: &GpuRows) -> Result<GpuTensor> {
        let GpuTensor { num_rows, num_cols, dtype, .. } = made.rows;
        let num_made = self
            .groups
            .as_ref()
            .map_or(self.num_tokens * self.num_chosen, |groups| groups.num_rows);
        if dtype != DType::BF16 || num_rows != num_made {
            bail!("experts made {num_rows} rows of {dtype:?}, not {num_made} of BF16");
        }
        let out = GpuTensor::scratch(&self.gpu, DType::BF16, (self.num_tokens, num_cols))?;
        let args = [
            Arg::Buffer(&made.rows.buffer),
            Arg::Buffer(&self.weights),
            self.groups.as_ref().map_or(Arg::Null, |groups| Arg::Buffer(&groups.sources)),
            Arg::Buffer(&out.buffer),
            int(self.num_tokens),
            int(self.num_chosen),
            int(num_cols),
        ];
        if self.num_tokens != 0 {
            let kernel = Kernel { module: "combine_experts", function: "combine_experts" };
            self.gpu.launch(kernel, over_rows(self.num_tokens, num_cols), &args)?;
        }
        Ok(out)
    }
}

impl GpuRows {
    pub(super) fn matmul(&self, first: &GpuMatrix) -> Result<Self> {
        Ok(self.followed_by(first.multiply_by_experts(&self.rows, &self.order)?))
    }

    pub(super) fn gated_matmul(&self, first: &GpuMatrix) -> Result<Self> {
        Ok(self.followed_by(first.gate_by_experts(&self.rows, &self.order)?))
    }

    /// Every result has a row of its own.
    fn followed_by(&self, rows: GpuTensor) -> Self {
        let mut order = self.order.clone();
        if let RowOrder::Choices { per_row, .. } = &mut order {
            *per_row = 1;
        }
        Self { rows, order }
    }
}

/// Rows whose numbers only the card knows.
fn gather_by_card(x: &GpuTensor, rows: &DeviceBuffer, num_rows: usize) -> Result<GpuTensor> {
    const PACK: usize = 4;
    let out = GpuTensor::scratch(&x.gpu, DType::BF16, (num_rows, x.num_cols))?;
    if x.dtype != DType::BF16 || !x.num_cols.is_multiple_of(PACK) {
        bail!("rows of {} values in {:?} are not gathered for experts", x.num_cols, x.dtype);
    }
    let args = [
        Arg::Buffer(&x.buffer),
        Arg::Buffer(rows),
        Arg::Buffer(&out.buffer),
        int(num_rows),
        int(x.num_cols),
    ];
    let kernel = Kernel { module: "gather_rows", function: "gather_rows_bf16_4" };
    x.gpu.launch(kernel, over_rows(num_rows, x.num_cols / PACK), &args)?;
    Ok(out)
}

/// `kernels/experts/combine_experts.cu`
pub(super) fn add_gated(x: &GpuTensor, gate: &GpuTensor, y: &GpuTensor) -> Result<GpuTensor> {
    if x.dtype != DType::BF16 || y.dtype != DType::BF16 || gate.dtype != DType::F32 {
        bail!("{:?} and {:?} with gates in {:?}", x.dtype, y.dtype, gate.dtype);
    }
    let out = GpuTensor::scratch(&x.gpu, DType::BF16, (x.num_rows, x.num_cols))?;
    let args = [
        Arg::Buffer(&x.buffer),
        Arg::Buffer(&gate.buffer),
        Arg::Buffer(&y.buffer),
        Arg::Buffer(&out.buffer),
        int(x.num_rows),
        int(x.num_cols),
    ];
    if x.num_rows != 0 {
        let kernel = Kernel { module: "combine_experts", function: "add_gated" };
        x.gpu.launch(kernel, over_rows(x.num_rows, x.num_cols), &args)?;
    }
    Ok(out)
}
