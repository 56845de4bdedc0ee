//! The gated activation of SwiGLU: `silu(gate) * up`, with `silu(x) = x / (1 + e^-x)`.
//!
//! It has no pass of its own: [`super::matmul::gated_matmul`] applies it to sums that are still in
//! the cache.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

use super::simd::{Kernel, LANES, Simd, load_padded, store_clipped};

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
    use super::*;
    use crate::ops::simd::Isa;

    fn silu_mul(isa: Isa, gate: &[f32], up: &[f32]) -> Vec<f32> {
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
                for (i, out) in silu_mul(isa, &gate, &up).into_iter().enumerate() {
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
            let out = silu_mul(isa, &gates, &[1.0; 6]);
            assert!(out[0].abs() < 1e-7 && out[1].abs() < 1e-35, "{isa:?}: {out:?}");
            assert_eq!(out[2..5], [0.0, 100.0, 1e30], "{isa:?}");
            assert!(out[5].is_nan(), "{isa:?}");
        }
    }
}
