//! Every kernel against a loop in `f64` over the decoded weights and the rounded activations.

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use half::bf16;

use super::launch::Plan;
use super::layout::packed_format;
use super::{GpuMatrix, Output, Stacking, Weights};
use crate::device::gpu::Gpu;
use crate::ops::gguf_blocks::tests::Random;
use crate::ops::matmul::MatrixSource;
use crate::ops::row_format::RowFormat;
use crate::ops::row_format::tests::{all_fp8_bytes, dequantized, random_rows};
use crate::ops::tensor::GpuTensor;

const INTEGERS: [GgmlDType; 11] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q8_1,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];
const FLOATS: [GgmlDType; 3] = [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16];

/// What is multiplied in few bits.
fn packed_formats() -> impl Iterator<Item = RowFormat> {
    INTEGERS.into_iter().map(RowFormat::from).chain([RowFormat::Fp8])
}

/// A matrix, and what it holds.
struct Case {
    matrix: GpuMatrix,
    weights: Vec<f32>,
    num_rows: usize,
    num_cols: usize,
}

impl Case {
    fn new(gpu: &Gpu, format: impl Into<RowFormat>, num_rows: usize, num_cols: usize) -> Self {
        Self::stacked(gpu, &[(format.into(), num_rows)], num_cols, Stacking::Below)
    }

    fn stacked(
        gpu: &Gpu,
        parts: &[(RowFormat, usize)],
        num_cols: usize,
        stacking: Stacking,
    ) -> Self {
        let mut weights = Vec::new();
        let blocks: Vec<_> = parts
            .iter()
            .zip(1..)
            .map(|(&(format, num_rows), seed)| {
                let data = random_rows(format, (num_rows, num_cols), seed * 77);
                let mut values = dequantized(format, &data, num_cols);
                if format.gguf().is_some_and(|dtype| FLOATS.contains(&dtype)) {
                    values = rounded(values);
                }
                weights.extend(values);
                data
            })
            .collect();
        let sources: Vec<_> = parts
            .iter()
            .zip(&blocks)
            .map(|(&(format, num_rows), data)| MatrixSource { format, data, num_rows })
            .collect();
        let matrix = GpuMatrix::pack(gpu, &sources, num_cols, stacking).unwrap();
        let num_rows = parts.iter().map(|part| part.1).sum();
        Self { matrix, weights, num_rows, num_cols }
    }

    /// `x * w^T` and the root of the sum of the squares of its terms.
    fn expected(&self, x: &[f32]) -> Vec<(f64, f64)> {
        let mut expected = Vec::new();
        for x in x.chunks(self.num_cols) {
            for w in self.weights.chunks(self.num_cols) {
                let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                let sums = terms
                    .fold((0.0, 0.0), |(sum, squares), term| (sum + term, squares + term * term));
                expected.push((sums.0, sums.1.sqrt()));
            }
        }
        expected
    }

    /// One kernel's product in `f32`.
    fn run(&self, plan: Plan, x: &[f32]) -> Vec<f32> {
        let x = activations(&self.matrix.gpu, x, self.num_cols);
        let shape = (x.num_rows, self.num_rows);
        let y = GpuTensor::scratch(&self.matrix.gpu, DType::F32, shape).unwrap();
        for segment in &self.matrix.segments {
            segment.launch_as(plan, &self.matrix, &x, (None, &y), Output::F32).unwrap();
        }
        y.to_vec().unwrap()
    }

    fn check(&self, plan: Plan, num_tokens: usize, what: &str) {
        let x = random_x(num_tokens, self.num_cols);
        let found = self.run(plan, &x);
        assert_close(&found, &self.expected(&x), 1e-5, &format!("{what} {plan:?} {num_tokens}"));
    }
}

fn rounded(values: Vec<f32>) -> Vec<f32> {
    values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect()
}

fn random_x(num_tokens: usize, num_cols: usize) -> Vec<f32> {
    let mut random = Random::new(11);
    rounded((0..num_tokens * num_cols).map(|_| random.float()).collect())
}

fn activations(gpu: &Gpu, x: &[f32], num_cols: usize) -> GpuTensor {
    GpuTensor::from_slice(gpu, x, DType::BF16, (x.len() / num_cols, num_cols)).unwrap()
}

fn assert_close(found: &[f32], expected: &[(f64, f64)], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (&found, &(expected, size))) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= tolerance * size, "{what} at {i}: {found}, not {expected} (of {size})");
    }
}

const SMALL: [Plan; 7] = [
    Plan::Small { columns: 1, tiles: 1, num_warps: 8 },
    Plan::Small { columns: 1, tiles: 2, num_warps: 8 },
    Plan::Small { columns: 1, tiles: 4, num_warps: 8 },
    Plan::Small { columns: 8, tiles: 1, num_warps: 16 },
    Plan::Small { columns: 8, tiles: 2, num_warps: 16 },
    Plan::Small { columns: 16, tiles: 1, num_warps: 16 },
    Plan::Small { columns: 16, tiles: 2, num_warps: 8 },
];

fn num_tokens(plan: Plan) -> &'static [usize] {
    match plan {
        Plan::Small { columns: 1, .. } => &[1],
        Plan::Small { columns: 8, .. } => &[1, 7, 8],
        Plan::Small { .. } => &[2, 9, 16],
        Plan::Large { .. } => &[1, 17],
    }
}

/// Goal: every instance for few tokens multiplies every format exactly. Method: shapes at the edges
/// of tiles, and one with several steps of the ring for each warp.
#[test]
fn few_tokens() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for format in packed_formats().chain(FLOATS.map(RowFormat::from)) {
        let block_len = format.block_len().max(32);
        let case = Case::new(&gpu, format, 35, block_len * if block_len == 32 { 27 } else { 3 });
        for plan in SMALL {
            let four = matches!(plan, Plan::Small { tiles: 4, .. });
            if four && !case.matrix.segments[0].weights.has_four_tiles() {
                continue;
            }
            for &num_tokens in num_tokens(plan) {
                case.check(plan, num_tokens, &format.to_string());
            }
        }
    }
}

/// Goal: the same for many tokens, whole and with split columns.
#[test]
fn many_tokens() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for format in packed_formats().chain([GgmlDType::BF16.into()]) {
        let block_len = format.block_len().max(32);
        let case = Case::new(&gpu, format, 131, block_len * if block_len == 32 { 11 } else { 2 });
        for (tokens, split_tiles, num_tokens) in
            [(32, 2, 33), (64, 100, 61), (64, 3, 65), (128, 100, 131)]
        {
            case.check(Plan::Large { tokens, split_tiles }, num_tokens, &format.to_string());
        }
    }
}

/// Goal: every number of eight bits counts for what it is, the smallest too. Method: each alone, by
/// the kernels for few tokens and for many.
#[test]
fn every_float_of_eight_bits_is_exact() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let (num_rows, num_cols) = (3, 256);
    let data = all_fp8_bytes();
    let weights = dequantized(RowFormat::Fp8, &data, num_cols);
    let source = MatrixSource { format: RowFormat::Fp8, data: &data, num_rows };
    let matrix = GpuMatrix::pack(&gpu, &[source], num_cols, Stacking::Below).unwrap();
    let mut x = vec![0.0; num_cols * num_cols];
    x.iter_mut().step_by(num_cols + 1).for_each(|one| *one = 1.0);
    for num_tokens in [16, 256] {
        for (index, x) in x.chunks(num_tokens * num_cols).enumerate() {
            let x = activations(&gpu, x, num_cols);
            let found = matrix.matmul(&x, None, DType::F32).unwrap().to_vec().unwrap();
            for (token, found) in found.chunks(num_rows).enumerate() {
                let column = index * num_tokens + token;
                let expected: Vec<f32> = weights.chunks(num_cols).map(|row| row[column]).collect();
                assert_eq!(found, expected, "{column:#x}");
            }
        }
    }
}

/// Goal: no shape is special. Method: rows and tokens of 1, primes, and around tiles, through the
/// plan that the shape gets.
#[test]
fn odd_shapes() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for (format, num_cols) in [
        (GgmlDType::Q5_0.into(), 32),
        (GgmlDType::Q4_0.into(), 96),
        (GgmlDType::BF16.into(), 8),
        (RowFormat::Fp8, 136),
    ] {
        for num_rows in [1, 15, 16, 17, 127, 128, 129] {
            let case = Case::new(&gpu, format, num_rows, num_cols);
            for num_tokens in [1, 2, 15, 16, 17, 31, 32, 33] {
                let weights = case.matrix.segments[0].weights;
                let plan = Plan::new(weights, num_tokens, (num_rows, num_cols));
                case.check(plan, num_tokens, &format!("{format} {num_rows} x {num_cols}"));
            }
        }
    }
}

/// Goal: the widths of real models. Method: few rows, so that the emulation is quick.
#[test]
fn real_widths() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let num_rows = if gpu.is_emulated() { 40 } else { 9728 };
    for (dtype, num_cols) in [
        (GgmlDType::Q5_0, 896),
        (GgmlDType::Q8_0, 896),
        (GgmlDType::Q6K, 4864),
        (GgmlDType::Q4K, 4864),
    ] {
        let case = Case::new(&gpu, dtype, num_rows, num_cols);
        for num_tokens in [1, 5, 16, 40] {
            let weights = case.matrix.segments[0].weights;
            let plan = Plan::new(weights, num_tokens, (num_rows, num_cols));
            case.check(plan, num_tokens, &format!("{dtype:?}"));
        }
    }
}

/// Goal: one token's result is the same bits in every company. Method: 16 tokens at once, and each
/// one alone, through plans of any size of row groups.
#[test]
fn company_changes_nothing() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let in_gguf = [GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K, GgmlDType::BF16];
    for format in in_gguf.into_iter().map(RowFormat::from).chain([RowFormat::Fp8]) {
        let (num_rows, num_cols) = (37, 512);
        let case = Case::new(&gpu, format, num_rows, num_cols);
        let x = random_x(16, num_cols);
        let plan = |columns, tiles| Plan::Small { columns, tiles, num_warps: 8 };
        let together = case.run(plan(16, 2), &x);
        assert_eq!(case.run(plan(16, 1), &x), together, "{format}");
        let eight = case.run(plan(8, 1), &x[..8 * num_cols]);
        assert_eq!(eight, together[..8 * num_rows], "{format}");
        for token in [0, 3, 15] {
            let alone = case.run(plan(1, 2), &x[token * num_cols..(token + 1) * num_cols]);
            assert_eq!(alone, together[token * num_rows..(token + 1) * num_rows], "{format}");
        }
    }
}

/// Goal: stacked matrices of several formats, with biases, in `bf16` and in `f32`.
#[test]
fn stacks_with_biases() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let parts =
        [(GgmlDType::Q5_0, 20), (GgmlDType::Q5_0, 7), (GgmlDType::Q8_0, 9), (GgmlDType::F16, 3)];
    let parts = parts.map(|(dtype, num_rows)| (dtype.into(), num_rows));
    let case = Case::stacked(&gpu, &parts, 96, Stacking::Below);
    assert_eq!(case.matrix.segments.len(), 3);
    let bias: Vec<f32> = (0..39).map(|i| i as f32 * 0.01).collect();
    let on_card = GpuTensor::from_slice(&gpu, &bias, DType::F32, (1, 39)).unwrap();
    for num_tokens in [1, 3, 18] {
        let x = random_x(num_tokens, 96);
        let mut expected = case.expected(&x);
        for row in expected.chunks_mut(39) {
            for (y, bias) in row.iter_mut().zip(&bias) {
                *y = (y.0 + f64::from(*bias), y.1 + f64::from(*bias));
            }
        }
        let x = activations(&gpu, &x, 96);
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 1e-2)] {
            let found = case.matrix.matmul(&x, Some(&on_card), dtype).unwrap();
            assert_eq!(found.dtype, dtype);
            assert_close(&found.to_vec().unwrap(), &expected, tolerance, "with a bias");
        }
    }
}

/// Goal: the gated product, fused and, where gate and up have different formats, in two steps.
#[test]
fn gates() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for (gate, up) in [
        (GgmlDType::Q5_0.into(), GgmlDType::Q5_0.into()),
        (GgmlDType::BF16.into(), GgmlDType::BF16.into()),
        (GgmlDType::Q4_0.into(), GgmlDType::Q5_0.into()),
        (RowFormat::Fp8, RowFormat::Fp8),
    ] {
        for num_features in [8, 21] {
            let parts = [(gate, num_features), (up, num_features)];
            let case = Case::stacked(&gpu, &parts, 64, Stacking::Gated);
            for num_tokens in [1, 12, 20, 40] {
                let x = random_x(num_tokens, 64);
                let found = case.matrix.gated_matmul(&activations(&gpu, &x, 64)).unwrap();
                assert_eq!((found.num_rows, found.num_cols), (num_tokens, num_features));
                let expected: Vec<_> = case
                    .expected(&x)
                    .chunks(2 * num_features)
                    .flat_map(|row| {
                        let (gates, ups) = row.split_at(num_features);
                        gates.iter().zip(ups).map(|(gate, up)| {
                            let silu = |x: f64| x / (1.0 + (-x).exp());
                            let size = (gate.1 + gate.0.abs()) * (up.1 + up.0.abs());
                            (silu(gate.0) * up.0, size)
                        })
                    })
                    .collect();
                let what = format!("{gate} {up} {num_features} {num_tokens}");
                assert_close(&found.to_vec().unwrap(), &expected, 1e-2, &what);
            }
        }
    }
}

/// Goal: the plans for real shapes on a large card.
#[test]
fn plans() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let weights = Case::new(&gpu, GgmlDType::Q4_0, 1, 32).matrix.segments[0].weights;
    let plan = |num_tokens, shape| Plan::new(weights, num_tokens, shape);
    let (qkv, up, down) = ((4608, 3584), (37888, 3584), (3584, 18944));
    assert_eq!(plan(1, (896, 896)), Plan::Small { columns: 1, tiles: 1, num_warps: 16 });
    assert_eq!(plan(1, down), Plan::Small { columns: 1, tiles: 2, num_warps: 16 });
    assert_eq!(plan(1, up), Plan::Small { columns: 1, tiles: 4, num_warps: 8 });
    assert_eq!(plan(4, up), Plan::Small { columns: 8, tiles: 2, num_warps: 8 });
    assert_eq!(plan(1, qkv), Plan::Small { columns: 1, tiles: 2, num_warps: 8 });
    assert_eq!(plan(16, down), Plan::Small { columns: 16, tiles: 1, num_warps: 16 });
    assert_eq!(plan(16, up), Plan::Small { columns: 16, tiles: 2, num_warps: 8 });
    assert_eq!(plan(17, qkv), Plan::Large { tokens: 32, split_tiles: 8 });
    assert_eq!(plan(64, down), Plan::Large { tokens: 64, split_tiles: 74 });
    assert_eq!(plan(64, up), Plan::Large { tokens: 64, split_tiles: 56 });
    assert_eq!(plan(512, down), Plan::Large { tokens: 64, split_tiles: 296 });
    assert_eq!(plan(4096, qkv), Plan::Large { tokens: 128, split_tiles: 56 });
}

/// Goal: no plan asks for more shared memory than the smallest card has that is served, an A100.
#[test]
fn plans_fit_into_shared_memory() {
    let formats = packed_formats().filter_map(packed_format).map(Weights::Packed);
    for weights in formats.chain([Weights::Dense { row_stride: 8 }]) {
        for num_tokens in 1..200 {
            for num_rows in (16..70_000).step_by(1000) {
                let num_bytes = match Plan::new(weights, num_tokens, (num_rows, 4096)) {
                    Plan::Small { columns, tiles, num_warps } => {
                        num_warps * weights.warp_bytes((columns, tiles), num_tokens)
                    }
                    Plan::Large { tokens, .. } => weights.block_bytes(tokens),
                };
                assert!(
                    num_bytes <= 163 << 10,
                    "{num_bytes}: {num_rows} rows, {num_tokens} tokens"
                );
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let pack = |dtype: GgmlDType, data: &[u8], num_cols| {
        let source = MatrixSource { format: dtype.into(), data, num_rows: 1 };
        GpuMatrix::pack(&gpu, &[source], num_cols, Stacking::Below)
    };
    assert!(pack(GgmlDType::Q4_0, &[0; 18], 64).is_err());
    assert!(pack(GgmlDType::Q8K, &[0; 292], 256).is_err());
    assert!(pack(GgmlDType::BF16, &[0; 14], 7).is_err());
    let matrix = pack(GgmlDType::Q4_0, &[0; 18], 32).unwrap();
    let x = |dtype, num_cols| GpuTensor::scratch(&gpu, dtype, (1, num_cols)).unwrap();
    assert!(matrix.matmul(&x(DType::BF16, 64), None, DType::BF16).is_err());
    assert!(matrix.matmul(&x(DType::F32, 32), None, DType::BF16).is_err());
    assert!(matrix.matmul(&x(DType::BF16, 32), None, DType::F16).is_err());
    assert!(matrix.gated_matmul(&x(DType::BF16, 32)).is_err());
    let bias = x(DType::F32, 2);
    assert!(matrix.matmul(&x(DType::BF16, 32), Some(&bias), DType::BF16).is_err());
}
