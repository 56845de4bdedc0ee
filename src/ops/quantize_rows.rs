//! Rows of floats in one of the integer formats, as ggml's reference code rounds them.

use std::sync::{Mutex, PoisonError};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Tensor, bail};

use super::gguf_blocks::{dequantize_row, row_bytes};
use crate::device::threads::parallel_for;

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
    to: GgmlDType,
) -> Result<Vec<u8>> {
    let from_bytes = row_bytes(from, num_cols)?;
    let to_bytes = row_bytes(to, num_cols)?;
    if Some(data.len()) != from_bytes.checked_mul(num_rows) || from.block_size() != 1 {
        bail!("{} bytes are not {num_rows} rows of {num_cols} floats in {from:?}", data.len());
    }
    let mut quantized = vec![0; num_rows * to_bytes];
    let strips: Vec<_> = quantized.chunks_mut((STRIP * to_bytes).max(1)).map(Mutex::new).collect();
    let failure = Mutex::new(None);
    parallel_for(strips.len(), |index| {
        let mut strip = strips[index].lock().unwrap_or_else(PoisonError::into_inner);
        let rows = index * STRIP..num_rows.min((index + 1) * STRIP);
        let data = &data[rows.start * from_bytes..rows.end * from_bytes];
        if let Err(error) = quantize_strip(from, data, (rows.len(), num_cols), (to, &mut strip)) {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    drop(strips);
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(quantized),
    }
}

fn quantize_strip(
    from: GgmlDType,
    data: &[u8],
    shape: (usize, usize),
    (to, out): (GgmlDType, &mut [u8]),
) -> Result<()> {
    let mut values = vec![0.0; shape.0 * shape.1];
    dequantize_row(from, data, &mut values)?;
    if values.iter().any(|value| !value.is_finite()) {
        bail!("a weight is not a finite number");
    }
    let tensor = QTensor::quantize(&Tensor::from_vec(values, shape, &Device::Cpu)?, to)?;
    out.copy_from_slice(&tensor.data()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gguf_blocks::tests::Random;

    /// Goal: quantised weights are about what they were, the closer the more bits they have.
    /// Method: random rows, error beside their own size.
    #[test]
    fn more_bits_lose_less() {
        let shape = (19, 512);
        let mut random = Random::new(3);
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| random.float()).collect();
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let error = |to: GgmlDType| {
            let rows = quantize_rows(GgmlDType::F32, &data, shape, to).unwrap();
            let mut found = vec![0.0; values.len()];
            dequantize_row(to, &rows, &mut found).unwrap();
            let squares = values.iter().zip(&found).map(|(a, b)| f64::from((a - b) * (a - b)));
            (squares.sum::<f64>() / values.len() as f64).sqrt()
        };
        let types =
            [GgmlDType::Q2K, GgmlDType::Q3K, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K];
        let errors: Vec<f64> = types.into_iter().chain([GgmlDType::Q8_0]).map(error).collect();
        assert!(errors.is_sorted_by(|more, less| less < more), "{errors:?}");
        assert!(errors[0] < 0.25 && errors[5] < 0.004, "{errors:?}");
    }

    #[test]
    fn what_cannot_be_quantised_is_an_error() {
        let data = [0; 128];
        assert!(quantize_rows(GgmlDType::F32, &data, (1, 32), GgmlDType::Q8_0).is_ok());
        assert!(quantize_rows(GgmlDType::F32, &data, (1, 32), GgmlDType::Q4K).is_err());
        assert!(quantize_rows(GgmlDType::F32, &data, (2, 32), GgmlDType::Q8_0).is_err());
        assert!(quantize_rows(GgmlDType::Q8_0, &data[..34], (1, 32), GgmlDType::Q4_0).is_err());
        let nan: Vec<u8> = [f32::NAN; 32].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert!(quantize_rows(GgmlDType::F32, &nan, (1, 32), GgmlDType::Q8_0).is_err());
    }
}
