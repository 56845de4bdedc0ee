//! [`Simd`] with AVX-512 F, BW and VNNI: one vector is one register.

#[allow(clippy::wildcard_imports, reason = "intrinsics carry their module in their names")]
use std::arch::x86_64::*;

use super::avx2::halves_of_e4m3;
use super::{MAGNITUDE, ROUNDER, Simd};

#[derive(Clone, Copy)]
pub(in super::super) struct Avx512;

impl Simd for Avx512 {
    type Bytes = __m512i;
    type Activations = __m512i;
    type Ints = __m512i;
    type Floats = __m512;

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_bytes(value: Self::Bytes, to: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_si512(to.cast(), value) };
    }

    #[inline(always)]
    unsafe fn shift_and_mask(value: Self::Bytes, left: i32, mask: u8) -> Self::Bytes {
        // SAFETY: the trait's contract.
        unsafe {
            let shifted = if left < 0 {
                _mm512_srl_epi16(value, _mm_cvtsi32_si128(-left))
            } else {
                _mm512_sll_epi16(value, _mm_cvtsi32_si128(left))
            };
            _mm512_and_si512(shifted, _mm512_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    unsafe fn or(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        // SAFETY: the trait's contract.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn widen(value: Self::Bytes) -> Self::Bytes {
        value
    }

    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::Ints {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    unsafe fn load_activations(from: *const i8) -> Self::Activations {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn dot(sum: Self::Ints, weights: Self::Bytes, x: Self::Activations) -> Self::Ints {
        // SAFETY: the trait's contract.
        unsafe { _mm512_dpbusd_epi32(sum, weights, x) }
    }

    #[inline(always)]
    unsafe fn dot_wide(sum: Self::Ints, weights: Self::Bytes, x: Self::Activations) -> Self::Ints {
        // SAFETY: the trait's contract.
        unsafe { Self::dot(sum, weights, x) }
    }

    #[inline(always)]
    unsafe fn begin_wide(correction: i32) -> Self::Ints {
        // SAFETY: the trait's contract.
        unsafe { Self::splat_int(correction) }
    }

    #[inline(always)]
    unsafe fn to_floats(value: Self::Ints) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtepi32_ps(value) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtph_ps(halves_of_e4m3(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_low_nibbles(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)))
        }
    }

    #[inline(always)]
    unsafe fn load_high_nibbles(from: *const u8) -> Self::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(bytes))
        }
    }

    #[inline(always)]
    unsafe fn store_f32(value: Self::Floats, to: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(to, value) };
    }

    #[inline(always)]
    unsafe fn largest_magnitude(values: &[f32; 32]) -> f32 {
        // SAFETY: the trait's contract; the loads are within the array.
        unsafe {
            let mask = _mm512_set1_epi32(MAGNITUDE as i32);
            let low = _mm512_and_si512(_mm512_loadu_si512(values.as_ptr().cast()), mask);
            let high = _mm512_and_si512(_mm512_loadu_si512(values[16..].as_ptr().cast()), mask);
            f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(low, high)))
        }
    }

    #[inline(always)]
    unsafe fn round(values: &[f32; 32], factor: f32, to: &mut [i8; 32]) -> [i32; 2] {
        let mut sums = [0; 2];
        let mut half = 0;
        while half < 2 {
            // SAFETY: the trait's contract; loads and stores are within the arrays.
            unsafe {
                let values = _mm512_loadu_ps(values[16 * half..].as_ptr());
                // Two roundings, not one, as everywhere.
                let scaled = _mm512_mul_ps(values, _mm512_set1_ps(factor));
                let rounded = _mm512_add_ps(scaled, _mm512_set1_ps(ROUNDER));
                let bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(rounded));
                _mm_storeu_si128(to[16 * half..].as_mut_ptr().cast(), bytes);
                sums[half] = super::avx2::sum_bytes(bytes);
            }
            half += 1;
        }
        sums
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: prefetches do not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) };
    }
}
