//! The norm of heads: each query and each key of a token is divided by its root mean square and
//! scaled, `x / sqrt(mean(x^2) + eps) * weight`, over the values of that head alone.

mod gpu;

use candle_core::Tensor as CpuTensor;
use candle_core::{CpuStorage, InplaceOp3, Layout, Result, bail};

use super::operand::contiguous;
use super::rms_norm::NormRow;
use super::rows::for_each_row_mut;
use super::simd::Isa;
use super::tensor::Tensor;

/// What heads are normalised with.
pub struct HeadNorms {
    /// Scales of the values of a query, `[1, head_dim]`.
    pub q_weight: Tensor,
    /// Scales of the values of a key, `[1, head_dim]`.
    pub k_weight: Tensor,
    /// Queries of a token.
    pub num_heads: usize,
    /// Keys of a token.
    pub num_kv_heads: usize,
    /// Added to the mean square before its root is taken.
    pub eps: f32,
}

/// Normalises queries and keys of `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`, per
/// token all queries, then all keys, then all values, in place; values stay as they are.
///
/// # Errors
/// If shapes or types do not fit.
pub fn norm_heads(qkv: &Tensor, norms: &HeadNorms) -> Result<()> {
    match qkv {
        Tensor::Cpu(qkv) => norm_heads_on_cpu(qkv, norms, Isa::best()),
        Tensor::Gpu(qkv) => gpu::norm_heads(qkv, norms),
    }
}

impl HeadNorms {
    /// The width of a head in rows of so many values.
    fn head_dim(&self, width: usize) -> Result<usize> {
        let Self { q_weight, k_weight, num_heads, num_kv_heads, .. } = self;
        let num_all_heads = num_heads + 2 * num_kv_heads;
        let (q, k) = (q_weight.dims2()?, k_weight.dims2()?);
        let is_fitting = q == k && q.0 == 1 && 0 < q.1 && width == num_all_heads * q.1;
        if !is_fitting {
            bail!("{num_all_heads} heads in rows of {width} values have norms of {q:?} and {k:?}");
        }
        Ok(q.1)
    }
}

fn norm_heads_on_cpu(qkv: &CpuTensor, norms: &HeadNorms, isa: Isa) -> Result<()> {
    norms.head_dim(qkv.dims2()?.1)?;
    let op = NormHeads {
        num_heads: norms.num_heads,
        num_kv_heads: norms.num_kv_heads,
        eps: norms.eps,
        isa,
    };
    qkv.inplace_op3(norms.q_weight.cpu()?, norms.k_weight.cpu()?, &op)
}

struct NormHeads {
    num_heads: usize,
    num_kv_heads: usize,
    eps: f32,
    isa: Isa,
}

impl InplaceOp3 for NormHeads {
    fn name(&self) -> &'static str {
        "norm_heads"
    }

    fn cpu_fwd(
        &self,
        qkv: &mut CpuStorage,
        qkv_layout: &Layout,
        q_weight: &CpuStorage,
        q_layout: &Layout,
        k_weight: &CpuStorage,
        k_layout: &Layout,
    ) -> Result<()> {
        let (_, width) = qkv_layout.shape().dims2()?;
        let q_weight = contiguous::<f32>("q_weight", q_weight, q_layout)?;
        let k_weight = contiguous::<f32>("k_weight", k_weight, k_layout)?;
        let Some((start, end)) = qkv_layout.contiguous_offsets() else {
            bail!("qkv must be contiguous, has strides {:?}", qkv_layout.stride())
        };
        let CpuStorage::F32(qkv) = qkv else { bail!("queries and keys must be F32") };
        let (head_dim, eps) = (q_weight.len(), self.eps);
        let weights = std::iter::repeat_n(q_weight, self.num_heads)
            .chain(std::iter::repeat_n(k_weight, self.num_kv_heads));
        for_each_row_mut(&mut qkv[start..end], width, |_, row| {
            let mut head = vec![0.0; head_dim];
            for (out, weight) in row.chunks_exact_mut(head_dim).zip(weights.clone()) {
                head.copy_from_slice(out);
                self.isa.run(NormRow { x: &head, weight, eps, out });
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tensor::Device;

    pub(super) fn wave(len: usize, seed: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.37 + seed).sin() * 3.0).collect()
    }

    pub(super) fn norms(
        (num_heads, num_kv_heads, head_dim): (usize, usize, usize),
        device: &Device,
    ) -> HeadNorms {
        let weight = |seed| Tensor::from_vec(wave(head_dim, seed), (1, head_dim), device).unwrap();
        HeadNorms {
            q_weight: weight(1.0),
            k_weight: weight(2.0),
            num_heads,
            num_kv_heads,
            eps: 1e-6,
        }
    }

    fn normed(shape: (usize, usize, usize), qkv: &[f32], isa: Isa) -> Vec<f32> {
        let width = (shape.0 + 2 * shape.1) * shape.2;
        let qkv = CpuTensor::from_slice(qkv, (qkv.len() / width, width), &candle_core::Device::Cpu);
        let qkv = qkv.unwrap();
        norm_heads_on_cpu(&qkv, &norms(shape, &Device::Cpu), isa).unwrap();
        qkv.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn matches_the_formula_in_f64_and_leaves_values_alone() {
        for isa in Isa::available() {
            for shape @ (num_heads, num_kv_heads, head_dim) in [(4, 2, 128), (3, 1, 24), (1, 1, 8)]
            {
                let width = (num_heads + 2 * num_kv_heads) * head_dim;
                let qkv = wave(5 * width, 0.0);
                let found = normed(shape, &qkv, isa);
                for (i, (x, found)) in qkv.chunks(head_dim).zip(found.chunks(head_dim)).enumerate()
                {
                    let weight = match i % (num_heads + 2 * num_kv_heads) {
                        head if head < num_heads => wave(head_dim, 1.0),
                        head if head < num_heads + num_kv_heads => wave(head_dim, 2.0),
                        _ => {
                            assert_eq!(x, found, "{isa:?}, {shape:?}");
                            continue;
                        }
                    };
                    let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
                    let scale = (squares / head_dim as f64 + 1e-6).sqrt().recip();
                    for ((x, weight), found) in x.iter().zip(weight).zip(found) {
                        let expected = f64::from(*x) * scale * f64::from(weight);
                        let error = (expected - f64::from(*found)).abs();
                        assert!(error <= 4e-7 * expected.abs(), "{found}, not {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_depends_on_no_other() {
        let shape = (16, 8, 128);
        let width = 32 * 128;
        let qkv = wave(40 * width, 0.0);
        for isa in Isa::available() {
            let together = normed(shape, &qkv, isa);
            for row in [0, 1, 39] {
                let alone = normed(shape, &qkv[row * width..][..width], isa);
                assert!(alone == together[row * width..][..width], "{isa:?}, row {row}");
            }
        }
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let qkv = |width| Tensor::from_vec(vec![1.0; 2 * width], (2, width), &Device::Cpu).unwrap();
        let norms = norms((2, 1, 8), &Device::Cpu);
        assert!(norm_heads(&qkv(32), &norms).is_ok());
        assert!(norm_heads(&qkv(40), &norms).is_err());
        let k_weight = Tensor::from_vec(vec![1.0; 4], (1, 4), &Device::Cpu).unwrap();
        assert!(norm_heads(&qkv(32), &HeadNorms { k_weight, ..norms }).is_err());
    }
}
