//! The gated activation of SwiGLU: `silu(gate) * up`, with `silu(x) = x / (1 + e^-x)`.
//!
//! Mostly it needs no pass of its own: [`super::matmul::gated_matmul`] applies it to sums that are not
//! in memory yet. [`gate`] is for sums to which something is added first.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

use candle_core::{DType, Result, Storage, bail};

use super::grid::over_rows;
use super::operand::contiguous;
use super::rows::for_each_row_mut;
use super::simd::{Isa, Kernel, LANES, Simd, load_padded, store_clipped};
use super::tensor::{GpuTensor, Tensor};
use crate::device::{Device, gpu};

/// Values that a thread computes, where rows are multiples of it.
const PACK: usize = 8;
/// The same of `f32`.
const F32_PACK: usize = 4;

/// Where gates and ups stand in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUpOrder {
    /// All gates, then all ups.
    Halves,
    /// Eight gates, then the ups of the same features, and so on.
    ByEight,
}

/// The activation of what [`super::matmul::gates_and_ups`] gives; the same bits as
/// [`super::matmul::gated_matmul`] gives.
///
/// # Errors
/// If the rows are not of pairs in this order.
pub fn gate(gate_up: &Tensor, order: GateUpOrder) -> Result<Tensor> {
    match gate_up {
        Tensor::Cpu(gate_up) => gate_on_cpu(gate_up, order),
        Tensor::Gpu(gate_up) => silu_mul(gate_up, order).map(Tensor::Gpu),
    }
}

fn gate_on_cpu(gate_up: &candle_core::Tensor, order: GateUpOrder) -> Result<Tensor> {
    let (num_rows, num_cols) = gate_up.dims2()?;
    if !num_cols.is_multiple_of(2) || order != GateUpOrder::Halves {
        bail!("gates and ups are rows of {num_cols} values by {order:?}, not of two halves");
    }
    let (storage, layout) = gate_up.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { unreachable!("it is the processor's") };
    let values = contiguous::<f32>("gates and ups", storage, layout)?;
    let width = num_cols / 2;
    let mut gated = vec![0.0; num_rows * width];
    for_each_row_mut(&mut gated, width, |row, out| {
        let (gate, up) = values[row * num_cols..(row + 1) * num_cols].split_at(width);
        Isa::best().run(SiluMul { gate, up, out });
    });
    Tensor::from_vec(gated, (num_rows, width), &Device::Cpu)
}

/// The activation on a card: `kernels/mlp/silu_mul.cu`.
///
/// # Errors
/// If the rows do not consist of such pairs, there is no kernel for them, or no memory.
pub fn silu_mul(gate_up: &GpuTensor, order: GateUpOrder) -> Result<GpuTensor> {
    let GpuTensor { gpu, buffer, dtype, num_rows, num_cols } = gate_up;
    let num_pairs = num_cols / 2;
    let (function, pack) = match (dtype, order, num_pairs.is_multiple_of(PACK)) {
        _ if !num_cols.is_multiple_of(2) => {
            bail!("gates and ups are rows of {num_cols} values, not of pairs")
        }
        (DType::BF16, GateUpOrder::Halves, true) => ("silu_mul_8", PACK),
        (DType::BF16, GateUpOrder::Halves, false) => ("silu_mul_1", 1),
        (DType::BF16, GateUpOrder::ByEight, true) => ("silu_mul_by_8", PACK),
        (DType::F32, GateUpOrder::ByEight, true) => ("silu_mul_f32_by_8", F32_PACK),
        _ => bail!("there is no kernel for {num_pairs} gates and ups of {dtype:?} by {order:?}"),
    };
    let out = GpuTensor::scratch(gpu, DType::BF16, (*num_rows, num_pairs))?;
    let args = [
        gpu::Arg::Buffer(buffer),
        gpu::Arg::Buffer(&out.buffer),
        gpu::Arg::I32(*num_rows as i32),
        gpu::Arg::I32(num_pairs as i32),
    ];
    let kernel = gpu::Kernel { module: "silu_mul", function };
    gpu.launch(kernel, over_rows(*num_rows, num_pairs / pack), &args)?;
    Ok(out)
}

/// Element by element; all three of one length.
pub(super) struct SiluMul<'a> {
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let inputs = self.gate.chunks(LANES).zip(self.up.chunks(LANES));
        for ((gate, up), out) in inputs.zip(self.out.chunks_mut(LANES)) {
            let (gate, up) = (load_padded(simd, gate), load_padded(simd, up));
            let negated = simd.sub(simd.splat(0.0), gate);
            let silu = simd.div(gate, simd.add(simd.splat(1.0), simd.exp(negated)));
            store_clipped(simd, out, simd.mul(silu, up));
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;

    use super::*;
    use crate::device::gpu::Gpu;
    use crate::ops::gguf_blocks::tests::random_blocks;
    use crate::ops::matmul::{MatrixSource, Stacking, Weights, gated_matmul, gates_and_ups};
    use crate::ops::simd::Isa;

    fn silu_mul_on_cpu(isa: Isa, gate: &[f32], up: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; gate.len()];
        isa.run(SiluMul { gate, up, out: &mut out });
        out
    }

    #[test]
    fn matches_the_formula_in_f64() {
        for isa in Isa::available() {
            for len in [1, 24, 4864] {
                let value = |i: usize| ((i * 7919) % 4001) as f32 * 0.02 - 40.0;
                let gate: Vec<f32> = (0..len).map(value).collect();
                let up: Vec<f32> = (len..2 * len).map(value).collect();
                for (i, out) in silu_mul_on_cpu(isa, &gate, &up).into_iter().enumerate() {
                    let (gate, up) = (f64::from(gate[i]), f64::from(up[i]));
                    let expected = gate / (1.0 + (-gate).exp()) * up;
                    let error = (expected - f64::from(out)).abs();
                    assert!(error <= 5e-7 * expected.abs(), "{isa:?}: {out}, not {expected}");
                }
            }
        }
    }

    #[test]
    fn extreme_gates_stay_finite_and_nan_stays_nan() {
        let gates = [-1e30, -100.0, 0.0, 100.0, 1e30, f32::NAN];
        for isa in Isa::available() {
            let out = silu_mul_on_cpu(isa, &gates, &[1.0; 6]);
            assert!(out[0].abs() < 1e-7 && out[1].abs() < 1e-35, "{isa:?}: {out:?}");
            assert_eq!(out[2..5], [0.0, 100.0, 1e30], "{isa:?}");
            assert!(out[5].is_nan(), "{isa:?}");
        }
    }

    #[test]
    fn a_card_matches_the_formula_in_f64() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let extremes = [-1e30, -100.0, -88.5, -0.0, 0.0, 89.0, 100.0, 1e30];
        for (num_rows, len) in [(1, 4864), (3, 18_944), (2, 37), (5, 8), (7, 1), (0, 64)] {
            let value = |i: usize| match i % 97 {
                n @ 0..8 => extremes[n],
                _ => ((i * 7919) % 4001) as f32 * 0.02 - 40.0,
            };
            let values: Vec<f32> = (0..num_rows * 2 * len).map(value).collect();
            let shape = (num_rows, 2 * len);
            let x = GpuTensor::from_slice(&gpu, &values, DType::BF16, shape).unwrap();
            let rounded = x.to_vec().unwrap();
            let found = silu_mul(&x, GateUpOrder::Halves).unwrap().to_vec().unwrap();
            for (row, found) in rounded.chunks(2 * len).zip(found.chunks(len)) {
                for ((&gate, &up), &found) in row[..len].iter().zip(&row[len..]).zip(found) {
                    let (gate, up, found) = (f64::from(gate), f64::from(up), f64::from(found));
                    let expected = gate / (1.0 + (-gate).exp()) * up;
                    // Half a unit of bf16; no smaller than what exponentials can be told apart.
                    let is_close = (found - expected).abs() <= 0.004 * expected.abs() + 1e-30;
                    assert!(is_close, "{num_rows} x {len}: {found}, not {expected}");
                }
            }
        }
        let odd = GpuTensor::from_slice(&gpu, &[1.0; 3], DType::BF16, (1, 3)).unwrap();
        assert!(silu_mul(&odd, GateUpOrder::Halves).is_err());
    }

    #[test]
    fn gates_and_ups_by_eight_give_what_halves_give() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let (num_rows, len) = (3, 40);
        let halves: Vec<f32> = (0..num_rows * 2 * len).map(|i| (i as f32 * 0.37).sin()).collect();
        let by_eight: Vec<f32> = halves
            .chunks(2 * len)
            .flat_map(|row| row[..len].chunks(8).zip(row[len..].chunks(8)))
            .flat_map(|(gates, ups)| [gates, ups].concat())
            .collect();
        let run = |values: &[f32], order| {
            let shape = (num_rows, 2 * len);
            let x = GpuTensor::from_slice(&gpu, values, DType::BF16, shape).unwrap();
            silu_mul(&x, order).unwrap().to_vec().unwrap()
        };
        assert_eq!(run(&by_eight, GateUpOrder::ByEight), run(&halves, GateUpOrder::Halves));
    }

    /// Goal: of a batch in which some tokens have adapters the others notice nothing. Method: products
    /// that gate at once, and sums that are gated afterwards, of all kernels and formats.
    #[test]
    fn a_card_gates_sums_to_the_bits_of_gated_products() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let (num_inputs, len) = (256, 40);
        let rows = |dtype, seed| random_blocks(dtype, len * num_inputs, seed);
        for (gate_dtype, up_dtype) in [
            (GgmlDType::Q4_0, GgmlDType::Q4_0),
            (GgmlDType::Q6K, GgmlDType::Q6K),
            (GgmlDType::BF16, GgmlDType::BF16),
            (GgmlDType::Q8_0, GgmlDType::Q4K),
        ] {
            let (gates, ups) = (rows(gate_dtype, 1), rows(up_dtype, 2));
            let source =
                |dtype: GgmlDType, data| MatrixSource { format: dtype.into(), data, num_rows: len };
            let sources = [source(gate_dtype, &gates), source(up_dtype, &ups)];
            let device = Device::Gpu(gpu.clone());
            let weights = Weights::pack(&sources, num_inputs, Stacking::Gated, &device).unwrap();
            for num_tokens in [1, 7, 16, 40, 70] {
                let x: Vec<f32> =
                    (0..num_tokens * num_inputs).map(|i| (i as f32 * 0.37).sin() * 0.1).collect();
                let shape = (num_tokens, num_inputs);
                let x = GpuTensor::from_slice(&gpu, &x, DType::BF16, shape).unwrap();
                let x = Tensor::Gpu(x);
                let expected = gated_matmul(&x, &weights).unwrap().to_vec().unwrap();
                let (sums, order) = gates_and_ups(&x, &weights).unwrap();
                let found = super::gate(&sums, order).unwrap().to_vec().unwrap();
                assert_eq!(found, expected, "{gate_dtype:?} {up_dtype:?} of {num_tokens} tokens");
            }
        }
    }
}
