//! Activations, on the device that computes them.

use candle_core::{DType, Result, bail};
use half::bf16;

pub use crate::device::Device;
use crate::device::gpu::{DeviceBuffer, Gpu};

/// A matrix of activations, one row a token. A vector is one row.
#[derive(Clone, Debug)]
pub enum Tensor {
    /// `f32` in the program's memory.
    Cpu(candle_core::Tensor),
    /// `f32` or `bf16` in a card's memory.
    Gpu(GpuTensor),
}

/// A contiguous matrix in a card's memory, row after row.
#[derive(Clone, Debug)]
pub struct GpuTensor {
    /// Whose memory.
    pub gpu: Gpu,
    /// The values.
    pub buffer: DeviceBuffer,
    /// `F32` or `BF16`.
    pub dtype: DType,
    /// Tokens.
    pub num_rows: usize,
    /// Values of a token.
    pub num_cols: usize,
}

impl GpuTensor {
    /// A result of an operation; what it holds is undefined.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn scratch(gpu: &Gpu, dtype: DType, (num_rows, num_cols): (usize, usize)) -> Result<Self> {
        let buffer = gpu.scratch(num_rows * num_cols * dtype.size_in_bytes())?;
        Ok(Self { gpu: gpu.clone(), buffer, dtype, num_rows, num_cols })
    }

    /// Copies values to the card, as they are or rounded to `bf16`.
    ///
    /// # Errors
    /// If there is no memory, or `dtype` is neither.
    pub fn from_slice(
        gpu: &Gpu,
        values: &[f32],
        dtype: DType,
        (num_rows, num_cols): (usize, usize),
    ) -> Result<Self> {
        assert_eq!(values.len(), num_rows * num_cols, "as many values as the shape has");
        let buffer = match dtype {
            DType::F32 => gpu.alloc_from(bytemuck::cast_slice(values))?,
            DType::BF16 => {
                let rounded: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
                gpu.alloc_from(bytemuck::cast_slice(&rounded))?
            }
            _ => bail!("activations of {dtype:?} are not supported"),
        };
        Ok(Self { gpu: gpu.clone(), buffer, dtype, num_rows, num_cols })
    }

    /// The values, once they are computed.
    ///
    /// # Errors
    /// If computing them failed.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let bytes = self.buffer.download()?;
        Ok(match self.dtype {
            DType::BF16 => bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes)
                .into_iter()
                .map(bf16::to_f32)
                .collect(),
            _ => bytemuck::pod_collect_to_vec(&bytes),
        })
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.num_cols * self.dtype.size_in_bytes()
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If they lie outside.
    #[must_use]
    pub fn narrow(&self, first: usize, num_rows: usize) -> Self {
        let bytes = first * self.row_bytes()..(first + num_rows) * self.row_bytes();
        Self { buffer: self.buffer.slice(bytes), num_rows, ..self.clone() }
    }
}

impl Tensor {
    /// The tensor, which must be the processor's.
    ///
    /// # Errors
    /// If it is on a card.
    pub fn cpu(&self) -> Result<&candle_core::Tensor> {
        match self {
            Self::Cpu(tensor) => Ok(tensor),
            Self::Gpu(_) => bail!("an operand is on the GPU, the others are not"),
        }
    }

    /// The tensor, which must be a card's.
    ///
    /// # Errors
    /// If it is the processor's.
    pub fn gpu(&self) -> Result<&GpuTensor> {
        match self {
            Self::Gpu(tensor) => Ok(tensor),
            Self::Cpu(_) => bail!("an operand is not on the GPU, as the others are"),
        }
    }

    /// Values of a parameter, as `f32`.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn from_vec(values: Vec<f32>, shape: (usize, usize), device: &Device) -> Result<Self> {
        Ok(match device {
            Device::Cpu => {
                Self::Cpu(candle_core::Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)
            }
            Device::Gpu(gpu) => Self::Gpu(GpuTensor::from_slice(gpu, &values, DType::F32, shape)?),
        })
    }

    /// Rows and columns.
    ///
    /// # Errors
    /// If it is no matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Self::Cpu(tensor) => tensor.dims2(),
            Self::Gpu(tensor) => Ok((tensor.num_rows, tensor.num_cols)),
        }
    }

    /// Some of the rows.
    ///
    /// # Errors
    /// If they lie outside.
    pub fn narrow(&self, first: usize, num_rows: usize) -> Result<Self> {
        match self {
            Self::Cpu(tensor) => Ok(Self::Cpu(tensor.narrow(0, first, num_rows)?.contiguous()?)),
            Self::Gpu(tensor) if first + num_rows <= tensor.num_rows => {
                Ok(Self::Gpu(tensor.narrow(first, num_rows)))
            }
            Self::Gpu(tensor) => {
                bail!("rows {first}..{} of {}", first + num_rows, tensor.num_rows)
            }
        }
    }

    /// The values, row after row.
    ///
    /// # Errors
    /// If computing them failed.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        match self {
            Self::Cpu(tensor) => tensor.flatten_all()?.to_vec1::<f32>(),
            Self::Gpu(tensor) => tensor.to_vec(),
        }
    }
}
