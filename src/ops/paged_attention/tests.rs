//! Attention against an f64 loop, and the equalities that make outputs independent of the batch.

use candle_core::DType;

use super::*;
use crate::device::threads::ThreadPool;

const SCALE: f32 = 0.125;

/// Dimensions of a model and how its cache is laid out.
#[derive(Clone, Copy)]
pub(super) struct Setup {
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) block_size: usize,
    pub(super) dtype: KvDtype,
    /// Distance between consecutive blocks of a sequence in the cache; odd.
    pub(super) block_step: usize,
    /// Tokens that a token looks at.
    pub(super) window: Option<usize>,
}

pub(super) const QWEN: Setup = Setup {
    num_heads: 14,
    num_kv_heads: 2,
    head_dim: 64,
    block_size: 16,
    dtype: KvDtype::F16,
    block_step: 1,
    window: None,
};

const DTYPES: [KvDtype; 5] =
    [KvDtype::F16, KvDtype::Bf16, KvDtype::F32, KvDtype::Fp8, KvDtype::Q8_0];

/// A sequence's content depends on `id` only.
#[derive(Clone, Copy)]
pub(super) struct Seq {
    pub(super) id: usize,
    pub(super) len: usize,
    pub(super) query_len: usize,
}

fn value(kind: usize, seq: usize, position: usize, index: usize) -> f32 {
    let mut hash = (((kind * 31 + seq) * 100_003 + position) * 4_099 + index) as u64;
    hash = (hash ^ (hash >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((hash >> 40) as f32 / 16_777_216.0 - 0.5) * if kind == 0 { 8.0 } else { 4.0 }
}

pub(super) struct Batch {
    pub(super) q: CpuTensor,
    pub(super) kv: CpuKvCache,
    pub(super) meta: AttentionMetadata,
    pub(super) how: Attending,
}

impl Setup {
    /// Lays out the sequences; every slot that belongs to nobody is NaN.
    pub(super) fn batch(&self, seqs: &[Seq]) -> Batch {
        let num_used: usize = seqs.iter().map(|seq| seq.len.div_ceil(self.block_size)).sum();
        let num_blocks = (num_used + 2).next_power_of_two();
        let cache_len = num_blocks * self.num_kv_heads * self.block_size * self.head_dim;
        let (mut k, mut v) = (vec![f32::NAN; cache_len], vec![f32::NAN; cache_len]);
        let max_blocks = seqs.iter().map(|seq| seq.len.div_ceil(self.block_size)).max();
        let mut meta = AttentionMetadata {
            query_start_loc: vec![0].into(),
            max_blocks_per_seq: max_blocks.unwrap_or(0),
            ..AttentionMetadata::default()
        };
        let (mut queries, mut num_tokens, mut next_block) = (Vec::new(), 0, 1);
        for seq in seqs {
            let mut blocks = vec![u32::MAX; meta.max_blocks_per_seq];
            for block in &mut blocks[..seq.len.div_ceil(self.block_size)] {
                *block = (next_block * self.block_step % num_blocks) as u32;
                next_block += 1;
            }
            for position in 0..seq.len {
                let block = blocks[position / self.block_size] as usize;
                for head in 0..self.num_kv_heads {
                    let row = (block * self.num_kv_heads + head) * self.block_size;
                    let start = (row + position % self.block_size) * self.head_dim;
                    for dim in 0..self.head_dim {
                        let index = head * self.head_dim + dim;
                        k[start + dim] = value(1, seq.id, position, index);
                        v[start + dim] = value(2, seq.id, position, index);
                    }
                }
            }
            for position in seq.len - seq.query_len..seq.len {
                let width = self.num_heads * self.head_dim;
                queries.extend((0..width).map(|index| value(0, seq.id, position, index)));
            }
            num_tokens += seq.query_len;
            meta.block_table.extend(blocks);
            meta.seq_lens.push(seq.len as u32);
            meta.query_start_loc.push(num_tokens as u32);
        }
        let Self { num_kv_heads, block_size, head_dim, .. } = *self;
        let shape = KvCacheShape { num_blocks, num_kv_heads, block_size, head_dim };
        let kv = CpuKvCache::new(shape, self.dtype).unwrap();
        kv.fill(&k, &v).unwrap();
        let q_dims = (num_tokens, self.num_heads * self.head_dim);
        Batch {
            q: CpuTensor::from_vec(queries, q_dims, &candle_core::Device::Cpu).unwrap(),
            kv,
            meta,
            how: Attending { scale: SCALE, window: self.window },
        }
    }

    /// The cached value: rounded to the cache's type.
    fn cached(&self, kind: usize, seq: usize, position: usize, index: usize) -> f64 {
        let exact = value(kind, seq, position, index);
        match self.dtype {
            KvDtype::F16 => f16::from_f32(exact).to_f64(),
            KvDtype::Bf16 => bf16::from_f32(exact).to_f64(),
            KvDtype::F32 => f64::from(exact),
            KvDtype::Fp8 => {
                // The values are below 16; 2^-3 of their power of two is their unit.
                let unit = 2.0_f64.powi((exact.abs().log2().floor() as i32).max(-6) - 3);
                (f64::from(exact) / unit).round_ties_even() * unit
            }
            KvDtype::Q8_0 => {
                let block = (index / 32 * 32..).take(32);
                let sizes = block.map(|index| value(kind, seq, position, index).abs());
                let scale = f16::from_f32(sizes.fold(0.0, f32::max) / 127.0).to_f32();
                f64::from((exact * scale.recip()).round_ties_even() * scale)
            }
        }
    }

    /// One head's attention by the formula, with every result of an operation rounded by `round`.
    fn expected(
        &self,
        seq: usize,
        position: usize,
        head: usize,
        round: fn(f64) -> f64,
    ) -> Vec<f64> {
        let kv_head = head / (self.num_heads / self.num_kv_heads);
        let score = |key: usize| {
            let products = (0..self.head_dim).map(|dim| {
                let q = f64::from(value(0, seq, position, head * self.head_dim + dim));
                round(q * self.cached(1, seq, key, kv_head * self.head_dim + dim))
            });
            round(products.fold(0.0, |sum, product| round(sum + product)) * f64::from(SCALE))
        };
        let first = (position + 1).saturating_sub(self.window.unwrap_or(usize::MAX));
        let scores: Vec<f64> = (first..=position).map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|&s| round(round(s - max).exp())).collect();
        let sum = weights.iter().fold(0.0, |sum, weight| round(sum + weight));
        let out = |dim: usize| {
            let index = kv_head * self.head_dim + dim;
            let terms = (first..).zip(&weights);
            let weighted = terms.fold(0.0, |acc, (key, weight)| {
                round(acc + round(weight * self.cached(2, seq, key, index)))
            });
            round(weighted / sum)
        };
        (0..self.head_dim).map(out).collect()
    }
}

impl Batch {
    fn run_with(&self, isa: Isa) -> Result<Vec<Vec<f32>>> {
        let (shape, dtype) = (self.kv.shape()?, self.kv.dtype);
        let op = PagedAttention { shape, dtype, meta: &self.meta, how: self.how, isa };
        self.q.apply_op3_no_bwd(&self.kv.k, &self.kv.v, &op)?.to_vec2()
    }

    fn run(&self) -> Vec<Vec<f32>> {
        attend_on_cpu(&self.q, &self.kv, &self.meta, self.how).unwrap().to_vec2().unwrap()
    }
}

/// Compares with f64: the largest error may be twice that of the formula in f32.
fn check_against_f64(setup: Setup, seqs: &[Seq]) {
    let batch = setup.batch(seqs);
    let (mut exact, mut plain) = (Vec::new(), Vec::new());
    for seq in seqs {
        for position in seq.len - seq.query_len..seq.len {
            for head in 0..setup.num_heads {
                exact.extend(setup.expected(seq.id, position, head, |x| x));
                plain.extend(setup.expected(seq.id, position, head, |x| f64::from(x as f32)));
            }
        }
    }
    let error_of = |values: &mut dyn Iterator<Item = f64>| {
        values.zip(&exact).map(|(value, exact)| (value - exact).abs()).fold(0.0, f64::max)
    };
    let plain_error = error_of(&mut plain.iter().copied());
    for isa in Isa::available() {
        let out = batch.run_with(isa).unwrap().concat();
        assert!(out.len() == exact.len() && out.iter().all(|x| x.is_finite()));
        let error = error_of(&mut out.iter().map(|&x| f64::from(x)));
        assert!(
            error <= 2.0 * plain_error + 1e-7,
            "{isa:?}: the error is {error:e}, the formula's in f32 {plain_error:e}"
        );
    }
}

#[test]
fn matches_f64_for_head_sizes_groups_and_types() {
    let seqs = [Seq { id: 0, len: 33, query_len: 5 }, Seq { id: 1, len: 70, query_len: 1 }];
    for head_dim in [8, 64, 72, 128] {
        for (num_heads, num_kv_heads) in [(2, 2), (4, 2), (7, 1), (9, 1)] {
            for dtype in DTYPES {
                if dtype == KvDtype::Q8_0 && head_dim % 32 != 0 {
                    continue;
                }
                let setup = Setup { num_heads, num_kv_heads, head_dim, dtype, ..QWEN };
                check_against_f64(setup, &seqs);
            }
        }
    }
}

#[test]
fn matches_f64_at_lengths_around_blocks_tiles_and_partitions() {
    let lens = [1, 2, 15, 16, 17, 63, 64, 65, 101, 511, 512, 513, 1031];
    for (id, len) in lens.into_iter().enumerate() {
        let setup = Setup { num_heads: 7, num_kv_heads: 1, block_step: 5, ..QWEN };
        check_against_f64(setup, &[Seq { id, len, query_len: len.min(2) }]);
    }
    let whole = [Seq { id: 0, len: 67, query_len: 67 }, Seq { id: 1, len: 1, query_len: 1 }];
    check_against_f64(Setup { num_heads: 2, num_kv_heads: 1, ..QWEN }, &whole);
}

#[test]
fn matches_f64_in_windows_around_tiles_and_partitions() {
    let setup = Setup { num_heads: 7, num_kv_heads: 1, ..QWEN };
    for window in [1, 2, 63, 64, 65, 127, 200, 511, 513, 5000] {
        let setup = Setup { window: Some(window), ..setup };
        for (len, query_len) in [(1, 1), (66, 66), (130, 70), (700, 1), (1031, 3)] {
            check_against_f64(setup, &[Seq { id: len, len, query_len }]);
        }
    }
}

#[test]
fn a_batch_gives_each_sequence_the_bits_it_gets_alone() {
    let seqs = [(1, 1), (130, 130), (600, 1), (64, 3), (1100, 40), (17, 1)]
        .map(|(len, query_len)| Seq { id: len, len, query_len });
    for dtype in DTYPES {
        let setup = Setup { dtype, ..QWEN };
        let together = setup.batch(&seqs).run();
        let apart: Vec<_> = seqs.iter().flat_map(|&seq| setup.batch(&[seq]).run()).collect();
        assert!(together == apart, "{dtype:?}");
    }
}

#[test]
fn chunks_of_a_prompt_give_the_bits_of_the_whole() {
    for (setup, len) in [
        (QWEN, 1100),
        (Setup { window: Some(100), ..QWEN }, 1100),
        (Setup { window: Some(520), ..QWEN }, 1100),
        (Setup { dtype: KvDtype::Fp8, ..QWEN }, 300),
        (Setup { dtype: KvDtype::Q8_0, ..QWEN }, 300),
        (Setup { num_heads: 2, num_kv_heads: 2, head_dim: 72, ..QWEN }, 300),
        (Setup { num_heads: 9, num_kv_heads: 1, head_dim: 128, ..QWEN }, 300),
    ] {
        let whole = setup.batch(&[Seq { id: 0, len, query_len: len }]).run();
        for chunk in [1, 7, 64, 101] {
            for end in [chunk, 65, 128, 257, 300, 513, 640, 1025, 1100] {
                let end = end.clamp(chunk, len);
                let seq = Seq { id: 0, len: end, query_len: chunk };
                assert!(setup.batch(&[seq]).run() == whole[end - chunk..end], "{chunk} to {end}");
            }
        }
    }
}

#[test]
fn placement_and_size_of_blocks_do_not_change_a_bit() {
    let seqs = [(700, 9), (130, 130)].map(|(len, query_len)| Seq { id: len, len, query_len });
    let in_order = QWEN.batch(&seqs).run();
    for (block_size, block_step) in [(16, 7), (16, 63), (1, 5), (5, 3), (64, 3), (1024, 1)] {
        let setup = Setup { block_size, block_step, ..QWEN };
        assert!(setup.batch(&seqs).run() == in_order, "{block_size} {block_step}");
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let seqs = [(130, 130), (5000, 1), (600, 3), (1, 1)];
    let seqs = seqs.map(|(len, query_len)| Seq { id: len, len, query_len });
    for setup in [QWEN, Setup { window: Some(700), ..QWEN }] {
        let batch = setup.batch(&seqs);
        let serial = batch.run();
        for num_threads in [1, 2, 3, 8] {
            let run = || batch.run();
            assert!(ThreadPool::new(num_threads).install(run) == serial, "{num_threads}");
        }
    }
}

#[test]
fn instruction_sets_with_fused_multiply_add_agree_to_the_bit() {
    for dtype in DTYPES {
        let batch = Setup { dtype, ..QWEN }.batch(&[Seq { id: 0, len: 600, query_len: 40 }]);
        let run = |isa| batch.run_with(isa).unwrap();
        let mut results = Isa::available().into_iter().skip(1).map(run);
        if let Some(first) = results.next() {
            assert!(results.all(|result| result == first), "{dtype:?}");
        }
    }
}

#[test]
fn empty_batches_and_sequences_without_queries_are_fine() {
    assert!(QWEN.batch(&[]).run().is_empty());
    let seqs = [Seq { id: 0, len: 5, query_len: 0 }, Seq { id: 1, len: 5, query_len: 1 }];
    assert!(QWEN.batch(&seqs).run() == QWEN.batch(&seqs[1..]).run());
}

#[test]
fn wrong_metadata_shapes_and_types_are_errors() {
    let new = || QWEN.batch(&[Seq { id: 0, len: 20, query_len: 2 }]);
    assert!(new().run_with(Isa::best()).is_ok());
    let wrong: [fn(&mut Batch); 13] = [
        |b| b.meta.block_table[1] = 4,
        |b| b.meta.block_table.truncate(1),
        |b| b.meta.max_blocks_per_seq = usize::MAX,
        |b| b.meta.seq_lens[0] = 33,
        |b| b.meta.seq_lens[0] = 1,
        |b| b.meta.seq_lens.clear(),
        |b| b.meta.query_start_loc = vec![0, 3].into(),
        |b| b.meta.query_start_loc = vec![1, 2].into(),
        |b| b.meta.query_start_loc.clear(),
        |b| b.kv.block_size = 8,
        |b| b.kv.dtype = KvDtype::Fp8,
        |b| b.kv.v = b.kv.v.to_dtype(DType::F32).unwrap(),
        |b| b.q = b.q.narrow(1, 0, 13 * 64).unwrap(),
    ];
    for (index, spoil) in wrong.into_iter().enumerate() {
        let mut batch = new();
        spoil(&mut batch);
        assert!(batch.run_with(Isa::best()).is_err(), "case {index}");
    }
    let mut falling = QWEN.batch(&[Seq { id: 0, len: 4, query_len: 2 }; 2]);
    falling.meta.query_start_loc = vec![0, 5, 4].into();
    assert!(falling.run_with(Isa::best()).is_err());
    let shape = KvCacheShape { num_blocks: 1, num_kv_heads: 1, block_size: 16, head_dim: 12 };
    assert!(CpuKvCache::new(shape, KvDtype::F16).is_err());
    let shape = KvCacheShape { head_dim: 16, ..shape };
    assert!(CpuKvCache::new(shape, KvDtype::Fp8).is_ok());
    assert!(CpuKvCache::new(shape, KvDtype::Q8_0).is_err());
}

#[test]
#[cfg(target_os = "linux")]
fn an_unused_cache_takes_up_no_memory() {
    let resident_pages = || -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse().unwrap()
    };
    let before = resident_pages();
    let shape = KvCacheShape { num_blocks: 1 << 16, num_kv_heads: 8, block_size: 16, head_dim: 64 };
    let kv = CpuKvCache::new(shape, KvDtype::F16).unwrap();
    let grown = resident_pages().saturating_sub(before);
    assert!(grown < 1 << 16, "{grown} pages of {} values", 2 * kv.k.elem_count());
    let vast = KvCacheShape { num_blocks: 1 << 27, num_kv_heads: 1 << 20, ..shape };
    assert!(CpuKvCache::new(vast, KvDtype::F16).is_err());
    let vast = KvCacheShape { num_blocks: usize::MAX / 2, ..shape };
    assert!(CpuKvCache::new(vast, KvDtype::F16).is_err());
}
