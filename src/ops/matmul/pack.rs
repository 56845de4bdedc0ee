//! From the rows of a file to panels.

use candle_core::quantized::GgmlDType;
use half::f16;

use super::format::{BLOCK, GROUP_BYTES, GROUPS, SUPER, ScaleKind, packed_layout};
use super::simd::LANES;
use crate::ops::gguf_blocks::{QuantBlock, block_layout, read_block};

/// Packs up to sixteen rows of blocks into a zeroed panel.
pub(super) fn pack_quantized(dtype: GgmlDType, rows: &[&[u8]], num_cols: usize, panel: &mut [u8]) {
    let (bits, kind) = packed_layout(dtype.into()).expect("the caller packs floats otherwise");
    let run_len = block_layout(dtype).expect("an integer format").run_len;
    let block_len = dtype.block_size();
    let (quants, scales) = panel.split_at_mut(num_cols / BLOCK * bits * GROUP_BYTES);
    let mut block = QuantBlock::default();
    for (row, data) in rows.iter().enumerate() {
        for (index, bytes) in data.chunks_exact(dtype.type_size()).enumerate() {
            read_block(dtype, bytes, &mut block);
            let first = index * block_len / BLOCK;
            let integers = block.quants[..block_len].chunks_exact(BLOCK);
            for (i, integers) in integers.enumerate() {
                let to = &mut quants[(first + i) * bits * GROUP_BYTES..][..bits * GROUP_BYTES];
                put_integers(bits, integers, row, to);
            }
            put_scales(kind, &block, (first, row, block_len / run_len), scales);
        }
    }
    // Rows beyond the last have scales of zero, as the panel was zeroed.
}

/// Packs up to sixteen rows of floats into a zeroed panel, column by column.
pub(super) fn pack_dense(element_bytes: usize, rows: &[&[u8]], panel: &mut [u8]) {
    for (row, data) in rows.iter().enumerate() {
        for (column, element) in data.chunks_exact(element_bytes).enumerate() {
            let at = (column * LANES + row) * element_bytes;
            panel[at..at + element_bytes].copy_from_slice(element);
        }
    }
}

/// One row of one block; see the drawing in `format`. Four columns are one word: no operation below
/// carries from one byte to the next, because every integer has fewer bits than its place.
fn put_integers(bits: usize, integers: &[u8], row: usize, to: &mut [u8]) {
    let mut words = [0_u32; GROUPS];
    for (word, four) in words.iter_mut().zip(integers.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*four);
    }
    let mut put = |vector: usize, word: u32| {
        let at = vector * GROUP_BYTES + row * 4;
        to[at..at + 4].copy_from_slice(&word.to_le_bytes());
    };
    match bits {
        2 => put_pairs(words, 0, put),
        3 => {
            put_pairs(words.map(|word| word & lanes(3)), 0, &mut put);
            put(2, plane(words.map(|word| word >> 2 & lanes(1))));
        }
        4 => put_nibbles(words, put),
        5 => {
            put_nibbles(words.map(|word| word & lanes(15)), &mut put);
            put(4, plane(words.map(|word| word >> 4 & lanes(1))));
        }
        6 => {
            put_nibbles(words.map(|word| word & lanes(15)), &mut put);
            put_pairs(words.map(|word| word >> 4 & lanes(3)), 4, put);
        }
        _ => words.into_iter().enumerate().for_each(|(group, word)| put(group, word)),
    }
}

/// The same byte four times.
const fn lanes(byte: u32) -> u32 {
    byte * 0x0101_0101
}

fn put_nibbles(words: [u32; GROUPS], mut put: impl FnMut(usize, u32)) {
    for i in 0..4 {
        put(i, words[i] | words[i + 4] << 4);
    }
}

fn put_pairs(words: [u32; GROUPS], first: usize, mut put: impl FnMut(usize, u32)) {
    for i in 0..2 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|group| words[4 * i + group] << (2 * group));
        put(first + i, a | b | c | d);
    }
}

fn plane(words: [u32; GROUPS]) -> u32 {
    words.into_iter().enumerate().fold(0, |plane, (group, word)| plane | word << group)
}

/// The scales of a file block whose first packed block, row and number of runs are given.
fn put_scales(
    kind: ScaleKind,
    block: &QuantBlock,
    (first, row, num_runs): (usize, usize, usize),
    scales: &mut [u8],
) {
    let entry = kind.num_bytes(first);
    let scales = &mut scales[entry..];
    let mut put_half = |vector: usize, value: f32| {
        let at = (vector * LANES + row) * 2;
        scales[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    };
    match kind {
        ScaleKind::Half | ScaleKind::SuperHalves => put_half(0, block.scale),
        ScaleKind::HalfMin | ScaleKind::SuperMin | ScaleKind::SuperNibbles => {
            put_half(0, block.scale);
            put_half(1, block.min);
        }
        ScaleKind::Single => {}
    }
    for run in 0..num_runs {
        let scale = block.run_scales[run] as u8;
        match kind {
            ScaleKind::Half | ScaleKind::HalfMin => {}
            ScaleKind::Single => {
                let at = (run * LANES + row) * 4;
                scales[at..at + 4].copy_from_slice(&block.scale.to_le_bytes());
            }
            ScaleKind::SuperMin => {
                scales[(4 + 2 * run) * LANES + row] = scale;
                scales[(5 + 2 * run) * LANES + row] = block.run_mins[run];
            }
            ScaleKind::SuperHalves => scales[(2 + run) * LANES + row] = scale,
            ScaleKind::SuperNibbles => {
                scales[(4 + run) * LANES + row] = scale | block.run_mins[run] << 4;
            }
        }
    }
}

const _: () = assert!(GROUPS * 4 == BLOCK && SUPER * BLOCK == 256);
