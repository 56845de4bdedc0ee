//! Root-mean-square norm: `x / sqrt(mean(x^2) + eps) * weight`, per row.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

mod gpu;

use candle_core::Tensor as CpuTensor;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, bail};

use super::operand::contiguous;
use super::rows::for_each_row_mut;
use super::simd::{Isa, Kernel, LANES, Simd, load_padded, store_clipped};
use super::tensor::Tensor;

/// Normalises each row of `x` `[num_tokens, hidden_size]` and scales it by `weight`, a row of
/// `hidden_size`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    match x {
        Tensor::Cpu(x) => rms_norm_on_cpu(x, weight.cpu()?, eps).map(Tensor::Cpu),
        Tensor::Gpu(x) => gpu::rms_norm(x, weight.gpu()?, eps).map(Tensor::Gpu),
    }
}

/// The sum `x + residual` and its norm, both `[num_tokens, hidden_size]`.
pub fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    match x {
        Tensor::Cpu(x) => {
            let (sum, normed) = add_rms_norm_on_cpu(x, residual.cpu()?, weight.cpu()?, eps)?;
            Ok((Tensor::Cpu(sum), Tensor::Cpu(normed)))
        }
        Tensor::Gpu(x) => {
            let (sum, normed) = gpu::add_rms_norm(x, residual.gpu()?, weight.gpu()?, eps)?;
            Ok((Tensor::Gpu(sum), Tensor::Gpu(normed)))
        }
    }
}

fn rms_norm_on_cpu(x: &CpuTensor, weight: &CpuTensor, eps: f32) -> Result<CpuTensor> {
    x.apply_op2_no_bwd(weight, &RmsNorm { eps, isa: Isa::best() })
}

fn add_rms_norm_on_cpu(
    x: &CpuTensor,
    residual: &CpuTensor,
    weight: &CpuTensor,
    eps: f32,
) -> Result<(CpuTensor, CpuTensor)> {
    let op = AddRmsNorm { eps, isa: Isa::best() };
    // [2, num_tokens, hidden_size]
    let both = x.apply_op3_no_bwd(residual, weight, &op)?;
    Ok((both.get(0)?, both.get(1)?))
}

struct RmsNorm {
    eps: f32,
    isa: Isa,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let hidden_size = hidden_size(x_layout, weight_layout)?;
        let x = contiguous::<f32>("x", x, x_layout)?;
        let weight = contiguous::<f32>("weight", weight, weight_layout)?;
        let mut out = vec![0.0; x.len()];
        for_each_row_mut(&mut out, hidden_size, |index, out| {
            let row = &x[index * hidden_size..][..hidden_size];
            self.isa.run(NormRow { x: row, weight, eps: self.eps, out });
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

struct AddRmsNorm {
    eps: f32,
    isa: Isa,
}

impl CustomOp3 for AddRmsNorm {
    fn name(&self) -> &'static str {
        "add_rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let hidden_size = hidden_size(x_layout, weight_layout)?;
        if x_layout.shape() != residual_layout.shape() {
            bail!("x is {:?}, residual {:?}", x_layout.shape(), residual_layout.shape());
        }
        let x = contiguous::<f32>("x", x, x_layout)?;
        let residual = contiguous::<f32>("residual", residual, residual_layout)?;
        let weight = contiguous::<f32>("weight", weight, weight_layout)?;
        let mut out = vec![0.0; 2 * x.len()];
        let (sums, normed) = out.split_at_mut(x.len());
        for_each_row_mut(sums, hidden_size, |index, sums| {
            let rows = index * hidden_size..(index + 1) * hidden_size;
            for ((sum, x), residual) in sums.iter_mut().zip(&x[rows.clone()]).zip(&residual[rows]) {
                *sum = x + residual;
            }
        });
        let sums = &*sums;
        for_each_row_mut(normed, hidden_size, |index, out| {
            let row = &sums[index * hidden_size..][..hidden_size];
            self.isa.run(NormRow { x: row, weight, eps: self.eps, out });
        });
        let (num_tokens, hidden_size) = x_layout.shape().dims2()?;
        Ok((CpuStorage::F32(out), (2, num_tokens, hidden_size).into()))
    }
}

fn hidden_size(x: &Layout, weight: &Layout) -> Result<usize> {
    let (_, hidden_size) = x.shape().dims2()?;
    if hidden_size == 0 || weight.shape().elem_count() != hidden_size {
        bail!("rows of {hidden_size} values, weight {:?}", weight.shape());
    }
    Ok(hidden_size)
}

/// One row; all three of one length.
pub(super) struct NormRow<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut squares = simd.splat(0.0);
        for x in self.x.chunks(LANES) {
            let x = load_padded(simd, x);
            squares = simd.mul_add(x, x, squares);
        }
        let mean = simd.sum_of_lanes(squares) / self.x.len() as f32;
        let scale = simd.splat((mean + self.eps).sqrt().recip());
        let rows = self.x.chunks(LANES).zip(self.weight.chunks(LANES));
        for ((x, weight), out) in rows.zip(self.out.chunks_mut(LANES)) {
            let normed = simd.mul(load_padded(simd, x), scale);
            store_clipped(simd, out, simd.mul(normed, load_padded(simd, weight)));
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn wave(len: usize, seed: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.37 + seed).sin() * 3.0).collect()
    }

    fn norm_f64(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let scale = (squares / x.len() as f64 + f64::from(eps)).sqrt().recip();
        x.iter().zip(weight).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)).collect()
    }

    #[test]
    fn matches_the_formula_in_f64() {
        for isa in Isa::available() {
            for (num_tokens, hidden) in [(1, 8), (3, 17), (40, 896), (2, 5120)] {
                let (x, weight) = (wave(num_tokens * hidden, 0.0), wave(hidden, 1.0));
                let input = CpuTensor::from_slice(&x, (num_tokens, hidden), &Device::Cpu).unwrap();
                let w = CpuTensor::from_slice(&weight, hidden, &Device::Cpu).unwrap();
                let out = input.apply_op2_no_bwd(&w, &RmsNorm { eps: 1e-6, isa }).unwrap();
                for (x, out) in x.chunks(hidden).zip(out.to_vec2::<f32>().unwrap()) {
                    for (expected, out) in norm_f64(x, &weight, 1e-6).into_iter().zip(out) {
                        let error = (expected - f64::from(out)).abs();
                        assert!(error <= 4e-7 * expected.abs(), "{isa:?}: {out}, not {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn adding_first_equals_adding_apart_and_rows_do_not_depend_on_the_batch() {
        let (num_tokens, hidden) = (300, 100);
        let tensor = |seed| {
            let data = wave(num_tokens * hidden, seed);
            CpuTensor::from_vec(data, (num_tokens, hidden), &Device::Cpu).unwrap()
        };
        let (x, residual) = (tensor(0.0), tensor(2.0));
        let weight = CpuTensor::from_vec(wave(hidden, 1.0), hidden, &Device::Cpu).unwrap();
        let (sum, normed) = add_rms_norm_on_cpu(&x, &residual, &weight, 1e-6).unwrap();
        let apart = (&x + &residual).unwrap();
        assert_eq!(sum.to_vec2::<f32>().unwrap(), apart.to_vec2::<f32>().unwrap());
        for row in [0, 1, 299] {
            // A narrowed tensor starts inside its storage.
            let alone = rms_norm_on_cpu(&sum.narrow(0, row, 1).unwrap(), &weight, 1e-6).unwrap();
            let in_batch = normed.narrow(0, row, 1).unwrap();
            assert_eq!(alone.to_vec2::<f32>().unwrap(), in_batch.to_vec2::<f32>().unwrap());
        }
    }

    #[test]
    fn wrong_shapes_and_types_are_errors() {
        let zeros = |rows: usize, columns: usize| {
            CpuTensor::from_vec(vec![0.0_f32; rows * columns], (rows, columns), &Device::Cpu)
                .unwrap()
        };
        let weight = CpuTensor::from_vec(vec![1.0_f32; 8], 8, &Device::Cpu).unwrap();
        assert!(rms_norm_on_cpu(&zeros(2, 9), &weight, 1e-6).is_err());
        assert!(rms_norm_on_cpu(&weight, &weight, 1e-6).is_err());
        assert!(rms_norm_on_cpu(&zeros(8, 8).t().unwrap(), &weight, 1e-6).is_err());
        assert!(add_rms_norm_on_cpu(&zeros(2, 8), &zeros(1, 8), &weight, 1e-6).is_err());
        let half = zeros(2, 8).to_dtype(candle_core::DType::F16).unwrap();
        assert!(rms_norm_on_cpu(&half, &weight, 1e-6).is_err());
        assert_eq!(rms_norm_on_cpu(&zeros(0, 8), &weight, 1e-6).unwrap().dims(), [0, 8]);
    }
}
