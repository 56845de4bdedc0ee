//! Rotary position embedding, and the only writer of the KV cache.
//!
//! At position `p`, with `half = head_dim / 2` and angle `a_i = p * frequency_i`:
//!
//! ```text
//!   out[i]        = x[i] * cos a_i - x[i + half] * sin a_i
//!   out[i + half] = x[i + half] * cos a_i + x[i] * sin a_i
//! ```
//!
//! Queries come back rotated; keys are rotated and written to the cache, values written as they are.

mod gpu;

use candle_core::Tensor as CpuTensor;
use candle_core::{CpuStorage, CustomOp2, InplaceOp2, InplaceOp3, Layout, Result, Shape, bail};

use super::kv_cache::{CacheWriter, CpuKvCache, KvCache, KvCacheShape, KvDtype};
use super::operand::contiguous;
use super::paged_attention::{AttentionMetadata, PADDING_SLOT};
use super::rows::for_each_row_mut;
use super::tensor::Tensor;
use crate::device::Device;

/// How frequencies change so that positions beyond the trained ones can be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as trained.
    None,
    /// YaRN: low frequencies are slowed down, high ones kept.
    Yarn(YarnScaling),
}

/// Parameters of YaRN, named as in the Hugging Face configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct YarnScaling {
    /// How many times longer contexts get.
    pub factor: f64,
    /// Positions the model was trained on.
    pub original_max_position_embeddings: usize,
    /// Frequencies that turn at least this often over the trained positions are kept.
    pub beta_fast: f64,
    /// Frequencies that turn at most this often are divided by `factor`.
    pub beta_slow: f64,
    /// What queries and keys are multiplied by; `None` derives it from `factor`.
    pub attention_factor: Option<f64>,
}

impl YarnScaling {
    /// YaRN with the usual bounds of 32 and 1 turns.
    pub fn new(factor: f64, original_max_position_embeddings: usize) -> Self {
        Self {
            factor,
            original_max_position_embeddings,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
        }
    }

    /// The pair index whose frequency turns `num_turns` times over the trained positions.
    fn pair_with_turns(&self, num_turns: f64, head_dim: usize, theta: f64) -> f64 {
        let wavelength = self.original_max_position_embeddings as f64 / num_turns;
        head_dim as f64 * (wavelength / std::f64::consts::TAU).ln() / (2.0 * theta.ln())
    }

    /// The share of the trained frequency that each pair keeps.
    fn kept_shares(&self, head_dim: usize, theta: f64) -> Vec<f64> {
        let last = (head_dim - 1) as f64;
        let low = self.pair_with_turns(self.beta_fast, head_dim, theta).floor().max(0.0);
        let high = self.pair_with_turns(self.beta_slow, head_dim, theta).ceil().min(last);
        // Bounds that coincide would divide by zero.
        let width = if high <= low { 0.001 } else { high - low };
        (0..head_dim / 2).map(|i| 1.0 - ((i as f64 - low) / width).clamp(0.0, 1.0)).collect()
    }

    /// The factor on queries and keys each, which makes up for flatter attention over longer contexts.
    fn attention_factor(&self) -> f64 {
        let derived = if self.factor <= 1.0 { 1.0 } else { 0.1 * self.factor.ln() + 1.0 };
        self.attention_factor.unwrap_or(derived)
    }
}

/// What [`RopeTable`] is made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Values per head; even.
    pub head_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// The longest sequence.
    pub max_positions: usize,
    /// Change of the frequencies.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// Angle per position of each pair of values, as trained.
    fn frequencies(&self) -> Vec<f64> {
        let trained = |i: usize| self.theta.powf(-2.0 * i as f64 / self.head_dim as f64);
        (0..self.head_dim / 2).map(trained).collect()
    }

    /// The same, stretched.
    fn stretched_frequencies(&self, yarn: &YarnScaling) -> Vec<f64> {
        let kept = yarn.kept_shares(self.head_dim, self.theta);
        let pairs = self.frequencies().into_iter().zip(kept);
        pairs.map(|(trained, kept)| trained * (kept + (1.0 - kept) / yarn.factor)).collect()
    }

    fn is_supported(&self) -> bool {
        let is_positive = |value: f64| 0.0 < value && value.is_finite();
        let yarn = match self.scaling {
            RopeScaling::None => true,
            RopeScaling::Yarn(yarn) => {
                let values = [yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.attention_factor()];
                values.into_iter().all(is_positive) && 0 < yarn.original_max_position_embeddings
            }
        };
        yarn && 0 < self.head_dim && self.head_dim.is_multiple_of(2) && 1.0 < self.theta
    }
}

/// Cosines and sines of all angles. Angles are computed in `f64`: in `f32` they would be wrong by a
/// thousandth of a turn at position 30,000.
///
/// With stretched positions the table has two parts: one for sequences that keep within the trained
/// positions, which are rotated as trained, and behind it one for those that may become longer.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// `[num_rows, head_dim]`: the cosines of all pairs, then the sines
    cos_sin: Tensor,
    head_dim: usize,
    num_rows: usize,
}

impl RopeTable {
    /// Computes the table.
    pub fn new(config: &RopeConfig, device: &Device) -> Result<Self> {
        let RopeConfig { head_dim, max_positions, scaling, .. } = *config;
        if !config.is_supported() {
            bail!("rotary embedding with {config:?} is not supported");
        }
        let plain = |num_rows| (num_rows, config.frequencies(), 1.0);
        let parts = match scaling {
            RopeScaling::Yarn(yarn) if yarn.original_max_position_embeddings < max_positions => {
                let stretched = config.stretched_frequencies(&yarn);
                vec![
                    plain(yarn.original_max_position_embeddings),
                    (max_positions, stretched, yarn.attention_factor()),
                ]
            }
            _ => vec![plain(max_positions)],
        };
        let num_rows = parts.iter().map(|(num_rows, ..)| num_rows).sum();
        let mut cos_sin = vec![0.0_f32; num_rows * head_dim];
        let mut rest = cos_sin.as_mut_slice();
        for (num_rows, frequencies, magnitude) in parts {
            let rows = rest.split_off_mut(..num_rows * head_dim).expect("all parts were counted");
            fill_rows(rows, &frequencies, magnitude);
        }
        let cos_sin = Tensor::from_vec(cos_sin, (num_rows, head_dim), device)?;
        Ok(Self { cos_sin, head_dim, num_rows })
    }

    /// Values per head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Rows of all parts.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }
}

fn fill_rows(rows: &mut [f32], frequencies: &[f64], magnitude: f64) {
    let half = frequencies.len();
    for_each_row_mut(rows, 2 * half, |position, row| {
        let (cos, sin) = row.split_at_mut(half);
        for (pair, frequency) in frequencies.iter().enumerate() {
            let angle = position as f64 * frequency;
            cos[pair] = (angle.cos() * magnitude) as f32;
            sin[pair] = (angle.sin() * magnitude) as f32;
        }
    });
}

/// Rotates queries and keys and writes keys and values into the step's cache slots.
///
/// Takes `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`, per token all queries, then all
/// keys, then all values; yields the rotated queries `[num_tokens, num_heads * head_dim]`.
pub fn rope_and_cache(
    qkv: &Tensor,
    table: &RopeTable,
    kv: &KvCache,
    meta: &AttentionMetadata,
) -> Result<Tensor> {
    match kv {
        KvCache::Cpu(kv) => rope_and_cache_on_cpu(qkv.cpu()?, table, kv, meta).map(Tensor::Cpu),
        KvCache::Gpu(kv) => gpu::rope_and_cache(qkv.gpu()?, table, kv, meta).map(Tensor::Gpu),
    }
}

fn rope_and_cache_on_cpu(
    qkv: &CpuTensor,
    table: &RopeTable,
    kv: &CpuKvCache,
    meta: &AttentionMetadata,
) -> Result<CpuTensor> {
    let (num_tokens, width) = qkv.dims2()?;
    let shape = kv.shape()?;
    let q_width = num_query_heads(width, table, shape)? * shape.head_dim;
    check_tokens(meta, num_tokens, table.num_rows(), shape)?;
    if let Some(slot) = meta.slot_mapping.iter().find(|slot| **slot == PADDING_SLOT) {
        bail!("cache slot {slot} is beyond those of the cache");
    }
    let (positions, slots) = (&meta.positions, &meta.slot_mapping);
    let (cos_sin, dtype) = (table.cos_sin.cpu()?, kv.dtype);
    kv.k.inplace_op3(qkv, cos_sin, &CacheKeys { shape, dtype, q_width, positions, slots })?;
    kv.v.inplace_op2(qkv, &CacheValues { shape, dtype, q_width, slots })?;
    let rotate = RotateQueries { q_width, head_dim: shape.head_dim, positions };
    qkv.apply_op2_no_bwd(cos_sin, &rotate)
}

/// How many heads of queries a row of queries, keys and values holds.
fn num_query_heads(width: usize, table: &RopeTable, shape: KvCacheShape) -> Result<usize> {
    let kv_width = shape.num_kv_heads * shape.head_dim;
    if table.head_dim != shape.head_dim {
        bail!("heads of {} are rotated as heads of {}", shape.head_dim, table.head_dim);
    }
    if width <= 2 * kv_width || !width.is_multiple_of(shape.head_dim) {
        bail!("rows of {width} values hold no queries beside {kv_width} keys and values");
    }
    Ok((width - 2 * kv_width) / shape.head_dim)
}

/// A slot may also be [`PADDING_SLOT`].
fn check_tokens(
    meta: &AttentionMetadata,
    num_tokens: usize,
    num_rows: usize,
    shape: KvCacheShape,
) -> Result<()> {
    let (num_positions, num_slots) = (meta.positions.len(), meta.slot_mapping.len());
    if num_positions != num_tokens || num_slots != num_tokens {
        bail!("{num_tokens} tokens have {num_positions} positions and {num_slots} cache slots");
    }
    let is_outside = |limit: usize| move |index: &&u32| limit <= **index as usize;
    if let Some(position) = meta.positions.iter().find(is_outside(num_rows)) {
        bail!("position {position} is beyond the {num_rows} of the rotary table");
    }
    let num_slots = shape.num_blocks * shape.block_size;
    let slots = meta.slot_mapping.iter().filter(|slot| **slot != PADDING_SLOT);
    if let Some(slot) = slots.clone().find(is_outside(num_slots)) {
        bail!("cache slot {slot} is beyond the {num_slots} of the cache");
    }
    Ok(())
}

/// `cos_sin` is a row of the table.
fn rotate(x: &[f32], cos_sin: &[f32], out: &mut [f32]) {
    let half = x.len() / 2;
    let (cos, sin) = cos_sin.split_at(half);
    let ((x0, x1), (out0, out1)) = (x.split_at(half), out.split_at_mut(half));
    for i in 0..half {
        out0[i] = x0[i] * cos[i] - x1[i] * sin[i];
        out1[i] = x1[i] * cos[i] + x0[i] * sin[i];
    }
}

struct RotateQueries<'a> {
    q_width: usize,
    head_dim: usize,
    positions: &'a [u32],
}

impl CustomOp2 for RotateQueries<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
        cos_sin: &CpuStorage,
        cos_sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (num_tokens, width) = qkv_layout.shape().dims2()?;
        let qkv = contiguous::<f32>("qkv", qkv, qkv_layout)?;
        let cos_sin = contiguous::<f32>("cos_sin", cos_sin, cos_sin_layout)?;
        let mut out = vec![0.0; num_tokens * self.q_width];
        for_each_row_mut(&mut out, self.q_width, |token, out| {
            let row = &qkv[token * width..][..self.q_width];
            let cos_sin = &cos_sin[self.positions[token] as usize * self.head_dim..];
            let heads = row.chunks_exact(self.head_dim).zip(out.chunks_exact_mut(self.head_dim));
            for (head, out) in heads {
                rotate(head, &cos_sin[..self.head_dim], out);
            }
        });
        Ok((CpuStorage::F32(out), (num_tokens, self.q_width).into()))
    }
}

/// Writes by one thread: two tokens may name the same slot, and the work is small.
struct CacheKeys<'a> {
    shape: KvCacheShape,
    dtype: KvDtype,
    q_width: usize,
    positions: &'a [u32],
    slots: &'a [u32],
}

impl InplaceOp3 for CacheKeys<'_> {
    fn name(&self) -> &'static str {
        "cache_keys"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
        cos_sin: &CpuStorage,
        cos_sin_layout: &Layout,
    ) -> Result<()> {
        let head_dim = self.shape.head_dim;
        let qkv = contiguous::<f32>("qkv", qkv, qkv_layout)?;
        let cos_sin = contiguous::<f32>("cos_sin", cos_sin, cos_sin_layout)?;
        let mut cache = CacheWriter::new((cache, cache_layout), self.shape, self.dtype)?;
        let width = self.q_width + 2 * self.shape.num_kv_heads * head_dim;
        let mut rotated = vec![0.0; head_dim];
        for (token, row) in qkv.chunks_exact(width).enumerate() {
            let cos_sin = &cos_sin[self.positions[token] as usize * head_dim..][..head_dim];
            let keys = row[self.q_width..].chunks_exact(head_dim).take(self.shape.num_kv_heads);
            for (kv_head, key) in keys.enumerate() {
                rotate(key, cos_sin, &mut rotated);
                cache.write(self.slots[token], kv_head, &mut rotated);
            }
        }
        Ok(())
    }
}

struct CacheValues<'a> {
    shape: KvCacheShape,
    dtype: KvDtype,
    q_width: usize,
    slots: &'a [u32],
}

impl InplaceOp2 for CacheValues<'_> {
    fn name(&self) -> &'static str {
        "cache_values"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
    ) -> Result<()> {
        let head_dim = self.shape.head_dim;
        let kv_width = self.shape.num_kv_heads * head_dim;
        let qkv = contiguous::<f32>("qkv", qkv, qkv_layout)?;
        let mut cache = CacheWriter::new((cache, cache_layout), self.shape, self.dtype)?;
        let mut value = vec![0.0; head_dim];
        for (token, row) in qkv.chunks_exact(self.q_width + 2 * kv_width).enumerate() {
            let values = row[self.q_width + kv_width..].chunks_exact(head_dim);
            for (kv_head, row) in values.enumerate() {
                value.copy_from_slice(row);
                cache.write(self.slots[token], kv_head, &mut value);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    const SHAPE: KvCacheShape =
        KvCacheShape { num_blocks: 5, num_kv_heads: 2, block_size: 3, head_dim: 16 };
    const NUM_HEADS: usize = 4;
    const THETA: f64 = 1_000_000.0;

    fn table(max_positions: usize, scaling: RopeScaling) -> RopeTable {
        let config = RopeConfig { head_dim: SHAPE.head_dim, theta: THETA, max_positions, scaling };
        RopeTable::new(&config, &Device::Cpu).unwrap()
    }

    fn qkv(num_tokens: usize) -> (Vec<f32>, CpuTensor) {
        let width = (NUM_HEADS + 2 * SHAPE.num_kv_heads) * SHAPE.head_dim;
        let data: Vec<f32> =
            (0..num_tokens * width).map(|i| (i as f32 * 0.71).sin() * 5.0).collect();
        let tensor =
            CpuTensor::from_slice(&data, (num_tokens, width), &candle_core::Device::Cpu).unwrap();
        (data, tensor)
    }

    fn meta(positions: &[u32], slots: &[u32]) -> AttentionMetadata {
        AttentionMetadata {
            positions: positions.to_vec().into(),
            slot_mapping: slots.to_vec().into(),
            ..AttentionMetadata::default()
        }
    }

    fn rotate_f64(x: &[f32], position: u32) -> Vec<f64> {
        let half = x.len() / 2;
        let angle = |i: usize| f64::from(position) * THETA.powf(-(i as f64) / half as f64);
        let part = |i: usize| {
            let (low, high) = (f64::from(x[i % half]), f64::from(x[i % half + half]));
            let (sin, cos) = angle(i % half).sin_cos();
            if i < half { low * cos - high * sin } else { high * cos + low * sin }
        };
        (0..x.len()).map(part).collect()
    }

    #[test]
    fn rotates_as_in_f64_and_writes_the_named_slots_only() {
        let (positions, slots) = ([0, 1, 31_999, 17], [14, 0, 4, 8]);
        let (data, qkv) = qkv(4);
        let table = table(32_000, RopeScaling::None);
        for (dtype, unit) in [(KvDtype::F32, 0.0), (KvDtype::F16, 5e-4), (KvDtype::Bf16, 4e-3)] {
            let kv = CpuKvCache::new(SHAPE, dtype).unwrap();
            let q = rope_and_cache_on_cpu(&qkv, &table, &kv, &meta(&positions, &slots)).unwrap();
            let q = q.to_vec2::<f32>().unwrap();
            let cached = |t: &CpuTensor| {
                t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let (k, v) = (cached(&kv.k), cached(&kv.v));
            for (token, row) in data.chunks(data.len() / 4).enumerate() {
                let heads: Vec<&[f32]> = row.chunks(SHAPE.head_dim).collect();
                let close = |out: &[f32], expected: &[f64], unit: f64| {
                    for (&out, expected) in out.iter().zip(expected) {
                        let error = (f64::from(out) - expected).abs();
                        assert!(error <= 2e-6 + unit * expected.abs(), "{out}, not {expected}");
                    }
                };
                for head in 0..NUM_HEADS {
                    let out = &q[token][head * SHAPE.head_dim..][..SHAPE.head_dim];
                    close(out, &rotate_f64(heads[head], positions[token]), 0.0);
                }
                for head in 0..SHAPE.num_kv_heads {
                    let slot = slots[token] as usize;
                    let row = (slot / 3 * SHAPE.num_kv_heads + head) * 3 + slot % 3;
                    let range = row * SHAPE.head_dim..(row + 1) * SHAPE.head_dim;
                    let key = rotate_f64(heads[NUM_HEADS + head], positions[token]);
                    close(&k[range.clone()], &key, unit);
                    let value: Vec<f64> =
                        heads[NUM_HEADS + 2 + head].iter().map(|&x| f64::from(x)).collect();
                    close(&v[range], &value, unit);
                }
            }
            let num_written = 4 * SHAPE.num_kv_heads * SHAPE.head_dim;
            assert_eq!(k.iter().filter(|&&x| x != 0.0).count(), num_written, "{dtype:?}");
        }
    }

    #[test]
    fn large_values_saturate_in_f16() {
        let kv = CpuKvCache::new(SHAPE, KvDtype::F16).unwrap();
        let (_, qkv) = qkv(1);
        let qkv = (qkv * 1e9).unwrap();
        rope_and_cache_on_cpu(&qkv, &table(1, RopeScaling::None), &kv, &meta(&[0], &[0])).unwrap();
        let v = kv.v.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        assert!(v.to_vec1::<f32>().unwrap().iter().all(|x| x.abs() <= 65_504.0));
    }

    #[test]
    fn yarn_keeps_fast_turns_slows_slow_ones_and_scales() {
        let yarn = YarnScaling::new(4.0, 32_768);
        let config = RopeConfig {
            head_dim: 128,
            theta: THETA,
            max_positions: 40_000,
            scaling: RopeScaling::Yarn(yarn),
        };
        let scaled = config.stretched_frequencies(&yarn);
        // 32768 positions are 32 turns at pair 64 ln(32768 / (32 tau)) / ln(theta) = 23.6 and one
        // turn at pair 39.65.
        for (i, (plain, scaled)) in config.frequencies().iter().zip(&scaled).enumerate() {
            let expected = match i {
                0..=23 => 1.0,
                40.. => 0.25,
                _ => 1.0 - 0.75 * (i as f64 - 23.0) / 17.0,
            };
            assert!((scaled / plain - expected).abs() < 1e-12, "pair {i}");
        }
        let table = RopeTable::new(&config, &Device::Cpu).unwrap();
        assert_eq!(table.num_rows(), 32_768 + 40_000);
        let values = table.cos_sin.to_vec().unwrap();
        let close = |found: f32, expected: f64| {
            assert!((f64::from(found) - expected).abs() < 1e-6, "{found}, not {expected}");
        };
        let row = |index: usize| &values[index * 128..][..128];
        // The last pair, whose frequency is divided by four.
        let angle = 9.0 * scaled[63];
        close(row(9)[63], (9.0 * config.frequencies()[63]).cos());
        close(row(32_768)[0], 1.138_629_436);
        close(row(32_768 + 9)[63], angle.cos() * 1.138_629_436);
        close(row(32_768 + 9)[127], angle.sin() * 1.138_629_436);
    }

    #[test]
    fn nothing_is_stretched_that_is_short_enough() {
        let yarn = RopeScaling::Yarn(YarnScaling::new(4.0, 64));
        let short = table(64, yarn);
        assert_eq!(short.num_rows(), 64);
        let plain = table(64, RopeScaling::None).cos_sin.to_vec().unwrap();
        assert!(short.cos_sin.to_vec().unwrap() == plain);
        assert!(table(65, yarn).cos_sin.to_vec().unwrap()[..plain.len()] == plain);
        for scaling in
            [YarnScaling::new(0.0, 64), YarnScaling::new(f64::NAN, 64), YarnScaling::new(4.0, 0)]
        {
            let config = RopeConfig {
                head_dim: 16,
                theta: THETA,
                max_positions: 65,
                scaling: RopeScaling::Yarn(scaling),
            };
            assert!(RopeTable::new(&config, &Device::Cpu).is_err(), "{scaling:?}");
        }
    }

    #[test]
    fn wrong_shapes_positions_and_slots_are_errors() {
        let kv = CpuKvCache::new(SHAPE, KvDtype::F16).unwrap();
        let (_, qkv) = qkv(1);
        let table = table(8, RopeScaling::None);
        let run = |qkv: &CpuTensor, positions: &[u32], slots: &[u32]| {
            rope_and_cache_on_cpu(qkv, &table, &kv, &meta(positions, slots))
        };
        assert!(run(&qkv, &[7], &[14]).is_ok());
        for (positions, slots) in
            [(&[8][..], &[0][..]), (&[0], &[15]), (&[0, 1], &[0]), (&[0], &[])]
        {
            assert!(run(&qkv, positions, slots).is_err(), "{positions:?} {slots:?}");
        }
        assert!(run(&qkv.narrow(1, 0, 64).unwrap(), &[0], &[0]).is_err());
        assert!(run(&qkv.narrow(1, 0, 127).unwrap(), &[0], &[0]).is_err());
        assert!(run(&qkv.to_dtype(DType::F16).unwrap(), &[0], &[0]).is_err());
        assert!(run(&qkv.flatten_all().unwrap(), &[0], &[0]).is_err());
        let other = CpuKvCache::new(KvCacheShape { head_dim: 8, ..SHAPE }, KvDtype::F16);
        assert!(rope_and_cache_on_cpu(&qkv, &table, &other.unwrap(), &meta(&[0], &[0])).is_err());
    }
}
