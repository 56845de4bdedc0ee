//! The weight blocks of GGUF files, decoded.
//!
//! Every integer format is affine on short runs of weights: `weight = scale * (q - offset) - min`,
//! where `q` is an unsigned integer of two to eight bits. [`read_block`] takes one block of a file
//! apart; [`dequantize_row`] turns blocks of any format, floats included, into `f32`.

use candle_core::quantized::GgmlDType;
use candle_core::{Result, bail};
use half::{bf16, f16};

/// The most weights that one block of any format holds.
pub const MAX_BLOCK_LEN: usize = 256;

/// What the blocks of one integer format have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLayout {
    /// Bits of one integer.
    pub bits: u32,
    /// Weights that share a scale: 16 or 32.
    pub run_len: usize,
    /// Subtracted from the integer.
    pub offset: u8,
}

/// The layout of an integer format, or nothing for floats.
pub fn block_layout(dtype: GgmlDType) -> Option<BlockLayout> {
    let (bits, run_len, offset) = match dtype {
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => return None,
        GgmlDType::Q4_0 => (4, 32, 8),
        GgmlDType::Q4_1 | GgmlDType::Q4K => (4, 32, 0),
        GgmlDType::Q5_0 => (5, 32, 16),
        GgmlDType::Q5_1 | GgmlDType::Q5K => (5, 32, 0),
        GgmlDType::Q8_0 | GgmlDType::Q8_1 | GgmlDType::Q8K => (8, 32, 128),
        GgmlDType::Q2K => (2, 16, 0),
        GgmlDType::Q3K => (3, 16, 4),
        GgmlDType::Q6K => (6, 16, 32),
    };
    Some(BlockLayout { bits, run_len, offset })
}

/// One block of integer weights.
///
/// Run `i` has the scale `scale * run_scales[i]` and the minimum `min * run_mins[i]`.
#[derive(Clone, Debug)]
pub struct QuantBlock {
    /// The unsigned integers, as many as the block is long.
    pub quants: [u8; MAX_BLOCK_LEN],
    /// Scale of the block.
    pub scale: f32,
    /// Minimum of the block, subtracted from the scaled integer.
    pub min: f32,
    /// Integer scale of each run, one where the format has none.
    pub run_scales: [i8; 16],
    /// Integer minimum of each run, one where the format has none.
    pub run_mins: [u8; 16],
}

impl Default for QuantBlock {
    fn default() -> Self {
        Self {
            quants: [0; MAX_BLOCK_LEN],
            scale: 0.0,
            min: 0.0,
            run_scales: [1; 16],
            run_mins: [1; 16],
        }
    }
}

/// The bytes of `num_cols` weights in a format.
///
/// # Errors
/// If a row of that length does not consist of whole blocks.
pub fn row_bytes(dtype: GgmlDType, num_cols: usize) -> Result<usize> {
    let block_len = dtype.block_size();
    if !num_cols.is_multiple_of(block_len) {
        bail!("rows of {num_cols} weights do not consist of whole {dtype:?} blocks of {block_len}");
    }
    Ok(num_cols / block_len * dtype.type_size())
}

/// Takes one block of an integer format apart.
///
/// # Panics
/// If `bytes` is shorter than a block, or the format is one of floats.
pub fn read_block(dtype: GgmlDType, bytes: &[u8], block: &mut QuantBlock) {
    match dtype {
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => panic!("{dtype:?} has no blocks"),
        GgmlDType::Q4_0 => {
            block.scale = read_f16(bytes, 0);
            read_nibbles(&bytes[2..18], &mut block.quants);
        }
        GgmlDType::Q4_1 => {
            block.scale = read_f16(bytes, 0);
            block.min = -read_f16(bytes, 2);
            read_nibbles(&bytes[4..20], &mut block.quants);
        }
        GgmlDType::Q5_0 => {
            block.scale = read_f16(bytes, 0);
            read_nibbles(&bytes[6..22], &mut block.quants);
            add_fifth_bits(&bytes[2..6], &mut block.quants);
        }
        GgmlDType::Q5_1 => {
            block.scale = read_f16(bytes, 0);
            block.min = -read_f16(bytes, 2);
            read_nibbles(&bytes[8..24], &mut block.quants);
            add_fifth_bits(&bytes[4..8], &mut block.quants);
        }
        GgmlDType::Q8_0 => {
            block.scale = read_f16(bytes, 0);
            read_signed(&bytes[2..34], &mut block.quants);
        }
        GgmlDType::Q8_1 => {
            block.scale = read_f16(bytes, 0);
            read_signed(&bytes[4..36], &mut block.quants);
        }
        GgmlDType::Q8K => {
            block.scale = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            read_signed(&bytes[4..260], &mut block.quants);
        }
        GgmlDType::Q2K => read_q2k(bytes, block),
        GgmlDType::Q3K => read_q3k(bytes, block),
        GgmlDType::Q4K => read_q4k(bytes, block),
        GgmlDType::Q5K => read_q5k(bytes, block),
        GgmlDType::Q6K => read_q6k(bytes, block),
    }
}

/// Turns the blocks of a row into numbers.
///
/// # Errors
/// If `data` is not exactly `out.len()` weights long, or that is no number of whole blocks.
pub fn dequantize_row(dtype: GgmlDType, data: &[u8], out: &mut [f32]) -> Result<()> {
    let num_bytes = row_bytes(dtype, out.len())?;
    if data.len() != num_bytes {
        bail!("a row of {} {dtype:?} weights has {num_bytes} bytes, not {}", out.len(), data.len());
    }
    let elements = out.iter_mut();
    match dtype {
        GgmlDType::F32 => {
            for (value, bytes) in elements.zip(data.chunks_exact(4)) {
                *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        }
        GgmlDType::F16 => {
            for (value, bytes) in elements.zip(data.chunks_exact(2)) {
                *value = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }
        }
        GgmlDType::BF16 => {
            for (value, bytes) in elements.zip(data.chunks_exact(2)) {
                *value = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }
        }
        _ => dequantize_blocks(dtype, data, out),
    }
    Ok(())
}

fn dequantize_blocks(dtype: GgmlDType, data: &[u8], out: &mut [f32]) {
    let layout = block_layout(dtype).expect("floats are handled by the caller");
    let mut block = QuantBlock::default();
    let blocks = data.chunks_exact(dtype.type_size());
    for (bytes, values) in blocks.zip(out.chunks_exact_mut(dtype.block_size())) {
        read_block(dtype, bytes, &mut block);
        let runs = values.chunks_exact_mut(layout.run_len).zip(block.quants.chunks(layout.run_len));
        for (i, (values, quants)) in runs.enumerate() {
            let scale = block.scale * f32::from(block.run_scales[i]);
            let min = block.min * f32::from(block.run_mins[i]);
            for (value, &q) in values.iter_mut().zip(quants) {
                *value = scale * f32::from(i16::from(q) - i16::from(layout.offset)) - min;
            }
        }
    }
}

fn read_f16(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Low nibbles are the first half of the block, high nibbles the second.
fn read_nibbles(bytes: &[u8], quants: &mut [u8]) {
    let (low, high) = quants.split_at_mut(bytes.len());
    for ((&byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// Bit `i` of the word is the fifth bit of weight `i`.
fn add_fifth_bits(bytes: &[u8], quants: &mut [u8]) {
    for (eight, &byte) in quants.chunks_exact_mut(8).zip(&bytes[..4]) {
        for (i, q) in eight.iter_mut().enumerate() {
            *q |= (byte >> i & 1) << 4;
        }
    }
}

fn read_signed(bytes: &[u8], quants: &mut [u8]) {
    for (q, &byte) in quants.iter_mut().zip(bytes) {
        *q = byte ^ 0x80;
    }
}

/// `[scales 16][2-bit integers 64][d][dmin]`. Each half of 128 weights takes 32 bytes: four rounds
/// of 32 weights, one for each pair of bits.
fn read_q2k(bytes: &[u8], block: &mut QuantBlock) {
    block.scale = read_f16(bytes, 80);
    block.min = read_f16(bytes, 82);
    for (i, &packed) in bytes[..16].iter().enumerate() {
        block.run_scales[i] = (packed & 15) as i8;
        block.run_mins[i] = packed >> 4;
    }
    read_bit_pairs(&bytes[16..80], &mut block.quants);
}

/// `[third bits 32][2-bit integers 64][6-bit scales 12][d]`; a set third bit means plus four.
fn read_q3k(bytes: &[u8], block: &mut QuantBlock) {
    block.scale = read_f16(bytes, 108);
    read_bit_pairs(&bytes[32..96], &mut block.quants);
    for (i, q) in block.quants.iter_mut().enumerate() {
        *q |= (bytes[i % 32] >> (i / 32) & 1) << 2;
    }
    let packed = &bytes[96..108];
    for (i, scale) in block.run_scales.iter_mut().enumerate() {
        let low = packed[i % 8] >> (i / 8 * 4) & 15;
        let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        *scale = (low | high << 4) as i8 - 32;
    }
}

fn read_bit_pairs(bytes: &[u8], quants: &mut [u8; MAX_BLOCK_LEN]) {
    for (i, q) in quants.iter_mut().enumerate() {
        let (half, round, byte) = (i / 128, i % 128 / 32, i % 32);
        *q = bytes[half * 32 + byte] >> (2 * round) & 3;
    }
}

/// `[d][dmin][6-bit scales and minima 12][nibbles 128]`.
fn read_q4k(bytes: &[u8], block: &mut QuantBlock) {
    block.scale = read_f16(bytes, 0);
    block.min = read_f16(bytes, 2);
    read_six_bit_scales(&bytes[4..16], block);
    read_chunked_nibbles(&bytes[16..144], &mut block.quants);
}

/// `[d][dmin][6-bit scales and minima 12][fifth bits 32][nibbles 128]`.
fn read_q5k(bytes: &[u8], block: &mut QuantBlock) {
    block.scale = read_f16(bytes, 0);
    block.min = read_f16(bytes, 2);
    read_six_bit_scales(&bytes[4..16], block);
    read_chunked_nibbles(&bytes[48..176], &mut block.quants);
    let fifth_bits = &bytes[16..48];
    for (i, q) in block.quants.iter_mut().enumerate() {
        *q |= (fifth_bits[i % 32] >> (i / 32) & 1) << 4;
    }
}

/// Each 32 bytes hold 64 weights, as [`read_nibbles`] has them.
fn read_chunked_nibbles(bytes: &[u8], quants: &mut [u8]) {
    for (bytes, quants) in bytes.chunks_exact(32).zip(quants.chunks_exact_mut(64)) {
        read_nibbles(bytes, quants);
    }
}

/// Eight scales and eight minima. The first four of each have a byte of their own, whose two top
/// bits belong to the last four.
fn read_six_bit_scales(packed: &[u8], block: &mut QuantBlock) {
    for i in 0..4 {
        block.run_scales[i] = (packed[i] & 63) as i8;
        block.run_mins[i] = packed[i + 4] & 63;
        block.run_scales[i + 4] = (packed[i + 8] & 15 | packed[i] >> 6 << 4) as i8;
        block.run_mins[i + 4] = packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4;
    }
}

/// `[nibbles 128][high bit pairs 64][scales 16][d]`. Each half of 128 weights takes 64 bytes of
/// nibbles (low ones first) and 32 bytes of pairs, one round of 32 weights for each pair.
fn read_q6k(bytes: &[u8], block: &mut QuantBlock) {
    block.scale = read_f16(bytes, 208);
    for (scale, &byte) in block.run_scales.iter_mut().zip(&bytes[192..208]) {
        *scale = byte as i8;
    }
    for half in 0..2 {
        let quants = &mut block.quants[half * 128..(half + 1) * 128];
        read_nibbles(&bytes[half * 64..(half + 1) * 64], quants);
        let pairs = &bytes[128 + half * 32..128 + (half + 1) * 32];
        for (i, q) in quants.iter_mut().enumerate() {
            *q |= (pairs[i % 32] >> (i / 32 * 2) & 3) << 4;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use candle_core::Device;
    use candle_core::quantized::{QStorage, QTensor};
    use std::borrow::Cow;

    pub(crate) const ALL_DTYPES: [GgmlDType; 15] = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q8_1,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
        GgmlDType::Q8K,
    ];

    pub(crate) struct Random(u64);

    impl Random {
        pub(crate) fn new(seed: u64) -> Self {
            Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
        }

        pub(crate) fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
        }

        /// Between -1 and 1.
        pub(crate) fn float(&mut self) -> f32 {
            (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }
    }

    /// Random bits, with the float fields set to numbers of about `0.01`.
    pub(crate) fn random_blocks(dtype: GgmlDType, num_weights: usize, seed: u64) -> Vec<u8> {
        let mut random = Random::new(seed);
        let num_bytes = row_bytes(dtype, num_weights).unwrap();
        let mut data: Vec<u8> = (0..num_bytes).map(|_| (random.next() >> 56) as u8).collect();
        let f16_fields: &[usize] = match dtype {
            GgmlDType::F32 | GgmlDType::Q8K => {
                for block in data.chunks_exact_mut(dtype.type_size()) {
                    block[..4].copy_from_slice(&(random.float() * 0.01).to_le_bytes());
                }
                &[]
            }
            GgmlDType::BF16 => {
                for block in data.chunks_exact_mut(2) {
                    block.copy_from_slice(&bf16::from_f32(random.float()).to_le_bytes());
                }
                &[]
            }
            GgmlDType::F16 | GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
            GgmlDType::Q4_1
            | GgmlDType::Q5_1
            | GgmlDType::Q8_1
            | GgmlDType::Q4K
            | GgmlDType::Q5K => &[0, 2],
            GgmlDType::Q2K => &[80, 82],
            GgmlDType::Q3K => &[108],
            GgmlDType::Q6K => &[208],
        };
        for block in data.chunks_exact_mut(dtype.type_size()) {
            for &at in f16_fields {
                let value = f16::from_f32(random.float() * 0.01);
                block[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
        }
        data
    }

    /// Goal: every format decodes to the numbers that candle finds. Method: random blocks, exact
    /// comparison.
    #[test]
    fn every_format_decodes_as_candle_does() {
        for dtype in ALL_DTYPES {
            let num_weights = 256 * 9;
            let data = random_blocks(dtype, num_weights, 7);
            let storage = QStorage::from_data(Cow::Borrowed(&data), &Device::Cpu, dtype).unwrap();
            let expected = QTensor::new(storage, num_weights).unwrap();
            let expected = expected.dequantize(&Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
            let mut values = vec![f32::NAN; num_weights];
            dequantize_row(dtype, &data, &mut values).unwrap();
            assert_eq!(values, expected, "{dtype:?}");
        }
    }

    #[test]
    fn a_wrong_number_of_weights_or_bytes_is_an_error() {
        assert!(row_bytes(GgmlDType::Q4_0, 33).is_err());
        assert!(row_bytes(GgmlDType::Q4K, 32).is_err());
        assert_eq!(row_bytes(GgmlDType::Q4K, 512).unwrap(), 288);
        let mut values = [0.0; 32];
        assert!(dequantize_row(GgmlDType::Q8_0, &[0; 33], &mut values).is_err());
    }
}
