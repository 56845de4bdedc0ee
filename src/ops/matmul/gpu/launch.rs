//! Which kernel multiplies, and with how many threads.

use candle_core::Result;

use super::layout::{TILE_COLS, TILE_ROWS};
use super::{GpuMatrix, Interleaving, Output, SMALL_TOKENS, Segment, Weights};
use crate::device::gpu::{Arg, DeviceBuffer, Gpu, Kernel, LaunchConfig};
use crate::ops::tensor::GpuTensor;

/// Counters of a matrix: more than a split product has output blocks.
pub(super) const NUM_COUNTERS: usize = 4096;
/// Rows of a block of the kernels for many tokens, as `LARGE_ROWS`.
const LARGE_ROWS: usize = 128;
/// Threads of such a block.
const LARGE_THREADS: u32 = 256;
/// Blocks that keep every card busy.
const BUSY_BLOCKS: usize = 132;
/// Tokens up to which the columns of a matrix are split over blocks.
const SPLIT_TOKENS: usize = 128;
/// The fewest tiles that are worth a block of their own.
const SPLIT_TILES: usize = 8;
/// Row tiles above which a warp takes four of them at a time, for one token. Of packed weights it
/// takes two as soon as there are more than busy blocks, because its copies cost instructions.
const FOUR_TILES: usize = 8 * BUSY_BLOCKS;
/// Row tiles above which a warp takes two of them at a time that need no unpacking.
const DENSE_TWO_TILES: usize = 4 * BUSY_BLOCKS;
/// Bytes of a multiprocessor's shared memory that each block takes for itself.
const BLOCK_BYTES: usize = 1024;

const DENSE_SMALL: [&str; 7] = [
    "matmul_dense_small_n1_r1",
    "matmul_dense_small_n1_r2",
    "matmul_dense_small_n1_r2",
    "matmul_dense_small_n8_r1",
    "matmul_dense_small_n8_r2",
    "matmul_dense_small_n16_r1",
    "matmul_dense_small_n16_r2",
];
const DENSE_LARGE: [&str; 3] =
    ["matmul_dense_large_n32", "matmul_dense_large_n64", "matmul_dense_large_n128"];

/// A kernel and how it is spread over the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// `matmul_small`: columns of tokens, row tiles at a time, warps that share the columns.
    Small { columns: usize, tiles: usize, num_warps: usize },
    /// `matmul_large`: tokens of a block, tiles of a part of the columns.
    Large { tokens: usize, split_tiles: usize },
}

impl Plan {
    pub(super) fn new(weights: Weights, num_tokens: usize, shape: (usize, usize)) -> Self {
        if num_tokens <= SMALL_TOKENS {
            Self::small(weights, num_tokens, shape.0)
        } else {
            Self::large(num_tokens, shape)
        }
    }

    /// Row tiles at a time do not change the sums, warps do: only the shape may choose these.
    fn small(weights: Weights, num_tokens: usize, num_rows: usize) -> Self {
        let num_row_tiles = num_rows.div_ceil(TILE_ROWS);
        let columns = [1, 8].into_iter().find(|columns| num_tokens <= *columns);
        let columns = columns.unwrap_or(SMALL_TOKENS);
        let is_packed = matches!(weights, Weights::Packed(_));
        let two = if is_packed { BUSY_BLOCKS } else { DENSE_TWO_TILES };
        // Where all row tiles are taken at once, more warps share one.
        let most = if is_packed { 2 * BUSY_BLOCKS } else { BUSY_BLOCKS };
        let num_warps = if num_row_tiles <= most { 16 } else { 8 };
        let tiles = match num_row_tiles {
            // There is no room for the stages of so many.
            _ if columns == 16 && num_warps == 16 => 1,
            n if columns == 1 && weights.has_four_tiles() && FOUR_TILES < n => 4,
            n if two < n => 2,
            _ => 1,
        };
        Self::Small { columns, tiles, num_warps }
    }

    fn large(num_tokens: usize, (num_rows, num_cols): (usize, usize)) -> Self {
        let num_row_blocks = num_rows.div_ceil(LARGE_ROWS);
        let num_tiles = num_cols.div_ceil(TILE_COLS);
        let num_blocks = num_row_blocks * num_tokens.div_ceil(128);
        let tokens = match num_tokens {
            ..=32 => 32,
            _ if SPLIT_TOKENS < num_tokens && BUSY_BLOCKS <= num_blocks => 128,
            _ => 64,
        };
        let mut num_splits = 1;
        if num_tokens <= SPLIT_TOKENS {
            // As many as run at once: a second round for a few blocks would double the time.
            let at_once = if tokens == 32 { 2 * BUSY_BLOCKS } else { BUSY_BLOCKS };
            let num_blocks = num_row_blocks * num_tokens.div_ceil(tokens);
            num_splits = (at_once / num_blocks.max(1)).min(num_tiles / SPLIT_TILES).max(1);
        }
        Self::Large { tokens, split_tiles: num_tiles.div_ceil(num_splits).max(1) }
    }
}

impl Weights {
    /// Whether there is a kernel that takes four row tiles at a time, for one token.
    pub(super) fn has_four_tiles(self) -> bool {
        matches!(self, Self::Packed(format) if format.bits < 8)
    }

    /// Bytes of a tile and its superscales in shared memory, as `STAGE_BYTES`.
    fn stage_bytes(self) -> usize {
        match self {
            Self::Packed(format) => format.tile_bytes() + format.super_bytes(),
            Self::Dense { .. } => TILE_ROWS * TILE_COLS * 2,
        }
    }

    /// Shared memory that a warp of `matmul_small` has: its ring, and two sets of its sums.
    pub(super) fn warp_bytes(self, (columns, tiles): (usize, usize), num_tokens: usize) -> usize {
        let weight_bytes = tiles * self.stage_bytes();
        let warp_sums = tiles * if columns == 1 { TILE_ROWS } else { columns.div_ceil(8) * 4 * 32 };
        // As `small_stages`.
        let num_stages = (10240 - 2 * 4 * warp_sums) / (weight_bytes + columns * TILE_COLS * 2);
        num_stages.clamp(2, 6) * (weight_bytes + num_tokens * TILE_COLS * 2) + 2 * 4 * warp_sums
    }

    /// Shared memory that a block of `matmul_large` has, by tokens of a block.
    pub(super) fn block_bytes(self, tokens: usize) -> usize {
        let index = tokens.ilog2() as usize - 5;
        let (num_stages, sum_bytes) = match self {
            Self::Packed(format) if format.has_min() => {
                ([8, 8, 6][index], TILE_COLS / format.run_len() * tokens * 4)
            }
            Self::Packed(_) => ([8, 8, 6][index], 0),
            Self::Dense { .. } => ([5, 6, 5][index], 0),
        };
        let weight_bytes = LARGE_ROWS / TILE_ROWS * self.stage_bytes();
        num_stages * (weight_bytes + tokens * TILE_COLS * 2 + sum_bytes)
    }
}

impl Segment {
    /// Rows that the kernels see.
    pub(super) fn num_kernel_rows(&self) -> usize {
        match self.layout {
            Interleaving::Plain => self.num_rows,
            Interleaving::Gated => self.num_rows.next_multiple_of(TILE_ROWS),
        }
    }

    pub(super) fn launch(
        &self,
        matrix: &GpuMatrix,
        x: &GpuTensor,
        (bias, y): (Option<&GpuTensor>, &GpuTensor),
        output: Output,
    ) -> Result<()> {
        let plan = Plan::new(self.weights, x.num_rows, (self.num_kernel_rows(), x.num_cols));
        self.launch_as(plan, matrix, x, (bias, y), output)
    }

    pub(super) fn launch_as(
        &self,
        plan: Plan,
        matrix: &GpuMatrix,
        x: &GpuTensor,
        (bias, y): (Option<&GpuTensor>, &GpuTensor),
        output: Output,
    ) -> Result<()> {
        if x.num_rows == 0 || self.num_rows == 0 {
            return Ok(());
        }
        let bias = bias.map(|bias| {
            bias.buffer.slice(self.first_row * 4..(self.first_row + self.num_rows) * 4)
        });
        let y_at = self.first_row * y.dtype.size_in_bytes();
        let y_buffer = y.buffer.slice(y_at..y.buffer.len());
        let product = Product {
            segment: self,
            x,
            y: &y_buffer,
            y_stride: y.num_cols,
            bias: bias.as_ref(),
            output,
        };
        match plan {
            Plan::Small { columns, tiles, num_warps } => {
                product.small(&matrix.gpu, (columns, tiles), num_warps)
            }
            Plan::Large { tokens, split_tiles } => product.large(matrix, tokens, split_tiles),
        }
    }
}

struct Product<'a> {
    segment: &'a Segment,
    x: &'a GpuTensor,
    y: &'a DeviceBuffer,
    y_stride: usize,
    bias: Option<&'a DeviceBuffer>,
    output: Output,
}

impl Product<'_> {
    /// The arguments that all kernels begin with.
    fn args(&self) -> Vec<Arg<'_>> {
        let int = |value: usize| Arg::I32(value as i32);
        let mut args = vec![
            Arg::Buffer(&self.segment.buffer),
            Arg::Buffer(&self.x.buffer),
            self.bias.map_or(Arg::Null, Arg::Buffer),
            Arg::Buffer(self.y),
            int(self.x.num_rows),
            int(self.segment.num_kernel_rows()),
            int(self.x.num_cols),
        ];
        if let Weights::Dense { row_stride } = self.segment.weights {
            args.push(int(row_stride));
        }
        args.extend([int(self.y_stride), Arg::I32(self.output as i32)]);
        args
    }

    fn small(&self, gpu: &Gpu, (columns, tiles): (usize, usize), num_warps: usize) -> Result<()> {
        let (module, functions) = match self.segment.weights {
            Weights::Packed(format) => ("matmul_small", &format.small),
            Weights::Dense { .. } => ("matmul_dense", &DENSE_SMALL),
        };
        let index = match columns {
            1 => tiles / 2,
            8 => 2 + tiles,
            _ => 4 + tiles,
        };
        let weights = self.segment.weights;
        let shared_bytes = num_warps * weights.warp_bytes((columns, tiles), self.x.num_rows);
        // 16 warps are a block to themselves, because of their registers.
        let all_shared_bytes = gpu.properties().max_shared_bytes + BLOCK_BYTES;
        let fitting = all_shared_bytes / (shared_bytes + BLOCK_BYTES);
        let per_multiprocessor = fitting.clamp(1, 16 / num_warps);
        let num_groups = self.segment.num_kernel_rows().div_ceil(TILE_ROWS).div_ceil(tiles);
        let num_blocks = num_groups.min(gpu.num_multiprocessors() * per_multiprocessor);
        let config = LaunchConfig {
            grid: [num_blocks as u32, 1, 1],
            block: [num_warps as u32 * 32, 1, 1],
            shared_bytes: shared_bytes as u32,
        };
        gpu.launch(Kernel { module, function: functions[index] }, config, &self.args())?;
        Ok(())
    }

    fn large(&self, matrix: &GpuMatrix, tokens: usize, split_tiles: usize) -> Result<()> {
        let gpu = &matrix.gpu;
        let num_tiles = self.x.num_cols.div_ceil(TILE_COLS);
        let num_row_blocks = self.segment.num_kernel_rows().div_ceil(LARGE_ROWS);
        let num_token_blocks = self.x.num_rows.div_ceil(tokens);
        let num_splits = num_tiles.div_ceil(split_tiles).max(1);
        let num_blocks = num_row_blocks * num_token_blocks;
        let partial = match num_splits {
            1 => None,
            _ if NUM_COUNTERS < num_blocks => {
                candle_core::bail!("{num_blocks} output blocks are too many to split columns");
            }
            _ => Some(gpu.scratch(num_splits * num_blocks * tokens * LARGE_ROWS * 4)?),
        };
        let sum_stride = self.x.num_rows.next_multiple_of(tokens);
        let index = tokens.ilog2() as usize - 5;
        let mut args = self.args();
        let sums;
        let (module, function) = match self.segment.weights {
            Weights::Packed(format) => {
                sums = if format.has_min() {
                    Some(run_sums(self.x, format.run_len(), sum_stride)?)
                } else {
                    None
                };
                args.push(sums.as_ref().map_or(Arg::Null, Arg::Buffer));
                ("matmul_large", format.large[index])
            }
            Weights::Dense { .. } => ("matmul_dense", DENSE_LARGE[index]),
        };
        args.push(partial.as_ref().map_or(Arg::Null, Arg::Buffer));
        args.push(Arg::Buffer(&matrix.counters));
        if matches!(self.segment.weights, Weights::Packed(_)) {
            args.push(Arg::I32(sum_stride as i32));
        }
        args.push(Arg::I32(split_tiles as i32));
        let config = LaunchConfig {
            grid: [num_token_blocks as u32, num_row_blocks as u32, num_splits as u32],
            block: [LARGE_THREADS, 1, 1],
            shared_bytes: self.segment.weights.block_bytes(tokens) as u32,
        };
        gpu.launch(Kernel { module, function }, config, &args)?;
        Ok(())
    }
}

/// The sum of each run of activations, for the minima: `[runs of a row][sum_stride]`.
pub(super) fn run_sums(x: &GpuTensor, run_len: usize, sum_stride: usize) -> Result<DeviceBuffer> {
    const NUM_THREADS: usize = 128;
    let num_groups = x.num_cols.div_ceil(TILE_COLS) * (TILE_COLS / run_len);
    let sums = x.gpu.scratch(num_groups * sum_stride * 4)?;
    let function = if run_len == 16 { "matmul_sums_16" } else { "matmul_sums_32" };
    let config = LaunchConfig {
        grid: [sum_stride.div_ceil(NUM_THREADS) as u32, num_groups as u32, 1],
        block: [NUM_THREADS as u32, 1, 1],
        shared_bytes: 0,
    };
    let args = [
        Arg::Buffer(&x.buffer),
        Arg::Buffer(&sums),
        Arg::I32(x.num_rows as i32),
        Arg::I32(x.num_cols as i32),
        Arg::I32(sum_stride as i32),
    ];
    x.gpu.launch(Kernel { module: "matmul_sums", function }, config, &args)?;
    Ok(sums)
}
