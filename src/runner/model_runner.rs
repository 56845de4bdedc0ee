//! Runs a model for the engine: owns its weights, its KV cache and the sampler.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::batch::{forward_batch, logits_rows};
use super::gpu_steps::{GPU_LOGITS_ROWS_MAX, GpuSteps, Launched, StepInputs};
use crate::device::threads::{ThreadPool, parallel_for};
use crate::models::Model;
use crate::ops::indices::Indices;
use crate::ops::kv_cache::KvCache;
use crate::ops::tensor::Tensor;
use crate::sampling::device_sampler::{Wanted, Yielded};
use crate::sampling::logprobs::token_logprobs;
use crate::sampling::sampler::Sampler;
use crate::scheduler::step::{
    Draw, Runner, SampleRequest, ScheduledSeq, SchedulerOutput, SeqOutput, TokenLogprobs,
    TokenMasks, sample_then_launch,
};
use crate::text::{TokenBitmask, TokenId};

/// Rows of logits in memory at once. A row of Qwen2's vocabulary takes 608 KB.
pub(super) const LOGITS_ROWS_MAX: usize = 32;

/// Keys and values of all layers.
pub struct LayerCaches {
    /// One per layer.
    pub layers: Vec<KvCache>,
    /// Blocks of each.
    pub num_blocks: u32,
    /// Tokens of a block.
    pub block_size: usize,
}

/// Implements [`Runner`] for a real model.
pub struct ModelRunner {
    model: Box<dyn Model>,
    kv: LayerCaches,
    pool: Arc<ThreadPool>,
    samplers: Samplers,
    /// Present where a card computes.
    gpu: Option<GpuSteps>,
    under_way: Option<UnderWay>,
}

/// A launched step.
struct UnderWay {
    launched: Launched,
    /// Of each row of logits the sequence, and which of its tokens.
    rows: Vec<(usize, usize)>,
}

impl ModelRunner {
    /// Joins a loaded model and its cache.
    pub fn new(model: Box<dyn Model>, kv: LayerCaches, pool: Arc<ThreadPool>) -> Self {
        Self { model, kv, pool, samplers: Samplers::default(), gpu: None, under_way: None }
    }

    /// Runs steps on the card that the model and its cache are on.
    #[must_use]
    pub(super) fn on_gpu(self, steps: GpuSteps) -> Self {
        Self { gpu: Some(steps), ..self }
    }

    /// Launches a step; `drawn_rows` as [`StepInputs`] has them.
    fn forward(
        &mut self,
        step: &SchedulerOutput,
        drawn_rows: Indices,
    ) -> candle_core::Result<UnderWay> {
        let batch = forward_batch(step, self.kv.block_size);
        let rows: Vec<(usize, usize)> = step
            .scheduled
            .iter()
            .enumerate()
            .flat_map(|(index, seq)| logits_rows(seq).map(move |row| (index, row)))
            .collect();
        let launched = if let Some(gpu) = &mut self.gpu {
            let inputs = StepInputs { batch, num_logits: rows.len(), drawn_rows };
            gpu.launch(&*self.model, &self.kv.layers, inputs)?
        } else {
            let hidden = self.pool.install(|| self.model.forward(&batch, &self.kv.layers))?;
            Launched { hidden, logits: None }
        };
        Ok(UnderWay { launched, rows })
    }

    /// Logits of some of the wanted rows.
    fn logits(&self, launched: &Launched, rows: Range<usize>) -> candle_core::Result<Tensor> {
        if let Some(logits) = &launched.logits {
            return logits.narrow(rows.start, rows.len());
        }
        let hidden = launched.hidden.narrow(rows.start, rows.len())?;
        self.pool.install(|| self.model.compute_logits(&hidden))
    }

    fn sample_all(
        &mut self,
        step: &SchedulerOutput,
        under_way: &UnderWay,
        masks: &TokenMasks,
    ) -> candle_core::Result<Vec<SeqOutput>> {
        let UnderWay { launched, rows } = under_way;
        let mut outputs = vec![SeqOutput::default(); step.scheduled.len()];
        let behind_drafts = behind_drafts(step);
        let max_rows = if self.gpu.is_some() { GPU_LOGITS_ROWS_MAX } else { LOGITS_ROWS_MAX };
        for (chunk_index, chunk) in rows.chunks(max_rows).enumerate() {
            let first = chunk_index * max_rows;
            let logits = self.logits(launched, first..first + chunk.len())?;
            let rows = Rows { step, masks, wanted: chunk, behind_drafts: &behind_drafts };
            if let Some(gpu) = &mut self.gpu {
                let orders = rows.orders();
                let yielded = gpu.sample(&logits, &orders.wanted)?;
                orders.hand_out(yielded, &mut outputs);
            } else {
                let samplers = &self.samplers;
                self.pool.install(|| rows.sample_on_cpu(samplers, &logits, &mut outputs))?;
            }
        }
        for (seq, output) in step.scheduled.iter().zip(&mut outputs) {
            output.keep_verified(seq);
        }
        pool(step, &launched.hidden, rows.len(), &mut outputs)?;
        Ok(outputs)
    }

    /// Whether one launch samples all rows of a step, so that another step can be launched behind it
    /// before the results are here.
    fn can_run_ahead(&self) -> bool {
        let under_way = self.under_way.as_ref();
        self.gpu.is_some() && under_way.is_some_and(|step| step.rows.len() <= GPU_LOGITS_ROWS_MAX)
    }

    /// Queues the draws of `step` and behind them `next`, and then waits for the draws.
    fn sample_and_launch(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
        next: &SchedulerOutput,
    ) -> candle_core::Result<Vec<SeqOutput>> {
        let UnderWay { launched, rows } = self.under_way.take().expect(LAUNCHED);
        let behind_drafts = behind_drafts(step);
        let rows = Rows { step, masks, wanted: &rows, behind_drafts: &behind_drafts };
        let orders = rows.orders();
        let logits = self.logits(&launched, 0..rows.wanted.len())?;
        let Some(gpu) = &mut self.gpu else { unreachable!("only cards run ahead") };
        gpu.begin_sample(&logits, &orders.wanted)?;
        // Their memory is the next step's.
        drop((launched, logits));
        let rows_of_draws = orders.rows_of_draws(step.scheduled.len());
        let drawn_by = next.scheduled.iter().filter_map(|seq| seq.drawn_by);
        let row_of = |index: usize| rows_of_draws[index].expect("who goes on draws a token");
        let drawn_rows: Vec<u32> = drawn_by.map(row_of).collect();
        let under_way = self.forward(next, drawn_rows.into())?;
        self.under_way = Some(under_way);
        let Some(gpu) = &mut self.gpu else { unreachable!("only cards run ahead") };
        let mut outputs = vec![SeqOutput::default(); step.scheduled.len()];
        let yielded = gpu.end_sample(&orders.wanted)?;
        orders.hand_out(yielded, &mut outputs);
        Ok(outputs)
    }
}

const LAUNCHED: &str = "a step is launched before it is sampled";

/// What a card is to do with rows of logits.
#[derive(Default)]
struct Orders<'a> {
    /// For each order the row.
    wanted: Vec<(usize, Wanted<'a>)>,
    /// For each order the sequence.
    owners: Vec<usize>,
}

impl Orders<'_> {
    /// For each of so many sequences which order draws its token.
    fn rows_of_draws(&self, num_seqs: usize) -> Vec<Option<u32>> {
        let mut rows = vec![None; num_seqs];
        for ((row, &owner), (_, wanted)) in (0..).zip(&self.owners).zip(&self.wanted) {
            if matches!(wanted, Wanted::Token(..)) {
                rows[owner] = Some(row);
            }
        }
        rows
    }

    fn hand_out(&self, yielded: Vec<Yielded>, outputs: &mut [SeqOutput]) {
        for (&index, yielded) in self.owners.iter().zip(yielded) {
            match yielded {
                Yielded::Token(drawn) => outputs[index].push_draw(drawn.map_err(Into::into)),
                Yielded::Logprobs(scored) => outputs[index].prompt_logprobs.push(scored),
            }
        }
    }
}

/// One sampler for each thread that has ever needed one.
#[derive(Default)]
struct Samplers(Mutex<Vec<Sampler>>);

impl Samplers {
    fn with_one<R>(&self, work: impl FnOnce(&mut Sampler) -> R) -> R {
        let free = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sampler = free().pop().unwrap_or_default();
        let result = work(&mut sampler);
        free().push(sampler);
        result
    }
}

/// Some rows of logits and what they are for.
struct Rows<'a> {
    step: &'a SchedulerOutput,
    masks: &'a TokenMasks,
    /// Of each row the sequence, and which of its tokens.
    wanted: &'a [(usize, usize)],
    /// For each sequence the draws behind its guesses.
    behind_drafts: &'a [Vec<SampleRequest>],
}

impl<'a> Rows<'a> {
    /// The request and the mask of a row whose sequence draws a token from it.
    fn draw(
        &self,
        (index, row): (usize, usize),
    ) -> Option<(&'a SampleRequest, Option<&'a TokenBitmask>)> {
        let seq = &self.step.scheduled[index];
        let first = seq.sample.as_ref()?;
        let request = match row.checked_sub(seq.num_known() - 1)? {
            0 => first,
            num_drafts => &self.behind_drafts[index][num_drafts - 1],
        };
        Some((request, self.masks.get(&seq.id)))
    }

    /// Every row is a task: none of them concerns another.
    fn sample_on_cpu(
        &self,
        samplers: &Samplers,
        logits: &Tensor,
        outputs: &mut [SeqOutput],
    ) -> candle_core::Result<()> {
        let (_, vocab_size) = logits.dims2()?;
        let mut logits = logits.to_vec()?;
        let rows = self.wanted.iter().zip(logits.chunks_exact_mut(vocab_size));
        let tasks: Vec<_> = rows.map(|(&row, logits)| Mutex::new((row, logits, None))).collect();
        parallel_for(tasks.len(), |task| {
            let mut task = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
            let ((index, row), logits, result) = &mut *task;
            *result = Some(self.sample_row(samplers, (*index, *row), logits));
        });
        for task in tasks {
            let ((index, _), _, result) = task.into_inner().unwrap_or_else(PoisonError::into_inner);
            let (scored, drawn) = result.expect("every task was done");
            outputs[index].prompt_logprobs.extend(scored);
            if let Some(draw) = drawn {
                outputs[index].push_draw(draw);
            }
        }
        Ok(())
    }

    fn sample_row(
        &self,
        samplers: &Samplers,
        (index, row): (usize, usize),
        logits: &mut [f32],
    ) -> (Option<TokenLogprobs>, Option<Draw>) {
        let seq = &self.step.scheduled[index];
        let scored =
            scored_token(seq, row).map(|(target, num_top)| token_logprobs(logits, target, num_top));
        let drawn = self.draw((index, row)).map(|(request, mask)| {
            samplers.with_one(|sampler| sampler.sample(logits, request, mask)).map_err(Into::into)
        });
        (scored, drawn)
    }

    fn orders(&self) -> Orders<'a> {
        let mut orders = Orders::default();
        for (logits_row, &(index, row)) in self.wanted.iter().enumerate() {
            let seq = &self.step.scheduled[index];
            let scored = scored_token(seq, row).map(|(token, top)| Wanted::Logprobs(token, top));
            let drawn = self.draw((index, row)).map(|(request, mask)| Wanted::Token(request, mask));
            for what in scored.into_iter().chain(drawn) {
                orders.wanted.push((logits_row, what));
                orders.owners.push(index);
            }
        }
        orders
    }
}

/// For each sequence how to draw behind each of its guesses.
fn behind_drafts(step: &SchedulerOutput) -> Vec<Vec<SampleRequest>> {
    let requests = |seq: &ScheduledSeq| {
        let drafts = seq.drafts();
        let first = seq.sample.as_ref();
        let behind = |first: &SampleRequest| -> Vec<SampleRequest> {
            (1..=drafts.len()).map(|num_drafts| first.after(&drafts[..num_drafts])).collect()
        };
        first.map(behind).unwrap_or_default()
    };
    step.scheduled.iter().map(requests).collect()
}

/// The prompt token that the logits of `row` score, and how many likely ones to report beside it.
fn scored_token(seq: &ScheduledSeq, row: usize) -> Option<(TokenId, u32)> {
    let wanted = seq.prompt_logprobs.as_ref()?;
    wanted.targets.get(row).map(|target| (*target, wanted.num_top))
}

/// Adds up the hidden states of pooled rows, which begin at `first_row`: in double precision and
/// token by token, so that pieces of a prompt add up to what the whole does.
fn pool(
    step: &SchedulerOutput,
    hidden: &Tensor,
    mut first_row: usize,
    outputs: &mut [SeqOutput],
) -> candle_core::Result<()> {
    for (seq, output) in step.scheduled.iter().zip(outputs) {
        let Some(pool) = &seq.pool else { continue };
        let rows = hidden.narrow(first_row, pool.rows.len())?;
        first_row += pool.rows.len();
        let (_, hidden_size) = rows.dims2()?;
        let rows = rows.to_vec()?;
        let mut sum = pool.sum.clone();
        sum.resize(hidden_size, 0.0);
        for row in rows.chunks_exact(hidden_size) {
            for (sum, value) in sum.iter_mut().zip(row) {
                *sum += f64::from(*value);
            }
        }
        output.pooled = Some(sum);
    }
    Ok(())
}

impl Runner for ModelRunner {
    type Error = candle_core::Error;

    fn launch(&mut self, step: &SchedulerOutput) -> Result<(), Self::Error> {
        self.under_way = None;
        self.under_way = Some(self.forward(step, Indices::default())?);
        Ok(())
    }

    fn sample(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, Self::Error> {
        let under_way = self.under_way.take().expect(LAUNCHED);
        self.sample_all(step, &under_way, masks)
    }

    fn sample_ahead(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
        next: &SchedulerOutput,
    ) -> Result<Vec<SeqOutput>, Self::Error> {
        if self.can_run_ahead() {
            return self.sample_and_launch(step, masks, next);
        }
        sample_then_launch(self, step, masks, next)
    }

    fn with_threads(&self, work: &mut dyn FnMut()) {
        self.pool.install(work);
    }

    fn is_asynchronous(&self) -> bool {
        self.gpu.as_ref().is_some_and(GpuSteps::is_asynchronous)
    }

    fn num_blocks(&self) -> Option<u32> {
        Some(self.kv.num_blocks)
    }

    fn is_broken(&self) -> bool {
        self.gpu.as_ref().is_some_and(GpuSteps::is_broken)
    }
}
