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

    /// The bytes of `num_cols` weights where they are multiplied, on the device that takes more.
    ///
    /// # Errors
    /// As [`Self::row_bytes`].
    pub fn packed_bytes(self, num_cols: usize) -> Result<usize> {
        match self {
            Self::Gguf(_) => self.row_bytes(num_cols),
            Self::Fp8 => Ok(fp8_weights::packed_bytes(num_cols)),
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
            return (0..num_rows).flat_map(|_| random_fp8_row(&mut random, num_cols)).collect();
        };
        random_blocks(dtype, num_rows * num_cols, seed)
    }

    /// Every byte but those that are no number, and scales of every kind.
    fn random_fp8_row(random: &mut Random, num_cols: usize) -> Vec<u8> {
        let mut row = quantize_row(&vec![0.0; num_cols]);
        let (scales, weights) = row.split_at_mut(num_cols.div_ceil(128) * 4);
        for scale in scales.as_chunks_mut::<4>().0 {
            let size = [1e-2, -1e-2, 3e-3, 0.0][(random.float().abs() * 3.99) as usize];
            *scale = f32::to_le_bytes(size * random.float());
        }
        for weight in weights {
            let byte = (random.float() * 127.0) as i8 as u8;
            *weight = if byte & 127 == 127 { 1 } else { byte };
        }
        row
    }

    /// Rows of 256 columns that hold every byte of [`RowFormat::Fp8`] once, with scales of their own.
    pub(crate) fn all_fp8_bytes() -> Vec<u8> {
        let bytes = (0..=u8::MAX).map(|byte| if byte & 127 == 127 { 0 } else { byte });
        let row =
            |scale: f32| [[scale.to_le_bytes(); 2].concat(), bytes.clone().collect()].concat();
        [1.0, -0.37, 1e-30].into_iter().flat_map(row).collect()
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
