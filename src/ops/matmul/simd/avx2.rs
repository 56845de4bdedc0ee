//! [`Simd`] with AVX2, FMA and F16C, with or without VNNI: one vector is a pair of registers, eight
//! rows each.

#[allow(clippy::wildcard_imports, reason = "intrinsics carry their module in their names")]
use std::arch::x86_64::*;

use super::{MAGNITUDE, ROUNDER, Simd};

/// AVX2; `VNNI` says whether the processor has `vpdpbusd` in its VEX encoding.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2<const VNNI: bool>;

/// Adds the products of four unsigned and four signed bytes. Two neighbouring products must fit in
/// an `i16`.
///
/// # Safety
/// The contract of [`Simd`].
#[inline(always)]
unsafe fn dot_eight<const VNNI: bool>(sum: __m256i, weights: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the trait's contract.
    unsafe {
        if VNNI {
            return _mm256_dpbusd_avx_epi32(sum, weights, x);
        }
        let pairs = _mm256_maddubs_epi16(weights, x);
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// Half-precision numbers whose sign and upper bits are those of sixteen eight-bit floats.
///
/// # Safety
/// The contract of [`Simd`].
#[inline(always)]
pub(super) unsafe fn halves_of_e4m3(values: __m128i) -> __m256i {
    // SAFETY: the trait's contract.
    unsafe {
        // The sign reaches down to bit 14, where it does not belong.
        let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(values));
        _mm256_and_si256(words, _mm256_set1_epi16(0xbfff_u16 as i16))
    }
}

/// The sum of sixteen signed bytes.
///
/// # Safety
/// The contract of [`Simd`].
#[inline(always)]
pub(super) unsafe fn sum_bytes(bytes: __m128i) -> i32 {
    // SAFETY: the trait's contract.
    unsafe {
        let unsigned = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
        let sums = _mm_sad_epu8(unsigned, _mm_setzero_si128());
        _mm_cvtsi128_si32(sums) + _mm_extract_epi16::<4>(sums) - 16 * 128
    }
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type Bytes = [__m256i; 2];
    type Activations = __m256i;
    type Ints = [__m256i; 2];
    type Floats = [__m256; 2];

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }

    #[inline(always)]
    unsafe fn store_bytes(value: Self::Bytes, to: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe {
            _mm256_storeu_si256(to.cast(), value[0]);
            _mm256_storeu_si256(to.add(32).cast(), value[1]);
        }
    }

    #[inline(always)]
    unsafe fn shift_and_mask(value: Self::Bytes, left: i32, mask: u8) -> Self::Bytes {
        // SAFETY: the trait's contract.
        unsafe {
            let mask = _mm256_set1_epi8(mask as i8);
            if left < 0 {
                let by = _mm_cvtsi32_si128(-left);
                [
                    _mm256_and_si256(_mm256_srl_epi16(value[0], by), mask),
                    _mm256_and_si256(_mm256_srl_epi16(value[1], by), mask),
                ]
            } else {
                let by = _mm_cvtsi32_si128(left);
                [
                    _mm256_and_si256(_mm256_sll_epi16(value[0], by), mask),
                    _mm256_and_si256(_mm256_sll_epi16(value[1], by), mask),
                ]
            }
        }
    }

    #[inline(always)]
    unsafe fn or(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn widen(value: Self::Bytes) -> Self::Bytes {
        // SAFETY: the trait's contract.
        unsafe {
            if VNNI {
                return value;
            }
            // As signed numbers: with sign and magnitude two neighbouring products stay below 2 *
            // 128 * 127, which fits.
            let flip = _mm256_set1_epi8(-128);
            [_mm256_xor_si256(value[0], flip), _mm256_xor_si256(value[1], flip)]
        }
    }

    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::Ints {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }

    #[inline(always)]
    unsafe fn load_activations(from: *const i8) -> Self::Activations {
        // SAFETY: the trait's contract.
        unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn dot(sum: Self::Ints, weights: Self::Bytes, x: Self::Activations) -> Self::Ints {
        // SAFETY: the trait's contract.
        unsafe {
            [dot_eight::<VNNI>(sum[0], weights[0], x), dot_eight::<VNNI>(sum[1], weights[1], x)]
        }
    }

    #[inline(always)]
    unsafe fn dot_wide(sum: Self::Ints, weights: Self::Bytes, x: Self::Activations) -> Self::Ints {
        // SAFETY: the trait's contract.
        unsafe {
            if VNNI {
                return Self::dot(sum, weights, x);
            }
            [
                dot_eight::<false>(
                    sum[0],
                    _mm256_abs_epi8(weights[0]),
                    _mm256_sign_epi8(x, weights[0]),
                ),
                dot_eight::<false>(
                    sum[1],
                    _mm256_abs_epi8(weights[1]),
                    _mm256_sign_epi8(x, weights[1]),
                ),
            ]
        }
    }

    #[inline(always)]
    unsafe fn begin_wide(correction: i32) -> Self::Ints {
        // SAFETY: the trait's contract.
        unsafe {
            if VNNI {
                return Self::splat_int(correction);
            }
            [_mm256_setzero_si256(); 2]
        }
    }

    #[inline(always)]
    unsafe fn to_floats(value: Self::Ints) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_cvtepi32_ps(value[0]), _mm256_cvtepi32_ps(value[1])] }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let low = _mm_loadu_si128(from.cast());
            let high = _mm_loadu_si128(from.add(16).cast());
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let halves = halves_of_e4m3(_mm_loadu_si128(from.cast()));
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(16).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()));
            let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast()));
            Self::to_floats([low, high])
        }
    }

    #[inline(always)]
    unsafe fn load_low_nibbles(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let mask = _mm256_set1_epi32(15);
            let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()));
            Self::to_floats([_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)])
        }
    }

    #[inline(always)]
    unsafe fn load_high_nibbles(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()));
            Self::to_floats([_mm256_srli_epi32::<4>(low), _mm256_srli_epi32::<4>(high)])
        }
    }

    #[inline(always)]
    unsafe fn store_f32(value: Self::Floats, to: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            _mm256_storeu_ps(to, value[0]);
            _mm256_storeu_ps(to.add(8), value[1]);
        }
    }

    #[inline(always)]
    unsafe fn largest_magnitude(values: &[f32; 32]) -> f32 {
        // SAFETY: the trait's contract; the loads are within the array.
        unsafe {
            let mut largest = _mm256_setzero_si256();
            let mut at = 0;
            while at < 32 {
                let bits = _mm256_loadu_si256(values[at..].as_ptr().cast());
                let magnitudes = _mm256_and_si256(bits, _mm256_set1_epi32(MAGNITUDE as i32));
                largest = _mm256_max_epu32(largest, magnitudes);
                at += 8;
            }
            let (low, high) =
                (_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
            let four = _mm_max_epu32(low, high);
            let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b00_00_11_10>(four));
            let one = _mm_max_epu32(two, _mm_shuffle_epi32::<0b00_00_00_01>(two));
            f32::from_bits(_mm_cvtsi128_si32(one) as u32)
        }
    }

    #[inline(always)]
    unsafe fn round(values: &[f32; 32], factor: f32, to: &mut [i8; 32]) -> [i32; 2] {
        let mut sums = [0; 2];
        let mut half = 0;
        while half < 2 {
            // SAFETY: the trait's contract; loads and stores are within the arrays.
            unsafe {
                let mut pair = [_mm256_setzero_si256(); 2];
                let mut i = 0;
                while i < 2 {
                    let values = _mm256_loadu_ps(values[16 * half + 8 * i..].as_ptr());
                    let scaled = _mm256_mul_ps(values, _mm256_set1_ps(factor));
                    let rounded = _mm256_add_ps(scaled, _mm256_set1_ps(ROUNDER));
                    let bits = _mm256_castps_si256(rounded);
                    pair[i] = _mm256_sub_epi32(bits, _mm256_set1_epi32(ROUNDER.to_bits() as i32));
                    i += 1;
                }
                // Packing goes within the halves of a register; the permutation sorts the quarters.
                let words = _mm256_packs_epi32(pair[0], pair[1]);
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                let (low, high) =
                    (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
                let bytes = _mm_packs_epi16(low, high);
                _mm_storeu_si128(to[16 * half..].as_mut_ptr().cast(), bytes);
                sums[half] = sum_bytes(bytes);
            }
            half += 1;
        }
        sums
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: prefetches do not fault.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(from.cast());
        }
    }
}
