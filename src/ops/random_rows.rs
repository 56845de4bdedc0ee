//! Rows of random weights in the formats of files, to measure with where there is no file.
//!
//! Weights are spread around zero with a standard deviation near `1 / sqrt(num_cols)`, so that a
//! product is about as large as what goes in. The same numbers give the same weights on every
//! machine.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::Result;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use super::fp8_weights::{SCALED_COLS, row_bytes};
use super::row_format::RowFormat;
use crate::device::threads::parallel_for;

/// Bytes that a task fills: enough to be worth waking a thread for.
const TASK_BYTES: usize = 1 << 20;

/// Random rows of a matrix, one after the other. Uses the current thread pool.
///
/// # Errors
/// If rows do not consist of whole blocks.
pub fn random_rows(
    format: RowFormat,
    (num_rows, num_cols): (usize, usize),
    seed: u64,
) -> Result<Vec<u8>> {
    let mut data = vec![0; num_rows * format.row_bytes(num_cols)?];
    let pattern = Pattern::new(format, num_cols);
    let task_bytes = TASK_BYTES.next_multiple_of(pattern.block_bytes * size_of::<u64>());
    let parts: Vec<_> = data.chunks_mut(task_bytes).map(Mutex::new).collect();
    parallel_for(parts.len(), |index| {
        let mut part = parts[index].lock().unwrap_or_else(PoisonError::into_inner);
        pattern.fill(&mut part, mixed(seed ^ mixed(index as u64)));
    });
    Ok(data)
}

/// Repeat a pattern of 32 and of 16 bits in 64.
const TWICE: u64 = 0x0000_0001_0000_0001;
const FOUR_TIMES: u64 = 0x0001_0001_0001_0001;

/// Every bit of the result depends on every bit of the argument (Steele et al., 2014).
fn mixed(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// What of a block is not random.
struct Pattern {
    block_bytes: usize,
    /// Where factors are and their bytes, two or four.
    factors: Vec<(usize, Vec<u8>)>,
    /// Bytes of one value.
    fixed: &'static [(Range<usize>, u8)],
    /// Bits of eight bytes that are random, and those that are always set: of floats, sign and
    /// mantissa are random, and the exponent is given.
    random_bits: u64,
    set_bits: u64,
    /// Where there are no minimums, integers reach further below zero than above: half of the
    /// blocks are turned round.
    has_random_sign: bool,
}

impl Pattern {
    fn new(format: RowFormat, num_cols: usize) -> Self {
        let wanted = (num_cols.max(1) as f32).sqrt().recip();
        let RowFormat::Gguf(dtype) = format else { return Self::fp8(wanted, num_cols) };
        let mut pattern = Self {
            block_bytes: dtype.type_size(),
            factors: Vec::new(),
            fixed: fixed_bytes(dtype),
            random_bits: u64::MAX,
            set_bits: 0,
            has_random_sign: false,
        };
        // A mantissa from one to two has a mean square of 7/3.
        let power = wanted / (7.0_f32 / 3.0).sqrt();
        match dtype {
            GgmlDType::F32 => {
                pattern.set_float(u64::from(power.to_bits()) * TWICE, 0x807f_ffff * TWICE);
            }
            GgmlDType::F16 => {
                let bits = f16::from_f32(power).to_bits();
                pattern.set_float(u64::from(bits) * FOUR_TIMES, 0x83ff * FOUR_TIMES);
            }
            GgmlDType::BF16 => {
                let bits = bf16::from_f32(power).to_bits();
                pattern.set_float(u64::from(bits) * FOUR_TIMES, 0x807f * FOUR_TIMES);
            }
            _ => {
                let (factors, root_mean_square) = factors(dtype);
                pattern.has_random_sign = factors.len() == 1;
                pattern.factors = factors
                    .iter()
                    .map(|(at, factor)| {
                        let value = factor * wanted / root_mean_square;
                        let bytes = match dtype {
                            GgmlDType::Q8K => value.to_le_bytes().to_vec(),
                            _ => f16::from_f32(value).to_le_bytes().to_vec(),
                        };
                        (*at, bytes)
                    })
                    .collect();
            }
        }
        pattern
    }

    /// Numbers from one to two, of either sign, times one scale. A row is a block.
    fn fp8(wanted: f32, num_cols: usize) -> Self {
        // The root of the mean square of 1 + m / 8.
        let scale = wanted / 1.4657;
        let places = (0..num_cols.div_ceil(SCALED_COLS)).map(|index| index * size_of::<f32>());
        Self {
            block_bytes: row_bytes(num_cols),
            factors: places.map(|at| (at, scale.to_le_bytes().to_vec())).collect(),
            fixed: &[],
            random_bits: 0x8787_8787_8787_8787,
            set_bits: 0x3838_3838_3838_3838,
            has_random_sign: false,
        }
    }

    fn set_float(&mut self, powers: u64, random_bits: u64) {
        self.set_bits = powers & !random_bits;
        self.random_bits = random_bits;
    }

    fn fill(&self, part: &mut [u8], seed: u64) {
        let mut state = seed;
        let (words, rest) = part.as_chunks_mut::<8>();
        let mut next = || {
            state = state.wrapping_add(1);
            (mixed(state) & self.random_bits | self.set_bits).to_le_bytes()
        };
        for word in words {
            *word = next();
        }
        rest.copy_from_slice(&next()[..rest.len()]);
        if !self.factors.is_empty() {
            part.chunks_exact_mut(self.block_bytes).for_each(|block| self.finish(block));
        }
    }

    /// Puts everything that is not random into a block of integers.
    fn finish(&self, block: &mut [u8]) {
        for (range, byte) in self.fixed {
            block[range.clone()].fill(*byte);
        }
        for (at, bytes) in &self.factors {
            let sign = if self.has_random_sign { block[at + bytes.len() - 1] & 0x80 } else { 0 };
            block[*at..at + bytes.len()].copy_from_slice(bytes);
            block[at + bytes.len() - 1] |= sign;
        }
    }
}

/// Where a block's factors are and how they relate, so that weights are centred, and the root of
/// the mean square of weights with a scale of one.
fn factors(dtype: GgmlDType) -> (&'static [(usize, f32)], f32) {
    match dtype {
        GgmlDType::Q4_0 => (&[(0, 1.0)], 4.64),
        GgmlDType::Q4_1 => (&[(0, 1.0), (2, -7.5)], 4.61),
        GgmlDType::Q5_0 => (&[(0, 1.0)], 9.25),
        GgmlDType::Q5_1 => (&[(0, 1.0), (2, -15.5)], 9.23),
        GgmlDType::Q8_0 | GgmlDType::Q8_1 | GgmlDType::Q8K => (&[(0, 1.0)], 73.9),
        // The factors of runs are fixed: 8 of 15, 16 of 31, 32 of 63 and 32 of 127.
        GgmlDType::Q2K => (&[(80, 1.0 / 8.0), (82, 1.5 / 8.0)], 1.12),
        GgmlDType::Q3K => (&[(108, 1.0 / 16.0)], 2.35),
        GgmlDType::Q4K => (&[(0, 1.0 / 32.0), (2, 7.5 / 32.0)], 4.61),
        GgmlDType::Q5K => (&[(0, 1.0 / 32.0), (2, 15.5 / 32.0)], 9.23),
        GgmlDType::Q6K => (&[(208, 1.0 / 32.0)], 18.5),
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => (&[], 1.0),
    }
}

/// The bytes that hold the factors of runs, and sums that nobody reads.
fn fixed_bytes(dtype: GgmlDType) -> &'static [(Range<usize>, u8)] {
    match dtype {
        GgmlDType::Q8_1 => &[(2..4, 0)],
        GgmlDType::Q8K => &[(260..292, 0)],
        GgmlDType::Q2K => &[(0..16, 0x88)],
        GgmlDType::Q3K => &[(96..104, 0), (104..108, 0xff)],
        GgmlDType::Q4K | GgmlDType::Q5K => &[(4..12, 0xa0), (12..16, 0)],
        GgmlDType::Q6K => &[(192..208, 32)],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::row_format::tests::{all_formats, dequantized};

    /// Goal: weights are centred and as large as they should be. Method: moments of many.
    #[test]
    fn weights_are_spread_around_zero() {
        for format in all_formats() {
            let (num_rows, num_cols) = (64, 1024);
            let data = random_rows(format, (num_rows, num_cols), 5).unwrap();
            let weights = dequantized(format, &data, num_cols);
            let count = weights.len() as f64;
            let mean = weights.iter().map(|weight| f64::from(*weight)).sum::<f64>() / count;
            let square = weights.iter().map(|weight| f64::from(*weight).powi(2)).sum::<f64>();
            let deviation = (square / count).sqrt() * (num_cols as f64).sqrt();
            // Floats have a power of two.
            let is_float = format.gguf().is_some_and(|dtype| dtype.block_size() == 1);
            let expected = if is_float { 0.49..1.01 } else { 0.97..1.03 };
            assert!(expected.contains(&deviation), "{format} {deviation}");
            assert!(mean.abs() * (num_cols as f64).sqrt() < 0.03, "{format} {mean}");
        }
    }

    /// Goal: threads change nothing, seeds everything. Method: rows of several tasks.
    #[test]
    fn the_same_seed_gives_the_same_rows() {
        let shape = (3000, 4096);
        let pool = crate::device::threads::ThreadPool::new(2);
        let random_rows = |seed| random_rows(GgmlDType::Q4_0.into(), shape, seed).unwrap();
        let rows = random_rows(1);
        assert_eq!(pool.install(|| random_rows(1)), rows);
        let other = random_rows(2);
        let num_equal = rows.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!(num_equal < rows.len() / 50 + rows.len() / 9);
        assert_ne!(rows[..1 << 16], rows[1 << 20..][..1 << 16]);
    }
}
