//! The operations in plain Rust, for machines without an implementation of their own.

use half::{bf16, f16};

use super::{LANES, Simd};

/// No special instructions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Portable;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
    }
    lanes[0]
}

impl Simd for Portable {
    type V = [f32; LANES];
    const PRODUCT_ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, values: &[f32]) -> Self::V {
        std::array::from_fn(|i| values[i])
    }

    #[inline(always)]
    fn load_f16(self, values: &[f16]) -> Self::V {
        std::array::from_fn(|i| values[i].to_f32())
    }

    #[inline(always)]
    fn load_bf16(self, values: &[bf16]) -> Self::V {
        std::array::from_fn(|i| values[i].to_f32())
    }

    #[inline(always)]
    fn load_e4m3(self, values: &[u8]) -> Self::V {
        std::array::from_fn(|i| {
            let bits = u16::from(values[i]);
            // The numbers of half precision with these exponents are smaller by 2^8.
            let half = f16::from_bits((bits & 0x80) << 8 | (bits & 0x7f) << 7);
            if bits & 0x7f == 0x7f { f32::NAN } else { half.to_f32() * 256.0 }
        })
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8]) -> Self::V {
        std::array::from_fn(|i| f32::from(values[i]))
    }

    #[inline(always)]
    fn splat_f16(self, value: f16) -> Self::V {
        [value.to_f32(); LANES]
    }

    #[inline(always)]
    fn store(self, values: &mut [f32], v: Self::V) {
        values[..LANES].copy_from_slice(&v);
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Without the instruction, a fused operation would be a slow library call.
        const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        std::array::from_fn(|i| if FUSED { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] })
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // Adding and taking away 1.5 * 2^23 rounds |a| < 2^22 to an integer.
        const MAGIC: f32 = 12_582_912.0;
        a.map(|a| (a + MAGIC) - MAGIC)
    }

    #[inline(always)]
    fn exp2_of_integer(self, n: Self::V) -> Self::V {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) << 23) as u32))
    }

    #[inline(always)]
    fn zero_below(self, x: Self::V, limit: Self::V, value: Self::V) -> Self::V {
        std::array::from_fn(|i| if x[i] < limit[i] { 0.0 } else { value[i] })
    }

    #[inline(always)]
    fn sum_of_lanes(self, v: Self::V) -> f32 {
        fold(v, |a, b| a + b)
    }

    #[inline(always)]
    fn max_of_lanes(self, v: Self::V) -> f32 {
        fold(v, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn prefetch<T>(self, _values: &[T]) {}

    #[inline(always)]
    fn transpose(self, rows: &mut [Self::V; LANES]) {
        *rows = std::array::from_fn(|i| std::array::from_fn(|j| rows[j][i]));
    }
}
