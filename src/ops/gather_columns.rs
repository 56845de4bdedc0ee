//! The columns of a matrix in another order: `out[t, i] = x[t, columns[i]]`.

use candle_core::{DType, Result, bail};

use super::grid::over_rows;
use super::indices::Indices;
use super::tensor::{GpuTensor, Tensor};
use crate::device::gpu::{Arg, Kernel};

/// Values that a thread copies.
const PACK: usize = 4;

/// Copies the columns of `x` `[num_tokens, num_cols]` into `[num_tokens, columns.len()]`, on a card a
/// multiple of 4.
///
/// # Errors
/// If there is no such column; if on a card `x` is not `bf16`, or the indices are not there.
pub fn gather_columns(x: &Tensor, columns: &Indices) -> Result<Tensor> {
    match x {
        Tensor::Cpu(x) => {
            let columns = candle_core::Tensor::new(columns.as_slice(), x.device())?;
            x.index_select(&columns, 1).map(Tensor::Cpu)
        }
        Tensor::Gpu(x) => gather_columns_on_gpu(x, columns).map(Tensor::Gpu),
    }
}

/// `kernels/quant/gather_columns.cu`
fn gather_columns_on_gpu(x: &GpuTensor, columns: &Indices) -> Result<GpuTensor> {
    if x.dtype != DType::BF16 || !columns.len().is_multiple_of(PACK) {
        bail!("{} columns of {:?} are not supported on the GPU", columns.len(), x.dtype);
    }
    // A quick look in place of one at every index: those of a matrix are all its columns.
    if x.num_cols < columns.len() {
        bail!("{} columns of {}", columns.len(), x.num_cols);
    }
    let out = GpuTensor::scratch(&x.gpu, x.dtype, (x.num_rows, columns.len()))?;
    let args = [
        Arg::Buffer(&x.buffer),
        Arg::Buffer(columns.on_gpu()?),
        Arg::Buffer(&out.buffer),
        Arg::I32(x.num_rows as i32),
        Arg::I32(x.num_cols as i32),
        Arg::I32(columns.len() as i32),
    ];
    let kernel = Kernel { module: "gather_columns", function: "gather_columns" };
    x.gpu.launch(kernel, over_rows(x.num_rows, columns.len() / PACK), &args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::device::gpu::Gpu;

    #[test]
    fn columns_come_in_the_order_of_their_indices() {
        let x = Tensor::from_vec((0..6).map(|i| i as f32).collect(), (2, 3), &Device::Cpu).unwrap();
        let found = gather_columns(&x, &vec![2, 0, 1].into()).unwrap();
        assert_eq!(found.to_vec().unwrap(), [2.0, 0.0, 1.0, 5.0, 3.0, 4.0]);
        assert!(gather_columns(&x, &vec![3].into()).is_err());
    }

    #[test]
    fn a_card_copies_the_same_columns() {
        let Some(gpu) = Gpu::for_tests() else { return };
        for (num_tokens, num_cols) in [(1, 32), (3, 896), (2, 4864)] {
            let values: Vec<f32> = (0..num_tokens * num_cols).map(|i| (i % 251) as f32).collect();
            let shape = (num_tokens, num_cols);
            let x = GpuTensor::from_slice(&gpu, &values, DType::BF16, shape).unwrap();
            let mut columns: Indices = (0..num_cols).map(|i| (i * 5 % num_cols) as u32).collect();
            columns.upload_to(gpu.alloc(num_cols * size_of::<u32>()).unwrap()).unwrap();
            let found = gather_columns(&Tensor::Gpu(x), &columns).unwrap().to_vec().unwrap();
            for (row, found) in values.chunks(num_cols).zip(found.chunks(num_cols)) {
                let expected: Vec<f32> =
                    columns.iter().map(|&column| row[column as usize]).collect();
                assert_eq!(found, expected);
            }
        }
        let x = GpuTensor::scratch(&gpu, DType::F32, (1, 4)).unwrap();
        assert!(gather_columns(&Tensor::Gpu(x), &vec![0; 4].into()).is_err());
    }
}
