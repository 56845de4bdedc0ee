//! The product on a card: weights packed for it, and which kernel multiplies with them.
//!
//! Activations are `bf16`, sums `f32`. Integer weights are multiplied as the integers that they
//! are, and each sum is scaled in `f32`, so that a result is as exact as its activations.
//!
//! **Invariant:** up to [`SMALL_TOKENS`] tokens, a token's result is the same bits whatever other
//! tokens there are: how the columns are shared out depends on the shape of the matrix alone.

mod experts;
mod launch;
mod layout;
mod pack;
mod random;
#[cfg(test)]
mod tests;

use candle_core::{DType, Result, bail};

pub use self::experts::{GROUP_ROWS, RowOrder};
use self::layout::{PackedFormat, TILE_COLS, TILE_ROWS, packed_format};
use self::pack::{RowTile, pack_dense};
use super::{MatrixSource, SharedMut};
use crate::device::gpu::{DenseOperands, DeviceBuffer, Gpu};
use crate::device::threads::parallel_for;
use crate::ops::row_format::RowFormat;
use crate::ops::silu_mul::{GateUpOrder, silu_mul};
use crate::ops::tensor::GpuTensor;

/// The most tokens that the kernels for few take.
const SMALL_TOKENS: usize = 16;
/// From so many tokens on, dense weights go to the vendor's library.
const LIBRARY_TOKENS: usize = 65;
/// Packed bytes that are uploaded at once.
const UPLOAD_BYTES: usize = 64 << 20;
/// Rows of gates, and of ups, in a tile of both.
const GATED_ROWS: usize = TILE_ROWS / 2;

/// How the sources of a matrix lie in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stacking {
    /// One below the other.
    Below,
    /// Gates and ups of a feed-forward layer, for [`super::gated_matmul`].
    Gated,
}

/// A matrix of weights `[num_rows, num_cols]` in a card's memory.
pub struct GpuMatrix {
    gpu: Gpu,
    segments: Vec<Segment>,
    stacking: Stacking,
    num_rows: usize,
    num_cols: usize,
    /// One for each output block of a product that splits its columns; zero between launches.
    counters: DeviceBuffer,
}

/// Consecutive rows of one format.
struct Segment {
    weights: Weights,
    first_row: usize,
    num_rows: usize,
    buffer: DeviceBuffer,
    /// The same rows of all matrices that lie side by side, this one's among them.
    all: DeviceBuffer,
    layout: Interleaving,
}

#[derive(Clone, Copy)]
enum Weights {
    Packed(&'static PackedFormat),
    /// `bf16` rows, so many values apart.
    Dense {
        row_stride: usize,
    },
}

/// Which rows lie beside each other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Interleaving {
    Plain,
    /// Eight gates, then the eight ups of the same features.
    Gated,
}

/// What is done with the sums.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Output {
    Bf16 = 0,
    F32 = 1,
    SiluMul = 2,
}

impl GpuMatrix {
    /// Packs the sources and copies them to the card. Uses the current thread pool.
    ///
    /// # Errors
    /// If rows are not whole blocks, a source has not the bytes that its rows need, there is no
    /// kernel for the format, or no memory.
    pub fn pack(
        gpu: &Gpu,
        sources: &[MatrixSource<'_>],
        num_cols: usize,
        stacking: Stacking,
    ) -> Result<Self> {
        Ok(Self::pack_each(gpu, &[sources], num_cols, stacking)?.remove(0))
    }

    /// The same for several matrices that differ in nothing but their weights, side by side in
    /// memory: see `multiply_by_experts`.
    ///
    /// # Errors
    /// As [`GpuMatrix::pack`], and if they differ.
    pub fn pack_each<'a>(
        gpu: &Gpu,
        matrices: &[impl AsRef<[MatrixSource<'a>]>],
        num_cols: usize,
        stacking: Stacking,
    ) -> Result<Vec<Self>> {
        let plans: Vec<_> = matrices
            .iter()
            .map(|sources| plan_segments(sources.as_ref(), num_cols, stacking))
            .collect::<Result<_>>()?;
        let Some(first) = plans.first() else { return Ok(Vec::new()) };
        let shape = |plan: &[PlannedSegment<'_>]| -> Vec<_> {
            plan.iter().map(|it| (it.rows.format(), it.rows.layout, it.rows.num_rows)).collect()
        };
        if plans.iter().any(|plan| shape(plan) != shape(first)) {
            bail!(
                "the experts of a layer are stored in different formats, which runs on the CPU only; \
                 use `--device cpu`"
            );
        }
        let counters = gpu.alloc(launch::NUM_COUNTERS * size_of::<u32>())?;
        gpu.zero(&counters)?;
        let rooms = first
            .iter()
            .map(|segment| Ok(gpu.alloc(segment.num_bytes * plans.len())?))
            .collect::<Result<Vec<_>>>()?;
        let mut packed = Vec::with_capacity(plans.len());
        for (index, plan) in plans.iter().enumerate() {
            let mut segments = Vec::new();
            for (planned, all) in plan.iter().zip(&rooms) {
                let num_bytes = planned.num_bytes;
                let buffer = all.slice(index * num_bytes..(index + 1) * num_bytes);
                upload(&buffer, planned.weights, &planned.rows, num_cols)?;
                segments.push(planned.placed(buffer, all.clone()));
            }
            let num_rows = segments.iter().map(|segment| segment.num_rows).sum();
            let (gpu, counters) = (gpu.clone(), counters.clone());
            packed.push(Self { gpu, segments, stacking, num_rows, num_cols, counters });
        }
        Ok(packed)
    }

    /// Rows of all sources.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Weights in a row.
    pub fn num_cols(&self) -> usize {
        self.num_cols
    }

    /// Memory that the weights take.
    pub fn num_bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.buffer.len()).sum()
    }

    /// `x * w^T + bias` for `x: [num_tokens, num_cols]`, as `bf16` or `f32`.
    pub(super) fn matmul(
        &self,
        x: &GpuTensor,
        bias: Option<&GpuTensor>,
        dtype: DType,
    ) -> Result<GpuTensor> {
        self.check(x)?;
        if let Some(bias) = bias
            && (bias.dtype != DType::F32 || bias.num_rows * bias.num_cols != self.num_rows)
        {
            bail!("{} biases for {} rows", bias.num_rows * bias.num_cols, self.num_rows);
        }
        let output = match dtype {
            DType::BF16 => Output::Bf16,
            DType::F32 => Output::F32,
            _ => bail!("products are BF16 or F32, not {dtype:?}"),
        };
        if bias.is_none()
            && let Some(y) = self.multiply_by_library(x, dtype)?
        {
            return Ok(y);
        }
        let y = GpuTensor::scratch(&self.gpu, dtype, (x.num_rows, self.num_rows))?;
        for segment in &self.segments {
            if segment.layout == Interleaving::Gated {
                bail!("the rows of gates and ups are interleaved");
            }
            segment.launch(self, x, (bias, &y), output)?;
        }
        Ok(y)
    }

    /// `silu(x * gate^T) * (x * up^T)`.
    pub(in crate::ops) fn gated_matmul(&self, x: &GpuTensor) -> Result<GpuTensor> {
        self.check(x)?;
        let fused = match &self.segments[..] {
            [segment] if segment.layout == Interleaving::Gated => segment,
            _ if self.stacking == Stacking::Gated => {
                return silu_mul(&self.matmul(x, None, DType::BF16)?, GateUpOrder::Halves);
            }
            _ => bail!("the weights are not a gate and an up projection"),
        };
        if let Some(both) = self.multiply_by_library(x, DType::BF16)? {
            return silu_mul(&both, GateUpOrder::ByEight);
        }
        let y = GpuTensor::scratch(&self.gpu, DType::BF16, (x.num_rows, self.num_rows / 2))?;
        fused.launch(self, x, (None, &y), Output::SiluMul)?;
        Ok(y)
    }

    /// Gates and ups before the activation, which gives the bits of [`GpuMatrix::gated_matmul`]: sums
    /// in `f32`, or in `bf16` where that rounds them too.
    pub(super) fn gates_and_ups(&self, x: &GpuTensor) -> Result<(GpuTensor, GateUpOrder)> {
        self.check(x)?;
        let segment = match &self.segments[..] {
            [segment] if segment.layout == Interleaving::Gated => segment,
            _ => return Ok((self.matmul(x, None, DType::BF16)?, GateUpOrder::Halves)),
        };
        if self.num_rows != segment.num_kernel_rows() {
            bail!("{} gates and ups do not come by eight", self.num_rows);
        }
        if let Some(both) = self.multiply_by_library(x, DType::BF16)? {
            return Ok((both, GateUpOrder::ByEight));
        }
        let y = GpuTensor::scratch(&self.gpu, DType::F32, (x.num_rows, self.num_rows))?;
        segment.launch(self, x, (None, &y), Output::F32)?;
        Ok((y, GateUpOrder::ByEight))
    }

    /// The product of many tokens with dense weights, rows as they lie in memory, if the vendor's
    /// library is there: it knows its card better than kernels for all of them.
    fn multiply_by_library(&self, x: &GpuTensor, dtype: DType) -> Result<Option<GpuTensor>> {
        let [Segment { weights: Weights::Dense { row_stride }, buffer, .. }] = &self.segments[..]
        else {
            return Ok(None);
        };
        if x.num_rows < LIBRARY_TOKENS || !self.num_rows.is_multiple_of(TILE_ROWS) {
            return Ok(None);
        }
        let y = GpuTensor::scratch(&self.gpu, dtype, (x.num_rows, self.num_rows))?;
        let is_done = self.gpu.multiply(&DenseOperands {
            x: &x.buffer,
            w: buffer,
            y: &y.buffer,
            num_tokens: x.num_rows,
            num_rows: self.num_rows,
            num_cols: self.num_cols,
            row_stride: *row_stride,
        })?;
        Ok(is_done.then_some(y))
    }

    fn check(&self, x: &GpuTensor) -> Result<()> {
        if x.num_cols != self.num_cols {
            bail!("activations have {} columns, the weights {}", x.num_cols, self.num_cols);
        }
        if x.dtype != DType::BF16 {
            bail!("activations are {:?}, not BF16", x.dtype);
        }
        Ok(())
    }
}

impl std::fmt::Debug for GpuMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GpuMatrix({} x {})", self.num_rows, self.num_cols)
    }
}

/// A segment before it is in the card's memory.
struct PlannedSegment<'a> {
    weights: Weights,
    first_row: usize,
    rows: SourceRows<'a>,
    num_bytes: usize,
}

impl PlannedSegment<'_> {
    fn placed(&self, buffer: DeviceBuffer, all: DeviceBuffer) -> Segment {
        let Self { weights, first_row, rows: SourceRows { layout, num_rows, .. }, .. } = *self;
        Segment { weights, first_row, num_rows, buffer, all, layout }
    }
}

/// Neighbours of one format need one launch.
fn plan_segments<'a>(
    sources: &'a [MatrixSource<'a>],
    num_cols: usize,
    stacking: Stacking,
) -> Result<Vec<PlannedSegment<'a>>> {
    if let (Stacking::Gated, [gate, up]) = (stacking, sources)
        && gate.format == up.format
        && gate.num_rows == up.num_rows
    {
        return Ok(vec![plan_segment(sources, num_cols, 0, Interleaving::Gated)?]);
    }
    let mut first_row = 0;
    let mut planned = Vec::new();
    for alike in sources.chunk_by(|a, b| a.format == b.format) {
        let segment = plan_segment(alike, num_cols, first_row, Interleaving::Plain)?;
        first_row += segment.rows.num_rows;
        planned.push(segment);
    }
    Ok(planned)
}

fn plan_segment<'a>(
    sources: &'a [MatrixSource<'a>],
    num_cols: usize,
    first_row: usize,
    layout: Interleaving,
) -> Result<PlannedSegment<'a>> {
    let format = sources[0].format;
    let row_bytes = format.row_bytes(num_cols)?;
    for MatrixSource { data, num_rows, .. } in sources {
        if Some(data.len()) != row_bytes.checked_mul(*num_rows) {
            bail!("{num_rows} rows of {num_cols} {format} weights are not {} bytes", data.len());
        }
    }
    let weights = match packed_format(format) {
        Some(packed) => Weights::Packed(packed),
        None if format.block_len() != 1 => bail!("there is no kernel for {format} weights"),
        None => Weights::Dense { row_stride: num_cols },
    };
    if !num_cols.is_multiple_of(8) {
        bail!("rows of {num_cols} weights: a card takes multiples of 8");
    }
    let num_rows = sources.iter().map(|source| source.num_rows).sum();
    let rows = SourceRows { sources, row_bytes, layout, num_rows };
    let num_bytes = rows.num_row_tiles() * weights.row_tile_bytes(num_cols);
    Ok(PlannedSegment { weights, first_row, rows, num_bytes })
}

impl Weights {
    /// Bytes of sixteen rows.
    fn row_tile_bytes(self, num_cols: usize) -> usize {
        match self {
            Self::Packed(format) => format.row_tile_bytes(num_cols.div_ceil(TILE_COLS)),
            Self::Dense { row_stride } => TILE_ROWS * row_stride * 2,
        }
    }
}

/// The rows of sources in the order of a matrix.
struct SourceRows<'a> {
    sources: &'a [MatrixSource<'a>],
    row_bytes: usize,
    layout: Interleaving,
    num_rows: usize,
}

impl SourceRows<'_> {
    fn format(&self) -> RowFormat {
        self.sources[0].format
    }

    fn num_row_tiles(&self) -> usize {
        match self.layout {
            Interleaving::Plain => self.num_rows.div_ceil(TILE_ROWS),
            Interleaving::Gated => (self.num_rows / 2).div_ceil(GATED_ROWS),
        }
    }

    /// Row `i` of a row tile, if there is one.
    fn get(&self, row_tile: usize, i: usize) -> Option<&[u8]> {
        let (mut row, sources) = match self.layout {
            Interleaving::Plain => (row_tile * TILE_ROWS + i, self.sources),
            Interleaving::Gated => {
                let source = i / GATED_ROWS;
                (row_tile * GATED_ROWS + i % GATED_ROWS, &self.sources[source..=source])
            }
        };
        for source in sources {
            if row < source.num_rows {
                return Some(&source.data[row * self.row_bytes..][..self.row_bytes]);
            }
            row -= source.num_rows;
        }
        None
    }
}

/// Packs rows in portions and copies each to its place.
fn upload(
    buffer: &DeviceBuffer,
    weights: Weights,
    rows: &SourceRows<'_>,
    num_cols: usize,
) -> Result<()> {
    let num_tiles = num_cols.div_ceil(TILE_COLS);
    let tile_bytes = weights.row_tile_bytes(num_cols);
    let num_row_tiles = rows.num_row_tiles();
    let portion = (UPLOAD_BYTES / tile_bytes.max(1)).clamp(1, num_row_tiles.max(1));
    let mut host = vec![0_u8; portion * tile_bytes];
    for first in (0..num_row_tiles).step_by(portion) {
        let count = portion.min(num_row_tiles - first);
        host.fill(0);
        let start = SharedMut(host.as_mut_ptr());
        parallel_for(count, |index| {
            // SAFETY: tasks have row tiles of their own, inside of the buffer.
            let to = unsafe {
                std::slice::from_raw_parts_mut(start.get().add(index * tile_bytes), tile_bytes)
            };
            let data: [_; TILE_ROWS] = std::array::from_fn(|i| rows.get(first + index, i));
            match weights {
                Weights::Packed(format) => {
                    let from = (rows.format(), num_cols);
                    RowTile::new(num_tiles).pack(format, from, &data, to);
                }
                Weights::Dense { row_stride } => pack_dense(rows.format(), &data, row_stride, to),
            }
        });
        let range = first * tile_bytes..(first + count) * tile_bytes;
        buffer.slice(range).upload(&host[..count * tile_bytes])?;
    }
    Ok(())
}
