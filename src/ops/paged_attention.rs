//! Causal attention over a paged KV cache, for batches of sequences of any lengths.
//!
//! For query `i` of `n` of a sequence of length `len`, at position `p = len - n + i`, and each head:
//!
//! ```text
//!   out = sum over p - window < j <= p of softmax_j(scale * q . k_j) * v_j
//! ```
//!
//! where `k_j` and `v_j` lie in slot `j % block_size` of the sequence's block `j / block_size`, and
//! every `num_heads / num_kv_heads` consecutive heads share a KV head. Arithmetic is in f32; its
//! order per query and head is fixed, see the tile module.

mod gpu;
mod plan;
mod product;
#[cfg(test)]
mod tests;
mod tile;

use std::cmp::Reverse;
use std::sync::{Mutex, PoisonError};

use bytemuck::Pod;
use candle_core::Tensor as CpuTensor;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, WithDType, bail};
use half::{bf16, f16};

use super::indices::Indices;
use super::kv_cache::{CpuKvCache, E4m3, KvCache, KvCacheShape, KvDtype, Q8_0Block, Stored};
use super::operand::contiguous;
use super::rows::parallel_chunks_mut;
use super::simd::Isa;
use super::tensor::Tensor;
use crate::device::threads::current_num_threads;
pub use gpu::{StepPlan, max_partial_bytes};
pub(super) use gpu::{check_shape, new_counters};
pub use plan::StepBounds;
use tile::{
    Attend, CacheView, Destination, MergePartitions, PARTITION, Partial, QueryTile, Scratch,
};

/// The cache slot of a token that belongs to no sequence: nothing is written for it. Its sequence
/// has length 0, and its result means nothing. Only cards know such tokens.
pub const PADDING_SLOT: u32 = u32::MAX;

/// Rows (queries times heads) that share one reading of the keys.
const MAX_TILE_ROWS: usize = 128;
/// Enough for threads of different speed to finish together.
const TASKS_PER_THREAD: usize = 4;
/// More partitions in a task would hardly save any more of its start.
const MAX_PARTIALS_PER_TASK: usize = 8;

/// Which tokens of a step belong to which sequence and where their keys and values live.
///
/// The tokens of all sequences stand one after the other, without padding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttentionMetadata {
    /// First token of each sequence, then the number of tokens: `[num_seqs + 1]`.
    pub query_start_loc: Indices,
    /// Tokens of each sequence up to and including this step: `[num_seqs]`.
    pub seq_lens: Indices,
    /// Blocks of each sequence in token order, padded: `[num_seqs, max_blocks_per_seq]`.
    pub block_table: Indices,
    /// Row length of `block_table`.
    pub max_blocks_per_seq: usize,
    /// Cache slot of each token, `block * block_size + offset`: `[num_tokens]`.
    pub slot_mapping: Indices,
    /// Position of each token in its sequence: `[num_tokens]`.
    pub positions: Indices,
    /// The most tokens that a sequence has in this step.
    pub max_query_len: u32,
    /// The largest of `seq_lens`, or more: what is recorded for a step suffices up to here.
    pub max_seq_len: u32,
    /// How a card cuts the step, once its first layer has asked.
    pub step_plan: StepPlan,
}

impl AttentionMetadata {
    /// Checks everything that attention reads, so that no index can be out of range later.
    fn check(&self, num_tokens: usize, shape: KvCacheShape) -> Result<()> {
        self.check_starts(num_tokens)?;
        (0..self.seq_lens.len()).try_for_each(|seq| self.check_seq(seq, shape))
    }

    fn check_starts(&self, num_tokens: usize) -> Result<()> {
        let num_seqs = self.seq_lens.len();
        let starts = &self.query_start_loc;
        if starts.len() != num_seqs + 1 {
            bail!("query_start_loc has {} entries for {num_seqs} sequences", starts.len());
        }
        let (first, end) = (starts[0], starts[num_seqs]);
        if first != 0 || end as usize != num_tokens {
            bail!("query_start_loc covers {first}..{end} of {num_tokens} tokens");
        }
        let row_len = self.max_blocks_per_seq;
        if Some(self.block_table.len()) != num_seqs.checked_mul(row_len) {
            let num_entries = self.block_table.len();
            bail!("block_table has {num_entries} entries for {num_seqs} sequences of {row_len}");
        }
        if let Some(&[start, end]) = starts.windows(2).find(|pair| pair[1] < pair[0]) {
            bail!("query_start_loc falls from {start} to {end}");
        }
        Ok(())
    }

    fn check_seq(&self, seq: usize, shape: KvCacheShape) -> Result<()> {
        let KvCacheShape { num_blocks, block_size, .. } = shape;
        let (seq_len, row_len) = (self.seq_lens[seq], self.max_blocks_per_seq);
        let query_len = self.query_start_loc[seq + 1] - self.query_start_loc[seq];
        if seq_len < query_len {
            bail!("sequence {seq} has {query_len} queries but {seq_len} tokens");
        }
        let num_needed = (seq_len as usize).div_ceil(block_size);
        if row_len < num_needed {
            bail!("sequence {seq} needs {num_needed} blocks, block_table has {row_len}");
        }
        let blocks = &self.block_table[seq * row_len..][..num_needed];
        if let Some(block) = blocks.iter().find(|&&block| num_blocks <= block as usize) {
            bail!("sequence {seq} has block {block}, the cache has {num_blocks}");
        }
        Ok(())
    }
}

/// How keys become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attending {
    /// What products of queries and keys are multiplied with.
    pub scale: f32,
    /// How many tokens a token looks at, itself and those right before it; all of them if absent.
    pub window: Option<usize>,
}

impl Attending {
    /// How many tokens a token looks at, where more than any sequence has are all of them.
    fn num_seen(self) -> usize {
        self.window.unwrap_or(usize::MAX).max(1)
    }
}

/// Causal attention of the step's tokens over everything cached of their sequences.
///
/// Takes queries `[num_tokens, num_heads * head_dim]` and yields the same shape. Keys and values of
/// the step's tokens must be in the cache already.
pub fn paged_attention(
    q: &Tensor,
    kv: &KvCache,
    meta: &AttentionMetadata,
    how: Attending,
) -> Result<Tensor> {
    match kv {
        KvCache::Cpu(kv) => attend_on_cpu(q.cpu()?, kv, meta, how).map(Tensor::Cpu),
        KvCache::Gpu(kv) => gpu::attend(q.gpu()?, kv, meta, how).map(Tensor::Gpu),
    }
}

fn attend_on_cpu(
    q: &CpuTensor,
    kv: &CpuKvCache,
    meta: &AttentionMetadata,
    how: Attending,
) -> Result<CpuTensor> {
    let (shape, dtype) = (kv.shape()?, kv.dtype);
    let op = PagedAttention { shape, dtype, meta, how, isa: Isa::best() };
    q.apply_op3_no_bwd(&kv.k, &kv.v, &op)
}

struct PagedAttention<'a> {
    shape: KvCacheShape,
    dtype: KvDtype,
    meta: &'a AttentionMetadata,
    how: Attending,
    isa: Isa,
}

impl CustomOp3 for PagedAttention<'_> {
    fn name(&self) -> &'static str {
        "paged_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let KvCacheShape { num_kv_heads, head_dim, .. } = self.shape;
        let (num_tokens, width) = q_layout.shape().dims2()?;
        if width == 0 || width % (num_kv_heads * head_dim) != 0 {
            bail!("queries of {width} values do not fit {num_kv_heads} KV heads of {head_dim}");
        }
        self.meta.check(num_tokens, self.shape)?;
        let queries = contiguous::<f32>("q", q, q_layout)?;
        let (k, v) = ((k, k_layout), (v, v_layout));
        let out = match self.dtype {
            KvDtype::F16 => self.run(queries, self.view::<f16, f16>(k, v)?, width),
            KvDtype::Bf16 => self.run(queries, self.view::<bf16, bf16>(k, v)?, width),
            KvDtype::F32 => self.run(queries, self.view::<f32, f32>(k, v)?, width),
            KvDtype::Fp8 => self.run(queries, self.view::<u8, E4m3>(k, v)?, width),
            KvDtype::Q8_0 => self.run(queries, self.view::<u8, Q8_0Block>(k, v)?, width),
        };
        Ok((CpuStorage::F32(out), (num_tokens, width).into()))
    }
}

/// A tile of queries, where its results go and its partitions if threads share it.
struct WorkItem<'a> {
    tile: QueryTile<'a>,
    /// Per query: [group, head_dim].
    outputs: Vec<&'a mut [f32]>,
    /// One per partition of the keys; none if one thread goes over all of them.
    partials: Vec<Partial>,
}

/// What one thread does at a time.
struct Task<'a, 'o> {
    tile: &'a QueryTile<'o>,
    destination: Destination<'a, 'o>,
}

impl Task<'_, '_> {
    fn cost(&self) -> usize {
        self.tile.num_rows() * self.destination.partitions(self.tile).len()
    }
}

impl PagedAttention<'_> {
    /// The cache's rows, which lie in its tensors as values of type `T`.
    fn view<'a, T: WithDType + Pod, E: Pod>(
        &self,
        (keys, keys_layout): (&'a CpuStorage, &Layout),
        (values, values_layout): (&'a CpuStorage, &Layout),
    ) -> Result<CacheView<'a, E>> {
        let keys = contiguous::<T>("the key cache", keys, keys_layout)?;
        let values = contiguous::<T>("the value cache", values, values_layout)?;
        Ok(CacheView {
            keys: bytemuck::cast_slice(keys),
            values: bytemuck::cast_slice(values),
            num_kv_heads: self.shape.num_kv_heads,
            block_size: self.shape.block_size,
            head_dim: self.shape.head_dim,
        })
    }

    fn run<E: Stored>(&self, queries: &[f32], cache: CacheView<'_, E>, width: usize) -> Vec<f32> {
        let mut out = vec![0.0; queries.len()];
        let mut items = self.work_items(queries, &mut out, width);
        let num_partials: usize = items.iter().map(|item| item.partials.len()).sum();
        let wanted_tasks = TASKS_PER_THREAD * current_num_threads();
        let partials_per_task = (num_partials / wanted_tasks).clamp(1, MAX_PARTIALS_PER_TASK);
        let mut tasks: Vec<Task<'_, '_>> =
            items.iter_mut().flat_map(|item| item.tasks(partials_per_task)).collect();
        // The longest first, so that no thread is left with a long one at the end.
        tasks.sort_by_key(|task| Reverse(task.cost()));

        let scratches = Mutex::new(Vec::<Scratch>::new());
        parallel_chunks_mut(&mut tasks, 1, |_, task| {
            let lock = || scratches.lock().unwrap_or_else(PoisonError::into_inner);
            let scratch = &mut lock().pop().unwrap_or_default();
            let Task { tile, destination } = &mut task[0];
            self.isa.run(Attend { cache, tile, scratch, destination });
            lock().push(std::mem::take(scratch));
        });
        drop(tasks);

        items.retain(|item| !item.partials.is_empty());
        parallel_chunks_mut(&mut items, 1, |_, item| {
            let WorkItem { tile, outputs, partials } = &mut item[0];
            self.isa.run(MergePartitions { tile, head_dim: cache.head_dim, partials, outputs });
        });
        drop(items);
        out
    }

    /// Cuts the batch into tiles of queries of one sequence and one KV head.
    fn work_items<'a>(
        &'a self,
        queries: &'a [f32],
        out: &'a mut [f32],
        width: usize,
    ) -> Vec<WorkItem<'a>> {
        let num_kv_heads = self.shape.num_kv_heads;
        let queries_per_tile = (MAX_TILE_ROWS / self.group(width)).max(1);
        let mut items = Vec::new();
        let mut outputs = out.chunks_exact_mut(width / num_kv_heads);
        for (seq, range) in self.meta.query_start_loc.windows(2).enumerate() {
            let (start, end) = (range[0] as usize, range[1] as usize);
            for first in (start..end).step_by(queries_per_tile) {
                let tokens = first..end.min(first + queries_per_tile);
                let rows = &queries[first * width..tokens.end * width];
                let first_item = items.len();
                for kv_head in 0..num_kv_heads {
                    let tile = self.query_tile(rows, width, (seq, kv_head), end - first);
                    // Sharing a tile among threads pays only where there are few of them.
                    let num_partitions = tile.num_keys().div_ceil(PARTITION);
                    let is_shared = end - start <= queries_per_tile && 1 < num_partitions;
                    let num_partials = if is_shared { num_partitions } else { 0 };
                    let partials = vec![Partial::default(); num_partials];
                    items.push(WorkItem { tile, outputs: Vec::new(), partials });
                }
                for _ in tokens {
                    for (item, output) in items[first_item..].iter_mut().zip(&mut outputs) {
                        item.outputs.push(output);
                    }
                }
            }
        }
        items
    }

    /// `num_left`: queries of the sequence from the tile's first on.
    fn query_tile<'a>(
        &'a self,
        rows: &'a [f32],
        width: usize,
        (seq, kv_head): (usize, usize),
        num_left: usize,
    ) -> QueryTile<'a> {
        let meta = self.meta;
        let head_width = width / self.shape.num_kv_heads;
        let heads = kv_head * head_width..(kv_head + 1) * head_width;
        let seq_len = meta.seq_lens[seq] as usize;
        let num_blocks = seq_len.div_ceil(self.shape.block_size);
        QueryTile {
            queries: rows.chunks_exact(width).map(|row| &row[heads.clone()]).collect(),
            first_position: seq_len - num_left,
            group: self.group(width),
            kv_head,
            blocks: &meta.block_table[seq * meta.max_blocks_per_seq..][..num_blocks],
            scale: self.how.scale,
            window: self.how.num_seen(),
        }
    }

    /// Query heads per KV head.
    fn group(&self, width: usize) -> usize {
        width / (self.shape.num_kv_heads * self.shape.head_dim)
    }
}

impl<'o> WorkItem<'o> {
    fn tasks<'a>(&'a mut self, partials_per_task: usize) -> Vec<Task<'a, 'o>> {
        let Self { tile, outputs, partials } = self;
        let tile = &*tile;
        if partials.is_empty() {
            return vec![Task { tile, destination: Destination::Outputs(outputs) }];
        }
        let new_task = |(index, partials)| {
            let first = index * partials_per_task;
            Task { tile, destination: Destination::Partials { first, partials } }
        };
        partials.chunks_mut(partials_per_task).enumerate().map(new_task).collect()
    }
}
