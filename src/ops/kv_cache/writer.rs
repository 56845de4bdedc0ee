//! Writing rows into a cache on the CPU.

use candle_core::{CpuStorage, Layout, Result, bail};
use half::{bf16, f16};

use super::{E4m3, KvCacheShape, KvDtype, Q8_0Block, Stored};

/// The keys or values of a layer.
pub(in crate::ops) struct CacheWriter<'a> {
    rows: Rows<'a>,
    shape: KvCacheShape,
}

/// `[num_blocks, num_kv_heads, block_size]` rows.
enum Rows<'a> {
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
    F32(&'a mut [f32]),
    Fp8(&'a mut [E4m3]),
    Q8_0(&'a mut [Q8_0Block]),
}

impl<'a> CacheWriter<'a> {
    /// What `storage` holds of a cache of this shape and type.
    pub(in crate::ops) fn new(
        (storage, layout): (&'a mut CpuStorage, &Layout),
        shape: KvCacheShape,
        dtype: KvDtype,
    ) -> Result<Self> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("the KV cache must be contiguous, has strides {:?}", layout.stride())
        };
        let range = start..end;
        let rows = match (storage, dtype) {
            (CpuStorage::F16(values), KvDtype::F16) => Rows::F16(&mut values[range]),
            (CpuStorage::BF16(values), KvDtype::Bf16) => Rows::Bf16(&mut values[range]),
            (CpuStorage::F32(values), KvDtype::F32) => Rows::F32(&mut values[range]),
            (CpuStorage::U8(bytes), KvDtype::Fp8) => {
                Rows::Fp8(bytemuck::cast_slice_mut(&mut bytes[range]))
            }
            (CpuStorage::U8(bytes), KvDtype::Q8_0) => {
                Rows::Q8_0(bytemuck::cast_slice_mut(&mut bytes[range]))
            }
            _ => bail!("the KV cache does not hold rows in {dtype:?}"),
        };
        Ok(Self { rows, shape })
    }

    /// Rounds one head's vector into a slot; `head` may be changed.
    pub(in crate::ops) fn write(&mut self, slot: u32, kv_head: usize, head: &mut [f32]) {
        let KvCacheShape { num_kv_heads, block_size, .. } = self.shape;
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        let index = (block * num_kv_heads + kv_head) * block_size + offset;
        match &mut self.rows {
            Rows::F16(rows) => round_into(rows, index, head),
            Rows::Bf16(rows) => round_into(rows, index, head),
            Rows::F32(rows) => round_into(rows, index, head),
            Rows::Fp8(rows) => round_into(rows, index, head),
            Rows::Q8_0(rows) => round_into(rows, index, head),
        }
    }
}

fn round_into<T: Stored>(rows: &mut [T], index: usize, head: &mut [f32]) {
    let len = head.len() / T::LEN;
    T::round(head, &mut rows[index * len..][..len]);
}
