//! From the rows of a file to the tiles that a card reads.

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use super::layout::{PackedFormat, SUPER_TILES, Scales, TILE_COLS, TILE_ROWS};
use crate::ops::fp8_weights::{SCALED_COLS, split_row};
use crate::ops::gguf_blocks::{QuantBlock, block_layout, read_block};
use crate::ops::row_format::RowFormat;

/// Lanes of a warp.
const LANES: usize = 32;
/// Products of 16 columns in a tile.
const PRODUCTS: usize = 4;
/// Pairs of integers that a lane has in a tile.
const PAIRS: usize = 16;

/// Integers, or floats of eight bits, of a row of tiles before they take their places.
pub(super) struct RowTile {
    num_tiles: usize,
    /// `[TILE_ROWS][num_tiles * TILE_COLS]`
    quants: Vec<u8>,
}

impl RowTile {
    /// Room for rows of so many tiles.
    pub(super) fn new(num_tiles: usize) -> Self {
        Self { num_tiles, quants: vec![0; TILE_ROWS * num_tiles * TILE_COLS] }
    }

    /// Packs up to sixteen rows into zeroed bytes; a missing row has weights of zero.
    pub(super) fn pack(
        &mut self,
        format: &PackedFormat,
        (from, num_cols): (RowFormat, usize),
        rows: &[Option<&[u8]>; TILE_ROWS],
        to: &mut [u8],
    ) {
        // Where nothing is written below, scales are zero and weights need only be numbers.
        self.quants.fill(0);
        for (row, data) in rows.iter().enumerate() {
            let Some(data) = data else { continue };
            let place = Place { format, row, num_tiles: self.num_tiles };
            match from {
                RowFormat::Gguf(dtype) => self.put_blocks(&place, dtype, data, to),
                RowFormat::Fp8 => self.put_fp8(&place, split_row(data, num_cols), to),
            }
        }
        let tiles =
            to[..self.num_tiles * format.tile_bytes()].chunks_exact_mut(format.tile_bytes());
        for (tile, to) in tiles.enumerate() {
            for lane in 0..LANES {
                put_integers(format, self.pairs(format, tile, lane), lane, to);
            }
        }
    }

    fn put_blocks(&mut self, place: &Place<'_>, dtype: GgmlDType, data: &[u8], to: &mut [u8]) {
        let run_len = block_layout(dtype).expect("an integer format").run_len;
        let block_len = dtype.block_size();
        let mut block = QuantBlock::default();
        for (index, bytes) in data.chunks_exact(dtype.type_size()).enumerate() {
            read_block(dtype, bytes, &mut block);
            let first = index * block_len;
            self.row_mut(place.row)[first..first + block_len]
                .copy_from_slice(&block.quants[..block_len]);
            place.put_superscales(&block, first, to);
            for run in 0..block_len / run_len {
                place.put_scales(&block, (first, run), to);
            }
        }
    }

    fn put_fp8(&mut self, place: &Place<'_>, row: (Vec<f32>, &[u8]), to: &mut [u8]) {
        let (scales, weights) = row;
        self.row_mut(place.row)[..weights.len()].copy_from_slice(weights);
        let (g, half) = place.row();
        for tile in 0..self.num_tiles {
            let at = tile * place.format.tile_bytes() + place.format.integer_bytes();
            let at = at + g * 8 + half * 4;
            let scale = scales[tile * TILE_COLS / SCALED_COLS];
            to[at..at + 4].copy_from_slice(&scale.to_le_bytes());
        }
    }

    fn row_mut(&mut self, row: usize) -> &mut [u8] {
        let width = self.num_tiles * TILE_COLS;
        &mut self.quants[row * width..(row + 1) * width]
    }

    /// A lane's integers in the order of its products, the first of a pair in the low half.
    fn pairs(&self, format: &PackedFormat, tile: usize, lane: usize) -> [u32; PAIRS] {
        let (g, t) = (lane / 4, lane % 4);
        let width = self.num_tiles * TILE_COLS;
        let mut pairs = [0; PAIRS];
        for product in 0..PRODUCTS {
            let column = tile * TILE_COLS
                + match format.run_len() {
                    32 => product / 2 * 32 + t * 8 + product % 2 * 4,
                    _ => product * 16 + t * 4,
                };
            for half in 0..2 {
                let four = &self.quants[(g + 8 * half) * width + column..][..4];
                pairs[product * 4 + half] = u32::from(four[0]) | u32::from(four[1]) << 16;
                pairs[product * 4 + half + 2] = u32::from(four[2]) | u32::from(four[3]) << 16;
            }
        }
        pairs
    }
}

/// Packs rows of floats as `bf16`, each `row_stride` values from the next, into zeroed bytes.
pub(super) fn pack_dense(
    from: RowFormat,
    rows: &[Option<&[u8]>],
    row_stride: usize,
    to: &mut [u8],
) {
    for (row, to) in rows.iter().zip(to.chunks_exact_mut(row_stride * 2)) {
        let bytes = row.unwrap_or_default();
        let mut put = |column: usize, value: bf16| {
            to[2 * column..2 * column + 2].copy_from_slice(&value.to_le_bytes());
        };
        match from {
            RowFormat::Gguf(GgmlDType::F32) => {
                for (column, value) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    put(column, bf16::from_f32(f32::from_le_bytes(*value)));
                }
            }
            RowFormat::Gguf(GgmlDType::F16) => {
                for (column, value) in bytes.as_chunks::<2>().0.iter().enumerate() {
                    put(column, bf16::from_f32(f16::from_le_bytes(*value).to_f32()));
                }
            }
            _ => to[..bytes.len()].copy_from_slice(bytes),
        }
    }
}

/// One lane's words of a tile: first four words of each lane, then four more, or a pair, or one.
fn put_integers(format: &PackedFormat, pairs: [u32; PAIRS], lane: usize, to: &mut [u8]) {
    let mut words = [0_u32; 8];
    match format.bits {
        // Of four columns the first two in the lower bytes of half words, the others in the upper.
        _ if format.scales == Scales::Single => {
            for (index, word) in words.iter_mut().enumerate() {
                let first = index / 2 * 4 + index % 2;
                *word = pairs[first] | pairs[first + 2] << 8;
            }
        }
        2 => pack_fields::<2>(pairs, &mut words),
        3 => pack_fields::<3>(pairs, &mut words),
        4 => pack_fields::<4>(pairs, &mut words),
        5 => pack_fields::<5>(pairs, &mut words),
        6 => pack_fields::<6>(pairs, &mut words),
        _ => {
            pack_fields::<4>(pairs.map(|pair| pair & 0x000f_000f), &mut words);
            pack_fields::<4>(pairs.map(|pair| pair >> 4 & 0x000f_000f), &mut words[4..]);
        }
    }
    let (mut first, mut plane) = (0, 0);
    for num_words in [4, 4, 2, 1] {
        if first + num_words <= format.bits {
            for (i, word) in words[first..first + num_words].iter().enumerate() {
                let at = plane + (lane * num_words + i) * 4;
                to[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            first += num_words;
            plane += num_words * 4 * LANES;
        }
    }
}

/// Fields of `bits` bits in half words, as many as fit, each turned so that a rotation brings it to
/// the top of the seven bits of a mantissa; then the pairs that are left, in the bits that are.
fn pack_fields<const BITS: usize>(pairs: [u32; PAIRS], words: &mut [u32]) {
    let fields = 16 / BITS;
    for (word, pairs) in words.iter_mut().zip(pairs.chunks_exact(fields)).take(BITS) {
        for (field, pair) in pairs.iter().enumerate() {
            *word |= (pair << (7 - BITS)).rotate_left((field * BITS) as u32);
        }
    }
    match BITS {
        3 | 5 => {
            for (i, word) in words[..BITS].iter_mut().enumerate() {
                *word |= (pairs[15] >> i & 0x0001_0001) << (6 - BITS);
            }
        }
        6 => {
            for (m, pair) in pairs[12..].iter().enumerate() {
                let (low, high) = ([0, 2, 3, 5][m], [1, 1, 4, 4][m]);
                words[low] |= ((pair & 0x000f_000f) << 1).rotate_left(12);
                words[high] |= ((pair >> 4 & 0x0003_0003) << 5).rotate_left([8, 10][m % 2]);
            }
        }
        _ => {}
    }
}

/// Where the scales of a row of the tile go.
struct Place<'a> {
    format: &'a PackedFormat,
    row: usize,
    num_tiles: usize,
}

impl Place<'_> {
    /// Row within eight, and which of the two rows of a lane.
    fn row(&self) -> (usize, usize) {
        (self.row % 8, self.row / 8)
    }

    fn put_superscales(&self, block: &QuantBlock, column: usize, to: &mut [u8]) {
        let (g, half) = self.row();
        let index = column / (SUPER_TILES * TILE_COLS);
        let from = self.num_tiles * self.format.tile_bytes() + index * self.format.super_bytes();
        match self.format.scales {
            Scales::Half | Scales::HalfMin | Scales::Single => {}
            Scales::SuperHalves => put_half(&mut to[from + g * 4 + half * 2..], block.scale),
            Scales::SuperMin | Scales::SuperNibbles => {
                put_half(&mut to[from + g * 8 + half * 4..], block.scale);
                put_half(&mut to[from + g * 8 + half * 4 + 2..], block.min);
            }
        }
    }

    /// The scales of one run of the block that begins at `column`.
    fn put_scales(&self, block: &QuantBlock, (column, run): (usize, usize), to: &mut [u8]) {
        let (g, half) = self.row();
        let column = column + run * self.format.run_len();
        let group = column % TILE_COLS / self.format.run_len();
        let tile = column / TILE_COLS * self.format.tile_bytes();
        let to = &mut to[tile + self.format.integer_bytes()..];
        let (scale, min) = (block.run_scales[run], block.run_mins[run]);
        match self.format.scales {
            Scales::Half => put_half(&mut to[g * 8 + group * 4 + half * 2..], block.scale),
            Scales::HalfMin => {
                put_half(&mut to[g * 16 + group * 8 + half * 4..], block.scale);
                put_half(&mut to[g * 16 + group * 8 + half * 4 + 2..], block.min);
            }
            Scales::SuperMin => {
                let at = g * 8 + group * 4 + half * 2;
                to[at..at + 2].copy_from_slice(&[scale.cast_unsigned(), min]);
            }
            Scales::SuperHalves => to[g * 8 + group * 2 + half] = scale.cast_unsigned() ^ 0x80,
            Scales::Single => {}
            Scales::SuperNibbles => {
                to[g * 8 + group * 2 + half] = scale.cast_unsigned() | min << 4;
            }
        }
    }
}

fn put_half(to: &mut [u8], value: f32) {
    to[..2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}
