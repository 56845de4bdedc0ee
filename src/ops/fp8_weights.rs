//! Weights in floats of eight bits (E4M3 without infinities) times scales.
//!
//! A row is an `f32` for each [`SCALED_COLS`] columns, and then a byte for each column, which is
//! multiplied with the scale of its columns. Scales of whole rows or matrices, and those of blocks
//! whose width is a multiple of that, are repeated ([`fp8_rows`]); of others the weights become
//! `f16` ([`half_rows`]).
//!
//! Source of the format: Micikevicius et al., 2022 (arXiv 2209.05433), table 1.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Result, bail};
use half::f16;

use super::kv_cache::E4m3;
use super::rows::parallel_chunks_mut;

/// Columns that share a scale: those of the blocks that Qwen publishes.
pub const SCALED_COLS: usize = 128;
/// The largest number of eight bits.
const LARGEST: f32 = 448.0;
/// Bytes of a scale.
const SCALE_BYTES: usize = size_of::<f32>();
/// Rows of a task.
const STRIP: usize = 16;

/// What a byte means; not a number for two of them.
pub(super) fn e4m3_to_f32(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match exponent {
        0 => mantissa / 8.0 * 2.0_f32.powi(-6),
        _ if byte & 127 == 127 => f32::NAN,
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if byte & 128 == 0 { size } else { -size }
}

/// The bytes of a row of `num_cols` weights.
pub(super) fn row_bytes(num_cols: usize) -> usize {
    num_cols.div_ceil(SCALED_COLS) * SCALE_BYTES + num_cols
}

/// The bytes of a row where it is multiplied: a card has a scale for each 64 columns.
pub(super) fn packed_bytes(num_cols: usize) -> usize {
    num_cols.div_ceil(SCALED_COLS / 2) * SCALE_BYTES + num_cols
}

/// The scales of a row, and its weights.
pub(super) fn split_row(row: &[u8], num_cols: usize) -> (Vec<f32>, &[u8]) {
    let (scales, weights) = row.split_at(row.len() - num_cols);
    (scales.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(), weights)
}

/// Turns a row into numbers.
///
/// # Errors
/// If `data` is no row of `out.len()` weights.
pub(super) fn dequantize_row(data: &[u8], out: &mut [f32]) -> Result<()> {
    if data.len() != row_bytes(out.len()) {
        bail!(
            "a row of {} weights of eight-bit floats has other than {} bytes",
            out.len(),
            data.len()
        );
    }
    let (scales, weights) = split_row(data, out.len());
    for (column, (value, &byte)) in out.iter_mut().zip(weights).enumerate() {
        *value = e4m3_to_f32(byte) * scales[column / SCALED_COLS];
    }
    Ok(())
}

/// A row of finite numbers, with scales that make the largest of their columns 448.
pub(super) fn quantize_row(values: &[f32]) -> Vec<u8> {
    let mut row = Vec::with_capacity(row_bytes(values.len()));
    let largest =
        |part: &[f32]| part.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let scales: Vec<f32> = values.chunks(SCALED_COLS).map(|part| largest(part) / LARGEST).collect();
    row.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    for (part, scale) in values.chunks(SCALED_COLS).zip(&scales) {
        let divisor = if *scale == 0.0 { 1.0 } else { *scale };
        row.extend(part.iter().map(|value| E4m3::from_f32(value / divisor).to_bits()));
    }
    row
}

/// Whether rows can say where so many columns of a file share a scale.
pub(super) fn fits_rows(scaled_cols: usize, num_cols: usize) -> bool {
    num_cols <= scaled_cols || scaled_cols.is_multiple_of(SCALED_COLS) && 0 < scaled_cols
}

/// A matrix as files have it: `[num_rows][num_cols]` bytes, of which that of a row and a column is
/// scaled by `scales[row / block.0][column / block.1]`.
#[derive(Clone, Copy, Debug)]
pub struct Fp8Source<'a> {
    /// The weights.
    pub bytes: &'a [u8],
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Rows and columns that share a scale.
    pub block: (usize, usize),
    /// `[blocks of rows][blocks of columns]`
    pub scales: &'a [f32],
}

/// The rows of a matrix. Uses the current thread pool.
///
/// # Errors
/// If the parts do not fit together, the scales are for too few columns, or a weight is not a finite
/// number.
pub fn fp8_rows(source: &Fp8Source<'_>) -> Result<Vec<u8>> {
    let (num_cols, scaled_cols) = (source.shape.1, source.block.1);
    if !fits_rows(scaled_cols, num_cols) {
        bail!("eight-bit floats with a scale for {scaled_cols} columns are no rows");
    }
    source.rows(row_bytes(num_cols), |from, scales, to| {
        let (scales_to, weights_to) = to.split_at_mut(to.len() - from.len());
        for (index, to) in scales_to.as_chunks_mut().0.iter_mut().enumerate() {
            *to = scales[index * SCALED_COLS / scaled_cols].to_le_bytes();
        }
        weights_to.copy_from_slice(from);
        // Nothing but a scale can make a number of eight bits infinite.
        scales.iter().all(|scale| (scale * LARGEST).is_finite())
            && from.iter().all(|byte| byte & 127 != 127)
    })
}

/// The same as rows of `f16`: as exact as the scales, but for weights below `6e-5`, which have an
/// error of up to `3e-8`.
///
/// # Errors
/// If the parts do not fit together, or a weight is not a finite number in half precision.
pub fn half_rows(source: &Fp8Source<'_>) -> Result<Vec<u8>> {
    let values: Vec<f32> = (0..=u8::MAX).map(e4m3_to_f32).collect();
    source.rows(source.shape.1 * size_of::<f16>(), |from, scales, to| {
        let mut is_finite = true;
        for (column, (&byte, to)) in from.iter().zip(to.as_chunks_mut::<2>().0).enumerate() {
            let value = f16::from_f32(values[byte as usize] * scales[column / source.block.1]);
            is_finite &= value.is_finite();
            *to = value.to_le_bytes();
        }
        is_finite
    })
}

impl Fp8Source<'_> {
    /// Rows of so many bytes, made of weights and scales by `put`, which says whether they are
    /// finite.
    fn rows(
        &self,
        row_bytes: usize,
        put: impl Fn(&[u8], &[f32], &mut [u8]) -> bool + Sync,
    ) -> Result<Vec<u8>> {
        let Self { bytes, shape: (num_rows, num_cols), block, scales } = *self;
        let scales_per_row = num_cols.div_ceil(block.1.max(1));
        let num_scales = num_rows.div_ceil(block.0.max(1)) * scales_per_row;
        if Some(bytes.len()) != num_rows.checked_mul(num_cols)
            || block.0 == 0
            || block.1 == 0
            || scales.len() != num_scales
        {
            bail!("the parts of a matrix of eight-bit floats do not fit together");
        }
        let mut data = vec![0; num_rows * row_bytes];
        let is_finite = AtomicBool::new(true);
        parallel_chunks_mut(&mut data, (STRIP * row_bytes).max(1), |strip, rows| {
            for (i, to) in rows.chunks_exact_mut(row_bytes).enumerate() {
                let row = strip * STRIP + i;
                let from = &bytes[row * num_cols..(row + 1) * num_cols];
                let scales = &scales[row / block.0 * scales_per_row..][..scales_per_row];
                if !put(from, scales, to) {
                    is_finite.store(false, Ordering::Relaxed);
                }
            }
        });
        if !is_finite.into_inner() {
            bail!("a weight of eight bits is not a number, or too large");
        }
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_mean_what_the_format_says() {
        for (byte, value) in [
            (0x00, 0.0),
            (0x80, -0.0),
            (0x01, 2.0_f32.powi(-9)),
            (0x07, 0.875 * 2.0_f32.powi(-6)),
            (0x08, 2.0_f32.powi(-6)),
            (0x38, 1.0),
            (0xb9, -1.125),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(e4m3_to_f32(byte).to_bits(), value.to_bits(), "{byte:#x}");
        }
        assert!(e4m3_to_f32(0x7f).is_nan() && e4m3_to_f32(0xff).is_nan());
    }

    #[test]
    fn each_block_has_its_scale() {
        // One (0x38) and minus two (0xc0) in blocks of two rows and three columns.
        let bytes: Vec<u8> = (0..15).map(|i| if i % 2 == 0 { 0x38 } else { 0xc0 }).collect();
        let scales = [1.0, 10.0, 100.0, 1000.0];
        let (shape, block) = ((3, 5), (2, 3));
        let data = half_rows(&Fp8Source { bytes: &bytes, shape, block, scales: &scales }).unwrap();
        let found: Vec<f32> =
            data.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect();
        assert_eq!(found[..5], [1.0, -2.0, 1.0, -20.0, 10.0]);
        assert_eq!(found[5..10], [-2.0, 1.0, -2.0, 10.0, -20.0]);
        assert_eq!(found[10..], [100.0, -200.0, 100.0, -2000.0, 1000.0]);
    }

    /// Goal: rows say what a file says. Method: scales of matrices, rows and blocks beside the same
    /// numbers in half precision, all of which are exact there.
    #[test]
    fn rows_of_either_kind_are_the_same_numbers() {
        let (num_rows, num_cols) = (5_usize, 300_usize);
        let bytes: Vec<u8> = (0..num_rows * num_cols).map(|i| (i * 7 % 127) as u8).collect();
        for block in [(num_rows, num_cols), (1, num_cols), (2, 128), (3, 256), (1, 1 << 20)] {
            let num_scales = num_rows.div_ceil(block.0) * num_cols.div_ceil(block.1);
            let scales: Vec<f32> = (0..num_scales).map(|i| 2.0_f32.powi(i as i32 % 7)).collect();
            let shape = (num_rows, num_cols);
            let source = Fp8Source { bytes: &bytes, shape, block, scales: &scales };
            let (rows, halves) = (fp8_rows(&source).unwrap(), half_rows(&source).unwrap());
            let mut found = vec![0.0; num_cols];
            for (row, halves) in rows.chunks(row_bytes(num_cols)).zip(halves.chunks(2 * num_cols)) {
                dequantize_row(row, &mut found).unwrap();
                let expected: Vec<f32> = halves
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|bytes| f16::from_le_bytes(*bytes).to_f32())
                    .collect();
                assert_eq!(found, expected, "{block:?}");
            }
        }
    }

    /// Goal: quantised weights are off by less than the format's half unit, and zeros stay.
    #[test]
    fn quantised_rows_are_near() {
        let values: Vec<f32> = (0..200).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1e-3).collect();
        let row = quantize_row(&values);
        let mut found = vec![0.0; values.len()];
        dequantize_row(&row, &mut found).unwrap();
        for (found, value) in found.iter().zip(&values) {
            assert!((found - value).abs() <= value.abs() / 16.0 + 0.05 / 448.0 / 512.0);
        }
        assert_eq!(quantize_row(&[0.0; 3]), [0; 7]);
        assert!(dequantize_row(&row[1..], &mut found).is_err());
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        let source = |bytes, num_cols, block, scales| Fp8Source {
            bytes,
            shape: (1, num_cols),
            block,
            scales,
        };
        for rows in [half_rows, fp8_rows] {
            assert!(rows(&source(&[0x38; 2], 2, (1, 2), &[65504.0])).is_ok());
            assert!(rows(&source(&[0x38, 0xff], 2, (1, 2), &[1.0])).is_err());
            assert!(rows(&source(&[0x38, 0x38], 2, (1, 2), &[f32::MAX])).is_err());
            assert!(rows(&source(&[0; 2], 2, (1, 1), &[1.0])).is_err());
            assert!(rows(&source(&[0; 2], 2, (0, 2), &[1.0])).is_err());
            assert!(rows(&source(&[0; 3], 2, (1, 2), &[1.0])).is_err());
        }
        assert!(half_rows(&source(&[0x38, 0x40], 2, (1, 2), &[65504.0])).is_err());
        assert!(fp8_rows(&source(&[0; 8], 8, (1, 4), &[1.0; 2])).is_err());
        assert!(half_rows(&source(&[0; 8], 8, (1, 4), &[1.0; 2])).is_ok());
    }
}
