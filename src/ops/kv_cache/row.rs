//! A row of the cache in each of its types: how it is rounded, and how it is read into vectors.
//!
//! Sources: e4m3 is Micikevicius et al., 2022 (arXiv 2209.05433), table 1, rounded as
//! `kernels/include/dtype.cuh` does; the blocks are those of GGUF's type Q8_0.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::ops::simd::{LANES, Simd, load_padded, padded};

/// Numbers that share a scale in `Q8_0Block`.
pub(in crate::ops) const Q8_0_LEN: usize = 32;

/// What rows are made of: numbers, or blocks of them.
pub(in crate::ops) trait Stored: Copy + Sync {
    /// Numbers of one.
    const LEN: usize;

    /// Rounds a row; `values` may be changed.
    fn round(values: &mut [f32], row: &mut [Self]);

    /// The 16 numbers of a row from `first` on, with zeros after its end.
    fn load<S: Simd>(simd: S, row: &[Self], first: usize) -> S::V;
}

/// A float of 8 bits: a sign, 4 bits of exponent with a bias of 7, 3 bits of mantissa.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(in crate::ops) struct E4m3(u8);

/// 32 integers and what they are multiplied with. Bytes, so that a block may lie anywhere.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(in crate::ops) struct Q8_0Block {
    /// `f16`, little-endian
    scale: [u8; 2],
    values: [i8; Q8_0_LEN],
}

impl E4m3 {
    /// The nearest, of two the even one. What is too large becomes 448; a NaN stays one.
    #[inline(always)]
    pub(in crate::ops) fn from_f32(x: f32) -> Self {
        let (sign, magnitude) = (x.to_bits() >> 24 & 0x80, x.abs());
        // Below 2^-6 they are multiples of 2^-9, the unit in the last place of 2^14.
        let small = (magnitude + 16_384.0).to_bits() & 0xf;
        let bits = if magnitude < 448.0 { magnitude } else { 448.0 }.to_bits();
        let large = (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20;
        let rounded = if magnitude < 0.015_625 { small } else { large.wrapping_sub(120 << 3) };
        Self(if x.is_nan() { 0x7f } else { (sign | rounded & 0x7f) as u8 })
    }

    pub(in crate::ops) fn to_bits(self) -> u8 {
        self.0
    }
}

impl Q8_0Block {
    /// The nearest multiples of a scale that the largest becomes 127 of. If a number is not finite,
    /// none is afterwards.
    #[inline(always)]
    fn from_f32(values: &[f32; Q8_0_LEN]) -> Self {
        let mut largest = 0.0_f32;
        let mut poison = 0.0;
        for value in values {
            largest = if largest < value.abs() { value.abs() } else { largest };
            // Zero, or NaN for what is not finite.
            poison += value * 0.0;
        }
        let scale = f16::from_f32((largest / 127.0).min(f16::MAX.to_f32()) + poison);
        let inverse = if scale.to_f32() == 0.0 { 0.0 } else { scale.to_f32().recip() };
        let round = |value: f32| (value * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
        Self { scale: scale.to_le_bytes(), values: values.map(round) }
    }
}

impl Stored for f32 {
    const LEN: usize = 1;

    #[inline(always)]
    fn round(values: &mut [f32], row: &mut [Self]) {
        row.copy_from_slice(values);
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, row: &[Self], first: usize) -> S::V {
        load_padded(simd, &row[first..])
    }
}

impl Stored for f16 {
    const LEN: usize = 1;

    #[inline(always)]
    fn round(values: &mut [f32], row: &mut [Self]) {
        // Saturated rather than infinite, which would turn into NaN later.
        let limit = f16::MAX.to_f32();
        for value in values.iter_mut() {
            *value = value.clamp(-limit, limit);
        }
        row.convert_from_f32_slice(values);
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, row: &[Self], first: usize) -> S::V {
        padded(&row[first..], |values| simd.load_f16(values))
    }
}

impl Stored for bf16 {
    const LEN: usize = 1;

    #[inline(always)]
    fn round(values: &mut [f32], row: &mut [Self]) {
        row.convert_from_f32_slice(values);
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, row: &[Self], first: usize) -> S::V {
        padded(&row[first..], |values| simd.load_bf16(values))
    }
}

impl Stored for E4m3 {
    const LEN: usize = 1;

    #[inline(always)]
    fn round(values: &mut [f32], row: &mut [Self]) {
        for (stored, value) in row.iter_mut().zip(values) {
            *stored = Self::from_f32(*value);
        }
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, row: &[Self], first: usize) -> S::V {
        // Without a closure: what it calls would not be inlined with the instructions enabled here.
        let values: &[u8] = bytemuck::cast_slice(&row[first..]);
        if values.len() < LANES {
            let mut padded = [0; LANES];
            padded[..values.len()].copy_from_slice(values);
            return simd.load_e4m3(&padded);
        }
        simd.load_e4m3(values)
    }
}

impl Stored for Q8_0Block {
    const LEN: usize = Q8_0_LEN;

    #[inline(always)]
    fn round(values: &mut [f32], row: &mut [Self]) {
        for (stored, values) in row.iter_mut().zip(values.as_chunks().0) {
            *stored = Self::from_f32(values);
        }
    }

    /// Products of 8 and 11 bits are exact.
    #[inline(always)]
    fn load<S: Simd>(simd: S, row: &[Self], first: usize) -> S::V {
        let block = &row[first / Q8_0_LEN];
        let values = simd.load_i8(&block.values[first % Q8_0_LEN..]);
        simd.mul(values, simd.splat_f16(f16::from_le_bytes(block.scale)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::fp8_weights::e4m3_to_f32;
    use crate::ops::simd::{Isa, Kernel, LANES};

    struct Read<'a, T>(&'a [T], &'a mut [f32]);

    impl<T: Stored> Kernel for Read<'_, T> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for (index, values) in self.1.chunks_mut(LANES).enumerate() {
                let mut lanes = [0.0; LANES];
                simd.store(&mut lanes, T::load(simd, self.0, index * LANES));
                values.copy_from_slice(&lanes[..values.len()]);
            }
        }
    }

    fn read<T: Stored>(isa: Isa, row: &[T]) -> Vec<f32> {
        let mut values = vec![0.0; row.len() * T::LEN];
        isa.run(Read(row, &mut values));
        values
    }

    #[test]
    fn floats_of_8_bits_are_the_nearest_and_saturate() {
        let numbers = |bits: u32| [f32::from_bits(bits << 12), -f32::from_bits(bits << 12)];
        // All exponents from 2^-12 to 2^11, with 11 bits of mantissa.
        for x in (0x39800..0x45800).flat_map(numbers).chain([0.0, -0.0, f32::INFINITY, 1e-40]) {
            let E4m3(found) = E4m3::from_f32(x);
            let bounded = x.clamp(-448.0, 448.0);
            let distance = |bits: u8| (e4m3_to_f32(bits) - bounded).abs();
            let nearest = (0..=255).map(distance).fold(f32::INFINITY, f32::min);
            assert_eq!(distance(found), nearest, "{x}: {found:#x}");
            // Of two that are as near, the even one; zeros have the number's sign.
            let is_tie = (0..=255)
                .any(|bits| e4m3_to_f32(bits) != e4m3_to_f32(found) && distance(bits) == nearest);
            assert!(!is_tie || found & 1 == 0, "{x}: {found:#x}");
            assert_eq!(found & 128 != 0, x.is_sign_negative(), "{x}: {found:#x}");
        }
        assert_eq!(E4m3::from_f32(f32::NAN).0 & 0x7f, 0x7f);
    }

    #[test]
    fn every_float_of_8_bits_is_read_exactly() {
        let row: Vec<E4m3> = (0..=255).map(E4m3).collect();
        for isa in Isa::available() {
            // Also at the end of a row that is no whole number of vectors.
            for end in [256, 248] {
                for (found, bits) in read(isa, &row[..end]).into_iter().zip(0..=255) {
                    let expected = e4m3_to_f32(bits);
                    let is_right = found.to_bits() == expected.to_bits();
                    assert!(is_right || found.is_nan() && expected.is_nan(), "{isa:?} {bits:#x}");
                }
            }
        }
    }

    #[test]
    fn blocks_hold_the_nearest_multiples_of_their_scale() {
        let numbers = |size: f32| move |i: usize| (i as f32 * 0.71).sin() * size;
        for size in [3e-7, 1e-3, 1.0, 170.0, 6e4, 5e6] {
            let mut values: Vec<f32> = (0..64).map(numbers(size)).collect();
            values[40] = size * 1.5;
            let exact = values.clone();
            let mut row = [Q8_0Block::default(); 2];
            Q8_0Block::round(&mut values, &mut row);
            for isa in Isa::available() {
                for (i, (found, exact)) in read(isa, &row).iter().zip(&exact).enumerate() {
                    let largest = if i < 32 { size } else { size * 1.5 };
                    // Scales below 6e-5 are multiples of 6e-8.
                    let step = largest / 127.0 * (1.0 + 1.0 / 1024.0) + 6e-8;
                    let error = (found - exact).abs();
                    assert!(error <= step * 0.51 + 64.0 * 6e-8, "{isa:?}: {found}, not {exact}");
                }
            }
        }
    }

    #[test]
    fn blocks_of_nothing_of_the_vast_and_of_nan() {
        let read_one = |values: [f32; 32]| read(Isa::best(), &[Q8_0Block::from_f32(&values)]);
        assert_eq!(read_one([0.0; 32]), [0.0; 32]);
        assert_eq!(read_one([-1e30; 32]), [-65_504.0 * 127.0; 32]);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = [1.0; 32];
            values[7] = bad;
            assert!(read_one(values).iter().all(|value| value.is_nan()));
        }
    }
}
