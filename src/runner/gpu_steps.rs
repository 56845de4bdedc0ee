//! Runs steps on a card: index vectors go over in one copy, and decode steps are recorded once and
//! replayed, so that the processor does not launch some hundred kernels for every token.
//!
//! A recording fits one shape. Decode steps are padded to few shapes: the number of sequences and
//! the longest length are rounded up. Padding rows belong to no sequence and write nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::{DType, Result, bail};

use crate::config::Execution;
use crate::device::gpu::{DeviceBuffer, Gpu, Graph, Parked};
use crate::models::{ForwardBatch, Model};
use crate::ops::indices::Indices;
use crate::ops::kv_cache::KvCache;
use crate::ops::paged_attention::PADDING_SLOT;
use crate::ops::sample::RowSampler;
use crate::ops::tensor::{GpuTensor, Tensor};
use crate::sampling::device_sampler::{DeviceSampler, Wanted, Yielded};

/// Index vectors begin at multiples of so many entries: 256 bytes.
const ALIGNMENT: usize = 64;
/// Numbers of sequences that decode steps are rounded up to.
const SEQ_BUCKETS: [usize; 14] = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];
/// Lengths are rounded up to this times a power of two.
const MIN_LEN_BUCKET: usize = 1024;

/// Rows of logits in a card's memory at once.
pub(super) const GPU_LOGITS_ROWS_MAX: usize = SEQ_BUCKETS[SEQ_BUCKETS.len() - 1];

/// What a step left on the card.
pub(super) struct Launched {
    /// Final hidden states of the wanted rows.
    pub(super) hidden: Tensor,
    /// Their logits, unless there are too many rows to keep them all.
    pub(super) logits: Option<Tensor>,
}

/// What a step computes.
pub(super) struct StepInputs {
    /// Its tokens, and where they are in the cache.
    pub(super) batch: ForwardBatch,
    /// How many of the wanted rows, the first ones, need logits.
    pub(super) num_logits: usize,
    /// If its tokens are only being drawn: for each the row that draws it.
    pub(super) drawn_rows: Indices,
}

/// The shape of a recorded step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    num_seqs: usize,
    len: usize,
}

/// A recorded step and where its results appear.
struct Recording {
    graph: Graph,
    hidden: ParkedTensor,
    logits: ParkedTensor,
}

/// A result whose memory is only taken between two steps.
struct ParkedTensor {
    parked: Parked,
    dtype: DType,
    num_rows: usize,
    num_cols: usize,
}

impl ParkedTensor {
    fn new(tensor: Tensor) -> Result<Self> {
        let GpuTensor { buffer, dtype, num_rows, num_cols, .. } = tensor.gpu()?.clone();
        drop(tensor);
        Ok(Self { parked: buffer.park(), dtype, num_rows, num_cols })
    }

    /// The first rows.
    fn retake(&self, gpu: &Gpu, num_rows: usize) -> Tensor {
        let whole = GpuTensor {
            gpu: gpu.clone(),
            buffer: gpu.retake(&self.parked),
            dtype: self.dtype,
            num_rows: self.num_rows,
            num_cols: self.num_cols,
        };
        Tensor::Gpu(whole.narrow(0, num_rows))
    }
}

/// The largest steps that there will be.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepLimits {
    /// Tokens of a step.
    pub(super) max_num_batched_tokens: usize,
    /// Sequences of a step.
    pub(super) max_num_seqs: usize,
    /// Tokens of a sequence.
    pub(super) max_model_len: usize,
    /// Tokens of a block of the cache.
    pub(super) block_size: usize,
    /// Logits of a row.
    pub(super) vocab_size: usize,
}

/// The card's side of the runner.
pub(super) struct GpuSteps {
    gpu: Gpu,
    limits: StepLimits,
    execution: Execution,
    /// The index vectors of the current step. Recordings read them here, so it stays where it is.
    inputs: DeviceBuffer,
    /// `None` for shapes that were run once: what runs first loads kernels and grows the workspace,
    /// which must not happen while recording.
    recordings: HashMap<Shape, Option<Recording>>,
    sampler: DeviceSampler,
}

impl GpuSteps {
    /// Room for the inputs of the largest step.
    ///
    /// # Errors
    /// If the card has no memory for them.
    pub(super) fn new(gpu: &Gpu, limits: StepLimits, execution: Execution) -> Result<Self> {
        let max_seqs = limits.max_num_seqs.max(GPU_LOGITS_ROWS_MAX);
        let max_blocks = limits.max_model_len.div_ceil(limits.block_size) + ALIGNMENT;
        // Each sequence may have an adapter of its own.
        let num_words = 5 * (limits.max_num_batched_tokens.max(max_seqs) + ALIGNMENT)
            + max_seqs * (max_blocks + 3 + ALIGNMENT)
            + 5 * ALIGNMENT;
        let inputs = gpu.alloc(num_words * size_of::<u32>())?;
        // A row may be both sampled and scored.
        let rows = RowSampler::new(gpu, 2 * GPU_LOGITS_ROWS_MAX, limits.vocab_size)?;
        let sampler = DeviceSampler::new(rows);
        let recordings = HashMap::new();
        Ok(Self { gpu: gpu.clone(), limits, execution, inputs, recordings, sampler })
    }

    /// Draws and scores what is wanted of rows of logits.
    ///
    /// # Errors
    /// If the card fails.
    pub(super) fn sample(
        &mut self,
        logits: &Tensor,
        wanted: &[(usize, Wanted<'_>)],
    ) -> Result<Vec<Yielded>> {
        self.begin_sample(logits, wanted)?;
        self.end_sample(wanted)
    }

    /// The same, queued: a step may be launched before [`GpuSteps::end_sample`].
    ///
    /// # Errors
    /// If the card fails.
    pub(super) fn begin_sample(
        &mut self,
        logits: &Tensor,
        wanted: &[(usize, Wanted<'_>)],
    ) -> Result<()> {
        self.sampler.upload(wanted, wanted.len())?;
        self.sampler.launch(logits.gpu()?)?;
        self.sampler.rows().begin_download()
    }

    /// Waits for what was queued, and for no step behind it.
    ///
    /// # Errors
    /// If the card fails.
    pub(super) fn end_sample(&self, wanted: &[(usize, Wanted<'_>)]) -> Result<Vec<Yielded>> {
        self.sampler.end_download(wanted)
    }

    /// Whether steps are to be launched behind each other. The twin waits for each.
    pub(super) fn is_asynchronous(&self) -> bool {
        self.execution == Execution::Recorded
    }

    /// Whether the card answers with errors only.
    pub(super) fn is_broken(&self) -> bool {
        self.gpu.synchronize().is_err()
    }

    /// Queues a step.
    ///
    /// # Errors
    /// If the card fails.
    pub(super) fn launch(
        &mut self,
        model: &dyn Model,
        kv: &[KvCache],
        inputs: StepInputs,
    ) -> Result<Launched> {
        let StepInputs { mut batch, num_logits, mut drawn_rows } = inputs;
        let Some(shape) = self.shape(&batch, num_logits) else {
            self.upload(&mut batch, &mut drawn_rows)?;
            let hidden = model.forward(&batch, kv)?;
            return Ok(Launched { hidden, logits: None });
        };
        let num_seqs = batch.attention.seq_lens.len();
        pad(&mut batch, shape, self.limits.block_size);
        self.upload(&mut batch, &mut drawn_rows)?;
        let gpu = self.gpu.clone();
        let Some(recording) = self.recording(model, kv, (&batch, shape))? else {
            let hidden = model.forward(&batch, kv)?;
            let logits = model.compute_logits(&hidden)?;
            return Ok(Launched {
                hidden: hidden.narrow(0, num_seqs)?,
                logits: Some(logits.narrow(0, num_seqs)?),
            });
        };
        gpu.replay(&recording.graph)?;
        let hidden = recording.hidden.retake(&gpu, num_seqs);
        let logits = recording.logits.retake(&gpu, num_seqs);
        Ok(Launched { hidden, logits: Some(logits) })
    }

    /// The recording of a step, unless it is to be launched: the first of its shape, all of those that
    /// are not recorded, and whatever has adapters, of which a step has these and the next one those.
    fn recording(
        &mut self,
        model: &dyn Model,
        kv: &[KvCache],
        (batch, shape): (&ForwardBatch, Shape),
    ) -> Result<Option<&Recording>> {
        if !batch.adapted.is_empty() || self.execution != Execution::Recorded {
            return Ok(None);
        }
        let known = match self.recordings.entry(shape) {
            Entry::Vacant(unknown) => {
                unknown.insert(None);
                return Ok(None);
            }
            Entry::Occupied(known) => known.into_mut(),
        };
        if known.is_none() {
            *known = Some(record(&self.gpu, model, kv, batch)?);
        }
        Ok(known.as_ref())
    }

    /// The shape to record a step in: every sequence adds one token and wants its logits.
    fn shape(&self, batch: &ForwardBatch, num_logits: usize) -> Option<Shape> {
        let num_seqs = batch.attention.seq_lens.len();
        let is_decode = batch.attention.max_query_len == 1
            && num_logits == num_seqs
            && batch.logits_indices.len() == num_seqs;
        if !is_decode {
            return None;
        }
        let num_seqs = SEQ_BUCKETS.into_iter().find(|bucket| num_seqs <= *bucket)?;
        let mut len = MIN_LEN_BUCKET;
        while len < batch.attention.max_seq_len as usize {
            len *= 2;
        }
        Some(Shape { num_seqs, len: len.min(self.limits.max_model_len) })
    }

    /// Sends all index vectors in one copy. Tokens that are drawn on the card never leave it.
    fn upload(&self, batch: &mut ForwardBatch, drawn_rows: &mut Indices) -> Result<()> {
        let attention = &mut batch.attention;
        let mut vectors = vec![
            &mut batch.input_ids,
            &mut batch.logits_indices,
            &mut attention.positions,
            &mut attention.slot_mapping,
            &mut attention.query_start_loc,
            &mut attention.seq_lens,
            &mut attention.block_table,
            &mut *drawn_rows,
        ];
        vectors.extend(batch.adapted.iter_mut().map(|adapted| &mut adapted.rows));
        let mut words: Vec<u32> = Vec::new();
        let starts: Vec<usize> = vectors
            .iter()
            .map(|vector| {
                words.resize(words.len().next_multiple_of(ALIGNMENT), 0);
                words.extend_from_slice(vector);
                words.len() - vector.len()
            })
            .collect();
        if self.inputs.len() < size_of_val(words.as_slice()) {
            bail!("the step's {} indices are more than was planned for", words.len());
        }
        self.inputs.upload(bytemuck::cast_slice(&words))?;
        for (vector, start) in vectors.into_iter().zip(starts) {
            let bytes = start * size_of::<u32>()..(start + vector.len()) * size_of::<u32>();
            let part = self.inputs.slice(bytes);
            vector.set_resident(part);
        }
        if drawn_rows.is_empty() {
            return Ok(());
        }
        self.sampler.rows().take_drawn(drawn_rows.on_gpu()?, batch.input_ids.on_gpu()?)
    }
}

/// Records a step that was run in this shape before.
fn record(gpu: &Gpu, model: &dyn Model, kv: &[KvCache], batch: &ForwardBatch) -> Result<Recording> {
    let (results, graph) = gpu.capture(|| {
        let hidden = model.forward(batch, kv)?;
        let logits = model.compute_logits(&hidden)?;
        Ok::<_, candle_core::Error>((hidden, logits))
    })?;
    let (hidden, logits) = results;
    Ok(Recording { graph, hidden: ParkedTensor::new(hidden)?, logits: ParkedTensor::new(logits)? })
}

/// Adds rows that belong to no sequence, and gives the block table the width of the shape.
fn pad(batch: &mut ForwardBatch, shape: Shape, block_size: usize) {
    let attention = &mut batch.attention;
    let num_seqs = attention.seq_lens.len();
    batch.input_ids.resize(shape.num_seqs, 0);
    batch.logits_indices.extend(num_seqs as u32..shape.num_seqs as u32);
    attention.positions.resize(shape.num_seqs, 0);
    attention.slot_mapping.resize(shape.num_seqs, PADDING_SLOT);
    attention.query_start_loc.extend(num_seqs as u32 + 1..=shape.num_seqs as u32);
    attention.seq_lens.resize(shape.num_seqs, 0);
    let (old_width, width) = (attention.max_blocks_per_seq, shape.len.div_ceil(block_size));
    let mut table = vec![0; shape.num_seqs * width];
    for (row, blocks) in
        table.chunks_exact_mut(width).zip(attention.block_table.chunks(old_width.max(1)))
    {
        let len = blocks.len().min(width);
        row[..len].copy_from_slice(&blocks[..len]);
    }
    attention.block_table = Indices::from(table);
    attention.max_blocks_per_seq = width;
    attention.max_seq_len = shape.len as u32;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::models::lora::{AdaptedRows, LoraWeights};
    use crate::ops::paged_attention::AttentionMetadata;

    const LIMITS: StepLimits = StepLimits {
        max_num_batched_tokens: 40,
        max_num_seqs: 8,
        max_model_len: 4096,
        block_size: 16,
        vocab_size: 10,
    };

    /// Counts how often its kernels are launched, and looks whether it finds the adapters' rows.
    struct Counting {
        gpu: Gpu,
        num_launches: AtomicUsize,
    }

    impl Counting {
        fn on(gpu: &Gpu) -> Self {
            Self { gpu: gpu.clone(), num_launches: AtomicUsize::new(0) }
        }

        fn scratch(&self, num_rows: usize) -> Result<Tensor> {
            GpuTensor::scratch(&self.gpu, DType::F32, (num_rows, LIMITS.vocab_size))
                .map(Tensor::Gpu)
        }
    }

    impl Model for Counting {
        fn forward(&self, batch: &ForwardBatch, _kv: &[KvCache]) -> Result<Tensor> {
            self.num_launches.fetch_add(1, Ordering::Relaxed);
            for AdaptedRows { rows, .. } in &batch.adapted {
                let found = rows.on_gpu()?.download()?;
                assert_eq!(bytemuck::pod_collect_to_vec::<u8, u32>(&found), **rows);
            }
            self.scratch(batch.logits_indices.len())
        }

        fn compute_logits(&self, hidden: &Tensor) -> Result<Tensor> {
            self.scratch(hidden.dims2()?.0)
        }

        fn num_weight_bytes(&self) -> usize {
            0
        }
    }

    /// A step of so many sequences of a token each, of which the last ones have an adapter each.
    fn step(num_seqs: u32, num_adapted: u32) -> StepInputs {
        let adapted = (num_seqs - num_adapted..num_seqs).map(|row| AdaptedRows {
            rows: vec![row].into(),
            weights: Arc::new(LoraWeights::new(Vec::new())),
        });
        let attention = AttentionMetadata {
            positions: vec![4; num_seqs as usize].into(),
            slot_mapping: (0..num_seqs).collect(),
            query_start_loc: (0..=num_seqs).collect(),
            seq_lens: vec![5; num_seqs as usize].into(),
            block_table: (0..num_seqs).collect(),
            max_blocks_per_seq: 1,
            max_query_len: 1,
            max_seq_len: 5,
            ..AttentionMetadata::default()
        };
        let batch = ForwardBatch {
            input_ids: vec![1; num_seqs as usize].into(),
            logits_indices: (0..num_seqs).collect(),
            attention,
            adapted: adapted.collect(),
        };
        StepInputs { batch, num_logits: num_seqs as usize, drawn_rows: Indices::default() }
    }

    /// Goal: steps are recorded and replayed beside steps with adapters, which are launched. Method:
    /// count launches; the first of a shape and the one that is recorded are some.
    #[test]
    fn steps_with_adapters_are_launched_and_others_replayed() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let model = Counting::on(&gpu);
        let mut steps = GpuSteps::new(&gpu, LIMITS, Execution::Recorded).unwrap();
        let mut launches = |num_seqs, num_adapted| {
            let before = model.num_launches.load(Ordering::Relaxed);
            let launched = steps.launch(&model, &[], step(num_seqs, num_adapted)).unwrap();
            let logits = launched.logits.expect("all rows have logits");
            let shapes = (launched.hidden.dims2().unwrap().0, logits.dims2().unwrap().0);
            assert_eq!(shapes, (num_seqs as usize, num_seqs as usize));
            model.num_launches.load(Ordering::Relaxed) - before
        };
        assert_eq!([launches(3, 2), launches(3, 2), launches(3, 2)], [1; 3]);
        assert_eq!([launches(3, 0), launches(3, 0), launches(3, 0), launches(4, 0)], [1, 1, 0, 0]);
        assert_eq!([launches(3, 1), launches(3, 3), launches(4, 0), launches(3, 0)], [1, 1, 0, 0]);
    }

    /// Goal: there is room for the indices of every step. Method: the largest one, whose sequences have
    /// an adapter each.
    #[test]
    fn the_largest_step_has_room() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let model = Counting::on(&gpu);
        // So many that what vectors begin at does not matter.
        let num_tokens = 1 << 18;
        let limits = StepLimits { max_num_batched_tokens: num_tokens, ..LIMITS };
        let mut steps = GpuSteps::new(&gpu, limits, Execution::Eager).unwrap();
        let num_seqs = LIMITS.max_num_seqs;
        let mut largest = step(num_seqs as u32, num_seqs as u32);
        let StepInputs { batch, num_logits, .. } = &mut largest;
        let per_seq = num_tokens / num_seqs;
        for vector in [&mut batch.input_ids, &mut batch.attention.positions] {
            vector.resize(num_tokens, 0);
        }
        batch.attention.slot_mapping.resize(num_tokens, 0);
        batch.logits_indices = (0..num_tokens as u32).collect();
        *num_logits = num_tokens;
        for (seq, adapted) in batch.adapted.iter_mut().enumerate() {
            adapted.rows = (seq * per_seq..(seq + 1) * per_seq).map(|row| row as u32).collect();
        }
        let width = LIMITS.max_model_len / LIMITS.block_size;
        batch.attention.block_table.resize(num_seqs * width, 0);
        batch.attention.max_blocks_per_seq = width;
        steps.launch(&model, &[], largest).unwrap();
    }
}
