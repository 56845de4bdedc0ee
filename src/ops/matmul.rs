//! Matrix product with the weights of a checkpoint: `y[t, r] = sum_k x[t, k] * w[r, k] + bias[r]`.
//!
//! [`PackedMatrix`] holds the weights in the form that the kernels stream: panels of sixteen rows,
//! in the precision of the file. Integer weights meet activations that are quantised to eight bits,
//! 32 values at a time; float weights meet them as they are.
//!
//! **Invariant:** a row of the result is the same bits whatever other rows there are, however many
//! threads work, and whatever instruction set the processor has. Start reading at `format`, then
//! `kernel`.

#![expect(
    clippy::inline_always,
    reason = "parts of a kernel must be compiled into the function that enables the features"
)]
#![expect(clippy::cast_ptr_alignment, reason = "vector loads and stores need no alignment")]

mod activations;
mod buffer;
mod format;
mod kernel;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pair;
mod simd;

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};

use self::activations::{Activations, Group, SumFactor, SumKind, groups};
use self::buffer::Buffer;
use self::format::{BLOCK, GROUP_BYTES, max_unpacked_bytes, packed_layout, panel_bytes};
use self::kernel::{Kernels, MAX_WIDTH, PairKernel, PanelArgs, PanelKernel, Tile};
use self::simd::{Isa, LANES};
use crate::device::threads::{current_num_threads, parallel_for};
use crate::ops::gguf_blocks::{block_layout, row_bytes};

/// Up to this many tokens the kernels read the packed weights themselves; beyond, each panel is
/// unpacked first.
const MAX_DIRECT_TOKENS: usize = 16;
/// Activations that one task goes over for each panel; they should stay in the second-level cache.
const TILE_BYTES: usize = 512 << 10;
/// Blocks of a panel that are unpacked at a time; they should stay in the first-level cache. A
/// multiple of the eight blocks that share scales.
const CHUNK_BLOCKS: usize = 16;
/// Tasks for each thread: enough to even out threads of unequal speed.
const TASKS_PER_THREAD: usize = 8;

/// The instruction set that products are computed with on this machine.
pub fn instruction_set() -> &'static str {
    Isa::detect().name()
}

/// Rows of weights as a file has them.
#[derive(Clone, Copy)]
pub struct MatrixSource<'a> {
    /// Format of the blocks.
    pub dtype: GgmlDType,
    /// The rows, one after the other.
    pub data: &'a [u8],
    /// How many rows there are.
    pub num_rows: usize,
}

/// A matrix of weights `[num_rows, num_cols]`, ready for [`matmul`].
pub struct PackedMatrix {
    segments: Vec<Segment>,
    num_rows: usize,
    num_cols: usize,
}

/// Consecutive rows of one format.
struct Segment {
    dtype: GgmlDType,
    first_row: usize,
    num_rows: usize,
    /// Panels before this segment.
    first_panel: usize,
    panel_bytes: usize,
    data: Buffer,
}

impl Segment {
    fn num_panels(&self) -> usize {
        self.num_rows.div_ceil(LANES)
    }

    /// Blocks of a panel, or columns for floats.
    fn num_blocks(&self, num_cols: usize) -> usize {
        if packed_layout(self.dtype).is_some() { num_cols / BLOCK } else { num_cols }
    }

    fn sum_kind(&self) -> Option<SumKind> {
        let layout = block_layout(self.dtype)?;
        let factor =
            if layout.offset == 0 { SumFactor::Scale } else { SumFactor::Offset(layout.offset) };
        Some(SumKind { halves: BLOCK / layout.run_len, factor })
    }
}

impl PackedMatrix {
    /// Packs the sources, one below the other. Uses the current thread pool.
    ///
    /// # Errors
    /// If rows are not whole blocks, or a source has not the bytes that its rows need, or there is
    /// no memory.
    pub fn pack(sources: &[MatrixSource<'_>], num_cols: usize) -> Result<Self> {
        let mut matrix = Self { segments: Vec::new(), num_rows: 0, num_cols };
        let mut num_panels = 0;
        for source in sources {
            let segment = pack_segment(source, num_cols, (matrix.num_rows, num_panels))?;
            matrix.num_rows += segment.num_rows;
            num_panels += segment.num_panels();
            matrix.segments.push(segment);
        }
        Ok(matrix)
    }

    /// Rows of all sources.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Weights in a row.
    pub fn num_cols(&self) -> usize {
        self.num_cols
    }

    /// Memory that the packed weights take.
    pub fn num_bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.data.len()).sum()
    }

    fn num_panels(&self) -> usize {
        self.segments.iter().map(Segment::num_panels).sum()
    }
}

fn pack_segment(
    source: &MatrixSource<'_>,
    num_cols: usize,
    (first_row, first_panel): (usize, usize),
) -> Result<Segment> {
    let MatrixSource { dtype, data, num_rows } = *source;
    let row_bytes = row_bytes(dtype, num_cols)?;
    if Some(data.len()) != row_bytes.checked_mul(num_rows) {
        bail!("{num_rows} rows of {num_cols} {dtype:?} weights are not {} bytes", data.len());
    }
    let panel_bytes = match packed_layout(dtype) {
        Some((bits, kind)) => panel_bytes(bits, kind, num_cols / BLOCK),
        None => num_cols * LANES * dtype.type_size(),
    };
    let num_panels = num_rows.div_ceil(LANES);
    let mut buffer = Buffer::zeroed(num_panels * panel_bytes)?;
    let start = SharedMut(buffer.as_mut_ptr());
    parallel_for(num_panels, |panel| {
        // SAFETY: tasks have panels of their own, inside of the buffer.
        let to = unsafe {
            std::slice::from_raw_parts_mut(start.get().add(panel * panel_bytes), panel_bytes)
        };
        let last = num_rows.min((panel + 1) * LANES);
        let rows: Vec<&[u8]> = (panel * LANES..last)
            .map(|row| &data[row * row_bytes..(row + 1) * row_bytes])
            .collect();
        if packed_layout(dtype).is_some() {
            pack::pack_quantized(dtype, &rows, num_cols, to);
        } else {
            pack::pack_dense(dtype.type_size(), &rows, to);
        }
    });
    Ok(Segment { dtype, first_row, num_rows, first_panel, panel_bytes, data: buffer })
}

/// A pointer that tasks share and write disjoint parts of.
#[derive(Clone, Copy)]
struct SharedMut<T>(*mut T);

// SAFETY: only a pointer; each dereference says why it is alone.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

/// `x * w^T + bias`: `[num_tokens, num_rows]` from `x: [num_tokens, num_cols]` and `bias:
/// [num_rows]`.
///
/// # Errors
/// If a shape or a type does not fit, or a tensor is not contiguous on the CPU.
pub fn matmul(x: &Tensor, w: &Arc<PackedMatrix>, bias: Option<&Tensor>) -> Result<Tensor> {
    let op = MatMul { weights: Arc::clone(w), bias: bias.cloned(), isa: Isa::detect() };
    x.apply_op1_no_bwd(&op)
}

struct MatMul {
    weights: Arc<PackedMatrix>,
    bias: Option<Tensor>,
    isa: Isa,
}

impl CustomOp1 for MatMul {
    fn name(&self) -> &'static str {
        "packed-matmul"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (num_tokens, num_cols) = layout.shape().dims2()?;
        let weights = &*self.weights;
        if num_cols != weights.num_cols {
            bail!("activations have {num_cols} columns, the weights {}", weights.num_cols);
        }
        let x = contiguous(storage, layout)?;
        let output = match &self.bias {
            None => multiply(self.isa, x, weights, None),
            Some(bias) => {
                let (storage, layout) = bias.storage_and_layout();
                let Storage::Cpu(storage) = &*storage else {
                    bail!("the bias is not on the CPU");
                };
                let bias = contiguous(storage, layout)?;
                if bias.len() != weights.num_rows {
                    bail!("{} biases for {} rows", bias.len(), weights.num_rows);
                }
                multiply(self.isa, x, weights, Some(bias))
            }
        };
        Ok((CpuStorage::F32(output), (num_tokens, weights.num_rows).into()))
    }
}

fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("the tensor is not contiguous"),
    }
}

/// The product on slices: `x` is `[num_tokens, num_cols]`.
fn multiply(isa: Isa, x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>) -> Vec<f32> {
    let num_tokens = x.len().checked_div(w.num_cols).unwrap_or(0);
    let len = num_tokens * w.num_rows;
    let mut output: Vec<f32> = Vec::with_capacity(len);
    let groups = groups(num_tokens);
    let activations = prepare(isa, x, w, &groups);
    let plan = Plan {
        w,
        kernels: w.segments.iter().map(|segment| Kernels::new(isa, segment.dtype)).collect(),
        groups: &groups,
        activations: &activations,
        bias,
        output: SharedMut(output.as_mut_ptr()),
        is_direct: num_tokens <= MAX_DIRECT_TOKENS,
    };
    plan.run();
    // SAFETY: the plan wrote all rows of all tokens.
    unsafe { output.set_len(len) };
    output
}

/// Activations of each group in the forms that the segments need.
fn prepare(isa: Isa, x: &[f32], w: &PackedMatrix, groups: &[Group]) -> Vec<Activations> {
    let mut kinds: Vec<SumKind> = Vec::new();
    let mut has_floats = false;
    for segment in &w.segments {
        match segment.sum_kind() {
            Some(kind) if !kinds.contains(&kind) => kinds.push(kind),
            Some(_) => {}
            None => has_floats = true,
        }
    }
    let mut activations: Vec<Activations> = groups.iter().map(|_| Activations::default()).collect();
    let shared = SharedMut(activations.as_mut_ptr());
    parallel_for(groups.len(), |index| {
        let Group { first, width } = groups[index];
        let x = &x[first * w.num_cols..(first + width) * w.num_cols];
        // SAFETY: tasks have elements of their own.
        let activations = unsafe { &mut *shared.get().add(index) };
        if !kinds.is_empty() {
            activations.quantize(isa, x, w.num_cols, &kinds);
        }
        if has_floats {
            activations.transpose(x, w.num_cols);
        }
    });
    activations
}

/// One product, cut into tasks.
struct Plan<'a> {
    w: &'a PackedMatrix,
    /// Of each segment.
    kernels: Vec<Kernels>,
    groups: &'a [Group],
    /// Of each group.
    activations: &'a [Activations],
    bias: Option<&'a [f32]>,
    output: SharedMut<f32>,
    /// Few tokens: panels are not unpacked.
    is_direct: bool,
}

/// Consecutive blocks of one or two panels, or columns for floats, and the code for them.
struct PanelSlice<'a> {
    weights: &'a [*const u8],
    blocks: Range<usize>,
    by_width: &'a [PanelKernel; 4],
    pair: Option<PairKernel>,
}

/// What a task needs besides its input.
struct Workspace {
    /// A chunk of two unpacked panels.
    scratch: Vec<CacheLine>,
    /// Results of two panels for each group.
    tiles: Vec<[Tile; 2]>,
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct CacheLine {
    _bytes: [u8; GROUP_BYTES],
}

impl Workspace {
    fn new(num_groups: usize, is_direct: bool) -> Self {
        let num_bytes = if is_direct { 0 } else { 2 * max_unpacked_bytes(CHUNK_BLOCKS) };
        let line = CacheLine { _bytes: [0; GROUP_BYTES] };
        Self {
            scratch: vec![line; num_bytes / GROUP_BYTES],
            tiles: vec![[[[0.0; LANES]; MAX_WIDTH]; 2]; num_groups],
        }
    }
}

impl Plan<'_> {
    /// A task is a range of panels for a range of groups; within it each panel meets all groups.
    fn run(&self) {
        let group_bytes = MAX_WIDTH * self.w.num_cols;
        let groups_per_tile = (TILE_BYTES / group_bytes.max(1)).max(1);
        let num_tiles = self.groups.len().div_ceil(groups_per_tile);
        let num_panels = self.w.num_panels();
        let num_tasks = current_num_threads() * TASKS_PER_THREAD;
        // Even, because panels are computed in pairs.
        let panels_per_task = num_panels.div_ceil(num_tasks).next_multiple_of(2).max(2);
        let num_chunks = num_panels.div_ceil(panels_per_task);
        parallel_for(num_tiles * num_chunks, |task| {
            let tile = task / num_chunks * groups_per_tile;
            let tile = tile..self.groups.len().min(tile + groups_per_tile);
            let first = task % num_chunks * panels_per_task;
            let last = num_panels.min(first + panels_per_task);
            let mut workspace = Workspace::new(tile.len(), self.is_direct);
            for (index, segment) in self.w.segments.iter().enumerate() {
                let end = last.min(segment.first_panel + segment.num_panels());
                let mut panel = first.max(segment.first_panel);
                while panel < end {
                    let next = end.min(panel + 2);
                    let panels = panel - segment.first_panel..next - segment.first_panel;
                    self.run_panels(index, panels, tile.clone(), &mut workspace);
                    panel = next;
                }
            }
        });
    }

    /// One or two panels of a segment and a range of groups.
    fn run_panels(
        &self,
        segment: usize,
        panels: Range<usize>,
        groups: Range<usize>,
        workspace: &mut Workspace,
    ) {
        let kernels = &self.kernels[segment];
        let segment = &self.w.segments[segment];
        let (first_panel, num_panels) = (panels.start, panels.len());
        let packed = |panel: usize| {
            segment.data[(first_panel + panel) * segment.panel_bytes..][..segment.panel_bytes]
                .as_ptr()
        };
        let Workspace { scratch, tiles } = workspace;
        tiles.fill([[[0.0; LANES]; MAX_WIDTH]; 2]);
        match &kernels.unpacking {
            Some(unpacking) if !self.is_direct => {
                let num_blocks = self.w.num_cols / BLOCK;
                let stride = max_unpacked_bytes(CHUNK_BLOCKS);
                let to: *mut u8 = scratch.as_mut_ptr().cast();
                for first in (0..num_blocks).step_by(CHUNK_BLOCKS) {
                    let blocks = first..num_blocks.min(first + CHUNK_BLOCKS);
                    for panel in 0..num_panels {
                        // SAFETY: the kernels are of a detected instruction set and of the
                        // segment's format; the scratch has room for a chunk of two panels.
                        unsafe {
                            let to = to.add(panel * stride);
                            (unpacking.unpack)(packed(panel), num_blocks, blocks.clone(), to);
                        }
                    }
                    let weights = [to.cast_const(), to.wrapping_add(stride)];
                    let slice = PanelSlice {
                        weights: &weights[..num_panels],
                        blocks,
                        by_width: &unpacking.by_width,
                        pair: unpacking.pair,
                    };
                    self.run_groups(segment, &slice, groups.clone(), tiles);
                }
            }
            _ => {
                let weights = [packed(0), packed(num_panels - 1)];
                let slice = PanelSlice {
                    weights: &weights[..num_panels],
                    blocks: 0..segment.num_blocks(self.w.num_cols),
                    by_width: &kernels.by_width,
                    pair: None,
                };
                self.run_groups(segment, &slice, groups.clone(), tiles);
            }
        }
        for (group, tiles) in groups.zip(tiles) {
            for (panel, tile) in panels.clone().zip(tiles) {
                self.write(segment, panel, self.groups[group], tile);
            }
        }
    }

    /// Adds what a slice of one or two panels contributes to the tiles of some groups.
    fn run_groups(
        &self,
        segment: &Segment,
        slice: &PanelSlice,
        groups: Range<usize>,
        tiles: &mut [[Tile; 2]],
    ) {
        for (index, tiles) in groups.zip(tiles) {
            let width = self.groups[index].width;
            let mut args = self.panel_args(segment, slice, index);
            if let (&[first, second], MAX_WIDTH, Some(pair)) = (slice.weights, width, slice.pair) {
                let stride = second as usize - first as usize;
                // SAFETY: as below, for both panels.
                unsafe { pair(&args, stride, tiles) };
                continue;
            }
            let kernel = slice.by_width[width.trailing_zeros() as usize];
            for (&weights, tile) in slice.weights.iter().zip(tiles) {
                args.panel = weights;
                // SAFETY: the kernel is of a detected instruction set, of the segment's format and
                // of the group's width, for which the weights and the activations were made.
                unsafe { kernel(&args, tile) };
            }
        }
    }

    fn panel_args(&self, segment: &Segment, slice: &PanelSlice, group: usize) -> PanelArgs {
        let activations = &self.activations[group];
        let width = self.groups[group].width;
        let panel = slice.weights[0];
        let num_blocks = slice.blocks.len();
        let first = slice.blocks.start * width;
        match segment.sum_kind() {
            Some(kind) => PanelArgs {
                panel,
                num_blocks,
                x: activations.quants[first * BLOCK..].as_ptr().cast(),
                x_scales: activations.scales[first..].as_ptr(),
                x_sums: activations.sums(kind)[first * kind.halves..].as_ptr(),
            },
            None => PanelArgs {
                panel,
                num_blocks,
                x: activations.floats[first..].as_ptr().cast(),
                x_scales: std::ptr::null(),
                x_sums: std::ptr::null(),
            },
        }
    }

    fn write(&self, segment: &Segment, panel: usize, group: Group, tile: &Tile) {
        let row = segment.first_row + panel * LANES;
        let num_rows = LANES.min(segment.num_rows - panel * LANES);
        for (t, sums) in tile.iter().enumerate().take(group.width) {
            let at = (group.first + t) * self.w.num_rows + row;
            // SAFETY: the rows of a panel and the tokens of a group belong to one task, and lie in
            // the output.
            let output = unsafe {
                std::slice::from_raw_parts_mut(
                    self.output.get().add(at).cast::<MaybeUninit<f32>>(),
                    num_rows,
                )
            };
            match self.bias {
                Some(bias) => {
                    for ((output, sum), bias) in output.iter_mut().zip(sums).zip(&bias[row..]) {
                        output.write(sum + bias);
                    }
                }
                None => {
                    for (output, &sum) in output.iter_mut().zip(sums) {
                        output.write(sum);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::threads::ThreadPool;
    use crate::ops::gguf_blocks::dequantize_row;
    use crate::ops::gguf_blocks::tests::{ALL_DTYPES, Random, random_blocks};
    use candle_core::Device;

    fn random_x(num_tokens: usize, num_cols: usize) -> Vec<f32> {
        let mut random = Random::new(11);
        (0..num_tokens * num_cols).map(|_| random.float()).collect()
    }

    fn pack(dtype: GgmlDType, num_rows: usize, num_cols: usize) -> (Vec<f32>, PackedMatrix) {
        let data = random_blocks(dtype, num_rows * num_cols, num_rows as u64);
        let mut weights = vec![0.0; num_rows * num_cols];
        dequantize_row(dtype, &data, &mut weights).unwrap();
        let source = MatrixSource { dtype, data: &data, num_rows };
        (weights, PackedMatrix::pack(&[source], num_cols).unwrap())
    }

    /// The squared error of the products, relative to the sum of the squares of their terms: unlike
    /// the square of the sum that does not vanish when terms cancel.
    fn error(found: &[f32], x: &[f32], weights: &[f32], num_cols: usize) -> f64 {
        let mut found = found.iter();
        let (mut errors, mut squares) = (0.0, 0.0);
        for x in x.chunks_exact(num_cols) {
            for w in weights.chunks_exact(num_cols) {
                let terms = || x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                squares += terms().map(|term| term * term).sum::<f64>();
                errors += (f64::from(*found.next().unwrap()) - terms().sum::<f64>()).powi(2);
            }
        }
        assert!(found.next().is_none());
        errors / squares
    }

    /// Goal: the product of every format is right at every shape. Method: an `f64` loop over
    /// dequantised weights; the tolerance is for the quantised activations, floats get a much
    /// smaller one.
    #[test]
    fn every_format_and_shape_agrees_with_a_loop() {
        for dtype in ALL_DTYPES {
            for (num_rows, num_blocks, num_tokens) in
                [(1, 1, 1), (15, 2, 3), (16, 3, 2), (17, 1, 4), (64, 4, 9), (37, 2, 23)]
            {
                let num_cols = num_blocks * dtype.block_size().max(32);
                let (weights, packed) = pack(dtype, num_rows, num_cols);
                let x = random_x(num_tokens, num_cols);
                let found = multiply(Isa::detect(), &x, &packed, None);
                let limit = if block_layout(dtype).is_some() { 5e-4 } else { 1e-11 };
                let error = error(&found, &x, &weights, num_cols);
                assert!(error < limit, "{dtype:?} {num_rows}x{num_cols}x{num_tokens}: {error:e}");
            }
        }
    }

    /// Goal: the instruction set does not change a bit. Method: all that are here, odd shapes, few
    /// and many tokens.
    #[test]
    fn instruction_sets_agree_bit_by_bit() {
        for dtype in ALL_DTYPES {
            let num_cols = 768;
            let (_, packed) = pack(dtype, 35, num_cols);
            for num_tokens in [1, 7, 31] {
                let x = random_x(num_tokens, num_cols);
                let expected = multiply(Isa::Portable, &x, &packed, None);
                for isa in Isa::available() {
                    assert_eq!(multiply(isa, &x, &packed, None), expected, "{dtype:?} {isa:?}");
                }
            }
        }
    }

    #[test]
    fn a_token_alone_and_in_a_batch_is_the_same_bits() {
        for dtype in ALL_DTYPES {
            for isa in Isa::available() {
                let num_cols = 768;
                let (_, packed) = pack(dtype, 40, num_cols);
                let x = random_x(29, num_cols);
                for num_tokens in [29, 13, 6] {
                    let batch = multiply(isa, &x[..num_tokens * num_cols], &packed, None);
                    for (x, row) in x.chunks_exact(num_cols).zip(batch.chunks_exact(40)) {
                        assert_eq!(multiply(isa, x, &packed, None), row, "{dtype:?} {isa:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn stacked_formats_and_threads_change_nothing() {
        let num_cols = 256;
        let shapes = [
            (GgmlDType::Q5_0, 33),
            (GgmlDType::Q8_0, 16),
            (GgmlDType::Q6K, 7),
            (GgmlDType::F16, 20),
        ];
        let data: Vec<_> = shapes
            .iter()
            .map(|&(dtype, num_rows)| random_blocks(dtype, num_rows * num_cols, 1))
            .collect();
        let sources: Vec<_> = shapes
            .iter()
            .zip(&data)
            .map(|(&(dtype, num_rows), data)| MatrixSource { dtype, data, num_rows })
            .collect();
        let stacked = PackedMatrix::pack(&sources, num_cols).unwrap();
        assert_eq!((stacked.num_rows(), stacked.num_cols()), (76, num_cols));
        let mut random = Random::new(2);
        let bias: Vec<f32> = (0..76).map(|_| random.float()).collect();
        for num_tokens in [1, 5, 40] {
            let x = random_x(num_tokens, num_cols);
            let expected = multiply(Isa::detect(), &x, &stacked, Some(&bias));
            let mut first = 0;
            for source in sources.chunks(1) {
                let packed = PackedMatrix::pack(source, num_cols).unwrap();
                let alone = multiply(Isa::detect(), &x, &packed, None);
                for (t, rows) in alone.chunks_exact(packed.num_rows()).enumerate() {
                    for (row, value) in rows.iter().enumerate() {
                        assert_eq!(expected[t * 76 + first + row], value + bias[first + row]);
                    }
                }
                first += packed.num_rows();
            }
            for num_threads in 1..5 {
                let pool = ThreadPool::new(num_threads);
                let packed = pool.install(|| PackedMatrix::pack(&sources, num_cols).unwrap());
                let found = pool.install(|| multiply(Isa::detect(), &x, &packed, Some(&bias)));
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn a_packed_matrix_is_about_as_large_as_its_file() {
        for dtype in ALL_DTYPES {
            let (num_rows, num_cols) = (64, 1024);
            let (_, packed) = pack(dtype, num_rows, num_cols);
            let file = row_bytes(dtype, num_cols).unwrap() * num_rows;
            let ratio = packed.num_bytes() as f64 / file as f64;
            assert!(ratio < 1.04, "{dtype:?}: {ratio}");
        }
    }

    #[test]
    fn tensors_in_and_out() {
        let (weights, packed) = pack(GgmlDType::F32, 3, 4);
        let packed = Arc::new(packed);
        let x = Tensor::from_vec(random_x(2, 4), (2, 4), &Device::Cpu).unwrap();
        let bias = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
        let found = matmul(&x, &packed, Some(&bias)).unwrap();
        let w = Tensor::from_vec(weights, (3, 4), &Device::Cpu).unwrap();
        let expected = x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        let difference = (found - expected).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-5);
        let none = Tensor::zeros((0, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert_eq!(matmul(&none, &packed, None).unwrap().dims(), [0, 3]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let source = |dtype, data, num_rows| MatrixSource { dtype, data, num_rows };
        assert!(PackedMatrix::pack(&[source(GgmlDType::Q4_0, &[0; 36], 2)], 32).is_ok());
        assert!(PackedMatrix::pack(&[source(GgmlDType::Q4_0, &[0; 35], 2)], 32).is_err());
        assert!(PackedMatrix::pack(&[source(GgmlDType::Q4_0, &[0; 36], 1)], 33).is_err());
        assert!(PackedMatrix::pack(&[source(GgmlDType::Q4K, &[0; 144], 1)], 128).is_err());
        let packed = Arc::new(pack(GgmlDType::Q8_0, 2, 32).1);
        let x = Tensor::zeros((1, 64), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(matmul(&x, &packed, None).is_err());
        let x = Tensor::zeros((1, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(matmul(&x, &packed, Some(&x.flatten_all().unwrap())).is_err());
        let halves = x.to_dtype(candle_core::DType::F16).unwrap();
        assert!(matmul(&halves, &packed, None).is_err());
    }
}
