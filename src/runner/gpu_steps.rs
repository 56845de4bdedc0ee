//! Runs steps on a card: index vectors go over in one copy, and decode steps are recorded once and
//! replayed, so that the processor does not launch some hundred kernels for every token.
//!
//! A recording fits one shape. Decode steps are padded to few shapes: the number of sequences and
//! the longest length are rounded up. Padding rows belong to no sequence and write nothing.

use std::collections::HashMap;

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
        let num_words = 4 * (limits.max_num_batched_tokens.max(max_seqs) + ALIGNMENT)
            + max_seqs * (max_blocks + 3)
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
        match self.recordings.get(&shape) {
            Some(None) if self.execution == Execution::Recorded => {
                let recording = record(&self.gpu, model, kv, &batch)?;
                self.recordings.insert(shape, Some(recording));
            }
            None | Some(None) => {
                self.recordings.insert(shape, None);
                let hidden = model.forward(&batch, kv)?;
                let logits = model.compute_logits(&hidden)?;
                return Ok(Launched {
                    hidden: hidden.narrow(0, num_seqs)?,
                    logits: Some(logits.narrow(0, num_seqs)?),
                });
            }
            Some(Some(_)) => {}
        }
        let Some(Some(recording)) = self.recordings.get(&shape) else {
            unreachable!("it was recorded above")
        };
        self.gpu.replay(&recording.graph)?;
        let hidden = recording.hidden.retake(&self.gpu, num_seqs);
        let logits = recording.logits.retake(&self.gpu, num_seqs);
        Ok(Launched { hidden, logits: Some(logits) })
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
        let vectors = [
            &mut batch.input_ids,
            &mut batch.logits_indices,
            &mut attention.positions,
            &mut attention.slot_mapping,
            &mut attention.query_start_loc,
            &mut attention.seq_lens,
            &mut attention.block_table,
            drawn_rows,
        ];
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
