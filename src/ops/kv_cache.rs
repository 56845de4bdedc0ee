//! Keys and values of one layer, in blocks that a sequence need not have side by side.
//!
//! A row is one head's vector of one token. What reads a cache sees rows as they were rounded when
//! they were written, also those of the step that wrote them, so that nothing depends on how a
//! prompt was cut.

mod row;
mod writer;

use candle_core::Tensor as CpuTensor;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Shape, WithDType, bail};
use half::{bf16, f16};

use super::paged_attention::{check_shape, new_counters};
use crate::device::Device;
use crate::device::gpu::{DeviceBuffer, Gpu};
pub(super) use row::{E4m3, Q8_0_LEN, Q8_0Block, Stored};
pub(super) use writer::CacheWriter;

/// How the numbers of a row are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// Half precision; saturates at 65,504.
    F16,
    /// The upper half of single precision.
    Bf16,
    /// Single precision.
    F32,
    /// Floats of 8 bits, e4m3: 3 bits of mantissa; saturates at 448.
    Fp8,
    /// Integers of 8 bits, 32 of which share a scale in half precision, as in GGUF's type.
    Q8_0,
}

impl KvDtype {
    /// Bytes of a row of so many numbers.
    pub fn row_bytes(self, num_values: usize) -> usize {
        match self {
            Self::Fp8 => num_values,
            Self::F16 | Self::Bf16 => 2 * num_values,
            Self::F32 => 4 * num_values,
            Self::Q8_0 => num_values.div_ceil(Q8_0_LEN) * size_of::<Q8_0Block>(),
        }
    }

    /// Whether a device holds rows of `head_dim` numbers so.
    ///
    /// # Errors
    /// If it does not: what to use instead.
    pub fn check(self, head_dim: usize, device: &Device) -> Result<()> {
        match (self, device) {
            (Self::F32, Device::Gpu(_)) => {
                bail!("a KV cache in f32 is not supported on a GPU; use f16, bf16 or fp8")
            }
            (Self::Q8_0, Device::Gpu(_)) => {
                bail!("a KV cache in q8_0 is not supported on a GPU; use fp8, f16 or bf16")
            }
            (Self::Q8_0, Device::Cpu) if !head_dim.is_multiple_of(Q8_0_LEN) => bail!(
                "a KV cache in q8_0 needs heads of a multiple of {Q8_0_LEN} values, and the model's \
                 have {head_dim}; use fp8, f16 or bf16"
            ),
            _ => Ok(()),
        }
    }

    /// The type that a card's kernels know it by.
    fn on_card(self) -> Result<DType> {
        Ok(match self {
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Fp8 => DType::F8E4M3,
            Self::F32 | Self::Q8_0 => bail!("a KV cache in {self:?} is not supported on a GPU"),
        })
    }
}

/// Dimensions of one layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCacheShape {
    /// How many blocks there are.
    pub num_blocks: usize,
    /// Heads that keys and values have.
    pub num_kv_heads: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Values per head; a multiple of 8.
    pub head_dim: usize,
}

/// Keys and values of one layer.
#[derive(Clone, Debug)]
pub enum KvCache {
    /// In the program's memory.
    Cpu(CpuKvCache),
    /// In a card's memory.
    Gpu(GpuKvCache),
}

/// Keys and values of one layer in the program's memory.
#[derive(Clone, Debug)]
pub struct CpuKvCache {
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`; of types of 8 bits the rows' bytes
    pub k: CpuTensor,
    /// The same of values.
    pub v: CpuTensor,
    /// How rows are stored.
    pub dtype: KvDtype,
    /// Tokens per block.
    pub block_size: usize,
}

/// Keys and values of one layer in a card's memory, `f16`, `bf16` or `f8e4m3`.
#[derive(Clone, Debug)]
pub struct GpuKvCache {
    /// Whose memory.
    pub gpu: Gpu,
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`
    pub k: DeviceBuffer,
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`
    pub v: DeviceBuffer,
    /// Type of keys and values.
    pub dtype: DType,
    /// Dimensions of `k` and of `v`.
    pub shape: KvCacheShape,
    /// What keys are multiplied with where they are used; 1 unless they have 8 bits.
    pub k_scale: f32,
    /// What values are multiplied with where they are used; 1 unless they have 8 bits.
    pub v_scale: f32,
    /// Of partitions that are done, see the kernel.
    pub(super) counters: DeviceBuffer,
}

impl KvCache {
    /// An empty cache, see [`CpuKvCache::new`] and [`GpuKvCache::new`].
    ///
    /// # Errors
    /// If the shape or the type is not supported, or there is no memory.
    pub fn new(shape: KvCacheShape, dtype: KvDtype, device: &Device) -> Result<Self> {
        Ok(match device {
            Device::Cpu => Self::Cpu(CpuKvCache::new(shape, dtype)?),
            Device::Gpu(gpu) => {
                check_shape(shape)?;
                Self::Gpu(GpuKvCache::new(shape, dtype, gpu)?)
            }
        })
    }
}

impl KvCacheShape {
    /// Values of all keys, or of all values.
    fn num_elements(self) -> Result<usize> {
        let Self { num_blocks, num_kv_heads, block_size, head_dim } = self;
        if num_kv_heads == 0 || block_size == 0 || head_dim == 0 || head_dim % 8 != 0 {
            bail!("a KV cache of {self:?} is not supported");
        }
        let num_slots = num_blocks.checked_mul(block_size).filter(|&n| u32::try_from(n).is_ok());
        let num_heads = num_slots.and_then(|n| n.checked_mul(num_kv_heads));
        match num_heads.and_then(|n| n.checked_mul(head_dim)) {
            Some(num_elements) => Ok(num_elements),
            None => bail!("a KV cache of {self:?} has too many slots"),
        }
    }
}

impl GpuKvCache {
    /// A cache in `f16`, `bf16` or `fp8`, which takes up its memory at once. No kernel reads a slot
    /// that was not written.
    ///
    /// # Errors
    /// If the shape or the type is not supported, or the card has no memory left.
    pub fn new(shape: KvCacheShape, dtype: KvDtype, gpu: &Gpu) -> Result<Self> {
        let dtype = dtype.on_card()?;
        let num_bytes = shape.num_elements()? * dtype.size_in_bytes();
        let (k, v) = (gpu.alloc(num_bytes)?, gpu.alloc(num_bytes)?);
        let counters = new_counters(gpu, shape.num_kv_heads)?;
        let (k_scale, v_scale) = (1.0, 1.0);
        Ok(Self { gpu: gpu.clone(), k, v, dtype, shape, k_scale, v_scale, counters })
    }
}

impl CpuKvCache {
    /// An empty cache. Blocks take up memory once written.
    ///
    /// # Errors
    /// If the shape or the type is not supported, or there is no memory.
    pub fn new(shape: KvCacheShape, dtype: KvDtype) -> Result<Self> {
        let KvCacheShape { num_blocks, num_kv_heads, block_size, head_dim } = shape;
        shape.num_elements()?;
        dtype.check(head_dim, &Device::Cpu)?;
        let dims = (num_blocks, num_kv_heads, block_size);
        let zeros = || match dtype {
            KvDtype::F16 => lazy_zeros::<f16>(dims, head_dim),
            KvDtype::Bf16 => lazy_zeros::<bf16>(dims, head_dim),
            KvDtype::F32 => lazy_zeros::<f32>(dims, head_dim),
            KvDtype::Fp8 | KvDtype::Q8_0 => lazy_zeros::<u8>(dims, dtype.row_bytes(head_dim)),
        };
        Ok(Self { k: zeros()?, v: zeros()?, dtype, block_size })
    }

    /// The cache's dimensions.
    pub fn shape(&self) -> Result<KvCacheShape> {
        let (num_blocks, num_kv_heads, block_size, row_len) = self.k.dims4()?;
        if block_size != self.block_size || self.v.dims() != self.k.dims() {
            let (k, v) = (self.k.dims(), self.v.dims());
            bail!("the cache's keys are {k:?} and its values {v:?}, not blocks of {block_size}");
        }
        let head_dim = match self.dtype {
            KvDtype::Q8_0 => row_len / size_of::<Q8_0Block>() * Q8_0_LEN,
            _ => row_len,
        };
        Ok(KvCacheShape { num_blocks, num_kv_heads, block_size, head_dim })
    }

    /// Writes all keys and all values, rounded: `[num_blocks, num_kv_heads, block_size, head_dim]`
    /// each. What a model computes goes through `rope_and_cache`; this is for tests and
    /// measurements.
    ///
    /// # Errors
    /// If they are not so many.
    pub fn fill(&self, keys: &[f32], values: &[f32]) -> Result<()> {
        let shape = self.shape()?;
        for (cache, numbers) in [(&self.k, keys), (&self.v, values)] {
            if numbers.len() != shape.num_elements()? {
                bail!("{} numbers do not fill a cache of {shape:?}", numbers.len());
            }
            cache.inplace_op1(&Fill { shape, dtype: self.dtype, numbers })?;
        }
        Ok(())
    }
}

struct Fill<'a> {
    shape: KvCacheShape,
    dtype: KvDtype,
    numbers: &'a [f32],
}

impl InplaceOp1 for Fill<'_> {
    fn name(&self) -> &'static str {
        "fill_cache"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let KvCacheShape { num_kv_heads, block_size, head_dim, .. } = self.shape;
        let mut writer = CacheWriter::new((cache, layout), self.shape, self.dtype)?;
        for (index, row) in self.numbers.chunks_exact(head_dim).enumerate() {
            let (block, head) = (index / block_size / num_kv_heads, index / block_size);
            let slot = block * block_size + index % block_size;
            writer.write(slot as u32, head % num_kv_heads, &mut row.to_vec());
        }
        Ok(())
    }
}

fn lazy_zeros<T: WithDType + bytemuck::Zeroable>(
    (num_blocks, num_kv_heads, block_size): (usize, usize, usize),
    row_len: usize,
) -> Result<CpuTensor> {
    let dims = (num_blocks, num_kv_heads, block_size, row_len);
    let Ok(zeros) = bytemuck::allocation::try_zeroed_vec::<T>(Shape::from(dims).elem_count())
    else {
        bail!("no memory for a KV cache of {dims:?}")
    };
    CpuTensor::from_vec(zeros, dims, &candle_core::Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_take_what_their_type_does() {
        let types = [KvDtype::F16, KvDtype::Bf16, KvDtype::F32, KvDtype::Fp8, KvDtype::Q8_0];
        assert_eq!(types.map(|dtype| dtype.row_bytes(128)), [256, 256, 512, 128, 136]);
    }

    #[test]
    fn heads_that_are_no_whole_blocks_are_refused_with_what_to_use() {
        let error = KvDtype::Q8_0.check(80, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("heads of a multiple of 32 values") && error.contains("80"));
        assert!(error.contains("use fp8, f16 or bf16"), "{error}");
        assert!(KvDtype::Q8_0.check(96, &Device::Cpu).is_ok());
        assert!(KvDtype::Fp8.check(80, &Device::Cpu).is_ok());
    }
}
