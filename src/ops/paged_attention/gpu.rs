//! Attention on a card.
//!
//! Sequences with few queries are computed by `paged_decode`, those with many by `paged_prefill`,
//! also where a step has both, so that a sequence's numbers do not depend on its company.

#[cfg(test)]
mod tests;

use std::f32::consts::LOG2_E;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Result, bail};

use super::plan::{
    Heads, MAX_DECODE_ROWS, Plan, Round, StepBounds, TILE_KEYS, TILE_ROWS, max_partial_rows,
    max_partitions,
};
use super::{Attending, AttentionMetadata};
use crate::device::gpu::{Arg, DeviceBuffer, Gpu, Kernel, LaunchConfig};
use crate::ops::kv_cache::{GpuKvCache, KvCacheShape};
use crate::ops::tensor::GpuTensor;

const THREADS: u32 = 128;
/// Rows of a merge's block, as in `merge_partitions.cu`.
const MERGE_ROWS: usize = 16;
/// What the warps of a decode block copy keys and values to, as in `paged_decode.cu`.
const RING_BYTES: usize = 64 << 10;
/// More decode blocks on a multiprocessor would not find the registers.
const MAX_DECODE_OCCUPANCY: usize = 3;
/// Rows of 16 that a sequence's decode can have.
const MAX_ROW_TILES: usize = MAX_DECODE_ROWS / 16;
/// Sequences that the counters of a cache suffice for.
const NUM_COUNTED_SEQS: usize = 256;

/// What the first layer's attention of a step leaves to the others: for layers that look at all
/// tokens, and for those with a window.
#[derive(Clone, Debug, Default)]
pub struct StepPlan([OnceLock<Arc<Uploaded>>; 2]);

/// It is made of the other indices.
impl PartialEq for StepPlan {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for StepPlan {}

#[derive(Debug)]
struct Uploaded {
    heads: Heads,
    window: Option<usize>,
    plan: Plan,
    /// The plan's tiles, then its merges.
    buffer: Option<DeviceBuffer>,
}

impl StepPlan {
    /// The step's plan, made and sent to the card by the first who asks.
    fn get(
        &self,
        meta: &AttentionMetadata,
        (heads, how): (Heads, Attending),
        num_tokens: usize,
        kv: &GpuKvCache,
    ) -> Result<Arc<Uploaded>> {
        let window = how.window;
        let kept = &self.0[usize::from(window.is_some())];
        if let Some(known) =
            kept.get().filter(|known| (known.heads, known.window) == (heads, window))
        {
            return Ok(Arc::clone(known));
        }
        meta.check_starts(num_tokens)?;
        // A sequence without tokens is padding, and nothing of it is read.
        let mut seqs = (0..meta.seq_lens.len()).filter(|&seq| meta.seq_lens[seq] != 0);
        seqs.try_for_each(|seq| meta.check_seq(seq, kv.shape))?;
        let plan = Plan::new(meta, heads, how.num_seen());
        let mut bytes = bytemuck::cast_slice::<_, u8>(&plan.tiles).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(&plan.merges));
        let buffer = if bytes.is_empty() {
            None
        } else {
            let buffer = kv.gpu.scratch(bytes.len())?;
            buffer.upload(&bytes)?;
            Some(buffer)
        };
        let uploaded = Arc::new(Uploaded { heads, window, plan, buffer });
        // A model whose layers have different heads or windows makes a plan for each; nothing
        // depends on it.
        let _ = kept.set(Arc::clone(&uploaded));
        Ok(uploaded)
    }
}

/// Counts the partitions that are done, per sequence, KV head and tile of rows. Always zero between
/// launches.
pub(in crate::ops) fn new_counters(gpu: &Gpu, num_kv_heads: usize) -> Result<DeviceBuffer> {
    zeros(gpu.alloc(counter_bytes(NUM_COUNTED_SEQS, num_kv_heads))?, gpu)
}

fn counter_bytes(num_seqs: usize, num_kv_heads: usize) -> usize {
    num_seqs * num_kv_heads * MAX_ROW_TILES * size_of::<u32>()
}

fn zeros(buffer: DeviceBuffer, gpu: &Gpu) -> Result<DeviceBuffer> {
    gpu.zero(&buffer)?;
    Ok(buffer)
}

/// See [`super::paged_attention`].
pub(super) fn attend(
    q: &GpuTensor,
    kv: &GpuKvCache,
    meta: &AttentionMetadata,
    how: Attending,
) -> Result<GpuTensor> {
    let heads = check(q, kv)?;
    let step = meta.step_plan.get(meta, (heads, how), q.num_rows, kv)?;
    let out = GpuTensor::scratch(&q.gpu, DType::BF16, (q.num_rows, q.num_cols))?;
    let call = Call { q, kv, meta, heads, how, out: &out };
    if 0 < step.plan.num_decode_tokens {
        call.decode(&step.plan)?;
    }
    for round in &step.plan.rounds {
        call.prefill(&step, round)?;
    }
    Ok(out)
}

/// Refuses caches that no kernel reads.
pub(in crate::ops) fn check_shape(shape: KvCacheShape) -> Result<()> {
    let KvCacheShape { block_size, head_dim, .. } = shape;
    if !matches!(head_dim, 64 | 128) {
        bail!("attention heads of {head_dim} values have no kernel; use `--device cpu`");
    }
    if !block_size.is_multiple_of(8) {
        bail!("blocks of {block_size} tokens have no kernel; use a `--block-size` of 8 to 128");
    }
    Ok(())
}

fn check(q: &GpuTensor, kv: &GpuKvCache) -> Result<Heads> {
    let shape = kv.shape;
    let kv_width = shape.num_kv_heads * shape.head_dim;
    if q.dtype != DType::BF16 || q.num_cols == 0 || !q.num_cols.is_multiple_of(kv_width) {
        let (dtype, width) = (q.dtype, q.num_cols);
        bail!("{dtype:?} queries of {width} values do not fit {shape:?}; they must be bf16");
    }
    let group = q.num_cols / kv_width;
    if MAX_DECODE_ROWS < group {
        bail!("attention with {group} heads per KV head has no kernel");
    }
    check_shape(shape)?;
    Ok(Heads { num_kv_heads: shape.num_kv_heads, group })
}

/// One layer's attention.
struct Call<'a> {
    q: &'a GpuTensor,
    kv: &'a GpuKvCache,
    meta: &'a AttentionMetadata,
    heads: Heads,
    how: Attending,
    out: &'a GpuTensor,
}

/// Where partial results go.
struct Partials {
    out: DeviceBuffer,
    max_sum: DeviceBuffer,
}

impl Partials {
    fn new(gpu: &Gpu, num_rows: usize, head_dim: usize) -> Result<Self> {
        let size = size_of::<f32>();
        let out = gpu.scratch(num_rows * head_dim * size)?;
        Ok(Self { out, max_sum: gpu.scratch(num_rows * 2 * size)? })
    }
}

/// Most memory that partial results take on a card, for `(num_heads, num_kv_heads)` heads.
pub fn max_partial_bytes(
    (num_heads, num_kv_heads): (usize, usize),
    head_dim: usize,
    bounds: StepBounds,
) -> usize {
    let heads = Heads { num_kv_heads, group: (num_heads / num_kv_heads).max(1) };
    max_partial_rows(heads, bounds) * (head_dim + 2) * size_of::<f32>()
}

impl Call<'_> {
    /// As kernels take it, who count keys in signed numbers of 32 bits.
    fn window(&self) -> Arg<'static> {
        Arg::U32(self.how.num_seen().min(i32::MAX as usize) as u32)
    }

    fn decode(&self, plan: &Plan) -> Result<()> {
        let Self { q, kv, meta, heads, .. } = *self;
        let Heads { num_kv_heads, group } = heads;
        let (gpu, head_dim) = (&q.gpu, kv.shape.head_dim);
        let num_seqs = meta.seq_lens.len();
        let partitions = max_partitions(plan.max_decode_keys);
        let num_partials = if partitions == 1 { 0 } else { plan.num_decode_tokens * partitions };
        let partials = Partials::new(gpu, num_partials * num_kv_heads * group, head_dim)?;
        let num_bytes = counter_bytes(num_seqs, num_kv_heads);
        let counters = if num_bytes <= kv.counters.len() {
            kv.counters.clone()
        } else {
            zeros(gpu.scratch(num_bytes)?, gpu)?
        };
        let ring_bytes = if is_narrow(kv) { RING_BYTES / 2 } else { RING_BYTES };
        let shared_bytes = ring_bytes + 2 * (num_seqs + 1) * size_of::<u32>();
        let row_tiles = plan.max_decode_rows.div_ceil(16);
        let num_items = num_seqs * num_kv_heads * partitions * row_tiles;
        let num_blocks = num_items.min(num_decode_slots(gpu, shared_bytes));
        let function = match (kv.dtype, head_dim) {
            (DType::BF16, 64) => "paged_decode_bf16_64",
            (DType::BF16, _) => "paged_decode_bf16_128",
            (DType::F8E4M3, 64) => "paged_decode_e4m3_64",
            (DType::F8E4M3, _) => "paged_decode_e4m3_128",
            (_, 64) => "paged_decode_f16_64",
            (_, _) => "paged_decode_f16_128",
        };
        let config = LaunchConfig {
            grid: [num_blocks as u32, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: shared_bytes as u32,
        };
        let args = [
            Arg::Buffer(&self.out.buffer),
            Arg::Buffer(&q.buffer),
            Arg::Buffer(&kv.k),
            Arg::Buffer(&kv.v),
            Arg::Buffer(&partials.out),
            Arg::Buffer(&partials.max_sum),
            Arg::Buffer(&counters),
            Arg::Buffer(meta.query_start_loc.on_gpu()?),
            Arg::Buffer(meta.seq_lens.on_gpu()?),
            Arg::Buffer(meta.block_table.on_gpu()?),
            Arg::U32(num_seqs as u32),
            Arg::U32(meta.max_blocks_per_seq as u32),
            Arg::U32(num_kv_heads as u32),
            Arg::U32(group as u32),
            Arg::U32(kv.shape.block_size as u32),
            self.window(),
            Arg::F32(self.how.scale * LOG2_E * kv.k_scale),
            Arg::F32(kv.v_scale),
        ];
        Ok(gpu.launch(Kernel { module: "paged_decode", function }, config, &args)?)
    }

    fn prefill(&self, step: &Uploaded, round: &Round) -> Result<()> {
        let Self { q, kv, meta, heads, .. } = *self;
        let (gpu, head_dim) = (&q.gpu, kv.shape.head_dim);
        let num_rows = round.num_slots * heads.num_kv_heads * TILE_ROWS;
        let partials = Partials::new(gpu, num_rows, head_dim)?;
        let function = match (kv.dtype, head_dim) {
            (DType::BF16, 64) => "paged_prefill_bf16_64",
            (DType::BF16, _) => "paged_prefill_bf16_128",
            (DType::F8E4M3, 64) => "paged_prefill_e4m3_64",
            (DType::F8E4M3, _) => "paged_prefill_e4m3_128",
            (_, 64) => "paged_prefill_f16_64",
            (_, _) => "paged_prefill_f16_128",
        };
        let config = LaunchConfig {
            grid: [heads.num_kv_heads as u32, round.tiles.len() as u32, 1],
            block: [THREADS, 1, 1],
            shared_bytes: prefill_shared_bytes(kv.dtype, head_dim) as u32,
        };
        let args = [
            Arg::Buffer(&self.out.buffer),
            Arg::Buffer(&q.buffer),
            Arg::Buffer(&kv.k),
            Arg::Buffer(&kv.v),
            Arg::Buffer(&step.tiles(round)),
            Arg::Buffer(&partials.out),
            Arg::Buffer(&partials.max_sum),
            Arg::Buffer(meta.query_start_loc.on_gpu()?),
            Arg::Buffer(meta.seq_lens.on_gpu()?),
            Arg::Buffer(meta.block_table.on_gpu()?),
            Arg::U32(meta.max_blocks_per_seq as u32),
            Arg::U32(heads.group as u32),
            Arg::U32(kv.shape.block_size as u32),
            self.window(),
            Arg::F32(self.how.scale * LOG2_E * kv.k_scale),
            Arg::F32(kv.v_scale),
        ];
        gpu.launch(Kernel { module: "paged_prefill", function }, config, &args)?;
        if round.merges.is_empty() { Ok(()) } else { self.merge(step, round, &partials) }
    }

    fn merge(&self, step: &Uploaded, round: &Round, partials: &Partials) -> Result<()> {
        let function = match self.kv.shape.head_dim {
            64 => "merge_partitions_64",
            _ => "merge_partitions_128",
        };
        let num_parts = TILE_ROWS / MERGE_ROWS;
        let num_merges = round.merges.len() as u32;
        let config = LaunchConfig {
            grid: [self.heads.num_kv_heads as u32, num_merges, num_parts as u32],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
        };
        let args = [
            Arg::Buffer(&self.out.buffer),
            Arg::Buffer(&partials.out),
            Arg::Buffer(&partials.max_sum),
            Arg::Buffer(&step.merges(round)),
            Arg::Buffer(self.meta.query_start_loc.on_gpu()?),
            Arg::U32(self.heads.group as u32),
        ];
        let kernel = Kernel { module: "merge_partitions", function };
        Ok(self.q.gpu.launch(kernel, config, &args)?)
    }
}

impl Uploaded {
    fn part(&self, start: usize, num_bytes: usize) -> DeviceBuffer {
        let buffer = self.buffer.as_ref().expect("a plan with rounds was uploaded");
        buffer.slice(start..start + num_bytes)
    }

    fn tiles(&self, round: &Round) -> DeviceBuffer {
        let tiles = &self.plan.tiles;
        let start = size_of_val(&tiles[..round.tiles.start]);
        self.part(start, size_of_val(&tiles[round.tiles.clone()]))
    }

    fn merges(&self, round: &Round) -> DeviceBuffer {
        let (tiles, merges) = (&self.plan.tiles, &self.plan.merges);
        let start = size_of_val(tiles.as_slice()) + size_of_val(&merges[..round.merges.start]);
        self.part(start, size_of_val(&merges[round.merges.clone()]))
    }
}

/// Whether a row of the cache has 64 bytes, for which the decode kernel's rings are half as large.
fn is_narrow(kv: &GpuKvCache) -> bool {
    kv.dtype == DType::F8E4M3 && kv.shape.head_dim == 64
}

/// Tiles of queries, keys and values in 16 bits; numbers in 8 bits are copied beside them first.
fn prefill_shared_bytes(dtype: DType, head_dim: usize) -> usize {
    let num_staged = if dtype == DType::F8E4M3 { 2 * TILE_KEYS } else { 0 };
    ((TILE_ROWS + 2 * TILE_KEYS) * 2 + num_staged) * head_dim
}

/// How many decode blocks run at a time. Work is dealt out to so many beforehand, so one more would
/// begin when the others end.
fn num_decode_slots(gpu: &Gpu, shared_bytes: usize) -> usize {
    let properties = gpu.properties();
    // The driver takes 1 KiB per block, and the kernel some more besides what it is given.
    let occupancy = (properties.max_shared_bytes + 1024) / (shared_bytes + 2048);
    properties.num_multiprocessors * occupancy.clamp(1, MAX_DECODE_OCCUPANCY)
}
