//! The operations with AVX-512: a vector is one register.
#![expect(clippy::cast_ptr_alignment, reason = "the loads are unaligned ones")]

use std::arch::x86_64::{
    __m128i, __m256i, __m512, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _MM_HINT_T0, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_max_ps, _mm_max_ss,
    _mm_movehdup_ps, _mm_movehl_ps, _mm_prefetch, _mm256_add_ps, _mm256_and_si256,
    _mm256_castps256_ps128, _mm256_cmpeq_epi16, _mm256_cvtepi8_epi16, _mm256_extractf128_ps,
    _mm256_loadu_si256, _mm256_max_ps, _mm256_or_si256, _mm256_set1_epi16, _mm256_slli_epi16,
    _mm512_add_ps, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps512_ps256, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_div_ps, _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_mask_blend_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_roundscale_ps,
    _mm512_scalef_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_slli_epi32,
    _mm512_storeu_ps, _mm512_sub_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps,
};

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};

/// Proof that the machine has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512(());

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        found.then_some(Self(()))
    }

    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn run<K: Kernel>(token: Avx512, kernel: K) -> K::Output {
            kernel.run(token)
        }
        // SAFETY: the token is made by `detect` only.
        unsafe { run(self, kernel) }
    }
}

impl Simd for Avx512 {
    type V = __m512;
    const PRODUCT_ROWS: usize = 8;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, values: &[f32]) -> __m512 {
        let values = &values[..LANES];
        // SAFETY: the slice has 16 values; the token is made by `detect` only.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(self, values: &[f16]) -> __m512 {
        let values = &values[..LANES];
        // SAFETY: the slice has 16 values; the token is made by `detect` only.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast::<__m256i>())) }
    }

    #[inline(always)]
    fn load_bf16(self, values: &[bf16]) -> __m512 {
        let values = &values[..LANES];
        // SAFETY: the slice has 16 values; the token is made by `detect` only.
        unsafe {
            let bits = _mm256_loadu_si256(values.as_ptr().cast::<__m256i>());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }
    }

    #[inline(always)]
    fn load_e4m3(self, values: &[u8]) -> __m512 {
        let values = values[..LANES].as_ptr().cast::<__m128i>();
        // SAFETY: the slice has 16 values; the token is made by `detect` only.
        unsafe {
            // Sign extension puts the sign where half precision has it. Numbers of the same
            // exponent are smaller there by 2^8; where all other bits are set it is a NaN.
            let wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(values));
            let magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
            let is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
            let sign = _mm256_and_si256(wide, _mm256_set1_epi16(i16::MIN));
            let half = _mm256_or_si256(sign, _mm256_slli_epi16::<7>(magnitude));
            let wide = _mm512_cvtph_ps(_mm256_or_si256(half, is_nan));
            _mm512_mul_ps(wide, _mm512_set1_ps(256.0))
        }
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8]) -> __m512 {
        let values = values[..LANES].as_ptr().cast::<__m128i>();
        // SAFETY: the slice has 16 values; the token is made by `detect` only.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(values))) }
    }

    #[inline(always)]
    fn splat_f16(self, value: f16) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(value.to_bits() as i16)) }
    }

    #[inline(always)]
    fn store(self, values: &mut [f32], v: __m512) {
        let values = &mut values[..LANES];
        // SAFETY: the slice has 16 places; the token is made by `detect` only.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_roundscale_ps::<NEAREST>(a) }
    }

    #[inline(always)]
    fn exp2_of_integer(self, n: __m512) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe { _mm512_scalef_ps(_mm512_set1_ps(1.0), n) }
    }

    #[inline(always)]
    fn zero_below(self, x: __m512, limit: __m512, value: __m512) -> __m512 {
        // SAFETY: the token is made by `detect` only.
        unsafe {
            let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, limit);
            _mm512_mask_blend_ps(below, value, _mm512_setzero_ps())
        }
    }

    #[inline(always)]
    fn sum_of_lanes(self, v: __m512) -> f32 {
        // SAFETY: the token is made by `detect` only.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let (low, high) = (_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let four = _mm_add_ps(low, high);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn max_of_lanes(self, v: __m512) -> f32 {
        // SAFETY: the token is made by `detect` only.
        unsafe {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let (low, high) = (_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let four = _mm_max_ps(low, high);
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn prefetch<T>(self, values: &[T]) {
        // SAFETY: a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().cast::<i8>()) }
    }

    #[inline(always)]
    fn transpose(self, rows: &mut [__m512; LANES]) {
        // SAFETY: the token is made by `detect` only.
        unsafe {
            // Within each 128-bit quarter: 4x4 blocks of 32-bit values are transposed.
            let mut t = [_mm512_setzero_ps(); LANES];
            for i in (0..LANES).step_by(4) {
                let low01 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
                let high01 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
                let low23 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i + 2], rows[i + 3]));
                let high23 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
                t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
                t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
                t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
                t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
            }
            // Then the 4x4 arrangement of quarters is.
            for j in 0..4 {
                let low01 = _mm512_shuffle_f32x4::<0x44>(t[j], t[j + 4]);
                let high01 = _mm512_shuffle_f32x4::<0xee>(t[j], t[j + 4]);
                let low23 = _mm512_shuffle_f32x4::<0x44>(t[j + 8], t[j + 12]);
                let high23 = _mm512_shuffle_f32x4::<0xee>(t[j + 8], t[j + 12]);
                rows[j] = _mm512_shuffle_f32x4::<0x88>(low01, low23);
                rows[j + 4] = _mm512_shuffle_f32x4::<0xdd>(low01, low23);
                rows[j + 8] = _mm512_shuffle_f32x4::<0x88>(high01, high23);
                rows[j + 12] = _mm512_shuffle_f32x4::<0xdd>(high01, high23);
            }
        }
    }
}
