//! What rows of weights are made of where products read them.

use std::fmt;

use candle_core::Result;
use candle_core::quantized::GgmlDType;

use super::{fp8_weights, gguf_blocks};

/// The format of a row of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// Blocks or floats as GGUF files have them.
    Gguf(GgmlDType),
    /// Floats of eight bits with a scale for each 128: see [`super::fp8_weights`].
    Fp8,
}

impl RowFormat {
    /// The bytes of `num_cols` weights.
    ///
    /// # Errors
    /// If a row of that length does not consist of whole blocks.
    pub fn row_bytes(self, num_cols: usize) -> Result<usize> {
        match self {
            Self::Gguf(dtype) => gguf_blocks::row_bytes(dtype, num_cols),
            Self::Fp8 => Ok(fp8_weights::row_bytes(num_cols)),
        }
    }

    /// Turns a row into numbers.
    ///
    /// # Errors
    /// If `data` is not exactly `out.len()` weights long, or that is no number of whole blocks.
    pub fn dequantize_row(self, data: &[u8], out: &mut [f32]) -> Result<()> {
        match self {
            Self::Gguf(dtype) => gguf_blocks::dequantize_row(dtype, data, out),
            Self::Fp8 => fp8_weights::dequantize_row(data, out),
        }
    }

    /// The format in GGUF files, if they have it.
    pub fn gguf(self) -> Option<GgmlDType> {
        match self {
            Self::Gguf(dtype) => Some(dtype),
            Self::Fp8 => None,
        }
    }

    /// Whether rows of [`Self::Fp8`] can say where so many columns of a file share a scale.
    pub fn fits_fp8(scaled_cols: usize, num_cols: usize) -> bool {
        fp8_weights::fits_rows(scaled_cols, num_cols)
    }

    /// Weights that only exist together: rows are a multiple of them.
    pub fn block_len(self) -> usize {
        self.gguf().map_or(1, |dtype| dtype.block_size())
    }
}

impl From<GgmlDType> for RowFormat {
    fn from(dtype: GgmlDType) -> Self {
        Self::Gguf(dtype)
    }
}

impl fmt::Display for RowFormat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gguf(dtype) => write!(formatter, "{dtype:?}"),
            Self::Fp8 => formatter.write_str("FP8"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::RowFormat;
    use crate::ops::fp8_weights::quantize_row;
    use crate::ops::gguf_blocks::tests::{ALL_DTYPES, Random, random_blocks};

    /// Every format that there is.
    pub(crate) fn all_formats() -> Vec<RowFormat> {
        ALL_DTYPES.into_iter().map(RowFormat::from).chain([RowFormat::Fp8]).collect()
    }

    /// Random rows, one after the other.
    pub(crate) fn random_rows(
        format: RowFormat,
        (num_rows, num_cols): (usize, usize),
        seed: u64,
    ) -> Vec<u8> {
        let RowFormat::Gguf(dtype) = format else {
            let mut random = Random::new(seed);
            let mut rows = Vec::new();
            for _ in 0..num_rows {
                let values: Vec<f32> = (0..num_cols).map(|_| random.float()).collect();
                rows.extend(quantize_row(&values));
            }
            return rows;
        };
        random_blocks(dtype, num_rows * num_cols, seed)
    }

    /// The numbers of rows of `num_cols`.
    pub(crate) fn dequantized(format: RowFormat, rows: &[u8], num_cols: usize) -> Vec<f32> {
        let row_bytes = format.row_bytes(num_cols).unwrap();
        let mut numbers = vec![0.0; rows.len() / row_bytes * num_cols];
        for (row, out) in rows.chunks(row_bytes).zip(numbers.chunks_mut(num_cols)) {
            format.dequantize_row(row, out).unwrap();
        }
        numbers
    }
}
