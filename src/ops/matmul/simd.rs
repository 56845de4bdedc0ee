//! What the kernels need from a processor: sixteen rows at a time, four weights of each.
//!
//! The kernels are written once over [`Simd`]; each instruction set implements some twenty
//! functions. All sets compute the same bits: integer sums are exact, and each float operation is
//! one rounding everywhere.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod portable;

/// Rows in a panel, and lanes of [`Simd::Ints`] and [`Simd::Floats`].
pub(super) const LANES: usize = 16;

/// The instruction set to compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// Nothing beyond the target's baseline.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2 and the VNNI instructions in their VEX encoding.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 F, BW and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// All that this processor has, the best one last.
    #[cfg(test)]
    pub(super) fn available() -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        for (isa, is_there) in [
            (Self::Avx2, has_avx2()),
            (Self::AvxVnni, has_avx_vnni()),
            (Self::Avx512, has_avx512()),
        ] {
            if is_there {
                found.push(isa);
            }
        }
        found
    }

    /// What processors' makers call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => "AVX-VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "AVX-512 VNNI",
        }
    }

    /// The best that this processor has.
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Self::Avx512;
            }
            if has_avx_vnni() {
                return Self::AvxVnni;
            }
            if has_avx2() {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx_vnni() -> bool {
    has_avx2() && is_x86_feature_detected!("avxvnni")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
}

/// Adding this to a number of small magnitude leaves its nearest integer in the low bits of the
/// sum.
const ROUNDER: f32 = 12_582_912.0;
/// All bits of an `f32` but the sign. Magnitudes compare as their bits do, and not-a-number is
/// above all.
const MAGNITUDE: u32 = 0x7FFF_FFFF;

/// Vectors of one instruction set.
///
/// # Safety
/// All functions may be called only where the processor has the instruction set, and are inlined
/// into a function that is compiled for it. Pointers must be valid for what the function reads or
/// writes; they need no alignment.
pub(super) trait Simd: Copy {
    /// Sixty-four bytes: four consecutive weights of each of sixteen rows.
    type Bytes: Copy;
    /// Four signed bytes for all rows.
    type Activations: Copy;
    /// Sixteen `i32`.
    type Ints: Copy;
    /// Sixteen `f32`.
    type Floats: Copy;

    unsafe fn load_bytes(from: *const u8) -> Self::Bytes;
    unsafe fn store_bytes(value: Self::Bytes, to: *mut u8);
    /// Each byte is shifted left, or right where `left` is negative, then masked. Bits that come
    /// from a neighbouring byte must be masked out.
    unsafe fn shift_and_mask(value: Self::Bytes, left: i32, mask: u8) -> Self::Bytes;
    unsafe fn or(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;

    /// What [`Simd::dot_wide`] wants instead of bytes above 127.
    unsafe fn widen(value: Self::Bytes) -> Self::Bytes;
    unsafe fn splat_int(value: i32) -> Self::Ints;
    unsafe fn load_activations(from: *const i8) -> Self::Activations;
    /// Adds to each lane the product of its four unsigned bytes, below 128, with the four signed
    /// bytes `x`.
    unsafe fn dot(sum: Self::Ints, weights: Self::Bytes, x: Self::Activations) -> Self::Ints;
    /// As [`Simd::dot`] for a sum that began with [`Simd::begin_wide`] and weights that went
    /// through [`Simd::widen`].
    unsafe fn dot_wide(sum: Self::Ints, weights: Self::Bytes, x: Self::Activations) -> Self::Ints;
    /// The beginning of a sum of `(weight - 128) * x`, given the sum of `-128 * x`.
    unsafe fn begin_wide(correction: i32) -> Self::Ints;

    unsafe fn to_floats(value: Self::Ints) -> Self::Floats;
    unsafe fn splat(value: f32) -> Self::Floats;
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c` with one rounding.
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    unsafe fn load_f32(from: *const f32) -> Self::Floats;
    unsafe fn load_f16(from: *const u8) -> Self::Floats;
    unsafe fn load_bf16(from: *const u8) -> Self::Floats;
    /// Eight-bit floats (E4M3), smaller by 2^8 than they are.
    unsafe fn load_e4m3(from: *const u8) -> Self::Floats;
    unsafe fn load_i8(from: *const u8) -> Self::Floats;
    /// The low four bits of each byte.
    unsafe fn load_low_nibbles(from: *const u8) -> Self::Floats;
    /// The high four bits of each byte.
    unsafe fn load_high_nibbles(from: *const u8) -> Self::Floats;
    unsafe fn store_f32(value: Self::Floats, to: *mut f32);
    /// The largest magnitude, or not-a-number if there is one.
    unsafe fn largest_magnitude(values: &[f32; 32]) -> f32;
    /// Rounds `values * factor`, at most 127 in magnitude, to the nearest integers. Returns the
    /// sums of both halves.
    unsafe fn round(values: &[f32; 32], factor: f32, to: &mut [i8; 32]) -> [i32; 2];
    /// Asks for the cache line, which need not exist.
    unsafe fn prefetch(from: *const u8);
}
