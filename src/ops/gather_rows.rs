//! Some of the rows of a matrix: `out[i] = x[rows[i]]`.

use candle_core::{DType, Result, bail};

use super::grid::over_rows;
use super::indices::Indices;
use super::tensor::{GpuTensor, Tensor};
use crate::device::gpu::{Arg, Kernel};

/// Values that a thread copies, where rows are multiples of it.
const PACK: usize = 4;

/// Copies rows of `x` `[num_tokens, num_cols]` into `[rows.len(), num_cols]`.
///
/// # Errors
/// If there is no such row.
pub fn gather_rows(x: &Tensor, rows: &Indices) -> Result<Tensor> {
    let (num_tokens, _) = x.dims2()?;
    if let Some(row) = rows.iter().find(|row| num_tokens <= **row as usize) {
        bail!("row {row} of {num_tokens}");
    }
    match x {
        Tensor::Cpu(x) => {
            let rows = candle_core::Tensor::new(rows.as_slice(), x.device())?;
            x.index_select(&rows, 0).map(Tensor::Cpu)
        }
        Tensor::Gpu(x) => gather_rows_on_gpu(x, rows).map(Tensor::Gpu),
    }
}

/// `kernels/embedding/gather_rows.cu`
fn gather_rows_on_gpu(x: &GpuTensor, rows: &Indices) -> Result<GpuTensor> {
    let (num_rows, num_cols) = (rows.len(), x.num_cols);
    let out = GpuTensor::scratch(&x.gpu, x.dtype, (num_rows, num_cols))?;
    let is_packed = num_cols.is_multiple_of(PACK);
    let function = match (x.dtype, is_packed) {
        (DType::F32, true) => "gather_rows_f32_4",
        (DType::F32, false) => "gather_rows_f32_1",
        (DType::BF16, true) => "gather_rows_bf16_4",
        (DType::BF16, false) => "gather_rows_bf16_1",
        (dtype, _) => bail!("rows of {dtype:?} are not supported on the GPU"),
    };
    let args = [
        Arg::Buffer(&x.buffer),
        Arg::Buffer(rows.on_gpu()?),
        Arg::Buffer(&out.buffer),
        Arg::I32(num_rows as i32),
        Arg::I32(num_cols as i32),
    ];
    let threads_per_row = if is_packed { num_cols / PACK } else { num_cols };
    let kernel = Kernel { module: "gather_rows", function };
    x.gpu.launch(kernel, over_rows(num_rows, threads_per_row), &args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::device::gpu::Gpu;

    #[test]
    fn rows_come_in_the_order_of_their_indices() {
        let x = Tensor::from_vec((0..6).map(|i| i as f32).collect(), (3, 2), &Device::Cpu).unwrap();
        let found = gather_rows(&x, &vec![2, 0, 2].into()).unwrap();
        assert_eq!(found.to_vec().unwrap(), [4.0, 5.0, 0.0, 1.0, 4.0, 5.0]);
        assert_eq!(gather_rows(&x, &Indices::default()).unwrap().dims2().unwrap(), (0, 2));
        assert!(gather_rows(&x, &vec![3].into()).is_err());
    }

    #[test]
    fn a_card_copies_the_same_rows() {
        let Some(gpu) = Gpu::for_tests() else { return };
        for (dtype, num_cols) in
            [(DType::F32, 896), (DType::F32, 7), (DType::BF16, 3584), (DType::BF16, 1)]
        {
            let values: Vec<f32> = (0..5 * num_cols).map(|i| (i % 251) as f32).collect();
            let x = GpuTensor::from_slice(&gpu, &values, dtype, (5, num_cols)).unwrap();
            let mut rows = Indices::from(vec![4, 0, 3, 4]);
            rows.upload_to(gpu.alloc(16).unwrap()).unwrap();
            let found = gather_rows(&Tensor::Gpu(x), &rows).unwrap().to_vec().unwrap();
            for (&row, found) in rows.iter().zip(found.chunks(num_cols)) {
                assert_eq!(found, &values[row as usize * num_cols..][..num_cols], "{dtype:?}");
            }
        }
    }
}
