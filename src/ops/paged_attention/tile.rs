//! The arithmetic of attention: online softmax over tiles of 64 keys.
//!
//! A work item is a tile of queries of one sequence with all query heads that share a KV head; a
//! (query, head) pair is a *row*. Per tile of keys:
//!
//! ```text
//!   keys [head_dim, 64]   (transposed)        values [64, head_dim]
//!   scores = queries x keys                    acc = acc * exp(old max - new max) + p x values
//!   [rows, 64]  ->  p = exp(scores - max)      [rows, head_dim]
//! ```
//!
//! **Invariant:** tiles lie at multiples of 64 from position 0 and partitions at multiples of
//! [`PARTITION`], whatever is computed together; a row meets exactly the keys up to its position,
//! one product sum after the other. So its result has always the same bits.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

use std::ops::Range;

use super::product::{Ahead, MAX_DEPTH, PANEL, Product, Start};
use crate::ops::kv_cache::Stored;
use crate::ops::simd::{Kernel, LANES, Simd};

/// Keys per tile.
const TILE: usize = MAX_DEPTH;
/// Keys per partition: the unit that different threads can do for one query.
pub(super) const PARTITION: usize = 512;
/// Rows of scores that are computed before they are used: the largest `Simd::PRODUCT_ROWS`.
const MAX_PRODUCT_ROWS: usize = 8;

/// How one layer's keys and values lie in memory.
#[derive(Clone, Copy)]
pub(super) struct CacheView<'a, E> {
    /// [num_blocks, num_kv_heads, block_size, row_len]
    pub(super) keys: &'a [E],
    /// [num_blocks, num_kv_heads, block_size, row_len]
    pub(super) values: &'a [E],
    pub(super) num_kv_heads: usize,
    pub(super) block_size: usize,
    pub(super) head_dim: usize,
}

impl<E: Stored> CacheView<'_, E> {
    /// Of what rows are made of, how much one has.
    fn row_len(&self) -> usize {
        self.head_dim / E::LEN
    }
}

/// The queries of a work item and what they look at.
#[derive(Clone)]
pub(super) struct QueryTile<'a> {
    /// Per query: the heads that share the KV head, [group, head_dim].
    pub(super) queries: Vec<&'a [f32]>,
    /// Position of the first query; the others follow it.
    pub(super) first_position: usize,
    /// Query heads per KV head.
    pub(super) group: usize,
    pub(super) kv_head: usize,
    /// How many keys a query looks at, its own and those right before it.
    pub(super) window: usize,
    /// The sequence's blocks; all that the last query needs exist.
    pub(super) blocks: &'a [u32],
    pub(super) scale: f32,
}

impl QueryTile<'_> {
    pub(super) fn num_rows(&self) -> usize {
        self.queries.len() * self.group
    }

    /// One past the last key that any query looks at.
    pub(super) fn num_keys(&self) -> usize {
        self.first_position + self.queries.len()
    }

    /// The first key that a query looks at.
    fn first_key(&self, query: usize) -> usize {
        (self.first_position + query + 1).saturating_sub(self.window)
    }

    /// The first query that does not look at a key any more.
    fn first_query_beyond(&self, key: usize) -> usize {
        key.saturating_add(self.window).saturating_sub(self.first_position).min(self.queries.len())
    }
}

/// Softmax state of some rows over some keys: maximum, sum and weighted values.
#[derive(Clone, Default)]
pub(super) struct Partial {
    max: Vec<f32>,
    /// Each lane adds up the weights of every 16th key; they meet when the result is written.
    sum: Vec<[f32; LANES]>,
    /// [rows, padded head_dim]
    acc: Vec<f32>,
}

impl Partial {
    /// The state over no keys.
    pub(super) fn reset(&mut self, num_rows: usize, head_dim: usize) {
        refill(&mut self.max, num_rows, f32::NEG_INFINITY);
        refill(&mut self.sum, num_rows, [0.0; LANES]);
        refill(&mut self.acc, num_rows * padded(head_dim), 0.0);
    }

    /// Adds the state over the following keys. `first_row`: earlier rows see none of them.
    #[inline(always)]
    fn merge<S: Simd>(&mut self, simd: S, next: &Self, first_row: usize) {
        let width = self.acc.len() / self.max.len();
        for row in first_row..self.max.len() {
            if next.max[row] == f32::NEG_INFINITY {
                // All of these keys are before its window.
                continue;
            }
            let max = if self.max[row] > next.max[row] { self.max[row] } else { next.max[row] };
            let (scale, next_scale) =
                (exp(simd, self.max[row] - max), exp(simd, next.max[row] - max));
            self.max[row] = max;
            let sum = simd.mul(simd.load(&self.sum[row]), simd.splat(scale));
            let next_sum = simd.load(&next.sum[row]);
            simd.store(&mut self.sum[row], simd.mul_add(next_sum, simd.splat(next_scale), sum));
            let acc = &mut self.acc[row * width..][..width];
            let next_acc = &next.acc[row * width..][..width];
            for (acc, next_acc) in acc.chunks_exact_mut(LANES).zip(next_acc.chunks_exact(LANES)) {
                let scaled = simd.mul(simd.load(acc), simd.splat(scale));
                let next_acc = simd.load(next_acc);
                simd.store(acc, simd.mul_add(next_acc, simd.splat(next_scale), scaled));
            }
        }
    }

    /// Divides by the sums: the attention's result, per query [group, head_dim].
    #[inline(always)]
    fn write<S: Simd>(&self, simd: S, outputs: &mut [&mut [f32]], group: usize, head_dim: usize) {
        let width = padded(head_dim);
        for (query, output) in outputs.iter_mut().enumerate() {
            for (head, output) in output.chunks_exact_mut(head_dim).enumerate() {
                let row = query * group + head;
                let sum = simd.sum_of_lanes(simd.load(&self.sum[row]));
                for (output, acc) in output.iter_mut().zip(&self.acc[row * width..]) {
                    *output = acc / sum;
                }
            }
        }
    }
}

/// Working memory of a thread.
#[derive(Default)]
pub(super) struct Scratch {
    /// [head_dim / 64, rows, 64], scaled
    queries: Vec<[f32; MAX_DEPTH]>,
    /// [TILE / PANEL, head_dim, PANEL]
    keys: Vec<[f32; PANEL]>,
    /// [head_dim / PANEL, TILE, PANEL]
    values: Vec<[f32; PANEL]>,
    /// Where the tile's keys start in the cache.
    offsets: Vec<usize>,
    /// Where their cache lines do; empty if they need not be fetched.
    lines: Vec<usize>,
    total: Partial,
    partition: Partial,
}

/// Attention of a query tile over all its keys or over some partitions of them.
pub(super) struct Attend<'a, 'd, 'o, E> {
    pub(super) cache: CacheView<'a, E>,
    pub(super) tile: &'a QueryTile<'o>,
    pub(super) scratch: &'a mut Scratch,
    pub(super) destination: &'a mut Destination<'d, 'o>,
}

/// Where the results go.
pub(super) enum Destination<'a, 'o> {
    /// All partitions together, per query [group, head_dim].
    Outputs(&'a mut [&'o mut [f32]]),
    /// Some consecutive partitions, each by itself.
    Partials { first: usize, partials: &'a mut [Partial] },
}

impl<E: Stored> Kernel for Attend<'_, '_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { cache, tile, scratch, destination } = self;
        let mut total = std::mem::take(&mut scratch.total);
        let mut partition = std::mem::take(&mut scratch.partition);
        total.reset(tile.num_rows(), cache.head_dim);
        scratch.set_queries(tile, cache.head_dim);
        let range = destination.partitions(tile);
        scratch.find_keys(cache, tile, range.start * PARTITION);
        for index in range {
            let partial = match destination {
                Destination::Outputs(_) => &mut partition,
                Destination::Partials { first, partials } => &mut partials[index - *first],
            };
            partial.reset(tile.num_rows(), cache.head_dim);
            attend_partition(simd, cache, tile, (scratch, partial), index * PARTITION);
            if let Destination::Outputs(_) = destination {
                total.merge(simd, &partition, first_row(tile, index * PARTITION));
            }
        }
        if let Destination::Outputs(outputs) = destination {
            total.write(simd, outputs, tile.group, cache.head_dim);
        }
        scratch.total = total;
        scratch.partition = partition;
    }
}

impl Destination<'_, '_> {
    /// The partitions that this is about.
    pub(super) fn partitions(&self, tile: &QueryTile<'_>) -> Range<usize> {
        match self {
            Self::Outputs(_) => tile.first_key(0) / PARTITION..tile.num_keys().div_ceil(PARTITION),
            Self::Partials { first, partials } => *first..first + partials.len(),
        }
    }
}

/// Joins the partitions of a query tile.
pub(super) struct MergePartitions<'a, 'o> {
    pub(super) tile: &'a QueryTile<'a>,
    pub(super) head_dim: usize,
    /// In key order.
    pub(super) partials: &'a [Partial],
    pub(super) outputs: &'a mut [&'o mut [f32]],
}

impl Kernel for MergePartitions<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut total = Partial::default();
        total.reset(self.tile.num_rows(), self.head_dim);
        for (index, partial) in self.partials.iter().enumerate() {
            total.merge(simd, partial, first_row(self.tile, index * PARTITION));
        }
        total.write(simd, self.outputs, self.tile.group, self.head_dim);
    }
}

impl Scratch {
    fn set_queries(&mut self, tile: &QueryTile<'_>, head_dim: usize) {
        let num_rows = tile.num_rows();
        self.queries.resize(head_dim.div_ceil(MAX_DEPTH) * num_rows, [0.0; MAX_DEPTH]);
        let rows = tile.queries.iter().flat_map(|query| query.chunks_exact(head_dim));
        for (row, query) in rows.enumerate() {
            for (index, part) in query.chunks(MAX_DEPTH).enumerate() {
                for (scaled, value) in self.queries[index * num_rows + row].iter_mut().zip(part) {
                    *scaled = value * tile.scale;
                }
            }
        }
        // What an earlier tile left behind is overwritten before it is read; what pads a head stays
        // zero.
        self.keys.resize(TILE / PANEL * head_dim, [0.0; PANEL]);
        self.values.resize(padded(head_dim) / PANEL * TILE, [0.0; PANEL]);
    }

    /// Looks up where the keys from `first_key` on lie, up to a tile's.
    fn find_keys<E: Stored>(
        &mut self,
        cache: CacheView<'_, E>,
        tile: &QueryTile<'_>,
        first_key: usize,
    ) {
        const CACHE_LINE: usize = 64;
        let (block_size, row_len) = (cache.block_size, cache.row_len());
        self.offsets.clear();
        self.lines.clear();
        let end = tile.num_keys().min(first_key + TILE);
        let mut key = first_key;
        while key < end {
            let (block, slot) = (tile.blocks[key / block_size] as usize, key % block_size);
            let first = (block * cache.num_kv_heads + tile.kv_head) * block_size + slot;
            let num_keys = (block_size - slot).min(end - key);
            let range = first * row_len..(first + num_keys) * row_len;
            self.offsets.extend(range.clone().step_by(row_len));
            self.lines.extend(range.step_by(CACHE_LINE / size_of::<E>()));
            key += num_keys;
        }
    }
}

/// The first row that sees the key.
fn first_row(tile: &QueryTile<'_>, key: usize) -> usize {
    key.saturating_sub(tile.first_position) * tile.group
}

/// Adds the keys of the partition from `start` on to a state. The scratch memory knows where the
/// first tile lies; afterwards it knows so of the first one after the partition.
#[inline(always)]
fn attend_partition<S: Simd, E: Stored>(
    simd: S,
    cache: CacheView<'_, E>,
    tile: &QueryTile<'_>,
    (scratch, partial): (&mut Scratch, &mut Partial),
    start: usize,
) {
    let end = tile.num_keys().min(start + PARTITION);
    for first_key in (start..end).step_by(TILE) {
        // Queries see the tile up to their own key and from their window's first on. Those from
        // `full` to `cut` see all of it; the heads of others only are computed together.
        let num_queries = tile.queries.len();
        let full = (first_key + TILE - 1).saturating_sub(tile.first_position).min(num_queries);
        let cut = tile.first_query_beyond(first_key);
        let last_key = end.min(first_key + TILE) - 1;
        let num_seeing = tile.first_query_beyond(last_key);
        let mut query = first_key.saturating_sub(tile.first_position);
        if query < num_seeing {
            load_keys(simd, cache, &mut scratch.keys, &scratch.offsets);
            load_values(simd, cache, &mut scratch.values, &scratch.offsets);
        }
        scratch.find_keys(cache, tile, first_key + TILE);
        while query < num_seeing {
            let is_whole = (full..cut).contains(&query);
            let next = if is_whole { cut } else { query + 1 };
            let end = TILE.min(tile.first_position + query + 1 - first_key);
            let visible = tile.first_key(query).saturating_sub(first_key)..end;
            let rows = query * tile.group..next * tile.group;
            attend_rows(simd, cache, (scratch, partial), rows, visible);
            scratch.lines.clear();
            query = next;
        }
    }
}

/// Adds the tile in `scratch` to the rows' state; all of them see the tile's `visible` keys.
#[inline(always)]
fn attend_rows<S: Simd, E: Stored>(
    simd: S,
    cache: CacheView<'_, E>,
    (scratch, partial): (&Scratch, &mut Partial),
    rows: Range<usize>,
    visible: Range<usize>,
) {
    let Range { start: num_hidden, end: visible } = visible;
    let num_columns = visible.next_multiple_of(LANES);
    let num_blocks = rows.len().div_ceil(S::PRODUCT_ROWS);
    let mut row = rows.start;
    for block in 0..num_blocks {
        let num_rows = (rows.end - row).div_ceil(num_blocks - block);
        let lines = if block == 0 { &scratch.lines[..] } else { &[] };
        let mut scores = [[0.0; TILE]; MAX_PRODUCT_ROWS];
        let scores = &mut scores[..num_rows];
        let ahead = Ahead { data: cache.keys, lines };
        multiply_queries(simd, scratch, (row, visible), scores, ahead);
        for scores in &mut *scores {
            scores[..num_hidden].fill(f32::NEG_INFINITY);
            scores[visible..num_columns].fill(f32::NEG_INFINITY);
        }
        let (max, sum) = (&mut partial.max[row..][..num_rows], &mut partial.sum[row..]);
        let factors = softmax(simd, scores, num_columns, max, sum);
        let width = padded(cache.head_dim);
        let acc = &mut partial.acc[row * width..];
        let mut ahead = Ahead { data: cache.values, lines };
        for (panel, values) in scratch.values.chunks_exact(TILE).enumerate() {
            let product = Product {
                a: scores,
                b: &values[..visible],
                start: Start::Scaled(&factors),
                ahead: ahead.split_off(visible),
            };
            product.write(simd, &mut acc[panel * PANEL..], width);
        }
        row += num_rows;
    }
}

/// Products of the rows from `row` on with the tile's first `visible` keys.
#[inline(always)]
fn multiply_queries<S: Simd, E: Stored>(
    simd: S,
    scratch: &Scratch,
    (row, visible): (usize, usize),
    scores: &mut [[f32; TILE]],
    mut ahead: Ahead<'_, E>,
) {
    let num_rows = scores.len();
    let head_dim = scratch.keys.len() / (TILE / PANEL);
    let num_parts = head_dim.div_ceil(MAX_DEPTH);
    let all_rows = scratch.queries.len() / num_parts;
    let panels = scratch.keys.chunks_exact(head_dim).take(visible.div_ceil(PANEL));
    for (panel, keys) in panels.enumerate() {
        for (part, keys) in keys.chunks(MAX_DEPTH).enumerate() {
            let product = Product {
                a: &scratch.queries[part * all_rows + row..][..num_rows],
                b: keys,
                start: if part == 0 { Start::Zero } else { Start::Scaled(&[1.0; LANES]) },
                ahead: ahead.split_off(keys.len()),
            };
            product.write(simd, &mut scores.as_flattened_mut()[panel * PANEL..], TILE);
        }
    }
}

/// Replaces rows of scores by weights relative to the rows' maxima, which it updates along with
/// the sums of weights. Returns the factors for earlier weights.
#[inline(always)]
fn softmax<S: Simd>(
    simd: S,
    scores: &mut [[f32; TILE]],
    num_columns: usize,
    max: &mut [f32],
    sum: &mut [[f32; LANES]],
) -> [f32; LANES] {
    let mut changes = [0.0; LANES];
    for ((scores, max), change) in scores.iter().zip(&mut *max).zip(&mut changes) {
        let mut largest = simd.splat(*max);
        for scores in scores[..num_columns].as_chunks::<LANES>().0 {
            largest = simd.max(simd.load(scores), largest);
        }
        let new_max = simd.max_of_lanes(largest);
        *change = *max - new_max;
        *max = new_max;
    }
    let mut factors = [0.0; LANES];
    simd.store(&mut factors, simd.exp(simd.load(&changes)));
    let states = max.iter().zip(sum).zip(&factors);
    for (scores, ((max, sum), factor)) in scores.iter_mut().zip(states) {
        let mut weight_sum = simd.splat(0.0);
        for scores in scores[..num_columns].as_chunks_mut::<LANES>().0 {
            let weights = simd.exp(simd.sub(simd.load(scores), simd.splat(*max)));
            weight_sum = simd.add(weight_sum, weights);
            simd.store(scores, weights);
        }
        let before = simd.load(&*sum);
        simd.store(sum, simd.mul_add(before, simd.splat(*factor), weight_sum));
    }
    factors
}

/// Writes the keys as columns of `[TILE / PANEL, head_dim, PANEL]`. Columns after the last key, up
/// to a multiple of 16, get copies of another.
#[inline(always)]
fn load_keys<S: Simd, E: Stored>(
    simd: S,
    cache: CacheView<'_, E>,
    panels: &mut [[f32; PANEL]],
    offsets: &[usize],
) {
    let (head_dim, row_len) = (cache.head_dim, cache.row_len());
    for (group, offsets) in offsets.chunks(LANES).enumerate() {
        let (panel, half) = (group / 2, group % 2);
        let mut keys = [&cache.keys[offsets[0]..][..row_len]; LANES];
        for (key, offset) in keys.iter_mut().zip(offsets) {
            *key = &cache.keys[*offset..][..row_len];
        }
        for first in (0..head_dim).step_by(LANES) {
            let end = head_dim.min(first + LANES);
            let columns = &mut panels[panel * head_dim..][first..end];
            // In a closure the instructions that are enabled here would not be.
            let mut rows = [simd.splat(0.0); LANES];
            for (row, key) in rows.iter_mut().zip(keys) {
                *row = E::load(simd, key, first);
            }
            simd.transpose(&mut rows);
            for (column, row) in columns.iter_mut().zip(&rows) {
                simd.store(&mut column[half * LANES..], *row);
            }
        }
    }
}

/// Writes the values as rows of `[head_dim / PANEL, TILE, PANEL]`.
#[inline(always)]
fn load_values<S: Simd, E: Stored>(
    simd: S,
    cache: CacheView<'_, E>,
    panels: &mut [[f32; PANEL]],
    offsets: &[usize],
) {
    let (head_dim, row_len) = (cache.head_dim, cache.row_len());
    for (panel, rows) in panels.chunks_exact_mut(TILE).enumerate() {
        let first = panel * PANEL;
        for (row, offset) in rows.iter_mut().zip(offsets) {
            let values = &cache.values[*offset..][..row_len];
            simd.store(row, E::load(simd, values, first));
            if first + LANES < head_dim {
                simd.store(&mut row[LANES..], E::load(simd, values, first + LANES));
            }
        }
    }
}

/// `e^x` of one number, as the vectors have it.
#[inline(always)]
fn exp<S: Simd>(simd: S, x: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    simd.store(&mut lanes, simd.exp(simd.splat(x)));
    lanes[0]
}

/// Length of a head's row of sums.
fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(PANEL)
}

fn refill<T: Clone>(values: &mut Vec<T>, len: usize, value: T) {
    values.clear();
    values.resize(len, value);
}
