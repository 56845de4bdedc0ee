//! How a step's attention is cut into pieces for a card's multiprocessors. Pure.
//!
//! Sequences with few queries go to the decode kernel, which cuts them itself. Of the others, tiles
//! of queries become blocks; where a sequence has few tiles behind many keys, which would leave
//! most of the card idle, the keys are split too and the parts merged afterwards. Keys before the
//! window of a tile's first query belong to no piece.
//!
//! **Invariant:** how a sequence is cut depends on its own lengths and the layer's heads and window
//! only, so that its numbers do not depend on its company.

use std::cmp::Reverse;
use std::ops::Range;

use super::AttentionMetadata;

/// Rows (queries times heads of a KV head) of a tile, as in `paged_prefill.cu`.
pub(super) const TILE_ROWS: usize = 128;
/// Most rows of a sequence that the decode kernel takes, as in `paged_decode.cu`.
pub(super) const MAX_DECODE_ROWS: usize = 64;
/// Keys that a block takes at a time, as in `paged_prefill.cu`.
pub(super) const TILE_KEYS: usize = 64;
/// Fewest keys of a decode partition, as in `paged_decode.cu`.
const MIN_PARTITION: usize = 128;
/// Most partitions of a sequence, as in `paged_decode.cu`.
const MAX_PARTITIONS: usize = 32;
/// Fewest keys of a part of a tile: so many that merging costs little. A multiple of [`TILE_KEYS`].
const MIN_SPLIT: usize = 1024;
/// So many blocks keep a large card busy; no sequence is split into more.
const WANTED_BLOCKS: usize = 256;
/// Most blocks that leave partial results at a time, which bounds their memory.
const MAX_PARTIAL_BLOCKS: usize = 2 * WANTED_BLOCKS;
/// The slot of a tile that covers all of its keys.
const NO_SLOT: u32 = u32::MAX;

/// How queries share keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heads {
    pub(super) num_kv_heads: usize,
    /// Query heads per KV head.
    pub(super) group: usize,
}

impl Heads {
    /// Queries of a tile at most.
    fn queries_per_tile(self) -> usize {
        TILE_ROWS / self.group
    }
}

/// Work of one block per KV head, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Tile {
    seq: u32,
    first_query: u32,
    first_key: u32,
    end_key: u32,
    slot: u32,
}

impl Tile {
    fn num_keys(&self) -> usize {
        (self.end_key - self.first_key) as usize
    }
}

/// Parts of the keys of one tile of queries, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Merge {
    seq: u32,
    first_query: u32,
    first_slot: u32,
    num_slots: u32,
}

/// Tiles that run together, and the merges after them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Round {
    pub(super) tiles: Range<usize>,
    pub(super) merges: Range<usize>,
    /// Partial results per KV head.
    pub(super) num_slots: usize,
}

/// A step's pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Tokens of the sequences that the decode kernel takes.
    pub(super) num_decode_tokens: usize,
    /// Most rows that one of them has.
    pub(super) max_decode_rows: usize,
    /// Most keys that the queries of one of them see, in this step or when it is repeated.
    pub(super) max_decode_keys: usize,
    pub(super) tiles: Vec<Tile>,
    pub(super) merges: Vec<Merge>,
    pub(super) rounds: Vec<Round>,
}

impl Plan {
    /// Of a step in which a token sees `window` tokens, itself included.
    pub(super) fn new(meta: &AttentionMetadata, heads: Heads, window: usize) -> Self {
        let mut plan = Self::default();
        let mut split = Vec::new();
        for (seq, range) in meta.query_start_loc.windows(2).enumerate() {
            let query_len = (range[1] - range[0]) as usize;
            if query_len * heads.group <= MAX_DECODE_ROWS {
                let num_seen =
                    (window - 1).saturating_add(query_len).min(meta.max_seq_len as usize);
                plan.num_decode_tokens += query_len;
                plan.max_decode_rows = plan.max_decode_rows.max(query_len * heads.group);
                plan.max_decode_keys = plan.max_decode_keys.max(num_seen);
                continue;
            }
            let seq_len = meta.seq_lens[seq] as usize;
            let max_keys = split_len(query_len, seq_len, heads, window);
            for first_query in (0..query_len).step_by(heads.queries_per_tile()) {
                let end_query = query_len.min(first_query + heads.queries_per_tile());
                let position = seq_len - query_len + first_query;
                let first_seen = (position + 1).saturating_sub(window);
                let tile = Tile {
                    seq: seq as u32,
                    first_query: first_query as u32,
                    first_key: (first_seen / TILE_KEYS * TILE_KEYS) as u32,
                    end_key: (seq_len - query_len + end_query) as u32,
                    slot: NO_SLOT,
                };
                if tile.num_keys() <= max_keys {
                    plan.tiles.push(tile);
                } else {
                    split.push((tile, max_keys));
                }
            }
        }
        plan.add_rounds(&split, MAX_PARTIAL_BLOCKS / heads.num_kv_heads);
        plan
    }

    /// Closes the round of the whole tiles, to which the first split ones are added.
    fn add_rounds(&mut self, split: &[(Tile, usize)], max_slots: usize) {
        let mut round = Round::default();
        for &(tile, max_keys) in split {
            let num_slots = tile.num_keys().div_ceil(max_keys);
            if max_slots < round.num_slots + num_slots {
                round = self.close(round);
            }
            self.merges.push(Merge {
                seq: tile.seq,
                first_query: tile.first_query,
                first_slot: round.num_slots as u32,
                num_slots: num_slots as u32,
            });
            for first_key in (tile.first_key..tile.end_key).step_by(max_keys) {
                let end_key = tile.end_key.min(first_key + max_keys as u32);
                let slot = round.num_slots as u32;
                self.tiles.push(Tile { first_key, end_key, slot, ..tile });
                round.num_slots += 1;
            }
        }
        self.close(round);
    }

    /// Ends a round and begins the next.
    fn close(&mut self, mut round: Round) -> Round {
        round.tiles.end = self.tiles.len();
        round.merges.end = self.merges.len();
        // The longest first, so that no block is left with a long one at the end.
        self.tiles[round.tiles.clone()].sort_by_key(|tile| Reverse(tile.num_keys()));
        let next = Round {
            tiles: round.tiles.end..round.tiles.end,
            merges: round.merges.end..round.merges.end,
            num_slots: 0,
        };
        if !round.tiles.is_empty() {
            self.rounds.push(round);
        }
        next
    }
}

/// Most keys of a tile of a sequence.
fn split_len(query_len: usize, seq_len: usize, heads: Heads, window: usize) -> usize {
    let num_tiles = query_len.div_ceil(heads.queries_per_tile());
    let max_parts = WANTED_BLOCKS / (num_tiles * heads.num_kv_heads);
    let mut len = MIN_SPLIT;
    if max_parts <= 1 {
        return seq_len;
    }
    // Of a tile's keys those before its first query's window are left out.
    let num_keys = seq_len.min(window.saturating_add(heads.queries_per_tile() + TILE_KEYS));
    while max_parts < num_keys.div_ceil(len) {
        len *= 2;
    }
    len
}

/// Into how many partitions the decode kernel cuts sequences of up to this length at most.
pub(super) fn max_partitions(max_seq_len: usize) -> usize {
    max_seq_len.div_ceil(MIN_PARTITION).clamp(1, MAX_PARTITIONS)
}

/// The largest steps that there will be.
#[derive(Clone, Copy, Debug)]
pub struct StepBounds {
    /// Tokens of a step.
    pub num_tokens: usize,
    /// Sequences of a step.
    pub num_seqs: usize,
    /// Tokens of a sequence.
    pub max_seq_len: usize,
}

/// Most rows of partial results that are alive at a time, in all heads.
pub(super) fn max_partial_rows(heads: Heads, bounds: StepBounds) -> usize {
    let Heads { num_kv_heads, group } = heads;
    let partitions = max_partitions(bounds.max_seq_len);
    let num_partials = if partitions == 1 { 0 } else { partitions };
    let num_decode_tokens = bounds.num_tokens.min(bounds.num_seqs * (MAX_DECODE_ROWS / group));
    let decode = num_decode_tokens * num_partials * num_kv_heads * group;
    let is_ever_split = MIN_SPLIT < bounds.max_seq_len;
    decode.max(if is_ever_split { MAX_PARTIAL_BLOCKS * TILE_ROWS } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { num_kv_heads: 4, group: 7 };
    /// A window that hides nothing.
    const ALL: usize = usize::MAX;

    fn plan(seqs: &[(usize, usize)], heads: Heads, window: usize) -> Plan {
        let mut meta = AttentionMetadata { query_start_loc: vec![0].into(), ..Default::default() };
        for &(seq_len, query_len) in seqs {
            let start = meta.query_start_loc[meta.seq_lens.len()];
            meta.query_start_loc.push(start + query_len as u32);
            meta.seq_lens.push(seq_len as u32);
            meta.max_seq_len = meta.max_seq_len.max(seq_len as u32);
        }
        Plan::new(&meta, heads, window)
    }

    #[test]
    fn few_queries_are_left_to_the_decode_kernel() {
        for (window, max_decode_keys) in [(ALL, 900), (901, 900), (300, 308), (1, 9)] {
            let plan = plan(&[(900, 1), (0, 1), (40, 9), (5, 0)], HEADS, window);
            assert_eq!((plan.num_decode_tokens, plan.max_decode_rows), (11, 63));
            assert_eq!(plan.max_decode_keys, max_decode_keys);
            assert!(plan.tiles.is_empty() && plan.rounds.is_empty());
        }
    }

    /// What the tiles of a round cover: (seq, query, key) each exactly once, but for tiles of keys
    /// before the window, and merges all slots.
    fn check(seqs: &[(usize, usize)], heads: Heads, window: usize) {
        let plan = plan(seqs, heads, window);
        let first_key = |seq: u32, first_query: u32| {
            let (seq_len, query_len) = seqs[seq as usize];
            let position = seq_len - query_len + first_query as usize;
            (position + 1).saturating_sub(window) as u32 / 64 * 64
        };
        let per_tile = TILE_ROWS / heads.group;
        let mut next = (0, 0);
        for round in &plan.rounds {
            assert_eq!((round.tiles.start, round.merges.start), next);
            next = (round.tiles.end, round.merges.end);
            assert!(round.num_slots * heads.num_kv_heads <= MAX_PARTIAL_BLOCKS);
            let tiles = &plan.tiles[round.tiles.clone()];
            let lens: Vec<u32> = tiles.iter().map(|tile| tile.end_key - tile.first_key).collect();
            assert!(lens.is_sorted_by_key(|len| Reverse(*len)));
            let mut slots = Vec::new();
            for merge in &plan.merges[round.merges.clone()] {
                assert!(1 < merge.num_slots);
                let mut end = first_key(merge.seq, merge.first_query);
                for slot in merge.first_slot..merge.first_slot + merge.num_slots {
                    slots.push(slot);
                    let tile = tiles.iter().find(|tile| tile.slot == slot).unwrap();
                    assert_eq!((tile.seq, tile.first_query), (merge.seq, merge.first_query));
                    assert_eq!(tile.first_key, end);
                    assert!(tile.first_key < tile.end_key && tile.first_key % 64 == 0);
                    end = tile.end_key;
                }
            }
            assert!(slots.iter().copied().eq(0..round.num_slots as u32));
            let mut whole = tiles.iter().filter(|tile| tile.slot == NO_SLOT);
            assert!(whole.all(|tile| tile.first_key == first_key(tile.seq, tile.first_query)));
        }
        assert_eq!(next, (plan.tiles.len(), plan.merges.len()));
        let bounds = StepBounds {
            num_tokens: seqs.iter().map(|&(_, query_len)| query_len).sum(),
            num_seqs: seqs.len(),
            max_seq_len: seqs.iter().map(|&(seq_len, _)| seq_len).max().unwrap_or(0),
        };
        let num_slots = plan.rounds.iter().map(|round| round.num_slots).max().unwrap_or(0);
        let num_rows = num_slots * heads.num_kv_heads * TILE_ROWS;
        assert!(num_rows <= max_partial_rows(heads, bounds), "{num_rows} rows of {bounds:?}");
        for (seq, &(seq_len, query_len)) in seqs.iter().enumerate() {
            let is_prefill = MAX_DECODE_ROWS < query_len * heads.group;
            let mut ends: Vec<(u32, u32)> = (plan.tiles.iter())
                .filter(|tile| tile.seq == seq as u32)
                .map(|tile| (tile.first_query, tile.end_key))
                .collect();
            ends.sort_unstable();
            // The last part of each tile reaches what its last query sees.
            ends.reverse();
            ends.dedup_by_key(|end| end.0);
            ends.reverse();
            let expected = (0..if is_prefill { query_len } else { 0 }).step_by(per_tile);
            let expected = expected.map(|first| {
                (first as u32, (seq_len - query_len + query_len.min(first + per_tile)) as u32)
            });
            assert!(ends.into_iter().eq(expected), "sequence {seq}");
        }
    }

    #[test]
    fn tiles_cover_every_query_and_key_once() {
        let lens = [1, 9, 10, 18, 19, 127, 128, 129, 1023, 1024, 1025, 4096, 32_768, 131_072];
        for group in [1, 5, 6, 7, 8] {
            for num_kv_heads in [1, 2, 4, 8] {
                let heads = Heads { num_kv_heads, group };
                for len in lens {
                    for query_len in [1, 9, 10, 19, 96, 512, 2048] {
                        for window in [ALL, 1, 64, 65, 4096] {
                            check(&[(len.max(query_len), query_len)], heads, window);
                        }
                    }
                }
                let mixed = [(9000, 1), (3000, 3000), (5000, 100), (17, 17), (2048, 64)];
                for window in [ALL, 100, 3000] {
                    check(&[(40_000, 70); 40], heads, window);
                    check(&mixed, heads, window);
                }
            }
        }
    }

    #[test]
    fn few_queries_behind_many_keys_are_split_and_many_are_not() {
        assert!(plan(&[(32_768, 96)], HEADS, ALL).rounds[0].num_slots * 4 > 128);
        assert!(plan(&[(32_768, 2048)], HEADS, ALL).merges.is_empty());
        assert!(plan(&[(1024, 96)], HEADS, ALL).merges.is_empty());
        assert!(plan(&[(131_072, 96)], HEADS, ALL).rounds[0].num_slots * 4 <= WANTED_BLOCKS);
        // Of a window there are few keys.
        assert!(plan(&[(131_072, 96)], HEADS, 900).merges.is_empty());
        assert_eq!(plan(&[(131_072, 96)], HEADS, 4096).merges[0].num_slots, 5);
    }

    #[test]
    fn a_sequence_is_cut_the_same_in_any_company() {
        let alone = plan(&[(20_000, 96)], HEADS, ALL);
        let company = plan(&[(20_000, 96), (5000, 5000), (1, 1), (20_000, 40)], HEADS, ALL);
        let cuts = |plan: &Plan| -> Vec<(u32, u32, u32)> {
            let of_first = plan.tiles.iter().filter(|tile| tile.seq == 0);
            let mut cuts: Vec<_> =
                of_first.map(|tile| (tile.first_query, tile.first_key, tile.end_key)).collect();
            cuts.sort_unstable();
            cuts
        };
        assert_eq!(cuts(&alone), cuts(&company));
    }

    #[test]
    fn partial_results_of_decode_are_bounded() {
        let bounds = StepBounds { num_tokens: 2048, num_seqs: 64, max_seq_len: 4096 };
        assert_eq!(max_partial_rows(HEADS, bounds), 64 * 9 * 32 * 28);
        let short = StepBounds { num_tokens: 20, max_seq_len: 129, ..bounds };
        assert_eq!(max_partial_rows(HEADS, short), 20 * 2 * 28);
        assert_eq!(max_partial_rows(HEADS, StepBounds { max_seq_len: 128, ..bounds }), 0);
    }

    #[test]
    fn partitions_are_bounded() {
        assert_eq!(
            [0, 1, 128, 129, 4096, 4097, 1 << 20].map(max_partitions),
            [1, 1, 1, 2, 32, 32, 32]
        );
    }
}
