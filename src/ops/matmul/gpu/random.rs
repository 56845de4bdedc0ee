//! Random weights made on the card: `kernels/dummy/fill_random.cu`.
//!
//! A few rows are made and packed as those of a file are; the card repeats their scales and turns
//! the bits of their integers at random. So 40 GB take no longer than writing them.

use candle_core::Result;

use super::layout::Scales;
use super::{GATED_ROWS, TILE_COLS, TILE_ROWS};
use super::{GpuMatrix, Interleaving, Segment, Stacking, Weights};
use crate::device::gpu::{Arg, DeviceBuffer, Gpu, Kernel, LaunchConfig};
use crate::ops::matmul::{MatrixSource, RandomSource};
use crate::ops::random_rows::random_rows;

/// The bytes of a `uint4`.
const UNIT: usize = 16;
const NUM_THREADS: u32 = 256;
const BLOCKS_PER_MULTIPROCESSOR: usize = 16;

impl GpuMatrix {
    /// Makes matrices of random weights on the card, side by side; all like the first one.
    ///
    /// # Errors
    /// As [`GpuMatrix::pack`].
    pub fn random_each(
        gpu: &Gpu,
        matrices: &[Vec<RandomSource>],
        num_cols: usize,
        stacking: Stacking,
    ) -> Result<Vec<Self>> {
        let Some(sources) = matrices.first() else { return Ok(Vec::new()) };
        let rows = sources
            .iter()
            .map(|source| random_rows(source.format, (TILE_ROWS, num_cols), source.seed))
            .collect::<Result<Vec<_>>>()?;
        let samples: Vec<_> = sources
            .iter()
            .zip(&rows)
            .map(|(source, data)| MatrixSource { format: source.format, data, num_rows: TILE_ROWS })
            .collect();
        let sample = Self::pack(gpu, &samples, num_cols, stacking)?;
        let mut num_rows = 0;
        let mut segments = Vec::new();
        for segment in &sample.segments {
            let first = segment.first_row / TILE_ROWS;
            let sources = &sources[first..first + segment.num_rows / TILE_ROWS];
            let first_row = num_rows;
            let own_rows: usize = sources.iter().map(|source| source.num_rows).sum();
            let num_row_tiles = match segment.layout {
                Interleaving::Plain => own_rows.div_ceil(TILE_ROWS),
                Interleaving::Gated => (own_rows / 2).div_ceil(GATED_ROWS),
            };
            let shape = (num_row_tiles * matrices.len(), num_cols);
            let all = segment.filled(gpu, shape, sources[0].seed)?;
            segments.push((segment, all, first_row, own_rows));
            num_rows += own_rows;
        }
        let matrix = |index: usize| {
            let place = |(segment, all, first_row, num_rows): &(&Segment, DeviceBuffer, _, _)| {
                let num_bytes = all.len() / matrices.len();
                let buffer = all.slice(index * num_bytes..(index + 1) * num_bytes);
                let Segment { weights, layout, .. } = **segment;
                let (first_row, num_rows) = (*first_row, *num_rows);
                Segment { weights, first_row, num_rows, buffer, all: all.clone(), layout }
            };
            let (gpu, counters) = (gpu.clone(), sample.counters.clone());
            let segments = segments.iter().map(place).collect();
            Self { gpu, segments, stacking, num_rows, num_cols, counters }
        };
        Ok((0..matrices.len()).map(matrix).collect())
    }
}

impl Segment {
    /// Memory for so many row tiles, filled after the first one of this segment.
    fn filled(
        &self,
        gpu: &Gpu,
        (num_row_tiles, num_cols): (usize, usize),
        seed: u64,
    ) -> Result<DeviceBuffer> {
        let num_tiles = num_cols.div_ceil(TILE_COLS);
        let row_tile_bytes = self.weights.row_tile_bytes(num_cols);
        let (tile_bytes, integer_bytes, mask) = match self.weights {
            Weights::Packed(format) => {
                // Sign and mantissa of floats of eight bits: no exponent makes one that is no number.
                let mask = if format.scales == Scales::Single { 0x8787_8787 } else { u32::MAX };
                (format.tile_bytes(), format.integer_bytes(), mask)
            }
            Weights::Dense { .. } => (row_tile_bytes, row_tile_bytes, 0x807f_807f),
        };
        let tiles_bytes = match self.weights {
            Weights::Packed(_) => num_tiles * tile_bytes,
            Weights::Dense { .. } => tile_bytes,
        };
        let buffer = gpu.alloc(num_row_tiles * row_tile_bytes)?;
        let num_units = buffer.len() / UNIT;
        let args = [
            Arg::Buffer(&self.buffer),
            Arg::Buffer(&buffer),
            Arg::I64(num_units as i64),
            Arg::U32((row_tile_bytes / UNIT) as u32),
            Arg::U32((tiles_bytes / UNIT) as u32),
            Arg::U32((tile_bytes / UNIT) as u32),
            Arg::U32((integer_bytes / UNIT) as u32),
            Arg::U32(mask),
            Arg::U32(seed as u32 & 0x00ff_ffff),
        ];
        let wanted = num_units.div_ceil(NUM_THREADS as usize);
        let num_blocks = wanted.min(gpu.num_multiprocessors() * BLOCKS_PER_MULTIPROCESSOR);
        let kernel = Kernel { module: "fill_random", function: "fill_random" };
        gpu.launch(kernel, LaunchConfig::linear(num_blocks, NUM_THREADS), &args)?;
        Ok(buffer)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use candle_core::quantized::GgmlDType;

    use super::*;
    use crate::ops::gguf_blocks::tests::Random;
    use crate::ops::row_format::RowFormat;
    use crate::ops::tensor::GpuTensor;

    fn random_one(
        gpu: &Gpu,
        sources: &[RandomSource],
        num_cols: usize,
        stacking: Stacking,
    ) -> GpuMatrix {
        GpuMatrix::random_each(gpu, &[sources.to_vec()], num_cols, stacking).unwrap().remove(0)
    }

    /// Goal: random weights are as large as they should be, and rows differ. Method: the products
    /// with random activations have the activations' spread, and equal no other's.
    #[test]
    fn products_with_random_weights_are_as_large_as_their_input() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let num_cols = if gpu.is_emulated() { 256 } else { 8192 };
        let mut random = Random::new(3);
        let spread = 3.0_f32.sqrt();
        let x: Vec<f32> = (0..num_cols).map(|_| random.float() * spread).collect();
        let x = GpuTensor::from_slice(&gpu, &x, DType::BF16, (1, num_cols)).unwrap();
        let in_gguf = [
            GgmlDType::BF16,
            GgmlDType::F16,
            GgmlDType::Q8_0,
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q2K,
            GgmlDType::Q3K,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
            GgmlDType::Q6K,
        ];
        for format in in_gguf.into_iter().map(RowFormat::from).chain([RowFormat::Fp8]) {
            let source = |num_rows, seed| RandomSource { format, num_rows, seed };
            let sources = [source(160, 1), source(48, 2), source(16, 3)];
            let matrix = random_one(&gpu, &sources, num_cols, Stacking::Below);
            assert_eq!(matrix.num_rows(), 224);
            let y = matrix.matmul(&x, None, DType::F32).unwrap();
            let y = y.to_vec().unwrap();
            let square = y.iter().map(|y| y * y).sum::<f32>() / y.len() as f32;
            assert!((0.15..1.7).contains(&square), "{format}: {square}");
            let mut sorted = y.clone();
            sorted.sort_by(f32::total_cmp);
            let num_equal = sorted.windows(2).filter(|pair| pair[0] == pair[1]).count();
            assert!(num_equal < 4, "{format}: {num_equal} of {} products are equal", y.len());
        }
    }

    /// Goal: gates and ups of random weights multiply. Method: an activation of ones.
    #[test]
    fn random_gates_multiply() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let x = GpuTensor::from_slice(&gpu, &[1.0; 256], DType::BF16, (1, 256)).unwrap();
        let source = |seed| RandomSource { format: GgmlDType::Q4K.into(), num_rows: 72, seed };
        let sources = [source(1), source(2)];
        let matrix = random_one(&gpu, &sources, 256, Stacking::Gated);
        let y = matrix.gated_matmul(&x).unwrap().to_vec().unwrap();
        assert_eq!(y.len(), 72);
        assert!(y.iter().all(|y| y.is_finite()) && y.iter().any(|y| y.abs() > 0.01));
    }
}
