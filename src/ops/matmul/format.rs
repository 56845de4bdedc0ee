//! How packed weights lie in memory.
//!
//! A panel holds sixteen rows. Its integers come first, block after block of 32 columns; its scales
//! follow. The integers of a block are eight groups of 64 bytes, each the same four columns of all
//! sixteen rows:
//!
//! ```text
//! group g:   row 0: k=4g..4g+4 | row 1: k=4g..4g+4 | ... | row 15: k=4g..4g+4
//! ```
//!
//! Eight-bit formats store the groups as they are. The others take each byte of all groups apart
//! and store the parts:
//!
//! ```text
//! nibbles  4 vectors: vector i holds the low four bits of groups i (low half of a byte) and i + 4
//! pairs    2 vectors: vector i holds two bits of groups 4i (lowest), 4i + 1, 4i + 2 and 4i + 3
//! plane    1 vector:  bit g is one bit of group g
//!
//! 2 bits = pairs            3 bits = pairs, plane       4 bits = nibbles
//! 5 bits = nibbles, plane   6 bits = nibbles, pairs
//! ```
//!
//! Scales are those of the file, so that a packed matrix is about as large as its file and loses
//! nothing.

use candle_core::quantized::GgmlDType;

use super::RowFormat;
use super::simd::{LANES, Simd};

/// Columns in a block.
pub(super) const BLOCK: usize = 32;
/// Groups of four columns in a block.
pub(super) const GROUPS: usize = 8;
/// Bytes of a group.
pub(super) const GROUP_BYTES: usize = 64;
/// Blocks of 32 in the 256 columns that share a scale in the k-formats.
pub(super) const SUPER: usize = 8;

/// Which scales a panel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScaleKind {
    /// An `f16` a block.
    Half,
    /// An `f16` scale and an `f16` minimum a block.
    HalfMin,
    /// An `f32` a block.
    Single,
    /// For 256 columns an `f16` scale and minimum, for each block an eight-bit scale and minimum.
    SuperMin,
    /// For 256 columns an `f16` scale, for each 16 an eight-bit signed scale.
    SuperHalves,
    /// For 256 columns an `f16` scale and minimum, for each 16 a byte of two nibbles, scale and
    /// minimum.
    SuperNibbles,
}

impl ScaleKind {
    /// Columns that one entry of [`ScaleKind::entry_bytes`] is for.
    const fn entry_blocks(self) -> usize {
        match self {
            Self::Half | Self::HalfMin | Self::Single => 1,
            Self::SuperMin | Self::SuperHalves | Self::SuperNibbles => SUPER,
        }
    }

    const fn entry_bytes(self) -> usize {
        match self {
            Self::Half => 2 * LANES,
            Self::HalfMin | Self::Single => 4 * LANES,
            Self::SuperMin | Self::SuperNibbles => (4 + 2 * SUPER) * LANES,
            Self::SuperHalves => (2 + 2 * SUPER) * LANES,
        }
    }

    /// Bytes of a block of integers and its share of the scales.
    const fn block_bytes(self, bits: usize) -> usize {
        bits * GROUP_BYTES + self.entry_bytes() / self.entry_blocks()
    }

    /// Bytes of the scales of a panel.
    pub(super) const fn num_bytes(self, num_blocks: usize) -> usize {
        num_blocks / self.entry_blocks() * self.entry_bytes()
    }
}

/// The bits and scales that a format of integers is packed to, or nothing for floats.
pub(super) fn packed_layout(format: RowFormat) -> Option<(usize, ScaleKind)> {
    match format.gguf()? {
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => None,
        GgmlDType::Q4_0 => Some((4, ScaleKind::Half)),
        GgmlDType::Q4_1 => Some((4, ScaleKind::HalfMin)),
        GgmlDType::Q5_0 => Some((5, ScaleKind::Half)),
        GgmlDType::Q5_1 => Some((5, ScaleKind::HalfMin)),
        GgmlDType::Q8_0 | GgmlDType::Q8_1 => Some((8, ScaleKind::Half)),
        GgmlDType::Q2K => Some((2, ScaleKind::SuperNibbles)),
        GgmlDType::Q3K => Some((3, ScaleKind::SuperHalves)),
        GgmlDType::Q4K => Some((4, ScaleKind::SuperMin)),
        GgmlDType::Q5K => Some((5, ScaleKind::SuperMin)),
        GgmlDType::Q6K => Some((6, ScaleKind::SuperHalves)),
        GgmlDType::Q8K => Some((8, ScaleKind::Single)),
    }
}

/// Bytes of a panel, its scales included: a whole number of cache lines.
pub(super) const fn panel_bytes(bits: usize, kind: ScaleKind, num_blocks: usize) -> usize {
    (num_blocks * bits * GROUP_BYTES + kind.num_bytes(num_blocks)).next_multiple_of(64)
}

/// A packed format as the kernels see it: `weight = scale * (q - offset)` or `scale * q - min`.
///
/// # Safety
/// As for [`Simd`]; `scales` points to the scales of a panel that has a block `block`, and `half`
/// is below [`Format::HALVES`].
pub(super) trait Format {
    /// Bits of an integer.
    const BITS: usize;
    /// Scales in a block of 32: one, or two for 16 columns each.
    const HALVES: usize;
    /// The offset is this power of two; formats with a minimum have none.
    const OFFSET_LOG2: u32;
    /// Whether there is a minimum to subtract.
    const HAS_MIN: bool;
    /// Bytes of a block, its share of the scales included.
    const BLOCK_BYTES: usize;
    /// Whether the weights come from memory rather than from a cache.
    const IS_STREAMED: bool = true;
    /// The same format with integers as bytes and scales as `f32`.
    type Unpacked: Format;

    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, half: usize) -> S::Floats;
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, half: usize) -> S::Floats;
}

/// [`ScaleKind::Half`].
pub(super) struct Half<const BITS: usize, const OFFSET_LOG2: u32>;

impl<const BITS: usize, const OFFSET_LOG2: u32> Format for Half<BITS, OFFSET_LOG2> {
    const BITS: usize = BITS;
    const HALVES: usize = 1;
    const OFFSET_LOG2: u32 = OFFSET_LOG2;
    const HAS_MIN: bool = false;
    const BLOCK_BYTES: usize = ScaleKind::Half.block_bytes(BITS);
    type Unpacked = Unpacked<1, OFFSET_LOG2, false>;

    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, _half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(scales.add(block * 2 * LANES)) }
    }

    #[inline(always)]
    unsafe fn min<S: Simd>(_scales: *const u8, _block: usize, _half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::splat(0.0) }
    }
}

/// [`ScaleKind::HalfMin`].
pub(super) struct HalfMin<const BITS: usize>;

impl<const BITS: usize> Format for HalfMin<BITS> {
    const BITS: usize = BITS;
    const HALVES: usize = 1;
    const OFFSET_LOG2: u32 = 0;
    const HAS_MIN: bool = true;
    const BLOCK_BYTES: usize = ScaleKind::HalfMin.block_bytes(BITS);
    type Unpacked = Unpacked<1, 0, true>;

    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, _half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(scales.add(block * 4 * LANES)) }
    }

    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, _half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(scales.add(block * 4 * LANES + 2 * LANES)) }
    }
}

/// [`ScaleKind::SuperMin`]: `[scale][min]`, then `[scales][minima]` for each block.
pub(super) struct SuperMin<const BITS: usize>;

impl<const BITS: usize> Format for SuperMin<BITS> {
    const BITS: usize = BITS;
    const HALVES: usize = 1;
    const OFFSET_LOG2: u32 = 0;
    const HAS_MIN: bool = true;
    const BLOCK_BYTES: usize = ScaleKind::SuperMin.block_bytes(BITS);
    type Unpacked = Unpacked<1, 0, true>;

    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, _half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let entry = scales.add(block / SUPER * ScaleKind::SuperMin.entry_bytes());
            let small = S::load_i8(entry.add((4 + block % SUPER * 2) * LANES));
            S::mul(S::load_f16(entry), small)
        }
    }

    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, _half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let entry = scales.add(block / SUPER * ScaleKind::SuperMin.entry_bytes());
            let small = S::load_i8(entry.add((5 + block % SUPER * 2) * LANES));
            S::mul(S::load_f16(entry.add(2 * LANES)), small)
        }
    }
}

/// [`ScaleKind::SuperHalves`]: `[scale]`, then the scales of the halves of each block.
pub(super) struct SuperHalves<const BITS: usize, const OFFSET_LOG2: u32>;

impl<const BITS: usize, const OFFSET_LOG2: u32> Format for SuperHalves<BITS, OFFSET_LOG2> {
    const BITS: usize = BITS;
    const HALVES: usize = 2;
    const OFFSET_LOG2: u32 = OFFSET_LOG2;
    const HAS_MIN: bool = false;
    const BLOCK_BYTES: usize = ScaleKind::SuperHalves.block_bytes(BITS);
    type Unpacked = Unpacked<2, OFFSET_LOG2, false>;

    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let entry = scales.add(block / SUPER * ScaleKind::SuperHalves.entry_bytes());
            let small = S::load_i8(entry.add((2 + block % SUPER * 2 + half) * LANES));
            S::mul(S::load_f16(entry), small)
        }
    }

    #[inline(always)]
    unsafe fn min<S: Simd>(_scales: *const u8, _block: usize, _half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::splat(0.0) }
    }
}

/// [`ScaleKind::SuperNibbles`]: `[scale][min]`, then a byte for each half of each block.
pub(super) struct SuperNibbles<const BITS: usize>;

impl<const BITS: usize> Format for SuperNibbles<BITS> {
    const BITS: usize = BITS;
    const HALVES: usize = 2;
    const OFFSET_LOG2: u32 = 0;
    const HAS_MIN: bool = true;
    const BLOCK_BYTES: usize = ScaleKind::SuperNibbles.block_bytes(BITS);
    type Unpacked = Unpacked<2, 0, true>;

    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let entry = scales.add(block / SUPER * ScaleKind::SuperNibbles.entry_bytes());
            let small = S::load_low_nibbles(entry.add((4 + block % SUPER * 2 + half) * LANES));
            S::mul(S::load_f16(entry), small)
        }
    }

    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe {
            let entry = scales.add(block / SUPER * ScaleKind::SuperNibbles.entry_bytes());
            let small = S::load_high_nibbles(entry.add((4 + block % SUPER * 2 + half) * LANES));
            S::mul(S::load_f16(entry.add(2 * LANES)), small)
        }
    }
}

/// Bytes and `f32`: what a panel is expanded to when many tokens use it, and [`ScaleKind::Single`].
pub(super) struct Unpacked<const HALVES: usize, const OFFSET_LOG2: u32, const HAS_MIN: bool>;

impl<const HALVES: usize, const OFFSET_LOG2: u32, const HAS_MIN: bool> Format
    for Unpacked<HALVES, OFFSET_LOG2, HAS_MIN>
{
    const BITS: usize = 8;
    const HALVES: usize = HALVES;
    const OFFSET_LOG2: u32 = OFFSET_LOG2;
    const HAS_MIN: bool = HAS_MIN;
    const BLOCK_BYTES: usize = GROUPS * GROUP_BYTES + 4 * LANES;
    const IS_STREAMED: bool = false;
    type Unpacked = Self;

    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::load_f32(scales.cast::<f32>().add(unpacked_scale_at::<Self>(block, half))) }
    }

    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, half: usize) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::load_f32(scales.cast::<f32>().add(unpacked_min_at::<Self>(block, half))) }
    }
}

/// Floats before the scales of half a block of an unpacked panel.
#[inline(always)]
pub(super) fn unpacked_scale_at<F: Format>(block: usize, half: usize) -> usize {
    (block * F::HALVES * (1 + usize::from(F::HAS_MIN)) + half) * LANES
}

/// Floats before the minima of half a block of an unpacked panel.
#[inline(always)]
pub(super) fn unpacked_min_at<F: Format>(block: usize, half: usize) -> usize {
    unpacked_scale_at::<F>(block, half) + F::HALVES * LANES
}

/// Bytes of an unpacked panel with the most scales that any format has.
pub(super) const fn max_unpacked_bytes(num_blocks: usize) -> usize {
    num_blocks * (GROUPS * GROUP_BYTES + 4 * LANES * 4)
}

/// The groups of one block as bytes.
///
/// # Safety
/// As for [`Simd`]; `from` points to the integers of a block.
#[inline(always)]
pub(super) unsafe fn load_groups<S: Simd, const BITS: usize>(
    from: *const u8,
) -> [S::Bytes; GROUPS] {
    // SAFETY: the caller's promise; each format reads the `BITS` vectors that a block has.
    unsafe {
        match BITS {
            2 => pairs::<S>(from, 0),
            3 => with_plane::<S>(pairs::<S>(from, 0), from.add(2 * GROUP_BYTES), 2),
            4 => nibbles::<S>(from),
            5 => with_plane::<S>(nibbles::<S>(from), from.add(4 * GROUP_BYTES), 4),
            6 => {
                let mut groups = nibbles::<S>(from);
                let high = pairs::<S>(from.add(4 * GROUP_BYTES), 4);
                let mut g = 0;
                while g < GROUPS {
                    groups[g] = S::or(groups[g], high[g]);
                    g += 1;
                }
                groups
            }
            _ => {
                let mut groups = [S::load_bytes(from); GROUPS];
                let mut g = 1;
                while g < GROUPS {
                    groups[g] = S::load_bytes(from.add(g * GROUP_BYTES));
                    g += 1;
                }
                groups
            }
        }
    }
}

/// # Safety
/// As for [`load_groups`], four vectors.
#[inline(always)]
unsafe fn nibbles<S: Simd>(from: *const u8) -> [S::Bytes; GROUPS] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut groups = [S::load_bytes(from); GROUPS];
        let mut i = 0;
        while i < 4 {
            let both = S::load_bytes(from.add(i * GROUP_BYTES));
            groups[i] = S::shift_and_mask(both, 0, 15);
            groups[i + 4] = S::shift_and_mask(both, -4, 15);
            i += 1;
        }
        groups
    }
}

/// Two bits of each group, moved to `position`.
///
/// # Safety
/// As for [`load_groups`], two vectors.
#[inline(always)]
unsafe fn pairs<S: Simd>(from: *const u8, position: i32) -> [S::Bytes; GROUPS] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut groups = [S::load_bytes(from); GROUPS];
        let mut g = 0;
        while g < GROUPS {
            let four = S::load_bytes(from.add(g / 4 * GROUP_BYTES));
            groups[g] = S::shift_and_mask(four, position - (g % 4 * 2) as i32, 3 << position);
            g += 1;
        }
        groups
    }
}

/// Adds one bit of each group at `position`.
///
/// # Safety
/// As for [`load_groups`], one vector at `plane`.
#[inline(always)]
unsafe fn with_plane<S: Simd>(
    mut groups: [S::Bytes; GROUPS],
    plane: *const u8,
    position: i32,
) -> [S::Bytes; GROUPS] {
    // SAFETY: the caller's promise.
    unsafe {
        let plane = S::load_bytes(plane);
        let mut g = 0;
        while g < GROUPS {
            let bit = S::shift_and_mask(plane, position - g as i32, 1 << position);
            groups[g] = S::or(groups[g], bit);
            g += 1;
        }
        groups
    }
}
