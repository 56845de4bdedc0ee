//! Vectors of 16 floats for every instruction set, and the choice among them at run time.
//!
//! A kernel is written once over [`Simd`] and compiled per instruction set. The values of type
//! [`Simd`] are tokens: having one proves that the machine has the instructions, which makes the
//! methods safe to call. All sets hold 16 lanes and round alike where they have fused
//! multiply-add, so AVX2 and AVX-512 give the same bits; the portable code may differ in the last.
//!
//! **Invariant:** everything generic over [`Simd`] is `#[inline(always)]`, or it would be compiled
//! without the instructions that its caller enabled.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use half::{bf16, f16};

/// Floats in a vector.
pub(super) const LANES: usize = 16;

/// Operations on vectors of [`LANES`] floats.
pub(super) trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// How many pairs of vectors to sum up together so that all stay in registers.
    const PRODUCT_ROWS: usize;

    /// The same value in every lane.
    fn splat(self, value: f32) -> Self::V;
    /// The first 16 values.
    fn load(self, values: &[f32]) -> Self::V;
    /// The first 16 values, widened.
    fn load_f16(self, values: &[f16]) -> Self::V;
    /// The first 16 values, widened.
    fn load_bf16(self, values: &[bf16]) -> Self::V;
    /// The first 16 floats of 8 bits (e4m3), widened.
    fn load_e4m3(self, values: &[u8]) -> Self::V;
    /// The first 16 integers, as floats.
    fn load_i8(self, values: &[i8]) -> Self::V;
    /// The same value in every lane, widened.
    fn splat_f16(self, value: f16) -> Self::V;
    /// Writes the lanes to the first 16 places.
    fn store(self, values: &mut [f32], v: Self::V);
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, with one rounding where the machine can.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a` where it is larger, else `b`; thus `b` where one is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a` where it is smaller, else `b`; thus `b` where one is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The nearest integers, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^n` for integers from -126 to 127.
    fn exp2_of_integer(self, n: Self::V) -> Self::V;
    /// `value` where `x` is at least `limit` or NaN, else zero.
    fn zero_below(self, x: Self::V, limit: Self::V, value: Self::V) -> Self::V;
    /// The sum of the lanes: first those 8 apart are added, then those 4, 2 and 1 apart.
    fn sum_of_lanes(self, v: Self::V) -> f32;
    /// The largest lane.
    fn max_of_lanes(self, v: Self::V) -> f32;
    /// Announces that the first value's cache line will be read soon.
    fn prefetch<T>(self, values: &[T]);
    /// Swaps rows and columns.
    fn transpose(self, rows: &mut [Self::V; LANES]);

    /// The natural exponential, to about 1e-7 relative; zero below -87, constant above 88.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        let bounded = self.min(self.splat(88.0), x);
        let n = self.round(self.mul(bounded, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts: `n` times the first is exact.
        let r = self.mul_add(n, self.splat(-LN_2_HIGH), bounded);
        let r = self.mul_add(n, self.splat(-LN_2_LOW), r);
        let mut q = self.splat(EXP_COEFFICIENTS[0]);
        for &coefficient in &EXP_COEFFICIENTS[1..] {
            q = self.mul_add(q, r, self.splat(coefficient));
        }
        // NaN passes through: its power of two is arbitrary, its polynomial is NaN.
        self.zero_below(x, self.splat(-87.0), self.mul(q, self.exp2_of_integer(n)))
    }
}

/// ln 2 to 9 bits.
const LN_2_HIGH: f32 = 0.693_359_4;
/// ln 2 - `LN_2_HIGH`.
const LN_2_LOW: f32 = -0.000_212_194_44;
/// Highest power first; least error of e^r with |r| <= ln(2)/2, 1.1e-8 before rounding.
const EXP_COEFFICIENTS: [f32; 7] =
    [0.001_392_625, 0.008_363_233, 0.041_666_552, 0.166_665_76, 0.5, 1.0, 1.0];

/// Code to run with an instruction set. Implementations of `run` are `#[inline(always)]`.
pub(super) trait Kernel {
    /// What the code yields.
    type Output;
    /// The code.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Isa(Set);

#[derive(Clone, Copy, Debug)]
enum Set {
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    Portable(portable::Portable),
}

impl Isa {
    /// The fastest set.
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(token) = avx512::Avx512::detect() {
                return Self(Set::Avx512(token));
            }
            if let Some(token) = avx2::Avx2::detect() {
                return Self(Set::Avx2(token));
            }
        }
        Self(Set::Portable(portable::Portable))
    }

    /// Every set there is code for and that this machine has.
    #[cfg(test)]
    pub(super) fn available() -> Vec<Self> {
        let mut sets = vec![Self(Set::Portable(portable::Portable))];
        #[cfg(target_arch = "x86_64")]
        {
            sets.extend(avx2::Avx2::detect().map(|token| Self(Set::Avx2(token))));
            sets.extend(avx512::Avx512::detect().map(|token| Self(Set::Avx512(token))));
        }
        sets
    }

    /// Runs code with this set.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(token) => token.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(token) => token.run(kernel),
            Set::Portable(token) => kernel.run(token),
        }
    }
}

/// What `load` makes of the first 16 values, with zeros after the last if there are fewer.
#[inline(always)]
pub(super) fn padded<T: Copy + Default, V>(values: &[T], load: impl FnOnce(&[T]) -> V) -> V {
    if values.len() < LANES {
        let mut padded = [T::default(); LANES];
        padded[..values.len()].copy_from_slice(values);
        return load(&padded);
    }
    load(values)
}

/// The first values, up to 16, with zeros after them.
#[inline(always)]
pub(super) fn load_padded<S: Simd>(simd: S, values: &[f32]) -> S::V {
    padded(values, |values| simd.load(values))
}

/// Writes as many of the 16 lanes as there is room for.
#[inline(always)]
pub(super) fn store_clipped<S: Simd>(simd: S, values: &mut [f32], v: S::V) {
    if values.len() < LANES {
        let mut lanes = [0.0; LANES];
        simd.store(&mut lanes, v);
        values.copy_from_slice(&lanes[..values.len()]);
        return;
    }
    simd.store(values, v);
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for chunk in self.0.chunks_mut(LANES) {
                let x = load_padded(simd, chunk);
                store_clipped(simd, chunk, simd.exp(x));
            }
        }
    }

    #[test]
    fn exp_is_accurate_and_exact_at_its_edges() {
        for isa in Isa::available() {
            let inputs: Vec<f32> = (0..35_001).map(|i| i as f32 * 0.005 - 87.0).collect();
            let mut outputs = inputs.clone();
            isa.run(Exp(&mut outputs));
            for (&x, &y) in inputs.iter().zip(&outputs) {
                let expected = f64::from(x).exp();
                let error = (f64::from(y) / expected - 1.0).abs();
                assert!(error < 1.5e-7, "{isa:?}: exp({x}) = {y}, relative error {error:e}");
            }
            let mut edges = [0.0, -0.0, f32::NEG_INFINITY, -87.1, -1e30, f32::NAN, 1e30];
            isa.run(Exp(&mut edges));
            assert_eq!(edges[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{isa:?}");
            assert!(edges[5].is_nan() && edges[6].is_finite(), "{isa:?}");
        }
    }

    struct Transpose<'a>(&'a mut [f32]);

    impl Kernel for Transpose<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let mut rows = std::array::from_fn(|i| simd.load(&self.0[i * LANES..]));
            simd.transpose(&mut rows);
            for (i, row) in rows.into_iter().enumerate() {
                simd.store(&mut self.0[i * LANES..], row);
            }
        }
    }

    #[test]
    fn transpose_swaps_rows_and_columns() {
        for isa in Isa::available() {
            let mut data: Vec<f32> = (0..256_u16).map(f32::from).collect();
            isa.run(Transpose(&mut data));
            for (i, &value) in data.iter().enumerate() {
                assert_eq!(value, (i % 16 * 16 + i / 16) as f32, "{isa:?}: element {i}");
            }
        }
    }

    struct Widen<'a>(&'a [u16], &'a mut [f32], &'a mut [f32]);

    impl Kernel for Widen<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let as_f16: Vec<f16> = self.0.iter().map(|&bits| f16::from_bits(bits)).collect();
            let as_bf16: Vec<bf16> = self.0.iter().map(|&bits| bf16::from_bits(bits)).collect();
            for i in (0..self.0.len()).step_by(LANES) {
                simd.store(&mut self.1[i..], simd.load_f16(&as_f16[i..]));
                simd.store(&mut self.2[i..], simd.load_bf16(&as_bf16[i..]));
            }
        }
    }

    #[test]
    fn every_half_value_widens_exactly() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        for isa in Isa::available() {
            let mut from_f16 = vec![0.0; bits.len()];
            let mut from_bf16 = vec![0.0; bits.len()];
            isa.run(Widen(&bits, &mut from_f16, &mut from_bf16));
            for (i, &bits) in bits.iter().enumerate() {
                let (a, b) = (f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32());
                assert!(from_f16[i] == a || a.is_nan() && from_f16[i].is_nan(), "{isa:?} {bits:x}");
                assert!(
                    from_bf16[i] == b || b.is_nan() && from_bf16[i].is_nan(),
                    "{isa:?} {bits:x}"
                );
            }
        }
    }
}
