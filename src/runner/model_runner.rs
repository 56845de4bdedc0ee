//! Runs a model for the engine: owns its weights, its KV cache and the sampler.

use std::sync::Arc;

use super::batch::{forward_batch, logits_rows};
use super::gpu_steps::{GPU_LOGITS_ROWS_MAX, GpuSteps, Launched};
use crate::device::threads::ThreadPool;
use crate::models::Model;
use crate::ops::paged_attention::KvCache;
use crate::ops::tensor::Tensor;
use crate::sampling::device_sampler::{Wanted, Yielded};
use crate::sampling::logprobs::token_logprobs;
use crate::sampling::sampler::Sampler;
use crate::scheduler::step::{
    Runner, SampleRequest, ScheduledSeq, SchedulerOutput, SeqOutput, TokenMasks,
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
    sampler: Sampler,
    /// Present where a card computes.
    gpu: Option<GpuSteps>,
    launched: Option<Launched>,
}

impl ModelRunner {
    /// Joins a loaded model and its cache.
    pub fn new(model: Box<dyn Model>, kv: LayerCaches, pool: Arc<ThreadPool>) -> Self {
        Self { model, kv, pool, sampler: Sampler::default(), gpu: None, launched: None }
    }

    /// Runs steps on the card that the model and its cache are on.
    #[must_use]
    pub(super) fn on_gpu(self, steps: GpuSteps) -> Self {
        Self { gpu: Some(steps), ..self }
    }

    fn forward(&mut self, step: &SchedulerOutput) -> candle_core::Result<Launched> {
        let batch = forward_batch(step, self.kv.block_size);
        let Some(gpu) = &mut self.gpu else {
            let hidden = self.pool.install(|| self.model.forward(&batch, &self.kv.layers))?;
            return Ok(Launched { hidden, logits: None });
        };
        let num_logits = step.scheduled.iter().map(|seq| logits_rows(seq).count()).sum();
        gpu.launch(&*self.model, &self.kv.layers, batch, num_logits)
    }

    fn sample_all(
        &mut self,
        step: &SchedulerOutput,
        launched: &Launched,
        masks: &TokenMasks,
    ) -> candle_core::Result<Vec<SeqOutput>> {
        let wanted: Vec<(usize, usize)> = step
            .scheduled
            .iter()
            .enumerate()
            .flat_map(|(index, seq)| logits_rows(seq).map(move |row| (index, row)))
            .collect();
        let mut outputs = vec![SeqOutput::default(); step.scheduled.len()];
        let max_rows = if self.gpu.is_some() { GPU_LOGITS_ROWS_MAX } else { LOGITS_ROWS_MAX };
        for (chunk_index, chunk) in wanted.chunks(max_rows).enumerate() {
            let first = chunk_index * max_rows;
            let logits = if let Some(logits) = &launched.logits {
                logits.narrow(first, chunk.len())?
            } else {
                let rows = launched.hidden.narrow(first, chunk.len())?;
                self.pool.install(|| self.model.compute_logits(&rows))?
            };
            let rows = Rows { step, masks, wanted: chunk };
            match &mut self.gpu {
                Some(gpu) => rows.sample_on_gpu(gpu, &logits, &mut outputs)?,
                None => rows.sample_on_cpu(&mut self.sampler, &logits, &mut outputs)?,
            }
        }
        pool(step, &launched.hidden, wanted.len(), &mut outputs)?;
        Ok(outputs)
    }
}

/// Some rows of logits and what they are for.
struct Rows<'a> {
    step: &'a SchedulerOutput,
    masks: &'a TokenMasks,
    /// Of each row the sequence, and which of its tokens.
    wanted: &'a [(usize, usize)],
}

impl<'a> Rows<'a> {
    /// The request and the mask of a row whose sequence draws a token from it.
    fn draw(
        &self,
        seq: &'a ScheduledSeq,
        row: usize,
    ) -> Option<(&'a SampleRequest, Option<&'a TokenBitmask>)> {
        let request = seq.sample.as_ref().filter(|_| row + 1 == seq.tokens.len())?;
        Some((request, self.masks.get(&seq.id)))
    }

    fn sample_on_cpu(
        &self,
        sampler: &mut Sampler,
        logits: &Tensor,
        outputs: &mut [SeqOutput],
    ) -> candle_core::Result<()> {
        let (_, vocab_size) = logits.dims2()?;
        let mut logits = logits.to_vec()?;
        for (&(index, row), logits) in self.wanted.iter().zip(logits.chunks_exact_mut(vocab_size)) {
            let (seq, output) = (&self.step.scheduled[index], &mut outputs[index]);
            if let Some((target, num_top)) = scored_token(seq, row) {
                output.prompt_logprobs.push(token_logprobs(logits, target, num_top));
            }
            if let Some((request, mask)) = self.draw(seq, row) {
                let drawn = sampler.sample(logits, request, mask);
                output.sampled = Some(drawn.map_err(Into::into));
            }
        }
        Ok(())
    }

    fn sample_on_gpu(
        &self,
        gpu: &mut GpuSteps,
        logits: &Tensor,
        outputs: &mut [SeqOutput],
    ) -> candle_core::Result<()> {
        let mut wanted = Vec::new();
        let mut owners = Vec::new();
        for (logits_row, &(index, row)) in self.wanted.iter().enumerate() {
            let seq = &self.step.scheduled[index];
            let scored = scored_token(seq, row).map(|(token, top)| Wanted::Logprobs(token, top));
            let drawn = self.draw(seq, row).map(|(request, mask)| Wanted::Token(request, mask));
            for what in scored.into_iter().chain(drawn) {
                wanted.push((logits_row, what));
                owners.push(index);
            }
        }
        for (index, yielded) in owners.into_iter().zip(gpu.sample(logits, &wanted)?) {
            match yielded {
                Yielded::Token(drawn) => outputs[index].sampled = Some(drawn.map_err(Into::into)),
                Yielded::Logprobs(scored) => outputs[index].prompt_logprobs.push(scored),
            }
        }
        Ok(())
    }
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
        self.launched = None;
        self.launched = Some(self.forward(step)?);
        Ok(())
    }

    fn sample(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, Self::Error> {
        let launched = self.launched.take().expect("a step is launched before it is sampled");
        self.sample_all(step, &launched, masks)
    }

    fn num_blocks(&self) -> Option<u32> {
        Some(self.kv.num_blocks)
    }

    fn is_broken(&self) -> bool {
        self.gpu.as_ref().is_some_and(GpuSteps::is_broken)
    }
}
