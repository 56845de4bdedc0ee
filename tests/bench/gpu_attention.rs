//! Speed of paged attention on a card, beside what bounds it:
//! `cargo bench --features cuda --bench gpu_attention`.
//!
//! Decode is bound by the memory that the keys and values are read from, prefill by the tensor
//! cores. Each row runs over the caches of several layers in turn, so that no cache of the card
//! holds them, and as a recording, so that launches cost what they do in a server.

use std::time::Instant;

use candle_core::{DType, Result};
use qwen_server::device::gpu::Gpu;
use qwen_server::ops::indices::Indices;
use qwen_server::ops::kv_cache::{GpuKvCache, KvCache, KvCacheShape, KvDtype};
use qwen_server::ops::paged_attention::{Attending, AttentionMetadata, paged_attention};
use qwen_server::ops::tensor::{GpuTensor, Tensor};

const NUM_LAYERS: usize = 8;
const NUM_TOKENS: usize = 1 << 17;
const BLOCK_SIZE: usize = 16;
const SECONDS: f64 = 0.3;
/// Sequences, tokens of each and how many of them are new.
const DECODE: [(usize, usize); 9] = [
    (1, 128),
    (1, 1024),
    (1, 4096),
    (1, 32_768),
    (8, 1024),
    (32, 2048),
    (64, 512),
    (64, 2048),
    (256, 512),
];
const PREFILL: [(usize, usize, usize); 7] = [
    (1, 512, 512),
    (1, 2048, 2048),
    (1, 4096, 4096),
    (1, 16_384, 16_384),
    (8, 512, 512),
    (1, 8192, 96),
    (1, 32_768, 96),
];

/// Heads of a model.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

const MODELS: [Model; 3] = [
    Model { name: "0.5B", num_heads: 14, num_kv_heads: 2, head_dim: 64 },
    Model { name: "7B", num_heads: 28, num_kv_heads: 4, head_dim: 128 },
    Model { name: "72B", num_heads: 64, num_kv_heads: 8, head_dim: 128 },
];

/// What a row is made of.
struct Row {
    num_seqs: usize,
    len: usize,
    query_len: usize,
}

fn main() -> Result<()> {
    let Some(gpu) = Gpu::for_tests().filter(|gpu| !gpu.is_emulated()) else {
        println!("there is no card, or this build has no kernels for it");
        return Ok(());
    };
    println!("{}", gpu.properties().name);
    for model in MODELS {
        for dtype in [KvDtype::Bf16, KvDtype::Fp8] {
            let caches = caches(&gpu, model, dtype)?;
            for (num_seqs, len) in DECODE {
                let row = Row { num_seqs, len, query_len: 1 };
                let seconds = measure(&gpu, model, &caches, &row)?;
                let num_values = 2 * num_seqs * len * model.num_kv_heads * model.head_dim;
                let rate = (num_values * dtype.row_bytes(1)) as f64 / seconds / 1e9;
                print(model, dtype, &row, seconds, &format!("{rate:>7.0} GB/s"));
            }
            for (num_seqs, len, query_len) in PREFILL {
                let row = Row { num_seqs, len, query_len };
                let seconds = measure(&gpu, model, &caches, &row)?;
                let num_pairs = num_seqs * query_len * (2 * len - query_len + 1) / 2;
                let num_operations = 4 * num_pairs * model.num_heads * model.head_dim;
                let rate = num_operations as f64 / seconds / 1e12;
                print(model, dtype, &row, seconds, &format!("{rate:>7.1} TFLOP/s"));
            }
        }
    }
    Ok(())
}

fn print(model: Model, dtype: KvDtype, row: &Row, seconds: f64, rate: &str) {
    let Row { num_seqs, len, query_len } = row;
    let (name, dtype, micros) = (model.name, format!("{dtype:?}"), seconds * 1e6);
    println!(
        "{name:>5} {dtype:>7} {num_seqs:>3} x {query_len:>5} of {len:>5}: {micros:>9.1} us {rate}"
    );
}

/// The layers' caches, with numbers that differ as much as real ones: power depends on them.
fn caches(gpu: &Gpu, model: Model, dtype: KvDtype) -> Result<Vec<KvCache>> {
    let Model { num_kv_heads, head_dim, .. } = model;
    let num_blocks = NUM_TOKENS / BLOCK_SIZE;
    let shape = KvCacheShape { num_blocks, num_kv_heads, block_size: BLOCK_SIZE, head_dim };
    let mut state = 1_u64;
    let mut random = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    // Exponents around that of one.
    let pattern: Vec<u8> = if dtype == KvDtype::Bf16 {
        (0..1 << 22).flat_map(|_| ((random() & 0x81ff) as u16 | 0x3e00).to_le_bytes()).collect()
    } else {
        (0..1 << 23).map(|_| (random() & 0x9f) as u8 | 0x20).collect()
    };
    let cache = |_| {
        let kv = GpuKvCache::new(shape, dtype, gpu)?;
        for buffer in [&kv.k, &kv.v] {
            for start in (0..buffer.len()).step_by(pattern.len()) {
                let len = pattern.len().min(buffer.len() - start);
                buffer.slice(start..start + len).upload(&pattern[..len])?;
            }
        }
        Ok(KvCache::Gpu(kv))
    };
    (0..NUM_LAYERS).map(cache).collect()
}

/// Seconds of one layer's attention.
fn measure(gpu: &Gpu, model: Model, caches: &[KvCache], row: &Row) -> Result<f64> {
    let Row { num_seqs, len, query_len } = *row;
    let blocks_per_seq = len.div_ceil(BLOCK_SIZE);
    let resident = |mut indices: Indices| {
        indices.upload_to(gpu.alloc(size_of_val(indices.as_slice()))?)?;
        Ok::<_, candle_core::Error>(indices)
    };
    // Blocks far from each other, as in a cache that has been in use.
    let blocks = (0..num_seqs * blocks_per_seq)
        .map(|block| (block * 1021 % (NUM_TOKENS / BLOCK_SIZE)) as u32);
    let meta = AttentionMetadata {
        query_start_loc: resident((0..=num_seqs).map(|seq| (seq * query_len) as u32).collect())?,
        seq_lens: resident(vec![len as u32; num_seqs].into())?,
        block_table: resident(blocks.collect())?,
        max_blocks_per_seq: blocks_per_seq,
        max_query_len: query_len as u32,
        max_seq_len: len as u32,
        ..AttentionMetadata::default()
    };
    let shape = (num_seqs * query_len, model.num_heads * model.head_dim);
    let queries: Vec<f32> = (0..shape.0 * shape.1).map(|i| (i as f32 * 0.7).sin()).collect();
    let q = Tensor::Gpu(GpuTensor::from_slice(gpu, &queries, DType::BF16, shape)?);
    let how = Attending { scale: (model.head_dim as f32).sqrt().recip(), window: None };
    let attend = || caches.iter().try_for_each(|kv| paged_attention(&q, kv, &meta, how).map(drop));
    attend()?;
    let ((), graph) = gpu.capture(attend)?;
    gpu.replay(&graph)?;
    gpu.synchronize()?;
    let (start, mut fastest) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < SECONDS {
        let call = Instant::now();
        gpu.replay(&graph)?;
        gpu.synchronize()?;
        fastest = fastest.min(call.elapsed().as_secs_f64());
    }
    Ok(fastest / caches.len() as f64)
}
