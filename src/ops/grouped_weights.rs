//! Integer weights with a scale and a zero point for each group of columns, as GPTQ and AWQ store
//! them, put into the blocks that matrices are multiplied in.
//!
//! The blocks lose nothing. Where every zero point is the middle they hold the integers
//! ([`GgmlDType::Q4_0`], [`GgmlDType::Q8_0`]). Otherwise they hold the differences to the zero
//! points, which need a bit more: [`GgmlDType::Q5_0`] for four bits; for eight there is no such
//! format, so the weights become [`GgmlDType::F16`]. A scale is repeated for each 32 columns.

use std::sync::{Mutex, PoisonError};

use candle_core::quantized::GgmlDType;
use candle_core::{Result, bail};
use half::f16;

use super::gguf_blocks::row_bytes;
use crate::device::threads::parallel_for;

/// Columns of a block.
const BLOCK: usize = 32;
/// Rows of a task: what lies in one cache line of words.
const STRIP: usize = 16;

/// Where the integers of a word belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WordOrder {
    /// To neighbouring columns of one row, the lowest bits first: `[num_cols / per word, num_rows]`.
    Columns,
    /// To eight rows of one column, of which the lowest bits are this one's, and so on: `[num_cols,
    /// num_rows / 8]`.
    Rows([usize; 8]),
}

/// A matrix as it is stored.
#[derive(Clone, Copy, Debug)]
pub struct GroupedSource<'a> {
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Bits of an integer, 4 or 8.
    pub bits: u32,
    /// Little-endian words of 32 bits.
    pub words: &'a [u8],
    /// What is in a word.
    pub word_order: WordOrder,
    /// Columns of a group; a multiple of 32.
    pub group_size: usize,
    /// `[groups][rows]`
    pub zeros: &'a [u8],
    /// `[groups][rows]`
    pub scales: &'a [f16],
    /// The stored column of each column, if they are not the same.
    pub column_order: Option<&'a [u32]>,
}

/// The rows of a matrix in a format that [`GroupedSource`]'s numbers fit into. Uses the current
/// thread pool.
///
/// # Errors
/// If the parts do not fit together, the format is none of those above, or a number does not fit.
pub fn grouped_rows(source: &GroupedSource<'_>, dtype: GgmlDType) -> Result<Vec<u8>> {
    source.check()?;
    let (num_rows, num_cols) = source.shape;
    let row_bytes = row_bytes(dtype, num_cols)?;
    let mut data = vec![0; num_rows * row_bytes];
    let strips: Vec<_> = data.chunks_mut(STRIP * row_bytes).map(Mutex::new).collect();
    let misfit = Mutex::new(None);
    parallel_for(strips.len(), |index| {
        let mut strip = strips[index].lock().unwrap_or_else(PoisonError::into_inner);
        let first = index * STRIP;
        let integers = source.integers(first);
        for (i, row) in strip.chunks_exact_mut(row_bytes).enumerate() {
            let integers = &integers[i * num_cols..(i + 1) * num_cols];
            if let Err(error) = source.put_row(first + i, integers, dtype, row) {
                *misfit.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        }
    });
    drop(strips);
    match misfit.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(data),
    }
}

impl GroupedSource<'_> {
    fn check(&self) -> Result<()> {
        let (num_rows, num_cols) = self.shape;
        if ![4, 8].contains(&self.bits) || (self.bits == 8 && self.word_order != WordOrder::Columns)
        {
            bail!("integers of {} bits are not supported in this order", self.bits);
        }
        let per_word = 32 / self.bits as usize;
        let num_groups = num_cols.div_ceil(self.group_size.max(1));
        let fits = num_cols.is_multiple_of(BLOCK)
            && self.group_size.is_multiple_of(BLOCK)
            && (self.word_order == WordOrder::Columns || num_rows.is_multiple_of(8))
            && self.words.len() == num_rows * num_cols / per_word * size_of::<u32>()
            && self.zeros.len() == num_groups * num_rows
            && self.scales.len() == num_groups * num_rows
            && self.column_order.is_none_or(|order| {
                order.len() == num_cols && order.iter().all(|column| (*column as usize) < num_cols)
            });
        if fits { Ok(()) } else { bail!("the parts of a quantised matrix do not fit together") }
    }

    fn word(&self, index: usize) -> u32 {
        let bytes = &self.words[index * 4..index * 4 + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    /// The integers of a strip, row by row.
    fn integers(&self, first_row: usize) -> Vec<u8> {
        let (num_rows, num_cols) = self.shape;
        let rows = first_row..num_rows.min(first_row + STRIP);
        let mut integers = vec![0; rows.len() * num_cols];
        let top = u32::MAX >> (32 - self.bits);
        let per_word = 32 / self.bits as usize;
        for column in 0..num_cols {
            let stored = self.column_order.map_or(column, |order| order[column] as usize);
            for row in rows.clone() {
                let (index, place) = match self.word_order {
                    WordOrder::Columns => (stored / per_word * num_rows + row, stored % per_word),
                    WordOrder::Rows(order) => {
                        let place = order.iter().position(|&other| other == row % 8);
                        (stored * (num_rows / 8) + row / 8, place.unwrap_or_default())
                    }
                };
                let integer = self.word(index) >> (self.bits as usize * place) & top;
                integers[(row - first_row) * num_cols + column] = integer as u8;
            }
        }
        integers
    }

    fn put_row(&self, row: usize, integers: &[u8], dtype: GgmlDType, to: &mut [u8]) -> Result<()> {
        let num_rows = self.shape.0;
        let block_bytes = BLOCK / dtype.block_size() * dtype.type_size();
        let blocks = integers.as_chunks::<BLOCK>().0.iter().zip(to.chunks_exact_mut(block_bytes));
        for (index, (integers, to)) in blocks.enumerate() {
            let at = index * BLOCK / self.group_size * num_rows + row;
            let zero = i16::from(self.zeros[at]);
            let steps = integers.map(|integer| i16::from(integer) - zero);
            put_block(&steps, self.scales[at], dtype, to)?;
        }
        Ok(())
    }
}

/// Writes `scale * steps`.
fn put_block(steps: &[i16; BLOCK], scale: f16, dtype: GgmlDType, to: &mut [u8]) -> Result<()> {
    let half_range = match dtype {
        GgmlDType::Q4_0 => 8,
        GgmlDType::Q5_0 => 16,
        GgmlDType::Q8_0 => 128,
        GgmlDType::F16 => {
            for (&step, to) in steps.iter().zip(to.as_chunks_mut::<2>().0) {
                let value = f16::from_f32(scale.to_f32() * f32::from(step));
                if !value.is_finite() {
                    bail!("a weight is too large for half precision");
                }
                *to = value.to_le_bytes();
            }
            return Ok(());
        }
        _ => bail!("weights in groups do not fit into {dtype:?}"),
    };
    if steps.iter().any(|step| !(-half_range..half_range).contains(step)) {
        bail!("a weight is further from its zero point than {dtype:?} can say");
    }
    let (head, body) = to.split_at_mut(2);
    head.copy_from_slice(&scale.to_le_bytes());
    if dtype == GgmlDType::Q8_0 {
        for (&step, to) in steps.iter().zip(body) {
            *to = (step as i8).cast_unsigned();
        }
        return Ok(());
    }
    let integers = steps.map(|step| (step + half_range) as u8);
    let nibbles = if dtype == GgmlDType::Q5_0 {
        let fifth_bits =
            integers.iter().rev().fold(0_u32, |bits, &q| bits << 1 | u32::from(q >> 4));
        let (fifth, nibbles) = body.split_at_mut(4);
        fifth.copy_from_slice(&fifth_bits.to_le_bytes());
        nibbles
    } else {
        body
    };
    for (i, to) in nibbles.iter_mut().enumerate() {
        *to = integers[i] & 15 | (integers[i + BLOCK / 2] & 15) << 4;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gguf_blocks::dequantize_row;
    use crate::ops::gguf_blocks::tests::Random;

    const SHAPE: (usize, usize) = (24, 96);
    const GROUP: usize = 64;
    const AWQ: WordOrder = WordOrder::Rows([0, 2, 4, 6, 1, 3, 5, 7]);

    /// Integers `[column][row]` put into words, one by one.
    fn words(integers: &[u8], bits: u32, order: WordOrder) -> Vec<u8> {
        let (num_rows, _) = SHAPE;
        let per_word = 32 / bits as usize;
        let mut words = vec![0_u32; integers.len() / per_word];
        for (i, &integer) in integers.iter().enumerate() {
            let (column, row) = (i / num_rows, i % num_rows);
            let (word, place) = match order {
                WordOrder::Columns => (column / per_word * num_rows + row, column % per_word),
                WordOrder::Rows(order) => {
                    let place = order.iter().position(|&r| r == row % 8).unwrap();
                    (column * num_rows / 8 + row / 8, place)
                }
            };
            words[word] |= u32::from(integer) << (bits as usize * place);
        }
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Goal: what comes out is `scale * (q - zero)` of the column's group, exactly; as floats, to
    /// half precision. Method: random numbers in every form and order.
    #[test]
    fn rows_are_what_the_formula_says() {
        for (bits, dtype, order, is_symmetric) in [
            (4, GgmlDType::Q4_0, WordOrder::Columns, true),
            (4, GgmlDType::Q5_0, WordOrder::Columns, false),
            (4, GgmlDType::Q5_0, AWQ, false),
            (8, GgmlDType::Q8_0, WordOrder::Columns, true),
            (8, GgmlDType::F16, WordOrder::Columns, false),
        ] {
            for is_ordered in [false, true] {
                let mut random = Random::new(5);
                let (num_rows, num_cols) = SHAPE;
                let mut number = |below: u64| (random.next() >> 20) % below;
                let integers: Vec<u8> =
                    (0..num_rows * num_cols).map(|_| number(1 << bits) as u8).collect();
                let middle = 1 << (bits - 1);
                let num_scales = num_rows * num_cols.div_ceil(GROUP);
                let zeros: Vec<u8> = (0..num_scales)
                    .map(|_| if is_symmetric { middle } else { number(1 << bits) as u8 })
                    .collect();
                let scales: Vec<f16> =
                    (0..num_scales).map(|_| f16::from_f32(number(1000) as f32 / 1e5)).collect();
                let column_order: Vec<u32> =
                    (0..num_cols as u32).map(|column| column * 35 % num_cols as u32).collect();
                let words = words(&integers, bits, order);
                let source = GroupedSource {
                    shape: SHAPE,
                    bits,
                    words: &words,
                    word_order: order,
                    group_size: GROUP,
                    zeros: &zeros,
                    scales: &scales,
                    column_order: is_ordered.then_some(&column_order),
                };
                let data = grouped_rows(&source, dtype).unwrap();
                let mut found = vec![0.0; num_cols];
                for (row, data) in data.chunks(data.len() / num_rows).enumerate() {
                    dequantize_row(dtype, data, &mut found).unwrap();
                    for (column, &found) in found.iter().enumerate() {
                        let stored =
                            if is_ordered { column_order[column] as usize } else { column };
                        let at = column / GROUP * num_rows + row;
                        let step =
                            i16::from(integers[stored * num_rows + row]) - i16::from(zeros[at]);
                        let expected = scales[at].to_f32() * f32::from(step);
                        let bound =
                            if dtype == GgmlDType::F16 { 1e-3 * expected.abs() } else { 0.0 };
                        assert!((found - expected).abs() <= bound, "{dtype:?}: {found} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_errors() {
        let source = GroupedSource {
            shape: (8, 32),
            bits: 4,
            words: &[0; 128],
            word_order: WordOrder::Columns,
            group_size: 32,
            zeros: &[15; 8],
            scales: &[f16::ONE; 8],
            column_order: None,
        };
        assert!(grouped_rows(&source, GgmlDType::Q5_0).is_ok());
        let message = grouped_rows(&source, GgmlDType::Q4_0).unwrap_err().to_string();
        assert!(message.contains("further from its zero point"), "{message}");
        assert!(grouped_rows(&source, GgmlDType::Q4_1).is_err());
        for broken in [
            GroupedSource { shape: (8, 64), ..source },
            GroupedSource { bits: 3, ..source },
            GroupedSource { words: &[0; 127], ..source },
            GroupedSource { group_size: 0, ..source },
            GroupedSource { group_size: 16, ..source },
            GroupedSource { zeros: &[8; 7], ..source },
            GroupedSource { scales: &[f16::ONE; 9], ..source },
            GroupedSource { column_order: Some(&[0; 31]), ..source },
            GroupedSource { column_order: Some(&[32; 32]), ..source },
        ] {
            assert!(grouped_rows(&broken, GgmlDType::Q5_0).is_err(), "{broken:?}");
        }
    }
}
