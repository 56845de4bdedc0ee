//! Rows of floats in fewer bits: in the integer formats as ggml's reference code rounds them, or as
//! floats of eight bits.

use std::sync::{Mutex, PoisonError};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Tensor, bail};

use super::fp8_weights;
use super::gguf_blocks::{dequantize_row, row_bytes};
use super::row_format::RowFormat;
use super::rows::parallel_chunks_mut;

/// Rows of a task.
const STRIP: usize = 16;

/// Quantises the rows of a matrix of floats. Uses the current thread pool.
///
/// # Errors
/// If `data` is not so many rows of floats, one of them is not finite, or rows in the new format
/// are not whole blocks.
pub fn quantize_rows(
    from: GgmlDType,
    data: &[u8],
    (num_rows, num_cols): (usize, usize),
    to: RowFormat,
) -> Result<Vec<u8>> {
    let from_bytes = row_bytes(from, num_cols)?;
    let to_bytes = to.row_bytes(num_cols)?;
    if Some(data.len()) != from_bytes.checked_mul(num_rows) || from.block_size() != 1 {
        bail!("{} bytes are not {num_rows} rows of {num_cols} floats in {from:?}", data.len());
    }
    let mut quantized = vec![0; num_rows * to_bytes];
    let failure = Mutex::new(None);
    parallel_chunks_mut(&mut quantized, (STRIP * to_bytes).max(1), |index, strip| {
        let rows = index * STRIP..num_rows.min((index + 1) * STRIP);
        let data = &data[rows.start * from_bytes..rows.end * from_bytes];
        if let Err(error) = quantize_strip(from, data, (rows.len(), num_cols), (to, strip)) {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(quantized),
    }
}

fn quantize_strip(
    from: GgmlDType,
    data: &[u8],
    shape: (usize, usize),
    (to, out): (RowFormat, &mut [u8]),
) -> Result<()> {
    let mut values = vec![0.0; shape.0 * shape.1];
    dequantize_row(from, data, &mut values)?;
    if values.iter().any(|value| !value.is_finite()) {
        bail!("a weight is not a finite number");
    }
    match to {
        RowFormat::Gguf(to) => {
            let tensor = QTensor::quantize(&Tensor::from_vec(values, shape, &Device::Cpu)?, to)?;
            out.copy_from_slice(&tensor.data()?);
        }
        RowFormat::Fp8 => {
            let rows = values.chunks(shape.1).zip(out.chunks_mut(to.row_bytes(shape.1)?));
            rows.for_each(|(values, row)| row.copy_from_slice(&fp8_weights::quantize_row(values)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gguf_blocks::tests::Random;
    use crate::ops::row_format::tests::dequantized;

    /// Goal: quantised weights are about what they were, the closer the more bits they have.
    /// Method: random rows, error beside their own size.
    #[test]
    fn more_bits_lose_less() {
        let shape = (19, 512);
        let mut random = Random::new(3);
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| random.float()).collect();
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let error = |to: RowFormat| {
            let rows = quantize_rows(GgmlDType::F32, &data, shape, to).unwrap();
            let found = dequantized(to, &rows, shape.1);
            let squares = values.iter().zip(&found).map(|(a, b)| f64::from((a - b) * (a - b)));
            (squares.sum::<f64>() / values.len() as f64).sqrt()
        };
        let types =
            [GgmlDType::Q2K, GgmlDType::Q3K, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K];
        let types = types.into_iter().chain([GgmlDType::Q8_0]).map(RowFormat::from);
        let errors: Vec<f64> = types.map(error).collect();
        assert!(errors.is_sorted_by(|more, less| less < more), "{errors:?}");
        assert!(errors[0] < 0.25 && errors[5] < 0.004, "{errors:?}");
        // Three bits of mantissa.
        let fp8 = error(RowFormat::Fp8);
        assert!(errors[4] < fp8 && fp8 < errors[3], "{fp8} {errors:?}");
    }

    #[test]
    fn what_cannot_be_quantised_is_an_error() {
        let data = [0; 128];
        assert!(quantize_rows(GgmlDType::F32, &data, (1, 32), GgmlDType::Q8_0.into()).is_ok());
        assert!(quantize_rows(GgmlDType::F32, &data, (1, 32), GgmlDType::Q4K.into()).is_err());
        assert!(quantize_rows(GgmlDType::F32, &data, (2, 32), GgmlDType::Q8_0.into()).is_err());
        assert!(
            quantize_rows(GgmlDType::Q8_0, &data[..34], (1, 32), GgmlDType::Q4_0.into()).is_err()
        );
        let nan: Vec<u8> = [f32::NAN; 32].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert!(quantize_rows(GgmlDType::F32, &nan, (1, 32), GgmlDType::Q8_0.into()).is_err());
    }
}
