//! Rotary embedding and cache writes on a card: `kernels/rope/rope_cache.cu`.

use candle_core::{DType, Result, bail};

use super::{RopeTable, check_tokens};
use crate::device::gpu::{Arg, Kernel};
use crate::ops::grid::over_rows;
use crate::ops::kv_cache::GpuKvCache;
use crate::ops::paged_attention::AttentionMetadata;
use crate::ops::tensor::GpuTensor;

/// Pairs of values that a thread rotates, where heads are multiples of twice as many.
const PACK: usize = 8;

pub(super) fn rope_and_cache(
    qkv: &GpuTensor,
    table: &RopeTable,
    kv: &GpuKvCache,
    meta: &AttentionMetadata,
) -> Result<GpuTensor> {
    let (shape, num_tokens) = (kv.shape, qkv.num_rows);
    let num_all_heads = qkv.num_cols / shape.head_dim;
    if qkv.dtype != DType::BF16 {
        bail!("queries, keys and values are {:?}, not BF16", qkv.dtype);
    }
    let num_heads = super::num_query_heads(qkv.num_cols, table, shape)?;
    check_tokens(meta, num_tokens, table.num_rows(), shape)?;
    let q_shape = (num_tokens, num_heads * shape.head_dim);
    let q = GpuTensor::scratch(&qkv.gpu, DType::BF16, q_shape)?;
    let is_packed = shape.head_dim.is_multiple_of(2 * PACK);
    let pairs_per_thread = if is_packed { PACK } else { 1 };
    let function = match (kv.dtype, is_packed) {
        (DType::BF16, true) => "rope_cache_bf16_8",
        (DType::BF16, false) => "rope_cache_bf16_1",
        (DType::F16, true) => "rope_cache_f16_8",
        (DType::F16, false) => "rope_cache_f16_1",
        (DType::F8E4M3, true) => "rope_cache_e4m3_8",
        (DType::F8E4M3, false) => "rope_cache_e4m3_1",
        (dtype, _) => bail!("a KV cache of {dtype:?} is not supported on the GPU"),
    };
    let threads_per_token = num_all_heads * (shape.head_dim / 2 / pairs_per_thread);
    let args = [
        Arg::Buffer(&qkv.buffer),
        Arg::Buffer(&table.cos_sin.gpu()?.buffer),
        Arg::Buffer(meta.positions.on_gpu()?),
        Arg::Buffer(meta.slot_mapping.on_gpu()?),
        Arg::Buffer(&q.buffer),
        Arg::Buffer(&kv.k),
        Arg::Buffer(&kv.v),
        Arg::I32(num_tokens as i32),
        Arg::I32(num_heads as i32),
        Arg::I32(shape.num_kv_heads as i32),
        Arg::I32(shape.head_dim as i32),
        Arg::I32(shape.block_size as i32),
        Arg::F32(kv.k_scale.recip()),
        Arg::F32(kv.v_scale.recip()),
    ];
    let kernel = Kernel { module: "rope_cache", function };
    qkv.gpu.launch(kernel, over_rows(num_tokens, threads_per_token), &args)?;
    Ok(q)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::device::gpu::{DeviceBuffer, Gpu};
    use crate::ops::fp8_weights::e4m3_to_f32;
    use crate::ops::indices::Indices;
    use crate::ops::kv_cache::{CpuKvCache, KvCache, KvCacheShape, KvDtype};
    use crate::ops::paged_attention::PADDING_SLOT;
    use crate::ops::rope::{RopeConfig, RopeScaling};
    use crate::ops::tensor::{Device, Tensor};

    fn indices(gpu: &Gpu, values: Vec<u32>) -> Indices {
        let buffer = gpu.alloc(values.len() * 4).unwrap();
        let mut indices = Indices::from(values);
        indices.upload_to(buffer).unwrap();
        indices
    }

    fn cached(buffer: &DeviceBuffer, dtype: KvDtype) -> Vec<f32> {
        let bytes = buffer.download().unwrap();
        match dtype {
            KvDtype::Bf16 => {
                let values = bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes);
                values.into_iter().map(bf16::to_f32).collect()
            }
            KvDtype::F16 => {
                let values = bytemuck::pod_collect_to_vec::<u8, f16>(&bytes);
                values.into_iter().map(f16::to_f32).collect()
            }
            _ => bytes.into_iter().map(e4m3_to_f32).collect(),
        }
    }

    /// Rounding to the cache's type once more or less, or a fused multiplication, moves a value by
    /// a unit, in 8 bits very few; what nobody wrote must be as it was.
    fn assert_close(found: &[f32], expected: &[f32], dtype: KvDtype, what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let unit = if dtype == KvDtype::Fp8 { 0.126 } else { 0.008 };
        let mut num_moved = 0;
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (found - expected).abs();
            num_moved += usize::from(error != 0.0);
            assert!(error <= 1e-5 + unit * expected.abs(), "{what}, {i}: {found}, not {expected}");
        }
        assert!(dtype != KvDtype::Fp8 || num_moved * 100 < found.len(), "{what}: {num_moved}");
    }

    fn compare(gpu: &Gpu, num_heads: usize, shape: KvCacheShape, dtype: KvDtype) {
        let what = format!("{num_heads} heads, {shape:?}, {dtype:?}");
        let num_tokens = 11;
        let num_slots = (shape.num_blocks * shape.block_size) as u32;
        let config = RopeConfig {
            head_dim: shape.head_dim,
            theta: 1e6,
            max_positions: 40,
            scaling: RopeScaling::None,
        };
        let width = (num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
        let values: Vec<f32> =
            (0..num_tokens * width).map(|i| (i as f32 * 0.71).sin() * 5.0).collect();
        let qkv = GpuTensor::from_slice(gpu, &values, DType::BF16, (num_tokens, width)).unwrap();
        let positions: Vec<u32> = (0..num_tokens as u32).map(|i| i * 17 % 40).collect();
        // Every other slot, backwards.
        let slots: Vec<u32> = (0..num_tokens as u32).map(|i| num_slots - 1 - 2 * i).collect();
        let mut meta = AttentionMetadata {
            positions: indices(gpu, positions.clone()),
            slot_mapping: indices(gpu, slots.clone()),
            ..AttentionMetadata::default()
        };
        let device = Device::Gpu(gpu.clone());
        let kv = GpuKvCache::new(shape, dtype, gpu).unwrap();
        gpu.zero(&kv.k).unwrap();
        gpu.zero(&kv.v).unwrap();
        let q = rope_and_cache(&qkv, &RopeTable::new(&config, &device).unwrap(), &kv, &meta);

        let cpu_kv = CpuKvCache::new(shape, dtype).unwrap();
        let cpu_qkv =
            Tensor::from_vec(qkv.to_vec().unwrap(), (num_tokens, width), &Device::Cpu).unwrap();
        let table = RopeTable::new(&config, &Device::Cpu).unwrap();
        let cache = KvCache::Cpu(cpu_kv.clone());
        let expected = crate::ops::rope::rope_and_cache(&cpu_qkv, &table, &cache, &meta).unwrap();
        let queries = (q.unwrap().to_vec().unwrap(), expected.to_vec().unwrap());
        assert_close(&queries.0, &queries.1, KvDtype::Bf16, &what);
        for (found, expected) in [(&kv.k, &cpu_kv.k), (&kv.v, &cpu_kv.v)] {
            let expected = expected.flatten_all().unwrap();
            let expected = match dtype {
                KvDtype::Fp8 => {
                    expected.to_vec1::<u8>().unwrap().into_iter().map(e4m3_to_f32).collect()
                }
                _ => expected.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(),
            };
            assert_close(&cached(found, dtype), &expected, dtype, &what);
        }

        let before = (kv.k.download().unwrap(), kv.v.download().unwrap());
        meta.slot_mapping = indices(gpu, vec![PADDING_SLOT; num_tokens]);
        rope_and_cache(&qkv, &RopeTable::new(&config, &device).unwrap(), &kv, &meta).unwrap();
        assert!((kv.k.download().unwrap(), kv.v.download().unwrap()) == before, "{what}: padding");
    }

    #[test]
    fn a_card_rotates_and_caches_as_the_processor_does() {
        let Some(gpu) = Gpu::for_tests() else { return };
        for dtype in [KvDtype::Bf16, KvDtype::F16, KvDtype::Fp8] {
            for (num_heads, num_kv_heads, head_dim, block_size) in
                [(14, 2, 64, 16), (28, 4, 128, 16), (3, 1, 8, 5), (4, 4, 80, 7), (64, 8, 128, 32)]
            {
                let num_blocks = 23_usize.div_ceil(block_size) + 1;
                let shape = KvCacheShape { num_blocks, num_kv_heads, block_size, head_dim };
                compare(&gpu, num_heads, shape, dtype);
            }
        }
    }

    #[test]
    fn numbers_of_8_bits_are_the_nearest_and_saturate() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let shape = KvCacheShape { num_blocks: 40, num_kv_heads: 1, block_size: 8, head_dim: 128 };
        let config =
            RopeConfig { head_dim: 128, theta: 1e6, max_positions: 1, scaling: RopeScaling::None };
        let table = RopeTable::new(&config, &Device::Gpu(gpu.clone())).unwrap();
        let mut kv = GpuKvCache::new(shape, KvDtype::Fp8, &gpu).unwrap();
        (kv.k_scale, kv.v_scale) = (0.5, 1.0);
        // Every sign and exponent of bf16 from 2^-12 to 2^11, with all mantissas.
        let numbers = (0x3980..0x4580_u16).flat_map(|bits| [bits, bits | 0x8000]);
        let numbers: Vec<f32> = numbers.map(|bits| bf16::from_bits(bits).to_f32()).collect();
        let num_tokens = numbers.len() / 128;
        let rows = numbers.chunks(128).flat_map(|row| row.iter().copied().cycle().take(3 * 128));
        let rows: Vec<f32> = rows.collect();
        let qkv = GpuTensor::from_slice(&gpu, &rows, DType::BF16, (num_tokens, 3 * 128)).unwrap();
        let meta = AttentionMetadata {
            positions: indices(&gpu, vec![0; num_tokens]),
            slot_mapping: indices(&gpu, (0..num_tokens as u32).collect()),
            ..AttentionMetadata::default()
        };
        rope_and_cache(&qkv, &table, &kv, &meta).unwrap();
        for (buffer, scale) in [(&kv.k, kv.k_scale), (&kv.v, kv.v_scale)] {
            let found = buffer.download().unwrap();
            for (&found, number) in found.iter().zip(&numbers) {
                let number = number / scale;
                let distance = |bits: u8| (e4m3_to_f32(bits) - number).abs();
                let nearest = (0..=255).map(distance).fold(f32::INFINITY, f32::min);
                assert!(distance(found) == nearest, "{number}: {found:#x}");
                // Of two that are as near, the even one; zeros have the number's sign.
                let is_tie = (0..=255).any(|bits| bits != found && distance(bits) == nearest);
                assert!(!is_tie || found & 1 == 0, "{number}: {found:#x}");
                assert!((found & 128 != 0) == (number < 0.0), "{number}: {found:#x}");
            }
        }
    }

    #[test]
    fn wrong_shapes_positions_and_slots_are_errors() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let shape = KvCacheShape { num_blocks: 2, num_kv_heads: 1, block_size: 4, head_dim: 16 };
        let config =
            RopeConfig { head_dim: 16, theta: 1e6, max_positions: 8, scaling: RopeScaling::None };
        let table = RopeTable::new(&config, &Device::Gpu(gpu.clone())).unwrap();
        let kv = GpuKvCache::new(shape, KvDtype::Bf16, &gpu).unwrap();
        let run = |width: usize, dtype, position: u32, slot: u32| {
            let qkv = GpuTensor::from_slice(&gpu, &vec![1.0; width], dtype, (1, width)).unwrap();
            let meta = AttentionMetadata {
                positions: indices(&gpu, vec![position]),
                slot_mapping: indices(&gpu, vec![slot]),
                ..AttentionMetadata::default()
            };
            rope_and_cache(&qkv, &table, &kv, &meta)
        };
        assert!(run(48, DType::BF16, 7, 7).is_ok());
        assert!(run(48, DType::F32, 7, 7).is_err());
        assert!(run(32, DType::BF16, 7, 7).is_err());
        assert!(run(47, DType::BF16, 7, 7).is_err());
        assert!(run(48, DType::BF16, 8, 7).is_err());
        assert!(run(48, DType::BF16, 7, 8).is_err());
    }
}
