//! The operations with AVX2, FMA and F16C: a vector is two registers.
#![expect(clippy::cast_ptr_alignment, reason = "the loads are unaligned ones")]

use std::arch::x86_64::{
    __m128i, __m256, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0,
    _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadl_epi64, _mm_loadu_si128, _mm_max_ps,
    _mm_max_ss, _mm_movehdup_ps, _mm_movehl_ps, _mm_prefetch, _mm_set1_epi16, _mm256_add_epi32,
    _mm256_add_ps, _mm256_and_si256, _mm256_andnot_ps, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cmpeq_epi16, _mm256_cvtepi8_epi16,
    _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps,
    _mm256_cvtps_epi32, _mm256_div_ps, _mm256_extractf128_ps, _mm256_extracti128_si256,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_or_si256,
    _mm256_permute2f128_ps, _mm256_round_ps, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_slli_epi16, _mm256_slli_epi32, _mm256_storeu_ps,
    _mm256_sub_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

type Pair = [__m256; 2];

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn run<K: Kernel>(token: Avx2, kernel: K) -> K::Output {
            kernel.run(token)
        }
        // SAFETY: the token is made by `detect` only.
        unsafe { run(self, kernel) }
    }
}

impl Simd for Avx2 {
    type V = Pair;
    const PRODUCT_ROWS: usize = 3;

    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, values: &[f32]) -> Pair {
        let values = &values[..LANES];
        // SAFETY: the slice has 16 values; the token is made by `detect` only.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn load_f16(self, values: &[f16]) -> Pair {
        let values = values[..LANES].as_ptr().cast::<__m128i>();
        // SAFETY: the slice has 16 values; the token is made by `detect` only.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(values)),
                _mm256_cvtph_ps(_mm_loadu_si128(values.add(1))),
            ]
        }
    }

    #[inline(always)]
    fn load_bf16(self, values: &[bf16]) -> Pair {
        let values = values[..LANES].as_ptr().cast::<__m128i>();
        // SAFETY: the slice has 16 values; the token is made by `detect` only.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(values));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(values.add(1)));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }

    #[inline(always)]
    fn load_e4m3(self, values: &[u8]) -> Pair {
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
            let half = _mm256_or_si256(half, is_nan);
            let low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half));
            let factor = _mm256_set1_ps(256.0);
            [_mm256_mul_ps(low, factor), _mm256_mul_ps(high, factor)]
        }
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8]) -> Pair {
        let values = &values[..LANES];
        // SAFETY: the slice has 16 values; the token is made by `detect` only.
        unsafe {
            let low = _mm_loadl_epi64(values.as_ptr().cast());
            let high = _mm_loadl_epi64(values.as_ptr().add(8).cast());
            [low, high].map(|eight| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)))
        }
    }

    #[inline(always)]
    fn splat_f16(self, value: f16) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_cvtph_ps(_mm_set1_epi16(value.to_bits() as i16)); 2] }
    }

    #[inline(always)]
    fn store(self, values: &mut [f32], v: Pair) {
        let values = &mut values[..LANES];
        // SAFETY: the slice has 16 places; the token is made by `detect` only.
        unsafe {
            _mm256_storeu_ps(values.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(values.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: Pair, b: Pair, c: Pair) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn round(self, a: Pair) -> Pair {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: the token is made by `detect` only.
        unsafe { [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])] }
    }

    #[inline(always)]
    fn exp2_of_integer(self, n: Pair) -> Pair {
        // SAFETY: the token is made by `detect` only.
        n.map(|n| unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        })
    }

    #[inline(always)]
    fn zero_below(self, x: Pair, limit: Pair, value: Pair) -> Pair {
        // SAFETY: the token is made by `detect` only.
        unsafe {
            let below = [
                _mm256_cmp_ps::<_CMP_LT_OQ>(x[0], limit[0]),
                _mm256_cmp_ps::<_CMP_LT_OQ>(x[1], limit[1]),
            ];
            [_mm256_andnot_ps(below[0], value[0]), _mm256_andnot_ps(below[1], value[1])]
        }
    }

    #[inline(always)]
    fn sum_of_lanes(self, v: Pair) -> f32 {
        // SAFETY: the token is made by `detect` only.
        unsafe {
            let eight = _mm256_add_ps(v[0], v[1]);
            let (low, high) = (_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let four = _mm_add_ps(low, high);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn max_of_lanes(self, v: Pair) -> f32 {
        // SAFETY: the token is made by `detect` only.
        unsafe {
            let eight = _mm256_max_ps(v[0], v[1]);
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
    fn transpose(self, rows: &mut [Pair; LANES]) {
        let mut blocks = [[self.splat(0.0)[0]; 8]; 4];
        for (index, block) in blocks.iter_mut().enumerate() {
            *block =
                transpose_8x8(self, std::array::from_fn(|i| rows[index / 2 * 8 + i][index % 2]));
        }
        for i in 0..8 {
            rows[i] = [blocks[0][i], blocks[2][i]];
            rows[i + 8] = [blocks[1][i], blocks[3][i]];
        }
    }
}

#[inline(always)]
fn transpose_8x8(_proof: Avx2, rows: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the token is made by `detect` only.
    unsafe {
        // Within each 128-bit half, 4x4 blocks are transposed; then the halves change places.
        let mut t = [_mm256_setzero_ps(); 8];
        for i in [0, 4] {
            let low01 = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            let high01 = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
            let low23 = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]);
            let high23 = _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
            t[i] = _mm256_shuffle_ps::<0x44>(low01, low23);
            t[i + 1] = _mm256_shuffle_ps::<0xee>(low01, low23);
            t[i + 2] = _mm256_shuffle_ps::<0x44>(high01, high23);
            t[i + 3] = _mm256_shuffle_ps::<0xee>(high01, high23);
        }
        let mut columns = [_mm256_setzero_ps(); 8];
        for j in 0..4 {
            columns[j] = _mm256_permute2f128_ps::<0x20>(t[j], t[j + 4]);
            columns[j + 4] = _mm256_permute2f128_ps::<0x31>(t[j], t[j + 4]);
        }
        columns
    }
}
