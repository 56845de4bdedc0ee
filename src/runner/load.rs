//! From a model file to a runner: plan first, then allocate and repack.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use anyhow::Context;
use half::bf16;

use super::drafted::DraftedRunner;
use super::gpu_steps::{GPU_LOGITS_ROWS_MAX, GpuSteps, StepLimits};
use super::memory::{CacheShare, DraftMemory, MemoryPlan, MemoryRequest, activation_bytes, plan};
use super::model_runner::{LOGITS_ROWS_MAX, LayerCaches, ModelRunner};
use crate::config::{Execution, RopeScalingChoice};
use crate::device::threads::ThreadPool;
use crate::device::{Device, host_memory};
use crate::models::lora::{self, FittingAdapter, LoraWeights};
use crate::models::{Model, ModelConfig, registry};
use crate::ops::experts::{MAX_CHOSEN, max_group_rows};
use crate::ops::kv_cache::{KvCache, KvCacheShape, KvDtype};
use crate::ops::paged_attention::{StepBounds, max_partial_bytes};
use crate::weights::checkpoint::Checkpoint;
use crate::weights::lora::LoraFiles;

/// Assumed where the system does not say how much memory is free.
const UNKNOWN_MEMORY_BYTES: u64 = 4 << 30;

/// What the user decides about a model's memory and threads.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where the model runs.
    pub device: Device,
    /// The part of a card's memory that the server may take.
    pub gpu_memory_utilization: f64,
    /// How a card is told what to do.
    pub execution: Execution,
    /// Memory for keys and values; `None` lets the plan decide.
    pub kv_cache_bytes: Option<u64>,
    /// How keys and values are stored.
    pub kv_cache_dtype: KvDtype,
    /// Longest sequence; `None` lets the plan decide.
    pub max_model_len: Option<usize>,
    /// How positions beyond the trained ones are made usable.
    pub rope_scaling: RopeScalingChoice,
    /// Tokens a block of the cache holds.
    pub block_size: usize,
    /// Sequences that may run at once.
    pub max_num_seqs: usize,
    /// Tokens computed in one step.
    pub max_num_batched_tokens: usize,
    /// Threads that compute.
    pub num_threads: usize,
    /// Adapters to keep memory for, and their highest rank.
    pub adapters: (usize, usize),
}

/// A model whose headers were read and whose memory is planned; no weight was touched yet.
pub struct PlannedModel {
    /// The mapped files.
    pub checkpoint: Checkpoint,
    /// Its hyperparameters.
    pub config: ModelConfig,
    /// Where memory will go.
    pub plan: MemoryPlan,
    draft: Option<Draft>,
    options: LoadOptions,
    adapters: Mutex<Vec<Weak<LoraWeights>>>,
}

impl PlannedModel {
    /// Opens a GGUF file or a repository's directory, checks that it can be run and plans its
    /// memory.
    pub fn open(path: &Path, options: LoadOptions) -> anyhow::Result<Self> {
        Self::plan(Checkpoint::open(path)?, options)
    }

    /// The same with random weights instead of the file's.
    pub fn open_dummy(path: &Path, options: LoadOptions) -> anyhow::Result<Self> {
        Self::plan(Checkpoint::open_dummy(path)?, options)
    }

    /// The same of files that are open already.
    pub fn plan(checkpoint: Checkpoint, options: LoadOptions) -> anyhow::Result<Self> {
        Self::plan_with_draft(checkpoint, None, options)
    }

    /// The same, with a smaller model that guesses what the model says.
    ///
    /// # Errors
    /// Also if that cannot follow the model to the end of its longest sequence.
    pub fn plan_with_draft(
        checkpoint: Checkpoint,
        draft: Option<Checkpoint>,
        options: LoadOptions,
    ) -> anyhow::Result<Self> {
        let config = read_config(&checkpoint, &options)?;
        let draft = draft.map(|checkpoint| Draft::read(checkpoint, &options)).transpose()?;
        let (available_bytes, cache_share) = memory(&options)?;
        let (num_adapters, max_rank) = options.adapters;
        let adapter_bytes = lora::max_adapter_bytes(&config, max_rank, &options.device);
        let request = MemoryRequest {
            kv_cache_bytes: options.kv_cache_bytes,
            max_model_len: options.max_model_len,
            block_size: options.block_size,
            kv_cache_dtype: options.kv_cache_dtype,
            max_num_seqs: options.max_num_seqs,
            max_num_batched_tokens: options.max_num_batched_tokens,
            available_bytes,
            weight_bytes: checkpoint.num_weight_bytes(),
            adapter_bytes: num_adapters as u64 * adapter_bytes,
            cache_share,
            logits_bytes: logits_bytes(&options.device, config.vocab_size),
            attention_bytes: attention_bytes(&options, &config),
            draft: draft.as_ref().map(|draft| draft.memory(&options)).unwrap_or_default(),
            expert_bytes: expert_bytes(&options, &config),
        };
        let plan = plan(&config, &request)?;
        if let Some(draft) = &draft {
            draft.check_against(&config, &plan)?;
        }
        let adapters = Mutex::default();
        Ok(Self { checkpoint, config, plan, draft, options, adapters })
    }

    /// Repacks the weights on all threads and allocates the cache; `on_layer` hears how many of
    /// the model's layers are done.
    pub fn load(
        &self,
        mut on_layer: impl FnMut(usize) + Send,
    ) -> anyhow::Result<DraftedRunner<ModelRunner>> {
        let pool = Arc::new(ThreadPool::new(self.options.num_threads));
        let model = self.load_weights((&self.checkpoint, &self.config), &pool, &mut on_layer)?;
        let draft = self.draft.as_ref().map(|Draft { checkpoint, config }| {
            let model = self.load_weights((checkpoint, config), &pool, &mut |_| {})?;
            anyhow::Ok((model, config))
        });
        let draft = draft.transpose()?;
        let num_blocks = self.blocks_that_fit()?;
        let target = self.runner((model, &self.config), &self.options, num_blocks, &pool)?;
        let draft = draft
            .map(|draft| self.runner(draft, &draft_options(&self.options), num_blocks, &pool))
            .transpose()?;
        let draft_size = self.draft.as_ref().map_or(0, |draft| draft.config.vocab_size);
        Ok(DraftedRunner::new(target, draft, (self.config.vocab_size, draft_size)))
    }

    fn load_weights(
        &self,
        (checkpoint, config): (&Checkpoint, &ModelConfig),
        pool: &ThreadPool,
        on_layer: &mut (dyn FnMut(usize) + Send),
    ) -> anyhow::Result<Box<dyn Model>> {
        let (max_model_len, device) = (self.plan.max_model_len, &self.options.device);
        let model =
            pool.install(|| registry::load(checkpoint, config, max_model_len, device, on_layer))?;
        tracing::info!(weight_bytes = model.num_weight_bytes(), "weights packed");
        // The packed weights replace the file's pages; the embedding's come back row by row.
        checkpoint.release_pages();
        Ok(model)
    }

    /// Joins a model with a cache of its own.
    fn runner(
        &self,
        (model, config): (Box<dyn Model>, &ModelConfig),
        options: &LoadOptions,
        num_blocks: u32,
        pool: &Arc<ThreadPool>,
    ) -> anyhow::Result<ModelRunner> {
        let device = &options.device;
        let shape = KvCacheShape {
            num_blocks: num_blocks as usize,
            num_kv_heads: config.num_key_value_heads,
            block_size: options.block_size,
            head_dim: config.head_dim,
        };
        let layers = (0..config.num_hidden_layers)
            .map(|_| KvCache::new(shape, options.kv_cache_dtype, device))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let kv = LayerCaches { layers, num_blocks, block_size: options.block_size };
        let runner = ModelRunner::new(model, kv, Arc::clone(pool));
        Ok(match device {
            Device::Cpu => runner,
            Device::Gpu(gpu) => {
                let limits = StepLimits {
                    max_num_batched_tokens: options.max_num_batched_tokens,
                    max_num_seqs: options.max_num_seqs,
                    max_model_len: self.plan.max_model_len,
                    block_size: options.block_size,
                    vocab_size: config.vocab_size,
                };
                runner.on_gpu(GpuSteps::new(gpu, limits, options.execution)?)
            }
        })
    }

    /// The smaller model that guesses, if there is one: its files.
    pub fn draft_checkpoint(&self) -> Option<&Checkpoint> {
        self.draft.as_ref().map(|draft| &draft.checkpoint)
    }
}

/// A smaller model that guesses what the model says.
struct Draft {
    checkpoint: Checkpoint,
    config: ModelConfig,
}

impl Draft {
    fn read(checkpoint: Checkpoint, options: &LoadOptions) -> anyhow::Result<Self> {
        let config = read_config(&checkpoint, options).context("the draft model cannot be run")?;
        Ok(Self { checkpoint, config })
    }

    fn memory(&self, options: &LoadOptions) -> DraftMemory {
        let options = &draft_options(options);
        let logits_bytes = logits_bytes(&options.device, self.config.vocab_size);
        let activations = activation_bytes(&self.config, options.max_num_batched_tokens);
        DraftMemory {
            weight_bytes: self.checkpoint.num_weight_bytes(),
            kv_bytes_per_token: self.config.kv_bytes_per_token(options.kv_cache_dtype) as u64,
            workspace_bytes: activations
                + logits_bytes
                + attention_bytes(options, &self.config)
                + expert_bytes(options, &self.config),
        }
    }

    /// It computes whatever the model computes, so its positions must reach as far and be the same.
    fn check_against(&self, target: &ModelConfig, plan: &MemoryPlan) -> anyhow::Result<()> {
        let (reads, needed) = (self.config.max_position_embeddings, plan.max_model_len);
        anyhow::ensure!(
            needed <= reads,
            "the draft model reads {reads} tokens and sequences may have {needed}; pass \
             `--max-model-len {reads}`, or another draft model"
        );
        let stretched =
            |config: &ModelConfig| config.stretched_beyond().filter(|&len| len < needed);
        anyhow::ensure!(
            stretched(&self.config) == stretched(target),
            "positions of the draft model are not stretched as the model's are; pass \
             `--rope-scaling none`, or a draft model of the same family"
        );
        Ok(())
    }
}

/// A draft model's steps have a token more for each sequence whose guesses all came true.
fn draft_options(options: &LoadOptions) -> LoadOptions {
    let max_num_batched_tokens = options.max_num_batched_tokens + options.max_num_seqs;
    LoadOptions { max_num_batched_tokens, ..options.clone() }
}

/// Hyperparameters of a model that the device can run.
fn read_config(checkpoint: &Checkpoint, options: &LoadOptions) -> anyhow::Result<ModelConfig> {
    registry::check_architecture(&ModelConfig::architecture_of(checkpoint)?)?;
    let config = ModelConfig::from_checkpoint(checkpoint, options.rope_scaling)?;
    options.kv_cache_dtype.check(config.head_dim, &options.device)?;
    check_experts(&config, &options.device)?;
    Ok(config)
}

impl PlannedModel {
    /// Loads an adapter of this model from its directory, on the calling thread: whoever computes
    /// notices nothing.
    ///
    /// # Errors
    /// If it is not one of this model, or asks for what is not supported, or there is no memory.
    pub fn load_adapter(&self, directory: &Path) -> anyhow::Result<Arc<LoraWeights>> {
        let device = &self.options.device;
        let files = LoraFiles::open(directory)?;
        let adapter = FittingAdapter::new(&files, &self.config, self.options.adapters.1)?;
        self.check_room(adapter.max_bytes(device))?;
        let weights = Arc::new(adapter.pack(device)?);
        self.adapters().push(Arc::downgrade(&weights));
        Ok(weights)
    }

    /// A card's steps take memory when they first need it, and must find it.
    fn check_room(&self, num_bytes: u64) -> anyhow::Result<()> {
        let Device::Gpu(gpu) = &self.options.device else { return Ok(()) };
        let (free, _) = gpu.memory_info()?;
        let kept = self.plan.workspace_bytes.saturating_sub(gpu.workspace_bytes() as u64);
        let free = (free as u64).saturating_sub(kept);
        anyhow::ensure!(
            num_bytes <= free,
            "the adapter may take {num_bytes} bytes, and the GPU has {free} left beside what steps need; \
             unload another one, or lower `--gpu-memory-utilization` or `--kv-cache-memory`"
        );
        Ok(())
    }

    /// Adapters in memory.
    fn adapters(&self) -> MutexGuard<'_, Vec<Weak<LoraWeights>>> {
        let mut adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        adapters.retain(|adapter| 0 < adapter.strong_count());
        adapters
    }

    /// Memory that the cache must leave to steps, and to adapters that are not there yet.
    fn kept_bytes(&self) -> u64 {
        let adapters = self.adapters();
        let used = adapters.iter().filter_map(Weak::upgrade).map(|adapter| adapter.num_bytes());
        let used = used.sum::<usize>() as u64;
        self.plan.workspace_bytes + self.plan.adapter_bytes.saturating_sub(used)
    }

    /// The planned blocks, or fewer if others took a card's memory while the weights were loaded.
    fn blocks_that_fit(&self) -> anyhow::Result<u32> {
        let Device::Gpu(gpu) = &self.options.device else { return Ok(self.plan.num_blocks) };
        let (free, _) = gpu.memory_info()?;
        let free = (free as u64).saturating_sub(self.kept_bytes());
        let fitting = free / self.plan.block_bytes.max(1);
        let num_blocks = u32::try_from(fitting).unwrap_or(u32::MAX).min(self.plan.num_blocks);
        if num_blocks == 0 {
            anyhow::bail!(
                "the weights leave no memory for a KV cache; use a smaller or more quantised model, \
                 or raise `--gpu-memory-utilization`"
            );
        }
        if num_blocks < self.plan.num_blocks {
            tracing::warn!(
                num_blocks,
                planned = self.plan.num_blocks,
                "the KV cache is smaller than planned"
            );
        }
        Ok(num_blocks)
    }
}

/// Logits of the rows that are in memory at once, and what sampling makes of them.
fn logits_bytes(device: &Device, vocab_size: usize) -> u64 {
    let num_rows = match device {
        Device::Cpu => LOGITS_ROWS_MAX,
        Device::Gpu(_) => GPU_LOGITS_ROWS_MAX,
    };
    (num_rows * vocab_size * 2 * size_of::<f32>()) as u64
}

/// Partial results of a card's attention; a processor's are small.
fn attention_bytes(options: &LoadOptions, config: &ModelConfig) -> u64 {
    if matches!(options.device, Device::Cpu) {
        return 0;
    }
    let bounds = StepBounds {
        num_tokens: options.max_num_batched_tokens,
        num_seqs: options.max_num_seqs,
        max_seq_len: options.max_model_len.unwrap_or(config.max_position_embeddings),
    };
    let heads = (config.num_attention_heads, config.num_key_value_heads);
    max_partial_bytes(heads, config.head_dim, bounds) as u64
}

/// A card's kernels choose a bounded number of experts.
fn check_experts(config: &ModelConfig, device: &Device) -> anyhow::Result<()> {
    let num_chosen = config.experts.map_or(0, |experts| experts.num_experts_per_tok);
    if matches!(device, Device::Gpu(_)) && MAX_CHOSEN < num_chosen {
        anyhow::bail!(
            "a token goes to {num_chosen} experts, and a GPU chooses at most {MAX_CHOSEN}; use \
             `--device cpu`"
        );
    }
    Ok(())
}

/// The rows of a card's experts that belong to nobody; a processor has none.
fn expert_bytes(options: &LoadOptions, config: &ModelConfig) -> u64 {
    let (Device::Gpu(_), Some(experts)) = (&options.device, config.experts) else { return 0 };
    let num_choices = options.max_num_batched_tokens * experts.num_experts_per_tok;
    let num_rows = max_group_rows(num_choices, experts.num_experts);
    let per_row = 2 * config.hidden_size + 3 * experts.moe_intermediate_size;
    (num_rows.saturating_sub(num_choices) * per_row * size_of::<bf16>()) as u64
}

/// Bytes that the server may take, and which part of them the cache gets.
fn memory(options: &LoadOptions) -> anyhow::Result<(u64, CacheShare)> {
    let Device::Gpu(gpu) = &options.device else {
        let available = host_memory::available_bytes().unwrap_or(UNKNOWN_MEMORY_BYTES);
        return Ok((available, CacheShare::Quarter));
    };
    let (free, total) = gpu.memory_info()?;
    let wanted = (total as f64 * options.gpu_memory_utilization) as u64;
    // What others have of the card counts as taken.
    Ok((wanted.saturating_sub((total - free) as u64), CacheShare::Rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what is kept for adapters is kept until they are there, and again when they are gone.
    #[test]
    fn memory_is_kept_for_adapters_to_come() {
        let options = LoadOptions {
            device: Device::Cpu,
            gpu_memory_utilization: 0.9,
            execution: Execution::Eager,
            kv_cache_bytes: Some(1 << 20),
            kv_cache_dtype: KvDtype::F16,
            max_model_len: None,
            rope_scaling: RopeScalingChoice::Auto,
            block_size: 16,
            max_num_seqs: 1,
            max_num_batched_tokens: 16,
            num_threads: 1,
            adapters: (2, 8),
        };
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
        let planned = PlannedModel::open(&tiny.join("hf-sharded"), options).unwrap();
        let all = planned.plan.workspace_bytes + planned.plan.adapter_bytes;
        assert_eq!(planned.kept_bytes(), all);
        let adapter = planned.load_adapter(&tiny.join("lora-qwen2-all")).unwrap();
        let other = planned.load_adapter(&tiny.join("lora-qwen2-patterns")).unwrap();
        let used = adapter.num_bytes() + other.num_bytes();
        assert_eq!(planned.kept_bytes(), all - used as u64);
        drop(other);
        assert_eq!(planned.kept_bytes(), all - adapter.num_bytes() as u64);
        drop(adapter);
        assert_eq!(planned.kept_bytes(), all);
    }
}
