//! Weights in floats of eight bits (E4M3 without infinities) times scales of blocks, as rows of
//! `f16`: as exact as the scales, but for weights below `6e-5`, which have an error of up to
//! `3e-8`.
//!
//! Source of the format: Micikevicius et al., 2022 (arXiv 2209.05433), table 1.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use candle_core::{Result, bail};
use half::f16;

use crate::device::threads::parallel_for;

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

/// The rows of a matrix whose bytes are scaled by `scales[row / block.0][column / block.1]`. Uses
/// the current thread pool.
///
/// # Errors
/// If the parts do not fit together, or a weight is not a finite number in half precision.
pub fn fp8_rows(
    bytes: &[u8],
    (num_rows, num_cols): (usize, usize),
    block: (usize, usize),
    scales: &[f32],
) -> Result<Vec<u8>> {
    let scales_per_row = num_cols.div_ceil(block.1.max(1));
    let num_scales = num_rows.div_ceil(block.0.max(1)) * scales_per_row;
    if Some(bytes.len()) != num_rows.checked_mul(num_cols)
        || block.0 == 0
        || block.1 == 0
        || scales.len() != num_scales
    {
        bail!("the parts of a matrix of eight-bit floats do not fit together");
    }
    let values: Vec<f32> = (0..=u8::MAX).map(e4m3_to_f32).collect();
    let mut data = vec![0; bytes.len() * size_of::<f16>()];
    let strip_bytes = (STRIP * num_cols * size_of::<f16>()).max(1);
    let strips: Vec<_> = data.chunks_mut(strip_bytes).map(Mutex::new).collect();
    let is_finite = AtomicBool::new(true);
    parallel_for(strips.len(), |index| {
        let mut strip = strips[index].lock().unwrap_or_else(PoisonError::into_inner);
        for (i, to) in strip.chunks_exact_mut(num_cols * size_of::<f16>()).enumerate() {
            let row = index * STRIP + i;
            let from = &bytes[row * num_cols..(row + 1) * num_cols];
            let scales = &scales[row / block.0 * scales_per_row..][..scales_per_row];
            for (column, (&byte, to)) in from.iter().zip(to.as_chunks_mut::<2>().0).enumerate() {
                let value = f16::from_f32(values[byte as usize] * scales[column / block.1]);
                if !value.is_finite() {
                    is_finite.store(false, Ordering::Relaxed);
                }
                *to = value.to_le_bytes();
            }
        }
    });
    drop(strips);
    if !is_finite.into_inner() {
        bail!("a weight of eight bits is not a number, or too large for half precision");
    }
    Ok(data)
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
        let data = fp8_rows(&bytes, (3, 5), (2, 3), &scales).unwrap();
        let found: Vec<f32> =
            data.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect();
        assert_eq!(found[..5], [1.0, -2.0, 1.0, -20.0, 10.0]);
        assert_eq!(found[5..10], [-2.0, 1.0, -2.0, 10.0, -20.0]);
        assert_eq!(found[10..], [100.0, -200.0, 100.0, -2000.0, 1000.0]);
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        assert!(fp8_rows(&[0x38; 2], (1, 2), (1, 2), &[65504.0]).is_ok());
        assert!(fp8_rows(&[0x38, 0x40], (1, 2), (1, 2), &[65504.0]).is_err());
        assert!(fp8_rows(&[0x38, 0xff], (1, 2), (1, 2), &[1.0]).is_err());
        assert!(fp8_rows(&[0; 2], (1, 2), (1, 1), &[1.0]).is_err());
        assert!(fp8_rows(&[0; 2], (1, 2), (0, 2), &[1.0]).is_err());
        assert!(fp8_rows(&[0; 3], (1, 2), (1, 2), &[1.0]).is_err());
    }
}
