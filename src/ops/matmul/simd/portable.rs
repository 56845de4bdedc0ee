//! [`Simd`] in plain Rust, for processors without anything better and as the reference of the
//! others.

use half::{bf16, f16};

use super::{LANES, MAGNITUDE, ROUNDER, Simd};

#[derive(Clone, Copy)]
pub(in super::super) struct Portable;

#[inline(always)]
fn lanes<T: Copy + Default, A: Copy>(a: [A; LANES], f: impl Fn(A) -> T) -> [T; LANES] {
    let mut result = [T::default(); LANES];
    for (result, a) in result.iter_mut().zip(a) {
        *result = f(a);
    }
    result
}

/// # Safety
/// `from` points to `N` bytes.
#[inline(always)]
unsafe fn read<const N: usize>(from: *const u8) -> [u8; N] {
    // SAFETY: the caller's promise; byte arrays need no alignment.
    unsafe { from.cast::<[u8; N]>().read() }
}

impl Simd for Portable {
    type Bytes = [u8; 64];
    type Activations = [i8; 4];
    type Ints = [i32; LANES];
    type Floats = [f32; LANES];

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
        // SAFETY: the caller's promise.
        unsafe { read(from) }
    }

    #[inline(always)]
    unsafe fn store_bytes(value: Self::Bytes, to: *mut u8) {
        // SAFETY: the caller's promise; byte arrays need no alignment.
        unsafe { to.cast::<[u8; 64]>().write(value) };
    }

    #[inline(always)]
    unsafe fn shift_and_mask(mut value: Self::Bytes, left: i32, mask: u8) -> Self::Bytes {
        for byte in &mut value {
            *byte = (if left < 0 { *byte >> -left } else { *byte << left }) & mask;
        }
        value
    }

    #[inline(always)]
    unsafe fn or(mut a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        for (a, b) in a.iter_mut().zip(b) {
            *a |= b;
        }
        a
    }

    #[inline(always)]
    unsafe fn widen(value: Self::Bytes) -> Self::Bytes {
        value
    }

    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::Ints {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load_activations(from: *const i8) -> Self::Activations {
        // SAFETY: the caller's promise; byte arrays need no alignment.
        unsafe { from.cast::<[i8; 4]>().read() }
    }

    #[inline(always)]
    unsafe fn dot(mut sum: Self::Ints, weights: Self::Bytes, x: Self::Activations) -> Self::Ints {
        for (lane, weights) in sum.iter_mut().zip(weights.chunks_exact(4)) {
            for (&weight, &x) in weights.iter().zip(&x) {
                *lane += i32::from(weight) * i32::from(x);
            }
        }
        sum
    }

    #[inline(always)]
    unsafe fn dot_wide(sum: Self::Ints, weights: Self::Bytes, x: Self::Activations) -> Self::Ints {
        // SAFETY: the caller's promise.
        unsafe { Self::dot(sum, weights, x) }
    }

    #[inline(always)]
    unsafe fn begin_wide(correction: i32) -> Self::Ints {
        [correction; LANES]
    }

    #[inline(always)]
    unsafe fn to_floats(value: Self::Ints) -> Self::Floats {
        lanes(value, |lane| lane as f32)
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Floats {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn mul(mut a: Self::Floats, b: Self::Floats) -> Self::Floats {
        for (a, b) in a.iter_mut().zip(b) {
            *a *= b;
        }
        a
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, mut c: Self::Floats) -> Self::Floats {
        for (c, (a, b)) in c.iter_mut().zip(a.into_iter().zip(b)) {
            *c = a.mul_add(b, *c);
        }
        c
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self::Floats {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Floats {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes(bits, |bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self::Floats {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        lanes(bits, |bits| {
            let bits = u16::from(bits);
            f16::from_bits((bits & 0x80) << 8 | (bits & 0x7f) << 7).to_f32()
        })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::Floats {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes(bits, |bits| bf16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Floats {
        // SAFETY: the caller's promise.
        lanes(unsafe { read::<LANES>(from) }, |byte| f32::from(byte as i8))
    }

    #[inline(always)]
    unsafe fn load_low_nibbles(from: *const u8) -> Self::Floats {
        // SAFETY: the caller's promise.
        lanes(unsafe { read::<LANES>(from) }, |byte| f32::from(byte & 15))
    }

    #[inline(always)]
    unsafe fn load_high_nibbles(from: *const u8) -> Self::Floats {
        // SAFETY: the caller's promise.
        lanes(unsafe { read::<LANES>(from) }, |byte| f32::from(byte >> 4))
    }

    #[inline(always)]
    unsafe fn store_f32(value: Self::Floats, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(value) };
    }

    #[inline(always)]
    unsafe fn largest_magnitude(values: &[f32; 32]) -> f32 {
        f32::from_bits(values.iter().fold(0, |max, value| max.max(value.to_bits() & MAGNITUDE)))
    }

    #[inline(always)]
    unsafe fn round(values: &[f32; 32], factor: f32, to: &mut [i8; 32]) -> [i32; 2] {
        let mut sums = [0; 2];
        for (i, (value, to)) in values.iter().zip(to).enumerate() {
            *to = (value * factor + ROUNDER).to_bits() as i8;
            sums[i / 16] += i32::from(*to);
        }
        sums
    }

    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
}
