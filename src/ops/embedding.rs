//! Embedding: `out[i] = table[ids[i]]`, with the rows kept as the file has them and dequantised on
//! the way out.

mod gpu;

use candle_core::quantized::GgmlDType;
use candle_core::{Result, Tensor as CpuTensor, bail};

use super::gguf_blocks::{dequantize_row, row_bytes};
use super::indices::Indices;
use super::tensor::Tensor;
use crate::device::Device;
use crate::device::gpu::{DeviceBuffer, Gpu};

/// A table of rows in one of the file formats.
pub struct EmbeddingTable {
    data: Box<dyn AsRef<[u8]> + Send + Sync>,
    dtype: GgmlDType,
    num_rows: usize,
    num_cols: usize,
    row_bytes: usize,
    /// The same bytes in a card's memory.
    resident: Option<(Gpu, DeviceBuffer)>,
}

impl EmbeddingTable {
    /// A table of `num_rows` rows of `num_cols` weights, one after the other in `data`.
    ///
    /// # Errors
    /// If the rows are not whole blocks or `data` has another length.
    pub fn new(
        data: impl AsRef<[u8]> + Send + Sync + 'static,
        dtype: GgmlDType,
        (num_rows, num_cols): (usize, usize),
    ) -> Result<Self> {
        let row_bytes = row_bytes(dtype, num_cols)?;
        let num_bytes = data.as_ref().len();
        if num_bytes != num_rows * row_bytes {
            bail!("{num_rows} rows of {num_cols} {dtype:?} weights are not {num_bytes} bytes");
        }
        Ok(Self { data: Box::new(data), dtype, num_rows, num_cols, row_bytes, resident: None })
    }

    /// The table where this device finds it.
    ///
    /// # Errors
    /// If the card has no memory for it.
    pub fn to_device(mut self, device: &Device) -> Result<Self> {
        self.resident = match device {
            Device::Cpu => None,
            Device::Gpu(gpu) => Some((gpu.clone(), gpu.alloc_from((*self.data).as_ref())?)),
        };
        Ok(self)
    }

    /// How many rows there are.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// How many weights a row has.
    pub fn num_cols(&self) -> usize {
        self.num_cols
    }
}

/// Looks rows up: `[ids.len(), num_cols]`.
///
/// # Errors
/// If an id is not below the number of rows; on a card its row is NaN instead.
pub fn embedding(table: &EmbeddingTable, ids: &Indices) -> Result<Tensor> {
    match &table.resident {
        None => embedding_on_cpu(table, ids).map(Tensor::Cpu),
        Some(resident) => gpu::embedding(table, resident, ids).map(Tensor::Gpu),
    }
}

fn embedding_on_cpu(table: &EmbeddingTable, ids: &[u32]) -> Result<CpuTensor> {
    if let Some(id) = ids.iter().find(|id| table.num_rows <= **id as usize) {
        bail!("id {id} is outside of an embedding table of {} rows", table.num_rows);
    }
    let num_cols = table.num_cols;
    let mut rows: Vec<f32> = vec![0.0; ids.len() * num_cols];
    // Serial: a row is a few hundred bytes, less than waking a thread costs.
    for (row, &id) in rows.chunks_exact_mut(num_cols.max(1)).zip(ids) {
        let data = (*table.data).as_ref();
        let start = id as usize * table.row_bytes;
        dequantize_row(table.dtype, &data[start..start + table.row_bytes], row)?;
    }
    CpuTensor::from_vec(rows, (ids.len(), num_cols), &candle_core::Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gguf_blocks::tests::{ALL_DTYPES, random_blocks};

    #[test]
    fn rows_come_out_in_the_order_of_the_ids() {
        for dtype in ALL_DTYPES {
            let data = random_blocks(dtype, 5 * 256, 3);
            let mut all = vec![0.0; 5 * 256];
            dequantize_row(dtype, &data, &mut all).unwrap();
            let table = EmbeddingTable::new(data, dtype, (5, 256)).unwrap();
            let found = embedding_on_cpu(&table, &[4, 0, 4, 2]).unwrap().to_vec2::<f32>().unwrap();
            let expected: Vec<_> =
                [4, 0, 4, 2].iter().map(|&id| all[id * 256..(id + 1) * 256].to_vec()).collect();
            assert_eq!(found, expected, "{dtype:?}");
        }
    }

    #[test]
    fn wrong_sizes_and_ids_are_errors() {
        assert!(EmbeddingTable::new(vec![0; 34], GgmlDType::Q8_0, (2, 32)).is_err());
        assert!(EmbeddingTable::new(vec![0; 34], GgmlDType::Q8_0, (1, 33)).is_err());
        let table = EmbeddingTable::new(vec![0; 34], GgmlDType::Q8_0, (1, 32)).unwrap();
        assert!(embedding_on_cpu(&table, &[1]).is_err());
        assert_eq!(embedding_on_cpu(&table, &[]).unwrap().dims(), [0, 32]);
    }
}
