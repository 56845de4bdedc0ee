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
mod fp8;
mod gpu;
mod kernel;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pair;
mod plan;
mod simd;

use std::sync::Arc;

use candle_core::Tensor as CpuTensor;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, bail};

use self::activations::{Activations, Group, SumFactor, SumKind, groups};
use self::buffer::Buffer;
use self::format::{BLOCK, GROUP_BYTES, packed_layout, panel_bytes};
pub use self::gpu::{GROUP_ROWS, GpuMatrix, RowOrder, Stacking};
use self::kernel::Kernels;
use self::plan::{Epilogue, Plan};
use self::simd::{Isa, LANES};
use crate::device::threads::parallel_for;
use crate::ops::gguf_blocks::block_layout;
use crate::ops::random_rows::random_rows;
use crate::ops::row_format::RowFormat;
use crate::ops::silu_mul::GateUpOrder;
use crate::ops::simd::Isa as FloatIsa;
use crate::ops::tensor::{Device, GpuTensor, Tensor};

/// The instruction set that products are computed with on this machine.
pub fn instruction_set() -> &'static str {
    Isa::detect().name()
}

/// Rows of weights as a file has them.
#[derive(Clone, Copy)]
pub struct MatrixSource<'a> {
    /// What the rows are made of.
    pub format: RowFormat,
    /// The rows, one after the other.
    pub data: &'a [u8],
    /// How many rows there are.
    pub num_rows: usize,
}

/// Rows of weights that nobody has, see [`crate::ops::random_rows`].
#[derive(Clone, Copy, Debug)]
pub struct RandomSource {
    /// What the rows are made of.
    pub format: RowFormat,
    /// How many rows there are.
    pub num_rows: usize,
    /// Makes them differ from those of other matrices.
    pub seed: u64,
}

/// A matrix of weights `[num_rows, num_cols]` on the device that multiplies with it.
#[derive(Clone)]
pub enum Weights {
    /// In the program's memory.
    Cpu(Arc<PackedMatrix>),
    /// In a card's memory.
    Gpu(Arc<GpuMatrix>),
}

impl Weights {
    /// Packs the sources for a device. Uses the current thread pool.
    ///
    /// # Errors
    /// As [`PackedMatrix::pack`] and [`GpuMatrix::pack`].
    pub fn pack(
        sources: &[MatrixSource<'_>],
        num_cols: usize,
        stacking: Stacking,
        device: &Device,
    ) -> Result<Self> {
        Ok(match device {
            Device::Cpu => Self::Cpu(Arc::new(PackedMatrix::pack(sources, num_cols)?)),
            Device::Gpu(gpu) => {
                Self::Gpu(Arc::new(GpuMatrix::pack(gpu, sources, num_cols, stacking)?))
            }
        })
    }

    /// Packs several matrices of as many columns, each of sources of its own, into one piece of
    /// memory.
    ///
    /// # Errors
    /// As [`Weights::pack`].
    pub fn pack_each(
        matrices: &[Vec<MatrixSource<'_>>],
        num_cols: usize,
        stacking: Stacking,
        device: &Device,
    ) -> Result<Vec<Self>> {
        if let Device::Gpu(gpu) = device {
            let packed = GpuMatrix::pack_each(gpu, matrices, num_cols, stacking)?;
            return Ok(packed.into_iter().map(|matrix| Self::Gpu(Arc::new(matrix))).collect());
        }
        let packed = PackedMatrix::pack_each(matrices, num_cols)?;
        Ok(packed.into_iter().map(|matrix| Self::Cpu(Arc::new(matrix))).collect())
    }

    /// Makes up weights of several matrices on a device: other ones than another device does.
    ///
    /// # Errors
    /// As [`Weights::pack_each`].
    pub fn random_each(
        matrices: &[Vec<RandomSource>],
        num_cols: usize,
        stacking: Stacking,
        device: &Device,
    ) -> Result<Vec<Self>> {
        if let Device::Gpu(gpu) = device {
            let made = GpuMatrix::random_each(gpu, matrices, num_cols, stacking)?;
            return Ok(made.into_iter().map(|matrix| Self::Gpu(Arc::new(matrix))).collect());
        }
        let random = |sources: &Vec<_>| Self::random(sources, num_cols, stacking, device);
        matrices.iter().map(random).collect()
    }

    /// Makes up weights in the program's memory.
    fn random(
        sources: &[RandomSource],
        num_cols: usize,
        stacking: Stacking,
        device: &Device,
    ) -> Result<Self> {
        let rows = sources
            .iter()
            .map(|source| random_rows(source.format, (source.num_rows, num_cols), source.seed))
            .collect::<Result<Vec<_>>>()?;
        let sources: Vec<_> = sources
            .iter()
            .zip(&rows)
            .map(|(&RandomSource { format, num_rows, .. }, data)| MatrixSource {
                format,
                data,
                num_rows,
            })
            .collect();
        Self::pack(&sources, num_cols, stacking, device)
    }

    /// Rows of all sources.
    pub fn num_rows(&self) -> usize {
        match self {
            Self::Cpu(matrix) => matrix.num_rows(),
            Self::Gpu(matrix) => matrix.num_rows(),
        }
    }

    /// Memory that the packed weights take.
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Cpu(matrix) => matrix.num_bytes(),
            Self::Gpu(matrix) => matrix.num_bytes(),
        }
    }

    fn cpu(&self) -> Result<&Arc<PackedMatrix>> {
        match self {
            Self::Cpu(matrix) => Ok(matrix),
            Self::Gpu(_) => bail!("the weights are on the GPU, the activations are not"),
        }
    }

    pub(super) fn gpu(&self) -> Result<&GpuMatrix> {
        match self {
            Self::Gpu(matrix) => Ok(matrix),
            Self::Cpu(_) => bail!("the activations are on the GPU, the weights are not"),
        }
    }
}

/// A matrix of weights `[num_rows, num_cols]` as the processor's kernels stream it.
pub struct PackedMatrix {
    segments: Vec<Segment>,
    num_rows: usize,
    num_cols: usize,
}

/// Consecutive rows of one format.
struct Segment {
    format: RowFormat,
    first_row: usize,
    num_rows: usize,
    panel_bytes: usize,
    data: Buffer,
}

impl Segment {
    fn num_panels(&self) -> usize {
        self.num_rows.div_ceil(LANES)
    }

    /// Blocks of a panel, or columns for floats.
    fn num_blocks(&self, num_cols: usize) -> usize {
        if packed_layout(self.format).is_some() { num_cols / BLOCK } else { num_cols }
    }

    /// Bytes of the integers of so many blocks.
    fn integer_bytes(&self, num_blocks: usize) -> usize {
        packed_layout(self.format).map_or(0, |(bits, _)| num_blocks * bits * GROUP_BYTES)
    }

    /// Bytes of the scales of so many blocks.
    fn scale_bytes(&self, num_blocks: usize) -> usize {
        packed_layout(self.format).map_or(0, |(_, kind)| kind.num_bytes(num_blocks))
    }

    fn sum_kind(&self) -> Option<SumKind> {
        let layout = block_layout(self.format.gguf()?)?;
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
        Ok(Self::pack_each(&[sources.to_vec()], num_cols)?.remove(0))
    }

    /// The same for several matrices, which lie side by side in memory.
    ///
    /// # Errors
    /// As [`PackedMatrix::pack`].
    pub fn pack_each(matrices: &[Vec<MatrixSource<'_>>], num_cols: usize) -> Result<Vec<Self>> {
        let sources = matrices.iter().flatten();
        let lens =
            sources.map(|source| packed_len(source, num_cols)).collect::<Result<Vec<_>>>()?;
        let mut buffers = Buffer::zeroed_parts(&lens)?.into_iter();
        let mut packed = Vec::with_capacity(matrices.len());
        for sources in matrices {
            let mut matrix = Self { segments: Vec::new(), num_rows: 0, num_cols };
            for (source, buffer) in sources.iter().zip(buffers.by_ref()) {
                let segment = pack_segment(source, num_cols, matrix.num_rows, buffer);
                matrix.num_rows += segment.num_rows;
                matrix.segments.push(segment);
            }
            packed.push(matrix);
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

    /// Memory that the packed weights take.
    pub fn num_bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.data.len()).sum()
    }
}

/// Bytes of a panel of sixteen rows.
fn packed_panel_bytes(format: RowFormat, num_cols: usize) -> usize {
    match (format, packed_layout(format)) {
        (_, Some((bits, kind))) => panel_bytes(bits, kind, num_cols / BLOCK),
        (RowFormat::Gguf(dtype), None) => num_cols * LANES * dtype.type_size(),
        (RowFormat::Fp8, None) => fp8::panel_bytes(num_cols),
    }
}

/// Bytes that a source takes when it is packed.
fn packed_len(source: &MatrixSource<'_>, num_cols: usize) -> Result<usize> {
    let MatrixSource { format, data, num_rows } = *source;
    if Some(data.len()) != format.row_bytes(num_cols)?.checked_mul(num_rows) {
        bail!("{num_rows} rows of {num_cols} {format} weights are not {} bytes", data.len());
    }
    Ok(num_rows.div_ceil(LANES) * packed_panel_bytes(format, num_cols))
}

/// Packs into a zeroed buffer of [`packed_len`] bytes.
fn pack_segment(
    source: &MatrixSource<'_>,
    num_cols: usize,
    first_row: usize,
    mut buffer: Buffer,
) -> Segment {
    let MatrixSource { format, data, num_rows } = *source;
    let panel_bytes = packed_panel_bytes(format, num_cols);
    let row_bytes = data.len().checked_div(num_rows).unwrap_or(0);
    let num_panels = num_rows.div_ceil(LANES);
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
        match format {
            RowFormat::Fp8 => fp8::pack(&rows, num_cols, to),
            RowFormat::Gguf(dtype) if packed_layout(format).is_some() => {
                pack::pack_quantized(dtype, &rows, num_cols, to);
            }
            RowFormat::Gguf(dtype) => pack::pack_dense(dtype.type_size(), &rows, to),
        }
    });
    Segment { format, first_row, num_rows, panel_bytes, data: buffer }
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
/// [num_rows]`. On a card `x` and the result are `bf16`.
///
/// # Errors
/// If a shape or a type does not fit, or a tensor is not contiguous on the CPU.
pub fn matmul(x: &Tensor, w: &Weights, bias: Option<&Tensor>) -> Result<Tensor> {
    matmul_to(DType::BF16, x, w, bias)
}

/// [`matmul`] with a result in `f32` also on a card.
///
/// # Errors
/// As for [`matmul`].
pub fn matmul_f32(x: &Tensor, w: &Weights, bias: Option<&Tensor>) -> Result<Tensor> {
    matmul_to(DType::F32, x, w, bias)
}

fn matmul_to(dtype: DType, x: &Tensor, w: &Weights, bias: Option<&Tensor>) -> Result<Tensor> {
    match x {
        Tensor::Cpu(x) => {
            let bias = bias.map(Tensor::cpu).transpose()?;
            matmul_on_cpu(x, w.cpu()?, bias).map(Tensor::Cpu)
        }
        Tensor::Gpu(x) => {
            let bias: Option<&GpuTensor> = bias.map(Tensor::gpu).transpose()?;
            w.gpu()?.matmul(x, bias, dtype).map(Tensor::Gpu)
        }
    }
}

fn matmul_on_cpu(
    x: &CpuTensor,
    w: &Arc<PackedMatrix>,
    bias: Option<&CpuTensor>,
) -> Result<CpuTensor> {
    let then = bias.cloned().map_or(Then::Store, Then::AddBias);
    x.apply_op1_no_bwd(&MatMul { weights: Arc::clone(w), then, isa: Isa::detect() })
}

/// The gated half of a feed-forward layer, `silu(x * gate^T) * (x * up^T)`: `[num_tokens,
/// num_rows / 2]` from `x: [num_tokens, num_cols]` and a matrix packed of gate and up.
///
/// # Errors
/// As for [`matmul`], and if the matrix is not two of equal shape.
pub fn gated_matmul(x: &Tensor, gate_up: &Weights) -> Result<Tensor> {
    match x {
        Tensor::Cpu(x) => gated_matmul_on_cpu(x, gate_up.cpu()?).map(Tensor::Cpu),
        Tensor::Gpu(x) => gate_up.gpu()?.gated_matmul(x).map(Tensor::Gpu),
    }
}

/// The products of [`gated_matmul`] before the activation, which is [`super::silu_mul::gate`]: gates and
/// ups in the order that is said, on a card in `f32` or `bf16`.
///
/// # Errors
/// As for [`gated_matmul`].
pub fn gates_and_ups(x: &Tensor, gate_up: &Weights) -> Result<(Tensor, GateUpOrder)> {
    match x {
        Tensor::Cpu(_) => Ok((matmul(x, gate_up, None)?, GateUpOrder::Halves)),
        Tensor::Gpu(x) => {
            let (y, order) = gate_up.gpu()?.gates_and_ups(x)?;
            Ok((Tensor::Gpu(y), order))
        }
    }
}

fn gated_matmul_on_cpu(x: &CpuTensor, gate_up: &Arc<PackedMatrix>) -> Result<CpuTensor> {
    let then = Then::SiluMul(FloatIsa::best());
    x.apply_op1_no_bwd(&MatMul { weights: Arc::clone(gate_up), then, isa: Isa::detect() })
}

struct MatMul {
    weights: Arc<PackedMatrix>,
    then: Then,
    isa: Isa,
}

/// What is done with the product.
enum Then {
    Store,
    AddBias(CpuTensor),
    SiluMul(FloatIsa),
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
        let output = match &self.then {
            Then::Store => multiply(self.isa, x, weights, Epilogue::Store),
            Then::AddBias(bias) => {
                let (storage, layout) = bias.storage_and_layout();
                let Storage::Cpu(storage) = &*storage else {
                    bail!("the bias is not on the CPU");
                };
                let bias = contiguous(storage, layout)?;
                if bias.len() != weights.num_rows {
                    bail!("{} biases for {} rows", bias.len(), weights.num_rows);
                }
                multiply(self.isa, x, weights, Epilogue::AddBias(bias))
            }
            Then::SiluMul(isa) => match &weights.segments[..] {
                [gate, up] if gate.num_rows == up.num_rows => {
                    multiply(self.isa, x, weights, Epilogue::SiluMul(*isa))
                }
                _ => bail!("the weights are not a gate and an up projection of equal shape"),
            },
        };
        let num_rows = match self.then {
            Then::SiluMul(_) => weights.num_rows / 2,
            _ => weights.num_rows,
        };
        Ok((CpuStorage::F32(output), (num_tokens, num_rows).into()))
    }
}

fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("the tensor is not contiguous"),
    }
}

/// The product on slices: `x` is `[num_tokens, num_cols]`.
fn multiply(isa: Isa, x: &[f32], w: &PackedMatrix, epilogue: Epilogue<'_>) -> Vec<f32> {
    let num_tokens = x.len().checked_div(w.num_cols).unwrap_or(0);
    let num_rows = match epilogue {
        Epilogue::SiluMul(_) => w.num_rows / 2,
        _ => w.num_rows,
    };
    let len = num_tokens * num_rows;
    let mut output: Vec<f32> = Vec::with_capacity(len);
    let groups = groups(num_tokens);
    let activations = prepare(isa, x, w, &groups);
    let plan = Plan {
        w,
        kernels: w.segments.iter().map(|segment| Kernels::new(isa, segment.format)).collect(),
        groups: &groups,
        activations: &activations,
        epilogue,
        output: SharedMut(output.as_mut_ptr()),
        num_rows,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::threads::ThreadPool;
    use candle_core::quantized::GgmlDType;

    use crate::ops::gguf_blocks::tests::Random;
    use crate::ops::row_format::tests::{all_formats, all_fp8_bytes, dequantized, random_rows};
    use crate::ops::silu_mul::SiluMul;

    fn random_x(num_tokens: usize, num_cols: usize) -> Vec<f32> {
        let mut random = Random::new(11);
        (0..num_tokens * num_cols).map(|_| random.float()).collect()
    }

    fn pack(format: RowFormat, num_rows: usize, num_cols: usize) -> (Vec<f32>, PackedMatrix) {
        let data = random_rows(format, (num_rows, num_cols), num_rows as u64);
        let weights = dequantized(format, &data, num_cols);
        let source = MatrixSource { format, data: &data, num_rows };
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
        for format in all_formats() {
            for (num_rows, num_blocks, num_tokens) in
                [(1, 1, 1), (15, 2, 3), (16, 3, 2), (17, 1, 4), (64, 4, 9), (37, 2, 23)]
            {
                let num_cols = num_blocks * format.block_len().max(32);
                let (weights, packed) = pack(format, num_rows, num_cols);
                let x = random_x(num_tokens, num_cols);
                let found = multiply(Isa::detect(), &x, &packed, Epilogue::Store);
                let limit = if packed_layout(format).is_some() { 5e-4 } else { 1e-11 };
                let error = error(&found, &x, &weights, num_cols);
                assert!(error < limit, "{format} {num_rows}x{num_cols}x{num_tokens}: {error:e}");
            }
        }
    }

    /// Goal: every number of eight bits counts for what it is, the smallest too. Method: each alone.
    #[test]
    fn every_float_of_eight_bits_is_exact() {
        let (num_rows, num_cols) = (3, 256);
        let data = all_fp8_bytes();
        let weights = dequantized(RowFormat::Fp8, &data, num_cols);
        let source = MatrixSource { format: RowFormat::Fp8, data: &data, num_rows };
        let packed = PackedMatrix::pack(&[source], num_cols).unwrap();
        for isa in Isa::available() {
            for column in 0..num_cols {
                let mut x = vec![0.0; num_cols];
                x[column] = 1.0;
                let found = multiply(isa, &x, &packed, Epilogue::Store);
                let expected: Vec<f32> = weights.chunks(num_cols).map(|row| row[column]).collect();
                assert_eq!(found, expected, "{isa:?} {column:#x}");
            }
        }
    }

    /// Goal: the instruction set does not change a bit. Method: all that are here, odd shapes, few
    /// and many tokens.
    #[test]
    fn instruction_sets_agree_bit_by_bit() {
        for format in all_formats() {
            let num_cols = 768;
            let (_, packed) = pack(format, 35, num_cols);
            for num_tokens in [1, 7, 31] {
                let x = random_x(num_tokens, num_cols);
                let expected = multiply(Isa::Portable, &x, &packed, Epilogue::Store);
                for isa in Isa::available() {
                    assert_eq!(
                        multiply(isa, &x, &packed, Epilogue::Store),
                        expected,
                        "{format} {isa:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_token_alone_and_in_a_batch_is_the_same_bits() {
        for format in all_formats() {
            for isa in Isa::available() {
                let num_cols = 768;
                let (_, packed) = pack(format, 40, num_cols);
                let x = random_x(29, num_cols);
                for num_tokens in [29, 13, 6] {
                    let batch =
                        multiply(isa, &x[..num_tokens * num_cols], &packed, Epilogue::Store);
                    for (x, row) in x.chunks_exact(num_cols).zip(batch.chunks_exact(40)) {
                        assert_eq!(
                            multiply(isa, x, &packed, Epilogue::Store),
                            row,
                            "{format} {isa:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn stacked_formats_and_threads_change_nothing() {
        let num_cols = 256;
        let shapes = [
            (GgmlDType::Q5_0.into(), 33),
            (GgmlDType::Q8_0.into(), 16),
            (RowFormat::Fp8, 19),
            (GgmlDType::Q6K.into(), 7),
            (GgmlDType::F16.into(), 20),
        ];
        let data: Vec<_> = shapes
            .iter()
            .map(|&(format, num_rows)| random_rows(format, (num_rows, num_cols), 1))
            .collect();
        let sources: Vec<_> = shapes
            .iter()
            .zip(&data)
            .map(|(&(format, num_rows), data)| MatrixSource { format, data, num_rows })
            .collect();
        let stacked = PackedMatrix::pack(&sources, num_cols).unwrap();
        assert_eq!((stacked.num_rows(), stacked.num_cols()), (95, num_cols));
        let mut random = Random::new(2);
        let bias: Vec<f32> = (0..95).map(|_| random.float()).collect();
        for num_tokens in [1, 5, 40] {
            let x = random_x(num_tokens, num_cols);
            let expected = multiply(Isa::detect(), &x, &stacked, Epilogue::AddBias(&bias));
            let mut first = 0;
            for source in sources.chunks(1) {
                let packed = PackedMatrix::pack(source, num_cols).unwrap();
                let alone = multiply(Isa::detect(), &x, &packed, Epilogue::Store);
                for (t, rows) in alone.chunks_exact(packed.num_rows()).enumerate() {
                    for (row, value) in rows.iter().enumerate() {
                        assert_eq!(expected[t * 95 + first + row], value + bias[first + row]);
                    }
                }
                first += packed.num_rows();
            }
            for num_threads in 1..5 {
                let pool = ThreadPool::new(num_threads);
                let packed = pool.install(|| PackedMatrix::pack(&sources, num_cols).unwrap());
                let found =
                    pool.install(|| multiply(Isa::detect(), &x, &packed, Epilogue::AddBias(&bias)));
                assert_eq!(found, expected);
            }
        }
    }

    /// Goal: fusing changes no bit. Method: gate and up of equal and of different formats, and of
    /// rows that fill no panel, beside the products alone and the formula applied to them.
    #[test]
    fn gated_products_are_the_products_gated() {
        let num_cols = 768;
        for (gate, up) in [
            (GgmlDType::Q5_0.into(), GgmlDType::Q5_0.into()),
            (GgmlDType::Q4K.into(), GgmlDType::Q6K.into()),
            (GgmlDType::Q8_0.into(), GgmlDType::F16.into()),
            (RowFormat::Fp8, RowFormat::Fp8),
        ] {
            for (num_rows, num_tokens) in [(32, 1), (40, 9), (23, 37), (7, 16)] {
                let rows = |(format, seed)| random_rows(format, (num_rows, num_cols), seed);
                let data = [(gate, 1), (up, 2)].map(rows);
                let source = |format, data| MatrixSource { format, data, num_rows };
                let sources = [source(gate, &data[0][..]), source(up, &data[1][..])];
                let packed = PackedMatrix::pack(&sources, num_cols).unwrap();
                let x = random_x(num_tokens, num_cols);
                let isa = Isa::detect();
                let products = multiply(isa, &x, &packed, Epilogue::Store);
                let mut expected = vec![0.0; num_tokens * num_rows];
                let rows = products.chunks(2 * num_rows).zip(expected.chunks_mut(num_rows));
                for (product, out) in rows {
                    let (gate, up) = product.split_at(num_rows);
                    FloatIsa::best().run(SiluMul { gate, up, out });
                }
                let found = multiply(isa, &x, &packed, Epilogue::SiluMul(FloatIsa::best()));
                assert_eq!(found, expected, "{gate} {up} {num_rows} {num_tokens}");
            }
        }
    }

    #[test]
    fn a_packed_matrix_is_about_as_large_as_its_file() {
        for format in all_formats() {
            let (num_rows, num_cols) = (64, 1024);
            let (_, packed) = pack(format, num_rows, num_cols);
            let file = format.row_bytes(num_cols).unwrap() * num_rows;
            let ratio = packed.num_bytes() as f64 / file as f64;
            assert!(ratio < 1.04, "{format}: {ratio}");
        }
    }

    #[test]
    fn tensors_in_and_out() {
        let (weights, packed) = pack(GgmlDType::F32.into(), 3, 4);
        let packed = Arc::new(packed);
        let x = CpuTensor::from_vec(random_x(2, 4), (2, 4), &candle_core::Device::Cpu).unwrap();
        let bias = CpuTensor::new(&[1f32, 2.0, 3.0], &candle_core::Device::Cpu).unwrap();
        let found = matmul_on_cpu(&x, &packed, Some(&bias)).unwrap();
        let w = CpuTensor::from_vec(weights, (3, 4), &candle_core::Device::Cpu).unwrap();
        let expected = x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        let difference = (found - expected).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-5);
        let none =
            CpuTensor::zeros((0, 4), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        assert_eq!(matmul_on_cpu(&none, &packed, None).unwrap().dims(), [0, 3]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let source = |dtype: GgmlDType, data, num_rows| {
            let format = dtype.into();
            MatrixSource { format, data, num_rows }
        };
        assert!(PackedMatrix::pack(&[source(GgmlDType::Q4_0, &[0; 36], 2)], 32).is_ok());
        assert!(PackedMatrix::pack(&[source(GgmlDType::Q4_0, &[0; 35], 2)], 32).is_err());
        assert!(PackedMatrix::pack(&[source(GgmlDType::Q4_0, &[0; 36], 1)], 33).is_err());
        assert!(PackedMatrix::pack(&[source(GgmlDType::Q4K, &[0; 144], 1)], 128).is_err());
        let packed = Arc::new(pack(GgmlDType::Q8_0.into(), 2, 32).1);
        let x =
            CpuTensor::zeros((1, 64), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        assert!(matmul_on_cpu(&x, &packed, None).is_err());
        let x =
            CpuTensor::zeros((1, 32), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        assert!(matmul_on_cpu(&x, &packed, Some(&x.flatten_all().unwrap())).is_err());
        assert!(gated_matmul_on_cpu(&x, &packed).is_err());
        let halves = x.to_dtype(candle_core::DType::F16).unwrap();
        assert!(matmul_on_cpu(&halves, &packed, None).is_err());
    }
}
