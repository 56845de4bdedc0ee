//! Activations as the kernels read them.
//!
//! Tokens go in groups of 8, then 4, 2 and 1, and what the tokens of a group need for one block
//! lies together. For integer weights each 32 values become signed bytes with one `f32` scale (the
//! largest magnitude over 127).

use super::format::BLOCK;
use super::kernel::MAX_WIDTH;
#[cfg(target_arch = "x86_64")]
use super::simd::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::simd::avx512::Avx512;
use super::simd::portable::Portable;
use super::simd::{Isa, Simd};

/// Tokens that a kernel computes together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) first: usize,
    /// 1, 2, 4 or 8.
    pub(super) width: usize,
}

/// The groups of so many tokens.
pub(super) fn groups(num_tokens: usize) -> Vec<Group> {
    let mut groups = Vec::with_capacity(num_tokens / MAX_WIDTH + 3);
    let mut first = 0;
    let mut width = MAX_WIDTH;
    while first < num_tokens {
        while num_tokens - first < width {
            width /= 2;
        }
        groups.push(Group { first, width });
        first += width;
    }
    groups
}

/// Sums over the integers of a token that some weights need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SumKind {
    /// Sums a block of 32: 1 or 2.
    pub(super) halves: usize,
    /// What the sums are multiplied by.
    pub(super) factor: SumFactor,
}

/// What turns a sum of integers into the correction that a format needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SumFactor {
    /// Minus the offset of the format: where the integer products begin.
    Offset(u8),
    /// Minus the scale of the activations: what the minimum is multiplied by.
    Scale,
}

/// The activations of a group of tokens.
#[derive(Default)]
pub(super) struct Activations {
    /// `[block][token][32]`.
    pub(super) quants: Vec<i8>,
    /// `[block][token]`.
    pub(super) scales: Vec<f32>,
    /// `[block][half][token]`, those with [`SumFactor::Scale`] as the bits of an `f32`.
    sums: Vec<(SumKind, Vec<i32>)>,
    /// `[column][token]`, for float weights.
    pub(super) floats: Vec<f32>,
}

impl Activations {
    /// Sums of a kind that [`Activations::quantize`] was asked for.
    pub(super) fn sums(&self, kind: SumKind) -> &[i32] {
        let found = self.sums.iter().find(|(other, _)| *other == kind);
        &found.expect("made for all segments of the matrix").1
    }

    /// Quantises the rows `x`, each `num_cols` long, a multiple of 32.
    pub(super) fn quantize(&mut self, isa: Isa, x: &[f32], num_cols: usize, kinds: &[SumKind]) {
        let num_runs = x.len() / BLOCK;
        self.quants.resize(x.len(), 0);
        self.scales.resize(num_runs, 0.0);
        self.sums = kinds.iter().map(|&kind| (kind, vec![0; num_runs * kind.halves])).collect();
        match isa {
            // SAFETY: the portable functions need nothing from the processor.
            Isa::Portable => unsafe { self.fill::<Portable>(x, num_cols) },
            // SAFETY: the instruction set is one that the processor was found to have.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { fill_avx2(self, x, num_cols) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { fill_avx512(self, x, num_cols) },
        }
    }

    /// Stores the rows `x` by column.
    pub(super) fn transpose(&mut self, x: &[f32], num_cols: usize) {
        let width = x.len() / num_cols;
        self.floats.resize(x.len(), 0.0);
        for (column, values) in self.floats.chunks_exact_mut(width).enumerate() {
            for (t, value) in values.iter_mut().enumerate() {
                *value = x[t * num_cols + column];
            }
        }
    }

    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    unsafe fn fill<S: Simd>(&mut self, x: &[f32], num_cols: usize) {
        let width = x.len() / num_cols;
        for (t, row) in x.chunks_exact(num_cols).enumerate() {
            for (block, values) in row.chunks_exact(BLOCK).enumerate() {
                let run = block * width + t;
                let values = values.first_chunk().expect("a whole block");
                let quants = self.quants[run * BLOCK..].first_chunk_mut().expect("a whole block");
                // SAFETY: the caller's promise.
                let (scale, [low, high]) = unsafe { quantize_run::<S>(values, quants) };
                self.scales[run] = scale;
                for (kind, sums) in &mut self.sums {
                    if kind.halves == 1 {
                        sums[run] = kind.factor.correction(low + high, scale);
                    } else {
                        let at = 2 * block * width + t;
                        sums[at] = kind.factor.correction(low, scale);
                        sums[at + width] = kind.factor.correction(high, scale);
                    }
                }
            }
        }
    }
}

impl SumFactor {
    fn correction(self, sum: i32, scale: f32) -> i32 {
        match self {
            Self::Offset(offset) => -sum * i32::from(offset),
            Self::Scale => (-scale * sum as f32).to_bits() as i32,
        }
    }
}

/// # Safety
/// The processor has the instruction set.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fill_avx2(activations: &mut Activations, x: &[f32], num_cols: usize) {
    // SAFETY: the caller's promise.
    unsafe { activations.fill::<Avx2<false>>(x, num_cols) };
}

/// # Safety
/// The processor has the instruction set.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn fill_avx512(activations: &mut Activations, x: &[f32], num_cols: usize) {
    // SAFETY: the caller's promise.
    unsafe { activations.fill::<Avx512>(x, num_cols) };
}

/// Rounds `values / scale` to integers; returns the scale and the sums of both halves. Not-a-number
/// and infinity make the scale not finite, so that they reach the output.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
unsafe fn quantize_run<S: Simd>(
    values: &[f32; BLOCK],
    quants: &mut [i8; BLOCK],
) -> (f32, [i32; 2]) {
    /// Below this the reciprocal overflows; such values are zeros.
    const SMALLEST: f32 = 1e-30;
    // SAFETY: the caller's promise.
    let largest = unsafe { S::largest_magnitude(values) };
    if largest < SMALLEST {
        quants.fill(0);
        return (0.0, [0, 0]);
    }
    // SAFETY: the caller's promise.
    let sums = unsafe { S::round(values, 127.0 / largest, quants) };
    (largest / 127.0, sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gguf_blocks::tests::Random;

    #[test]
    fn groups_cover_all_tokens_in_order() {
        for num_tokens in 0..40 {
            let mut next = 0;
            for group in groups(num_tokens) {
                assert_eq!(group.first, next);
                assert!([1, 2, 4, 8].contains(&group.width));
                next += group.width;
            }
            assert_eq!(next, num_tokens);
        }
    }

    #[test]
    fn quantised_values_are_within_half_a_step_and_sums_are_theirs() {
        let mut random = Random::new(5);
        let (num_cols, width) = (64, 4);
        let x: Vec<f32> = (0..num_cols * width).map(|_| random.float()).collect();
        let whole = SumKind { halves: 1, factor: SumFactor::Offset(16) };
        let halves = SumKind { halves: 2, factor: SumFactor::Scale };
        for isa in Isa::available() {
            let mut activations = Activations::default();
            activations.quantize(isa, &x, num_cols, &[whole, halves]);
            for run in 0..8 {
                let (block, t) = (run / width, run % width);
                let (scale, quants) =
                    (activations.scales[run], &activations.quants[run * 32..run * 32 + 32]);
                for (i, &quant) in quants.iter().enumerate() {
                    let value = x[t * num_cols + block * 32 + i];
                    assert!((f32::from(quant) * scale - value).abs() <= scale * 0.501);
                }
                let sum_of = |quants: &[i8]| -quants.iter().map(|&q| i32::from(q)).sum::<i32>();
                assert_eq!(activations.sums(whole)[run], sum_of(quants) * 16);
                let high = activations.sums(halves)[(2 * block + 1) * width + t];
                assert_eq!(f32::from_bits(high as u32), scale * sum_of(&quants[16..]) as f32);
            }
        }
    }

    #[test]
    fn zeros_stay_zero_and_a_nan_is_not_lost() {
        for isa in Isa::available() {
            let mut x = [1e-40; 64];
            x[40] = f32::NAN;
            let mut activations = Activations::default();
            activations.quantize(isa, &x, 64, &[]);
            assert_eq!(activations.quants[..32], [0; 32]);
            assert_eq!(activations.scales[0], 0.0);
            assert!(activations.scales[1].is_nan());
        }
    }
}
