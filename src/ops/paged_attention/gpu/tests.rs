//! The kernels against the operation on the processor.
//!
//! Tolerance: a weight is rounded to the cache's type before it meets the values, and a result to
//! `bf16`; everything else is `f32`, and products of 16-bit numbers are exact in it. With values of
//! at most two, weights may add twice half a unit in their last place, and the result half a unit
//! in its own.

use half::{bf16, f16};

use super::super::tests::{Batch, QWEN, Seq, Setup};
use super::super::{KvCacheShape, KvDtype, attend_on_cpu};
use super::*;

/// Half a unit in the last place, relative to the number.
const BF16_UNIT: f32 = 1.0 / 256.0;
const F16_UNIT: f32 = 1.0 / 2048.0;
const MAX_VALUE: f32 = 2.0;
/// Sums in `f32` and approximate powers of two.
const SLACK: f32 = 2e-5;

fn seqs(lens: &[(usize, usize)]) -> Vec<Seq> {
    lens.iter().map(|&(len, query_len)| Seq { id: len, len, query_len }).collect()
}

/// The batch's caches and indices, on the card.
struct OnGpu {
    q: GpuTensor,
    kv: GpuKvCache,
    meta: AttentionMetadata,
    how: Attending,
}

impl OnGpu {
    fn new(gpu: &Gpu, setup: Setup, batch: &Batch) -> Self {
        let queries = batch.q.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let q = GpuTensor::from_slice(gpu, &queries, DType::BF16, batch.q.dims2().unwrap());
        let kv = GpuKvCache::new(batch.kv.shape().unwrap(), setup.dtype, gpu).unwrap();
        for (buffer, tensor) in [(&kv.k, &batch.kv.k), (&kv.v, &batch.kv.v)] {
            let flat = tensor.flatten_all().unwrap();
            match setup.dtype {
                KvDtype::Bf16 => {
                    let values = flat.to_vec1::<bf16>().unwrap();
                    buffer.upload(bytemuck::cast_slice(&values)).unwrap();
                }
                KvDtype::F16 => {
                    let values = flat.to_vec1::<f16>().unwrap();
                    buffer.upload(bytemuck::cast_slice(&values)).unwrap();
                }
                _ => buffer.upload(&flat.to_vec1::<u8>().unwrap()).unwrap(),
            }
        }
        let mut meta = batch.meta.clone();
        meta.max_seq_len = meta.seq_lens.iter().copied().max().unwrap_or(0);
        upload(gpu, &mut meta);
        Self { q: q.unwrap(), kv, meta, how: batch.how }
    }

    fn run(&self) -> Vec<f32> {
        self.attend().unwrap().to_vec().unwrap()
    }

    fn attend(&self) -> Result<GpuTensor> {
        attend(&self.q, &self.kv, &self.meta, self.how)
    }
}

fn upload(gpu: &Gpu, meta: &mut AttentionMetadata) {
    for indices in [&mut meta.query_start_loc, &mut meta.seq_lens, &mut meta.block_table] {
        let buffer = gpu.alloc(size_of_val(indices.as_slice())).unwrap();
        indices.upload_to(buffer).unwrap();
    }
}

/// What the processor makes of the same queries in `bf16`.
fn on_cpu(batch: &Batch) -> Vec<f32> {
    let q = batch.q.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    let out = attend_on_cpu(&q, &batch.kv, &batch.meta, batch.how).unwrap();
    out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
}

fn check(gpu: &Gpu, setup: Setup, lens: &[(usize, usize)]) {
    let batch = setup.batch(&seqs(lens));
    let (out, expected) = (OnGpu::new(gpu, setup, &batch).run(), on_cpu(&batch));
    assert_eq!(out.len(), expected.len());
    let weight_unit = if setup.dtype == KvDtype::Bf16 { BF16_UNIT } else { F16_UNIT };
    let width = setup.num_heads * setup.head_dim;
    for (index, (&out, &expected)) in out.iter().zip(&expected).enumerate() {
        let tolerance = expected.abs() * BF16_UNIT + MAX_VALUE * weight_unit + SLACK;
        assert!(
            (out - expected).abs() <= tolerance,
            "token {} value {}: {out}, not {expected}; {lens:?}",
            index / width,
            index % width
        );
    }
}

#[test]
fn matches_the_processor_for_groups_head_sizes_and_types() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for group in [1, 5, 6, 7, 8] {
        for head_dim in [64, 128] {
            for dtype in [KvDtype::F16, KvDtype::Bf16] {
                let num_heads = 2 * group;
                let setup = Setup { num_heads, head_dim, dtype, block_step: 5, ..QWEN };
                check(&gpu, setup, &[(33, 3), (1, 1), (70, 1), (131, 66), (257, 2), (19, 19)]);
            }
        }
    }
}

/// The processor reads the same bytes. With scales, which it does not have, keys and values are
/// as if queries and results were multiplied.
#[test]
fn matches_the_processor_on_a_cache_of_8_bits() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let (k_scale, v_scale) = (0.5, 2.0);
    for head_dim in [64, 128] {
        let setup = Setup { head_dim, block_step: 3, dtype: KvDtype::Fp8, ..QWEN };
        let lens = [(33, 3), (1, 1), (131, 66), (300, 1), (1100, 21)];
        check(&gpu, setup, &lens);
        let mut batch = setup.batch(&seqs(&lens));
        let mut step = OnGpu::new(&gpu, setup, &batch);
        (step.kv.k_scale, step.kv.v_scale) = (k_scale, v_scale);
        batch.q = (&batch.q * f64::from(k_scale)).unwrap();
        for (index, (out, expected)) in step.run().iter().zip(on_cpu(&batch)).enumerate() {
            let expected = expected * v_scale;
            let tolerance = expected.abs() * BF16_UNIT + MAX_VALUE * v_scale * F16_UNIT + SLACK;
            assert!((out - expected).abs() <= tolerance, "{index}: {out}, not {expected}");
        }
    }
}

#[test]
fn matches_the_processor_around_blocks_tiles_and_partitions() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for block_size in [8, 16, 24, 128] {
        let setup = Setup { num_heads: 7, num_kv_heads: 1, block_size, block_step: 3, ..QWEN };
        let lens = [1, 2, 7, 8, 15, 16, 17, 31, 63, 64, 65, 101, 127, 128, 129, 257, 511, 513];
        check(&gpu, setup, &lens.map(|len| (len, 1)));
        check(&gpu, setup, &lens.map(|len| (len, len.min(10))));
        check(&gpu, setup, &lens[6..13].iter().map(|&len| (len, len)).collect::<Vec<_>>());
    }
}

#[test]
fn matches_the_processor_on_long_sequences() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let setup = Setup { num_heads: 7, num_kv_heads: 1, ..QWEN };
    // Partitions of 128, 256 and 512 keys; split and whole tiles.
    check(&gpu, setup, &[(4096, 1), (4097, 2), (9000, 1), (1100, 20), (2500, 30), (1024, 11)]);
    let setup = Setup { head_dim: 128, dtype: KvDtype::Bf16, ..setup };
    check(&gpu, setup, &[(4097, 1), (2049, 12)]);
}

/// The edges are those of granules (8 keys), tiles (16, 32, 64), partitions (128, 256) and blocks.
#[test]
fn matches_the_processor_in_windows() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for (index, window) in
        [1, 2, 7, 20, 63, 64, 65, 127, 128, 129, 200, 257, 1000, 5000].into_iter().enumerate()
    {
        let head_dim = [64, 128][index % 2];
        let dtype = [KvDtype::F16, KvDtype::Bf16, KvDtype::Fp8][index % 3];
        let (num_heads, num_kv_heads) = [(7, 1), (2, 2), (8, 1)][index % 3];
        let block_size = [16, 8, 24, 128][index % 4];
        let window = Some(window);
        let setup =
            Setup { num_heads, num_kv_heads, head_dim, dtype, block_size, block_step: 3, window };
        check(&gpu, setup, &[(1, 1), (8, 1), (129, 1), (137, 2), (300, 8), (700, 1), (1031, 1)]);
        check(&gpu, setup, &[(70, 70), (200, 131), (150, 20), (333, 65), (129, 1)]);
    }
    // More partitions than there may be of 128 keys, and tiles whose keys are split.
    for window in [1100, 4090, 4096, 4500] {
        let setup = Setup { num_heads: 7, num_kv_heads: 1, window: Some(window), ..QWEN };
        check(&gpu, setup, &[(4500, 1), (5003, 8), (4400, 1), (4700, 30)]);
    }
}

/// Goal: a step costs what its window does. Method: values before it are not numbers, which would
/// show even with a weight of zero; copies begin with a granule, in `paged_prefill` with a tile.
#[test]
fn keys_before_the_window_are_not_read() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for (window, query_len, unit) in [(1, 1, 8), (100, 1, 8), (600, 9, 8), (130, 40, 64)] {
        let setup = Setup { num_heads: 7, num_kv_heads: 1, window: Some(window), ..QWEN };
        let len = 1501;
        let batch = setup.batch(&seqs(&[(len, query_len)]));
        let step = OnGpu::new(&gpu, setup, &batch);
        let expected = step.run();
        let first_read = (len - query_len + 1 - window) / unit * unit;
        let mut values = batch.kv.v.flatten_all().unwrap().to_vec1::<f16>().unwrap();
        for position in 0..first_read {
            let block = batch.meta.block_table[position / setup.block_size] as usize;
            let slot = block * setup.block_size + position % setup.block_size;
            values[slot * setup.head_dim..][..setup.head_dim].fill(f16::NAN);
        }
        step.kv.v.upload(bytemuck::cast_slice(&values)).unwrap();
        assert!(step.run() == expected, "{window} {query_len}");
        // The method can fail: what is seen is read.
        values[..].fill(f16::NAN);
        step.kv.v.upload(bytemuck::cast_slice(&values)).unwrap();
        assert!(step.run().iter().all(|value| value.is_nan()));
    }
}

#[test]
fn matches_the_processor_on_more_sequences_than_a_cache_counts() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let setup = Setup { num_heads: 5, num_kv_heads: 1, ..QWEN };
    let lens: Vec<_> = (0..=NUM_COUNTED_SEQS).map(|i| (i * 37 % 300 + 1, 1)).collect();
    check(&gpu, setup, &lens);
}

#[test]
fn matches_the_processor_in_the_shapes_of_models() {
    let Some(gpu) = Gpu::for_tests().filter(|gpu| !gpu.is_emulated()) else { return };
    let models =
        [(14, 2, 64), (12, 2, 128), (16, 2, 128), (28, 4, 128), (40, 8, 128), (64, 8, 128)];
    for (num_heads, num_kv_heads, head_dim) in models {
        for dtype in [KvDtype::F16, KvDtype::Bf16] {
            let setup = Setup { num_heads, num_kv_heads, head_dim, dtype, ..QWEN };
            check(&gpu, setup, &[(5000, 1), (777, 777), (3000, 96), (1, 1), (129, 1), (20_000, 1)]);
            check(&gpu, setup, &[(313, 1); 64]);
        }
    }
}

#[test]
fn a_batch_gives_each_sequence_the_bits_it_gets_alone() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for window in [None, Some(190)] {
        let setup = Setup { num_heads: 7, num_kv_heads: 1, window, ..QWEN };
        let lens = [(1, 1), (140, 140), (600, 1), (64, 3), (1100, 40), (17, 1), (257, 9)];
        let run = |lens: &[(usize, usize)]| {
            let batch = setup.batch(&seqs(lens));
            OnGpu::new(&gpu, setup, &batch).run()
        };
        let apart: Vec<f32> = lens.iter().flat_map(|&seq| run(&[seq])).collect();
        assert!(run(&lens) == apart, "{window:?}");
    }
}

#[test]
fn recorded_steps_follow_lengths_and_leave_padding_alone() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for window in [None, Some(1), Some(129), Some(250)] {
        let setup = Setup { num_heads: 7, num_kv_heads: 1, window, ..QWEN };
        check_recorded(&gpu, setup);
    }
}

fn check_recorded(gpu: &Gpu, setup: Setup) {
    let batch = setup.batch(&seqs(&[(300, 1), (20, 1), (129, 1)]));
    let mut step = OnGpu::new(gpu, setup, &batch);
    step.meta.max_seq_len = 1024;
    step.run();
    let (out, graph) = gpu.capture(|| step.attend()).unwrap();
    // Three rounds: counters that were not left at zero would show in the second.
    for lens in [[300_u32, 0, 129], [257, 20, 0], [130, 1, 128]] {
        let mut shorter = Setup::batch(&setup, &seqs(&[(300, 1), (20, 1), (129, 1)]));
        *shorter.meta.seq_lens = lens.to_vec();
        step.meta.seq_lens.on_gpu().unwrap().upload(bytemuck::cast_slice(&lens)).unwrap();
        gpu.replay(&graph).unwrap();
        let out = out.to_vec().unwrap();
        for (seq, expected) in lens.iter().map(|&len| len.max(1)).enumerate() {
            shorter.meta.seq_lens[seq] = expected;
        }
        let width = setup.num_heads * setup.head_dim;
        let expected = on_cpu(&shorter);
        for (seq, _) in lens.iter().enumerate().filter(|(_, len)| **len != 0) {
            for (out, expected) in
                out[seq * width..].iter().zip(&expected[seq * width..]).take(width)
            {
                let tolerance = expected.abs() * BF16_UNIT + MAX_VALUE * F16_UNIT + SLACK;
                assert!((out - expected).abs() <= tolerance, "{seq}: {out}, not {expected}");
            }
        }
    }
}

#[test]
fn shapes_without_a_kernel_are_errors() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let batch = QWEN.batch(&seqs(&[(20, 2), (40, 40)]));
    let new = || OnGpu::new(&gpu, QWEN, &batch);
    new().attend().unwrap();
    let wrong: [fn(&mut OnGpu); 8] = [
        |step| step.q.dtype = DType::F32,
        |step| step.q.num_cols = 13 * 64,
        |step| step.q.num_rows = 41,
        |step| step.kv.shape.head_dim = 32,
        |step| step.kv.shape.block_size = 12,
        |step| step.kv.shape.num_blocks = 1,
        |step| step.meta.seq_lens[1] = 39,
        |step| step.meta.block_table = Vec::new().into(),
    ];
    for (index, spoil) in wrong.into_iter().enumerate() {
        let mut step = new();
        spoil(&mut step);
        assert!(step.attend().is_err(), "case {index}");
    }
    let shape = KvCacheShape { num_blocks: 1, num_kv_heads: 1, block_size: 16, head_dim: 64 };
    assert!(GpuKvCache::new(shape, KvDtype::F32, &gpu).is_err());
}
