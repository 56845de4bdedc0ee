//! Draws tokens from rows of logits in a card's memory; only the results leave it.
//!
//! What is drawn, and by which share of the distribution, is what `sampling::Sampler` does on the
//! processor. A row's result does not depend on the other rows, bit for bit. **Invariant:** between
//! the launches nothing is decided by the processor, so that they can be recorded in a graph.
//!
//! Start at [`RowSampler`].

mod packing;

use std::num::NonZeroU32;

use bytemuck::Zeroable;
use candle_core::{DType, Result, bail};

use self::packing::{Inputs, Needs, ROW_BYTES, ResultWords};
use super::tensor::GpuTensor;
use crate::device::gpu::{Arg, DeviceBuffer, Gpu, Kernel, LaunchConfig};
use crate::text::{TokenBitmask, TokenId};

/// Most tokens reported beside the drawn one.
pub const MAX_TOP: u32 = 20;

/// Columns that one warp reads, of which the kernels keep the best.
const CHUNK: usize = 256;
/// Columns that one block of the first two kernels reads.
const TILE: usize = 16 * CHUNK;
/// The last kernel has a thread for each chunk.
const MAX_COLS: usize = 1024 * CHUNK;
const NUM_BINS: usize = 1024;

/// Shared memory of the kernels, see their headers.
const SCAN_SHARED_BYTES: u32 = 2 * 4 * TILE as u32;
const WEIGH_SHARED_BYTES: u32 = 12 * NUM_BINS as u32;
const DRAW_SHARED_BYTES: u32 = (23 * NUM_BINS) as u32;

const SCAN: Kernel = Kernel { module: "sample_scan", function: "sample_scan" };
const WEIGH: Kernel = Kernel { module: "sample_weigh", function: "sample_weigh" };
const DRAW: Kernel = Kernel { module: "sample_draw", function: "sample_draw" };
const TAKE_DRAWN: Kernel = Kernel { module: "take_drawn", function: "take_drawn" };
const LOGPROBS: Kernel = Kernel { module: "sample_logprobs", function: "sample_logprobs" };

/// What to do with one row of logits. Several of them may name the same row.
#[derive(Clone, Debug)]
pub struct SampleRow<'a> {
    /// Which row.
    pub logits_row: usize,
    /// How the token is found.
    pub pick: Pick,
    /// What changes the logits before.
    pub edits: Edits<'a>,
    /// Report the token's log-probability and so many of the most likely tokens, at most
    /// [`MAX_TOP`].
    pub num_top: Option<u32>,
}

/// How a token is found.
#[derive(Clone, Debug)]
pub enum Pick {
    /// The one with the largest logit, the lowest on a tie.
    Largest,
    /// At random.
    Draw(Draw),
    /// It is this one; only its log-probability is wanted. Edits do not matter.
    Given(TokenId),
}

/// A draw at random, with parameters that were validated.
#[derive(Clone, Debug)]
pub struct Draw {
    /// Divides the logits; positive.
    pub temperature: f32,
    /// Drop tokens less likely than this share of the most likely one.
    pub min_p: f32,
    /// Then keep so many of the most likely tokens.
    pub top_k: Option<NonZeroU32>,
    /// Then keep the most likely ones whose probability reaches this share.
    pub top_p: f32,
    /// Key of the generator.
    pub seed: u64,
    /// Part of its counter.
    pub choice: u32,
    /// The rest of its counter.
    pub position: u64,
}

/// Changes of single logits, in the order of the fields.
#[derive(Clone, Debug)]
pub struct Edits<'a> {
    /// Tokens that cannot be drawn.
    pub forbidden: &'a [TokenId],
    /// What is added to the logits of tokens, each of them named once.
    pub biases: &'a [(TokenId, f32)],
    /// The tokens so far.
    pub history: &'a [TokenId],
    /// How many of them belong to the prompt.
    pub num_prompt_tokens: usize,
    /// Divides positive and multiplies other logits of the tokens so far; one changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of generated tokens.
    pub presence_penalty: f32,
    /// Subtracted from them for each time they were generated.
    pub frequency_penalty: f32,
    /// The only tokens that can be drawn.
    pub mask: Option<&'a TokenBitmask>,
}

impl Default for Edits<'_> {
    fn default() -> Self {
        Self {
            forbidden: &[],
            biases: &[],
            history: &[],
            num_prompt_tokens: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            mask: None,
        }
    }
}

/// What a row yielded.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledRow {
    /// The token; `None` if a logit is NaN or infinity, or no token can be drawn.
    pub token: Option<TokenId>,
    /// Present where wanted and where there is a token.
    pub logprobs: Option<RowLogprobs>,
}

/// Log-probabilities under the unedited logits.
#[derive(Clone, Debug, PartialEq)]
pub struct RowLogprobs {
    /// The token's.
    pub logprob: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// Buffers for a number of rows. A step is [`RowSampler::upload`], [`RowSampler::launch`],
/// [`RowSampler::begin_download`] and [`RowSampler::end_download`]; the second one may be a recording of
/// [`RowSampler::launch_for_recording`] with as many rows.
#[derive(Debug)]
pub struct RowSampler {
    gpu: Gpu,
    max_rows: usize,
    num_cols: usize,
    inputs: Inputs,
    resident: DeviceBuffer,
    results: DeviceBuffer,
    num_moves: u64,
}

impl RowSampler {
    /// Buffers for up to `max_rows` rows of `num_cols` logits.
    ///
    /// # Errors
    /// If there is no memory, or the rows are too long.
    pub fn new(gpu: &Gpu, max_rows: usize, num_cols: usize) -> Result<Self> {
        if !(1..=MAX_COLS).contains(&num_cols) {
            bail!("rows of {num_cols} logits: the sampling kernels take 1 to {MAX_COLS}");
        }
        // Room for a mask each, and as many words again of other lists.
        let num_bytes = max_rows * (ROW_BYTES + 8 * num_cols.div_ceil(32));
        Ok(Self {
            gpu: gpu.clone(),
            max_rows,
            num_cols,
            inputs: Inputs::default(),
            resident: gpu.alloc(num_bytes)?,
            results: gpu.alloc(max_rows * size_of::<ResultWords>())?,
            num_moves: 0,
        })
    }

    /// Says what to do in the next launch of `num_launched` rows. There may be fewer `rows`;
    /// nothing is done for the others.
    ///
    /// # Errors
    /// If there are too many rows, or the copy fails.
    pub fn upload(&mut self, rows: &[SampleRow<'_>], num_launched: usize) -> Result<()> {
        if num_launched < rows.len() || self.max_rows < num_launched {
            bail!("{} rows in a launch of {num_launched}, of {}", rows.len(), self.max_rows);
        }
        self.inputs.pack(rows, num_launched, self.num_cols);
        let bytes = self.inputs.bytes();
        if self.resident.len() < bytes.len() {
            self.resident = self.gpu.alloc(bytes.len().next_power_of_two())?;
            self.num_moves += 1;
        }
        Ok(self.resident.upload(bytes)?)
    }

    /// How often the buffers moved, because an upload was larger than all before. A recorded launch
    /// is of no use after that.
    pub fn num_moves(&self) -> u64 {
        self.num_moves
    }

    /// Draws as the last upload said, with the kernels that its rows need. The logits stay as they
    /// are.
    ///
    /// # Errors
    /// If the logits have another type or length, or a launch fails.
    pub fn launch(&self, logits: &GpuTensor) -> Result<()> {
        self.launch_kernels(logits, self.inputs.needs())
    }

    /// The same with all kernels, so that a recording of it serves any later upload.
    ///
    /// # Errors
    /// As [`RowSampler::launch`].
    pub fn launch_for_recording(&self, logits: &GpuTensor) -> Result<()> {
        self.launch_kernels(logits, Needs { weights: true, logprobs: true })
    }

    fn launch_kernels(&self, logits: &GpuTensor, needs: Needs) -> Result<()> {
        let num_launched = self.inputs.num_launched();
        if logits.dtype != DType::F32 || logits.num_cols != self.num_cols {
            bail!("rows of {} {:?} for a sampler of f32", logits.num_cols, logits.dtype);
        }
        if logits.num_rows < self.inputs.num_logits_rows() {
            bail!("{} rows of logits of {}", self.inputs.num_logits_rows(), logits.num_rows);
        }
        if num_launched == 0 {
            return Ok(());
        }
        let num_chunks = num_launched * self.num_cols.div_ceil(CHUNK);
        let scratch = |num_bytes| self.gpu.scratch(num_bytes);
        let keys = scratch(num_launched * self.num_cols.next_multiple_of(4) * 4)?;
        let (best, raw_best) = (scratch(num_chunks * 8)?, scratch(num_chunks * 8)?);
        let (masses, raw_masses) = (scratch(num_chunks * 8)?, scratch(num_chunks * 8)?);
        let bin_counts = scratch(num_launched * NUM_BINS * 4)?;
        let bin_masses = scratch(num_launched * NUM_BINS * 8)?;
        let [logits, inputs, keys] = [&logits.buffer, &self.resident, &keys].map(Arg::Buffer);
        let [best, raw_best] = [&best, &raw_best].map(Arg::Buffer);
        let [masses, raw_masses] = [&masses, &raw_masses].map(Arg::Buffer);
        let [bin_counts, bin_masses] = [&bin_counts, &bin_masses].map(Arg::Buffer);
        let (results, num_cols) = (Arg::Buffer(&self.results), Arg::I32(self.num_cols as i32));

        let tiles = |shared_bytes| LaunchConfig {
            grid: [self.num_cols.div_ceil(TILE) as u32, num_launched as u32, 1],
            block: [512, 1, 1],
            shared_bytes,
        };
        let row_blocks = |num_threads, shared_bytes| LaunchConfig {
            shared_bytes,
            ..LaunchConfig::linear(num_launched, num_threads)
        };
        let args = [logits, inputs, keys, best, raw_best, bin_counts, bin_masses, num_cols];
        self.gpu.launch(SCAN, tiles(SCAN_SHARED_BYTES), &args)?;
        let args = [
            logits, inputs, keys, best, raw_best, masses, raw_masses, bin_counts, bin_masses,
            num_cols,
        ];
        if needs.weights {
            self.gpu.launch(WEIGH, tiles(WEIGH_SHARED_BYTES), &args)?;
        }
        let args = [logits, inputs, keys, best, masses, bin_counts, bin_masses, results, num_cols];
        self.gpu.launch(DRAW, row_blocks(1024, DRAW_SHARED_BYTES), &args)?;
        let args = [logits, inputs, raw_best, raw_masses, results, num_cols];
        let shared_bytes = (self.num_cols.div_ceil(CHUNK) * 8) as u32;
        if needs.logprobs {
            self.gpu.launch(LOGPROBS, row_blocks(CHUNK as u32, shared_bytes), &args)?;
        }
        Ok(())
    }

    /// Queues the results' way back, after the launch. What is launched before
    /// [`RowSampler::end_download`] does not delay it; there must be no upload.
    ///
    /// # Errors
    /// If the card fails.
    pub fn begin_download(&self) -> Result<()> {
        Ok(self.results.begin_download(self.inputs.num_launched() * size_of::<ResultWords>())?)
    }

    /// What the uploaded rows yielded.
    ///
    /// # Errors
    /// If the launch failed.
    pub fn end_download(&self) -> Result<Vec<SampledRow>> {
        let mut words = vec![ResultWords::zeroed(); self.inputs.num_launched()];
        self.results.end_download(bytemuck::cast_slice_mut(&mut words))?;
        Ok(self.inputs.unpack(&words))
    }

    /// Puts the tokens that `rows` of the launch drew into `ids`, as far as there are rows, after
    /// the launch; zero where nothing was drawn. Both hold an `u32` each.
    ///
    /// # Errors
    /// If the launch fails.
    pub fn take_drawn(&self, rows: &DeviceBuffer, ids: &DeviceBuffer) -> Result<()> {
        let num_ids = rows.len() / size_of::<u32>();
        assert!(rows.len() <= ids.len(), "{num_ids} rows for {} bytes of ids", ids.len());
        let args = [&self.results, rows, ids].map(Arg::Buffer);
        let args = [args[0], args[1], args[2], Arg::I32(num_ids as i32)];
        Ok(self.gpu.launch(TAKE_DRAWN, LaunchConfig::linear(num_ids.div_ceil(256), 256), &args)?)
    }
}
