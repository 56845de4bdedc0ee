//! The norm of heads on a card: `kernels/norm/head_norm.cu`.

use candle_core::{DType, Result, bail};

use super::HeadNorms;
use crate::device::gpu::{Arg, Kernel, LaunchConfig};
use crate::ops::tensor::GpuTensor;

const WARP_SIZE: usize = 32;
const WARPS_PER_BLOCK: usize = 8;

pub(super) fn norm_heads(qkv: &GpuTensor, norms: &HeadNorms) -> Result<()> {
    let head_dim = norms.head_dim(qkv.num_cols)?;
    let (q_weight, k_weight) = (norms.q_weight.gpu()?, norms.k_weight.gpu()?);
    let dtypes = [qkv.dtype, q_weight.dtype, k_weight.dtype];
    if dtypes != [DType::BF16, DType::F32, DType::F32] {
        bail!("heads and the weights of their norms are {dtypes:?}");
    }
    let num_normed = qkv.num_rows * (norms.num_heads + norms.num_kv_heads);
    let args = [
        Arg::Buffer(&qkv.buffer),
        Arg::Buffer(&q_weight.buffer),
        Arg::Buffer(&k_weight.buffer),
        Arg::I32(qkv.num_rows as i32),
        Arg::I32(norms.num_heads as i32),
        Arg::I32(norms.num_kv_heads as i32),
        Arg::I32(head_dim as i32),
        Arg::F32(norms.eps),
    ];
    let threads = (WARP_SIZE * WARPS_PER_BLOCK) as u32;
    let config = LaunchConfig::linear(num_normed.div_ceil(WARPS_PER_BLOCK), threads);
    let kernel = Kernel { module: "head_norm", function: "head_norm" };
    qkv.gpu.launch(kernel, config, &args)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::gpu::Gpu;
    use crate::ops::head_norm::tests::{norms, wave};
    use crate::ops::tensor::{Device, Tensor};

    #[test]
    fn a_card_norms_heads_as_the_processor_does() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let shapes = [(16, 8, 128), (4, 2, 64), (3, 1, 40), (1, 1, 8), (5, 2, 256)];
        for shape @ (num_heads, num_kv_heads, head_dim) in shapes {
            for num_tokens in [0, 1, 7] {
                let rows = (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim);
                let values = wave(rows.0 * rows.1, 0.0);
                let qkv = GpuTensor::from_slice(&gpu, &values, DType::BF16, rows).unwrap();
                let expected = Tensor::from_vec(qkv.to_vec().unwrap(), rows, &Device::Cpu).unwrap();
                crate::ops::head_norm::norm_heads(&expected, &norms(shape, &Device::Cpu)).unwrap();
                norm_heads(&qkv, &norms(shape, &Device::Gpu(gpu.clone()))).unwrap();
                let pairs = qkv.to_vec().unwrap().into_iter().zip(expected.to_vec().unwrap());
                for (i, (found, expected)) in pairs.enumerate() {
                    // Half a unit of bf16, and the order of additions.
                    let error = (found - expected).abs();
                    assert!(error <= 0.004 * expected.abs(), "{shape:?}, {i}: {found} {expected}");
                }
            }
        }
    }
}
