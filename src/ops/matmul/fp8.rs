//! Weights of eight-bit floats with a scale for each 128 columns: how a panel of them lies in memory,
//! and the inner loop.
//!
//! A panel is a block for each [`SCALED_COLS`] columns: sixteen scales, `f32`, then the weights
//! `[column][row]`, a byte each. Scales are 2^8 times those of the file, because a weight is widened
//! as if it were the upper half of a half-precision number: its bits fit there, its bias does not.
//!
//! **Invariant:** as in `kernel`: products of a block are added up by themselves, in ascending order
//! of columns, and blocks in ascending order, by the same operations everywhere.

use super::kernel::{PanelArgs, PanelKernel, load_tile, store_tile};
#[cfg(target_arch = "x86_64")]
use super::simd::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::simd::avx512::Avx512;
use super::simd::portable::Portable;
use super::simd::{Isa, LANES, Simd};
use crate::ops::fp8_weights::{SCALED_COLS, split_row};

const SCALES_BYTES: usize = LANES * size_of::<f32>();
const BLOCK_BYTES: usize = SCALES_BYTES + SCALED_COLS * LANES;
/// What widened weights are too small by.
const WIDENED: f32 = 256.0;
/// How far ahead of the weights in use to ask for the next ones.
const PREFETCH_BYTES: usize = 4096;
const COLUMNS_PER_LINE: usize = 64 / LANES;

/// Bytes of a panel: a whole number of cache lines.
pub(super) const fn panel_bytes(num_cols: usize) -> usize {
    (num_cols.div_ceil(SCALED_COLS) * SCALES_BYTES + num_cols * LANES).next_multiple_of(64)
}

/// Packs up to sixteen rows into a zeroed panel.
pub(super) fn pack(rows: &[&[u8]], num_cols: usize, panel: &mut [u8]) {
    for (row, data) in rows.iter().enumerate() {
        let (scales, weights) = split_row(data, num_cols);
        let blocks = panel.chunks_mut(BLOCK_BYTES).zip(weights.chunks(SCALED_COLS));
        for ((block, weights), scale) in blocks.zip(scales) {
            let at = row * size_of::<f32>();
            block[at..at + size_of::<f32>()].copy_from_slice(&(scale * WIDENED).to_le_bytes());
            for (column, weight) in weights.iter().enumerate() {
                block[SCALES_BYTES + column * LANES + row] = *weight;
            }
        }
    }
}

/// The code for groups of 1, 2, 4 and 8 tokens.
pub(super) fn by_width(isa: Isa) -> [PanelKernel; 4] {
    match isa {
        Isa::Portable => [
            fp8_panel::<Portable, 1>,
            fp8_panel::<Portable, 2>,
            fp8_panel::<Portable, 4>,
            fp8_panel::<Portable, 8>,
        ],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => [fp8_avx2::<1>, fp8_avx2::<2>, fp8_avx2::<4>, fp8_avx2::<8>],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => [fp8_avx512::<1>, fp8_avx512::<2>, fp8_avx512::<4>, fp8_avx512::<8>],
    }
}

/// # Safety
/// See [`PanelKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fp8_avx2<const T: usize>(args: &PanelArgs) {
    // SAFETY: the caller's promise.
    unsafe { fp8_panel::<Avx2<false>, T>(args) };
}

/// # Safety
/// See [`PanelKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn fp8_avx512<const T: usize>(args: &PanelArgs) {
    // SAFETY: the caller's promise.
    unsafe { fp8_panel::<Avx512, T>(args) };
}

/// # Safety
/// See [`PanelKernel`].
#[inline(always)]
unsafe fn fp8_panel<S: Simd, const T: usize>(args: &PanelArgs) {
    let x = args.x.cast::<f32>();
    // SAFETY: the caller's promise: blocks for `num_blocks` columns, and `T` activations of each.
    unsafe {
        let mut sums = load_tile::<S, T>(args.start);
        let (mut first, mut block) = (0, args.panel);
        while first < args.num_blocks {
            let num_left = args.num_blocks - first;
            let num_cols = if num_left < SCALED_COLS { num_left } else { SCALED_COLS };
            let mut products = [S::splat(0.0); T];
            let mut column = 0;
            while column < num_cols {
                let from = block.add(SCALES_BYTES + column * LANES);
                if column % COLUMNS_PER_LINE == 0 {
                    S::prefetch(from.wrapping_add(PREFETCH_BYTES));
                }
                let weights = S::load_e4m3(from);
                let x = x.add((first + column) * T);
                let mut t = 0;
                while t < T {
                    products[t] = S::mul_add(weights, S::splat(*x.add(t)), products[t]);
                    t += 1;
                }
                column += 1;
            }
            let scale = S::load_f32(block.cast());
            let mut t = 0;
            while t < T {
                sums[t] = S::mul_add(products[t], scale, sums[t]);
                t += 1;
            }
            first += num_cols;
            block = block.wrapping_add(BLOCK_BYTES);
        }
        store_tile::<S, T>(sums, args.sums);
    }
}
