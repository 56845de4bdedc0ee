//! Embedding on a card: `kernels/embedding/embedding.cu`.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Result};

use super::EmbeddingTable;
use crate::device::gpu::{Arg, DeviceBuffer, Gpu, Kernel};
use crate::ops::grid::over_rows;
use crate::ops::indices::Indices;
use crate::ops::tensor::GpuTensor;

fn function(dtype: GgmlDType) -> &'static str {
    match dtype {
        GgmlDType::F32 => "embedding_f32",
        GgmlDType::F16 => "embedding_f16",
        GgmlDType::BF16 => "embedding_bf16",
        GgmlDType::Q4_0 => "embedding_q4_0",
        GgmlDType::Q4_1 => "embedding_q4_1",
        GgmlDType::Q5_0 => "embedding_q5_0",
        GgmlDType::Q5_1 => "embedding_q5_1",
        GgmlDType::Q8_0 => "embedding_q8_0",
        GgmlDType::Q8_1 => "embedding_q8_1",
        GgmlDType::Q2K => "embedding_q2k",
        GgmlDType::Q3K => "embedding_q3k",
        GgmlDType::Q4K => "embedding_q4k",
        GgmlDType::Q5K => "embedding_q5k",
        GgmlDType::Q6K => "embedding_q6k",
        GgmlDType::Q8K => "embedding_q8k",
    }
}

/// The row of an id outside of the table becomes NaN: ids may be known to the card alone.
pub(super) fn embedding(
    table: &EmbeddingTable,
    (gpu, data): &(Gpu, DeviceBuffer),
    ids: &Indices,
) -> Result<GpuTensor> {
    let out = GpuTensor::scratch(gpu, DType::F32, (ids.len(), table.num_cols))?;
    let args = [
        Arg::Buffer(data),
        Arg::Buffer(ids.on_gpu()?),
        Arg::Buffer(&out.buffer),
        Arg::I32(ids.len() as i32),
        Arg::U32(table.num_rows as u32),
        Arg::I32(table.num_cols as i32),
    ];
    let kernel = Kernel { module: "embedding", function: function(table.dtype) };
    gpu.launch(kernel, over_rows(ids.len(), table.num_cols), &args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::ops::gguf_blocks::dequantize_row;
    use crate::ops::gguf_blocks::tests::{ALL_DTYPES, random_blocks};

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// Goal: a card decodes every format to the same bits as the processor. Method: random blocks.
    #[test]
    fn every_format_is_decoded_to_the_last_bit() {
        let Some(gpu) = Gpu::for_tests() else { return };
        for dtype in ALL_DTYPES {
            for num_cols in [dtype.block_size(), 256 * 14] {
                let data = random_blocks(dtype, 5 * num_cols, 3);
                let mut all = vec![0.0; 5 * num_cols];
                dequantize_row(dtype, &data, &mut all).unwrap();
                let table = EmbeddingTable::new(data, dtype, (5, num_cols)).unwrap();
                let table = table.to_device(&Device::Gpu(gpu.clone())).unwrap();
                let mut ids = Indices::from(vec![4, 0, 5, 4, 2, u32::MAX]);
                ids.upload_to(gpu.alloc(6 * 4).unwrap()).unwrap();
                let found = super::super::embedding(&table, &ids).unwrap().to_vec().unwrap();
                for (&id, row) in ids.iter().zip(found.chunks(num_cols)) {
                    let row_start = id as usize * num_cols;
                    match all.get(row_start..row_start + num_cols) {
                        Some(expected) => {
                            assert_eq!(bits(row), bits(expected), "{dtype:?}, row {id}");
                        }
                        None => assert!(row.iter().all(|value| value.is_nan()), "{dtype:?}"),
                    }
                }
            }
        }
    }
}
