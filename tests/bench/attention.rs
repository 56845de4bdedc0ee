//! Speed of paged attention for the shapes of Qwen2.5-0.5B: `cargo bench --bench attention`.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use qwen_server::device::threads::ThreadPool;
use qwen_server::ops::kv_cache::{CpuKvCache, KvCache, KvCacheShape, KvDtype};
use qwen_server::ops::paged_attention::{Attending, AttentionMetadata, paged_attention};
use qwen_server::ops::tensor::Tensor as Activations;

const HOW: Attending = Attending { scale: 0.125, window: None };
const NUM_HEADS: usize = 14;
const SHAPE: KvCacheShape =
    KvCacheShape { num_blocks: 8192, num_kv_heads: 2, block_size: 16, head_dim: 64 };
const SECONDS: f64 = 0.5;

fn main() -> candle_core::Result<()> {
    for num_threads in [1, 2] {
        for dtype in [KvDtype::F16, KvDtype::Fp8, KvDtype::Q8_0] {
            println!("{num_threads} threads, {dtype:?}");
            ThreadPool::new(num_threads).install(|| run(dtype))?;
        }
    }
    Ok(())
}

/// Measures what the first argument names, `decode` or `prefill`, or both.
fn run(dtype: KvDtype) -> candle_core::Result<()> {
    let only = std::env::args().nth(1).filter(|argument| !argument.starts_with('-'));
    let wanted = |name: &str| only.as_ref().is_none_or(|only| only == name);
    let kv = CpuKvCache::new(SHAPE, dtype)?;
    let KvCacheShape { num_blocks, num_kv_heads, block_size, head_dim } = SHAPE;
    let num_values = num_blocks * num_kv_heads * block_size * head_dim;
    let values: Vec<f32> = (0..num_values).map(|i| ((i % 1013) as f32).sin()).collect();
    kv.fill(&values, &values)?;
    let kv = KvCache::Cpu(kv);
    for context in [128, 1024, 8192].into_iter().filter(|_| wanted("decode")) {
        for num_seqs in [1, 8, 16] {
            let seconds = measure(&kv, num_seqs, context, 1)?;
            let num_rows = 2 * num_seqs * context * SHAPE.num_kv_heads;
            println!(
                "decode  {num_seqs:>2} x {context:>4}: {:>9.1} us {:>6.1} GB/s",
                seconds * 1e6,
                (num_rows * dtype.row_bytes(SHAPE.head_dim)) as f64 / seconds / 1e9
            );
        }
    }
    for len in [512, 2048, 8192].into_iter().filter(|_| wanted("prefill")) {
        let seconds = measure(&kv, 1, len, len)?;
        let products = (len * (len + 1) / 2 * 2 * NUM_HEADS * SHAPE.head_dim) as f64;
        println!(
            "prefill  1 x {len:>4}: {:>9.1} us {:>6.1} GMAC/s",
            seconds * 1e6,
            products / seconds / 1e9
        );
    }
    Ok(())
}

/// Seconds of the fastest call, which other programs disturb least.
fn measure(
    kv: &KvCache,
    num_seqs: usize,
    len: usize,
    query_len: usize,
) -> candle_core::Result<f64> {
    let blocks_per_seq = len / SHAPE.block_size;
    let meta = AttentionMetadata {
        query_start_loc: (0..=num_seqs).map(|seq| (seq * query_len) as u32).collect(),
        seq_lens: vec![len as u32; num_seqs].into(),
        // Blocks far from each other, as in a cache that has been in use.
        block_table: (0..num_seqs * blocks_per_seq)
            .map(|block| (block * 1021 % SHAPE.num_blocks) as u32)
            .collect(),
        max_blocks_per_seq: blocks_per_seq,
        ..AttentionMetadata::default()
    };
    let dims = (num_seqs * query_len, NUM_HEADS * SHAPE.head_dim);
    let q = Activations::Cpu(Tensor::ones(dims, DType::F32, &Device::Cpu)?);
    paged_attention(&q, kv, &meta, HOW)?;
    let (start, mut fastest) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < SECONDS {
        let call = Instant::now();
        paged_attention(&q, kv, &meta, HOW)?;
        fastest = fastest.min(call.elapsed().as_secs_f64());
    }
    Ok(fastest)
}
