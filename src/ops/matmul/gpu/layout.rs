//! Packed weights as the kernels of a card read them; drawn in `kernels/quant/formats.cuh`.
//!
//! A matrix is cut into tiles of 16 rows and 64 columns. A tile holds its integers in the order in
//! which the tensor cores take them, then the scales of the file in the file's precision.

use candle_core::quantized::GgmlDType;

use crate::ops::row_format::RowFormat;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub(super) const TILE_COLS: usize = 64;
/// Tiles that share superscales.
pub(super) const SUPER_TILES: usize = 4;

/// Which scales a tile has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scales {
    /// An `f16` for 32 columns.
    Half,
    /// An `f16` scale and an `f16` minimum for 32 columns.
    HalfMin,
    /// A byte of scale and one of minimum for 32 columns, `f16` superscales of both for 256.
    SuperMin,
    /// A byte of scale for 16 columns, an `f16` superscale for 256.
    SuperHalves,
    /// Nibbles of scale and minimum for 16 columns, `f16` superscales of both for 256.
    SuperNibbles,
    /// An `f32` for the 64 columns of a tile, whose weights are floats of eight bits.
    Single,
}

/// One packed format and the kernels that read it.
#[derive(Debug)]
pub(super) struct PackedFormat {
    pub(super) bits: usize,
    pub(super) scales: Scales,
    /// By columns of tokens and row tiles: `n1_r1`, `n1_r2`, `n1_r4`, `n8_r1`, `n8_r2`, `n16_r1`,
    /// `n16_r2`.
    pub(super) small: [&'static str; 7],
    /// By tokens of a block: 32, 64, 128.
    pub(super) large: [&'static str; 3],
    /// For experts: few choices, and rows in groups.
    pub(super) experts: [&'static str; 2],
}

impl PackedFormat {
    /// Columns that are scaled together.
    pub(super) const fn run_len(&self) -> usize {
        match self.scales {
            Scales::Half | Scales::HalfMin | Scales::SuperMin | Scales::Single => 32,
            Scales::SuperHalves | Scales::SuperNibbles => 16,
        }
    }

    /// Whether weights have a minimum.
    pub(super) const fn has_min(&self) -> bool {
        matches!(self.scales, Scales::HalfMin | Scales::SuperMin | Scales::SuperNibbles)
    }

    /// Bytes of the integers of a tile.
    pub(super) const fn integer_bytes(&self) -> usize {
        TILE_ROWS * TILE_COLS * self.bits / 8
    }

    /// Bytes of a tile.
    pub(super) const fn tile_bytes(&self) -> usize {
        let scales = if matches!(self.scales, Scales::HalfMin) { 128 } else { 64 };
        self.integer_bytes() + scales
    }

    /// Bytes of the superscales of [`SUPER_TILES`] tiles.
    pub(super) const fn super_bytes(&self) -> usize {
        match self.scales {
            Scales::Half | Scales::HalfMin | Scales::Single => 0,
            Scales::SuperHalves => 32,
            Scales::SuperMin | Scales::SuperNibbles => 64,
        }
    }

    /// Bytes of a row of tiles.
    pub(super) const fn row_tile_bytes(&self, num_tiles: usize) -> usize {
        num_tiles * self.tile_bytes() + num_tiles.div_ceil(SUPER_TILES) * self.super_bytes()
    }
}

macro_rules! format {
    ($name:literal, $bits:literal, $scales:ident) => {
        PackedFormat {
            bits: $bits,
            scales: Scales::$scales,
            small: [
                concat!("matmul_small_", $name, "_n1_r1"),
                concat!("matmul_small_", $name, "_n1_r2"),
                concat!("matmul_small_", $name, "_n1_r4"),
                concat!("matmul_small_", $name, "_n8_r1"),
                concat!("matmul_small_", $name, "_n8_r2"),
                concat!("matmul_small_", $name, "_n16_r1"),
                concat!("matmul_small_", $name, "_n16_r2"),
            ],
            large: [
                concat!("matmul_large_", $name, "_n32"),
                concat!("matmul_large_", $name, "_n64"),
                concat!("matmul_large_", $name, "_n128"),
            ],
            experts: [
                concat!("matmul_experts_small_", $name),
                concat!("matmul_experts_large_", $name),
            ],
        }
    };
}

static Q4_0: PackedFormat = format!("q4_0", 4, Half);
static Q4_1: PackedFormat = format!("q4_1", 4, HalfMin);
static Q5_0: PackedFormat = format!("q5_0", 5, Half);
static Q5_1: PackedFormat = format!("q5_1", 5, HalfMin);
static Q8_0: PackedFormat = format!("q8_0", 8, Half);
static Q2_K: PackedFormat = format!("q2_k", 2, SuperNibbles);
static Q3_K: PackedFormat = format!("q3_k", 3, SuperHalves);
static Q4_K: PackedFormat = format!("q4_k", 4, SuperMin);
static Q5_K: PackedFormat = format!("q5_k", 5, SuperMin);
static Q6_K: PackedFormat = format!("q6_k", 6, SuperHalves);
static FP8: PackedFormat = format!("fp8", 8, Single);

/// The packed format of weights in a file; nothing for floats of more than eight bits and for
/// formats without kernels.
pub(super) fn packed_format(format: RowFormat) -> Option<&'static PackedFormat> {
    let RowFormat::Gguf(dtype) = format else { return Some(&FP8) };
    Some(match dtype {
        GgmlDType::Q4_0 => &Q4_0,
        GgmlDType::Q4_1 => &Q4_1,
        GgmlDType::Q5_0 => &Q5_0,
        GgmlDType::Q5_1 => &Q5_1,
        GgmlDType::Q8_0 | GgmlDType::Q8_1 => &Q8_0,
        GgmlDType::Q2K => &Q2_K,
        GgmlDType::Q3K => &Q3_K,
        GgmlDType::Q4K => &Q4_K,
        GgmlDType::Q5K => &Q5_K,
        GgmlDType::Q6K => &Q6_K,
        GgmlDType::Q8K | GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => return None,
    })
}
