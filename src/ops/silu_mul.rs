//! The gated activation of SwiGLU: `silu(gate) * up`, with `silu(x) = x / (1 + e^-x)`.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::operand::contiguous;
use super::rows::for_each_row_mut;
use super::simd::{Isa, Kernel, LANES, Simd, load_padded, store_clipped};

/// Takes gates and values side by side, `[num_tokens, 2 * intermediate_size]`, and yields
/// `[num_tokens, intermediate_size]`.
pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    gate_up.apply_op1_no_bwd(&SiluMul { isa: Isa::best() })
}

struct SiluMul {
    isa: Isa,
}

impl CustomOp1 for SiluMul {
    fn name(&self) -> &'static str {
        "silu_mul"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (num_tokens, width) = layout.shape().dims2()?;
        if width == 0 || width % 2 != 0 {
            bail!("rows of {width} values are not gates and values side by side");
        }
        let gate_up = contiguous::<f32>("gate_up", gate_up, layout)?;
        let mut out = vec![0.0; num_tokens * width / 2];
        for_each_row_mut(&mut out, width / 2, |index, out| {
            let (gate, up) = gate_up[index * width..][..width].split_at(width / 2);
            self.isa.run(SiluMulRow { gate, up, out });
        });
        Ok((CpuStorage::F32(out), (num_tokens, width / 2).into()))
    }
}

struct SiluMulRow<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SiluMulRow<'_> {
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
    use candle_core::Device;

    use super::*;

    #[test]
    fn matches_the_formula_in_f64() {
        for isa in Isa::available() {
            for (num_tokens, width) in [(1, 1), (3, 24), (70, 4864)] {
                let value = |i: usize| ((i * 7919) % 4001) as f32 * 0.02 - 40.0;
                let data: Vec<f32> = (0..num_tokens * width * 2).map(value).collect();
                let input =
                    Tensor::from_slice(&data, (num_tokens, 2 * width), &Device::Cpu).unwrap();
                let out = input.apply_op1_no_bwd(&SiluMul { isa }).unwrap();
                for (row, out) in data.chunks(2 * width).zip(out.to_vec2::<f32>().unwrap()) {
                    for (i, out) in out.into_iter().enumerate() {
                        let (gate, up) = (f64::from(row[i]), f64::from(row[width + i]));
                        let expected = gate / (1.0 + (-gate).exp()) * up;
                        let error = (expected - f64::from(out)).abs();
                        assert!(error <= 5e-7 * expected.abs(), "{isa:?}: {out}, not {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn extreme_gates_stay_finite_and_nan_stays_nan() {
        let gates = [-1e30, -100.0, 0.0, 100.0, 1e30, f32::NAN];
        for isa in Isa::available() {
            let data: Vec<f32> = gates.into_iter().chain([1.0; 6]).collect();
            let input = Tensor::from_vec(data, (1, 12), &Device::Cpu).unwrap();
            let out = input.apply_op1_no_bwd(&SiluMul { isa }).unwrap();
            let out = out.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(out[0].abs() < 1e-7 && out[1].abs() < 1e-35, "{isa:?}: {out:?}");
            assert_eq!(out[2..5], [0.0, 100.0, 1e30], "{isa:?}");
            assert!(out[5].is_nan(), "{isa:?}");
        }
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let odd = Tensor::from_vec(vec![0.0_f32; 6], (2, 3), &Device::Cpu).unwrap();
        assert!(silu_mul(&odd).is_err());
        assert!(silu_mul(&odd.t().unwrap()).is_err());
        assert!(silu_mul(&odd.flatten_all().unwrap()).is_err());
    }
}
