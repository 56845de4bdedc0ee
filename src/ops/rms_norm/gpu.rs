//! The norm on a card: `kernels/norm/rms_norm.cu`.

use candle_core::{DType, Result, bail};

use crate::device::gpu::{Arg, Kernel, LaunchConfig};
use crate::ops::tensor::GpuTensor;

/// Values that a thread loads at once.
const PACK: usize = 8;
const MAX_THREADS: usize = 1024;

/// Functions for rows of up to 1, 2 and 4 packs a thread, and for rows of any length.
struct Variants([&'static str; 4]);

const RMS_NORM: Variants = Variants(["rms_norm_1", "rms_norm_2", "rms_norm_4", "rms_norm_any"]);
const ADD_RMS_NORM: Variants =
    Variants(["add_rms_norm_1", "add_rms_norm_2", "add_rms_norm_4", "add_rms_norm_any"]);

impl Variants {
    /// The kernel for rows of `num_cols` values, and how many threads a row takes.
    fn choose(&self, num_cols: usize) -> (Kernel, usize) {
        let packs_per_thread = num_cols.div_ceil(PACK * MAX_THREADS).next_power_of_two();
        let is_packed = num_cols.is_multiple_of(PACK) && packs_per_thread <= 4;
        let (index, values_per_thread) = if is_packed {
            (packs_per_thread.ilog2() as usize, packs_per_thread * PACK)
        } else {
            (3, 1)
        };
        let num_threads = num_cols.div_ceil(values_per_thread).next_multiple_of(32);
        let kernel = Kernel { module: "rms_norm", function: self.0[index] };
        (kernel, num_threads.min(MAX_THREADS))
    }
}

pub(super) fn rms_norm(x: &GpuTensor, weight: &GpuTensor, eps: f32) -> Result<GpuTensor> {
    check("x", x, DType::F32, x)?;
    check_weight(x, weight)?;
    let shape @ (num_rows, num_cols) = (x.num_rows, x.num_cols);
    let out = GpuTensor::scratch(&x.gpu, DType::BF16, shape)?;
    let (kernel, num_threads) = RMS_NORM.choose(num_cols);
    let args = [
        Arg::Buffer(&x.buffer),
        Arg::Buffer(&weight.buffer),
        Arg::Buffer(&out.buffer),
        Arg::I32(num_cols as i32),
        Arg::F32(eps),
    ];
    x.gpu.launch(kernel, LaunchConfig::linear(num_rows, num_threads as u32), &args)?;
    Ok(out)
}

pub(super) fn add_rms_norm(
    x: &GpuTensor,
    residual: &GpuTensor,
    weight: &GpuTensor,
    eps: f32,
) -> Result<(GpuTensor, GpuTensor)> {
    check("x", x, DType::BF16, x)?;
    check("residual", residual, DType::F32, x)?;
    check_weight(x, weight)?;
    let shape @ (num_rows, num_cols) = (x.num_rows, x.num_cols);
    let sum = GpuTensor::scratch(&x.gpu, DType::F32, shape)?;
    let out = GpuTensor::scratch(&x.gpu, DType::BF16, shape)?;
    let (kernel, num_threads) = ADD_RMS_NORM.choose(num_cols);
    let args = [
        Arg::Buffer(&x.buffer),
        Arg::Buffer(&residual.buffer),
        Arg::Buffer(&weight.buffer),
        Arg::Buffer(&sum.buffer),
        Arg::Buffer(&out.buffer),
        Arg::I32(num_cols as i32),
        Arg::F32(eps),
    ];
    x.gpu.launch(kernel, LaunchConfig::linear(num_rows, num_threads as u32), &args)?;
    Ok((sum, out))
}

fn check(name: &str, tensor: &GpuTensor, dtype: DType, like: &GpuTensor) -> Result<()> {
    let shape = |tensor: &GpuTensor| (tensor.num_rows, tensor.num_cols);
    if tensor.dtype != dtype || shape(tensor) != shape(like) || tensor.num_cols == 0 {
        let (found, wanted) = (shape(tensor), shape(like));
        bail!("{name} is {:?} {found:?}, not {dtype:?} {wanted:?}", tensor.dtype);
    }
    Ok(())
}

fn check_weight(x: &GpuTensor, weight: &GpuTensor) -> Result<()> {
    check("weight", weight, DType::F32, &GpuTensor { num_rows: 1, ..x.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::gpu::Gpu;
    use crate::ops::rms_norm;
    use crate::ops::tensor::{Device, Tensor};

    const EPS: f32 = 1e-6;

    fn wave(len: usize, seed: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.37 + seed).sin() * 3.0).collect()
    }

    fn assert_close(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            // Half a unit of bf16, and the order of additions.
            let error = (found - expected).abs();
            assert!(error <= 0.004 * expected.abs(), "{what}, {i}: {found}, not {expected}");
        }
    }

    /// Goal: both kernels give what the CPU gives, for every length that takes another path.
    /// Method: rows of hidden sizes of models, of odd lengths and of lengths around a pack.
    #[test]
    fn a_card_norms_as_the_processor_does() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let shapes = [
            (3, 896),
            (2, 3584),
            (2, 5120),
            (1, 8192),
            (1, 8200),
            (2, 16_384),
            (1, 32_768),
            (1, 40_000),
            (5, 1),
            (3, 7),
            (3, 8),
            (2, 1001),
            (0, 64),
        ];
        for shape @ (num_rows, num_cols) in shapes {
            let len = num_rows * num_cols;
            let cpu = |values: &[f32], shape| {
                Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).unwrap()
            };
            let on_gpu = |values: &[f32], dtype, shape| {
                GpuTensor::from_slice(&gpu, values, dtype, shape).unwrap()
            };
            let (residual, weight) = (wave(len, 0.0), wave(num_cols, 1.0));
            let x = on_gpu(&wave(len, 2.0), DType::BF16, shape);
            let gpu_residual = on_gpu(&residual, DType::F32, shape);
            let gpu_weight = on_gpu(&weight, DType::F32, (1, num_cols));
            let (cpu_residual, cpu_weight) = (cpu(&residual, shape), cpu(&weight, (1, num_cols)));

            let expected = rms_norm::rms_norm(&cpu_residual, &cpu_weight, EPS).unwrap();
            let found = rms_norm(&gpu_residual, &gpu_weight, EPS).unwrap();
            let what = format!("rms_norm {shape:?}");
            assert_close(&found.to_vec().unwrap(), &expected.to_vec().unwrap(), &what);

            let cpu_x = cpu(&x.to_vec().unwrap(), shape);
            let (expected_sum, expected) =
                rms_norm::add_rms_norm(&cpu_x, &cpu_residual, &cpu_weight, EPS).unwrap();
            let (sum, found) = add_rms_norm(&x, &gpu_residual, &gpu_weight, EPS).unwrap();
            assert_eq!(sum.to_vec().unwrap(), expected_sum.to_vec().unwrap(), "{shape:?}");
            let what = format!("add_rms_norm {shape:?}");
            assert_close(&found.to_vec().unwrap(), &expected.to_vec().unwrap(), &what);
        }
    }

    #[test]
    fn wrong_shapes_and_types_are_errors() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let tensor = |dtype, shape: (usize, usize)| {
            GpuTensor::from_slice(&gpu, &vec![1.0; shape.0 * shape.1], dtype, shape).unwrap()
        };
        let (x, weight) = (tensor(DType::BF16, (2, 8)), tensor(DType::F32, (1, 8)));
        let residual = tensor(DType::F32, (2, 8));
        assert!(rms_norm(&residual, &weight, EPS).is_ok());
        assert!(rms_norm(&x, &weight, EPS).is_err());
        assert!(rms_norm(&residual, &tensor(DType::F32, (1, 9)), EPS).is_err());
        assert!(add_rms_norm(&x, &tensor(DType::F32, (1, 8)), &weight, EPS).is_err());
        assert!(add_rms_norm(&residual, &residual, &weight, EPS).is_err());
    }
}
