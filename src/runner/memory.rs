//! Decides, before anything is allocated, how much memory goes where.

use crate::models::ModelConfig;
use crate::ops::kv_cache::KvDtype;

/// How much of what is free the KV cache gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheShare {
    /// A quarter: other programs need memory too, and pages cost nothing until they are written.
    Quarter,
    /// All that the activations leave: the card is the server's.
    Rest,
}

/// What the plan has to be made from.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRequest {
    /// Memory for keys and values, if the user fixed it.
    pub kv_cache_bytes: Option<u64>,
    /// Longest sequence, if the user fixed it.
    pub max_model_len: Option<usize>,
    /// Tokens a block holds.
    pub block_size: usize,
    /// How keys and values are stored.
    pub kv_cache_dtype: KvDtype,
    /// Sequences that may run at once.
    pub max_num_seqs: usize,
    /// Tokens computed in one step.
    pub max_num_batched_tokens: usize,
    /// Memory that is free before the model is loaded.
    pub available_bytes: u64,
    /// Memory that the weights will take.
    pub weight_bytes: u64,
    /// Memory that adapters may take.
    pub adapter_bytes: u64,
    /// Memory for logits.
    pub logits_bytes: u64,
    /// Memory for partial results of attention.
    pub attention_bytes: u64,
    /// Memory for rows of experts that no token fills.
    pub expert_bytes: u64,
    /// What the cache gets of the rest, if the user did not fix it.
    pub cache_share: CacheShare,
    /// What a draft model needs beside the model itself.
    pub draft: DraftMemory,
}

/// What a draft model needs; nothing if there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DraftMemory {
    /// Memory of its weights.
    pub weight_bytes: u64,
    /// Memory of a token's keys and values.
    pub kv_bytes_per_token: u64,
    /// Estimate of its activations.
    pub workspace_bytes: u64,
}

/// How memory is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Blocks of the KV cache.
    pub num_blocks: u32,
    /// Bytes of one block in all layers.
    pub block_bytes: u64,
    /// Longest sequence, prompt and output together.
    pub max_model_len: usize,
    /// Whether `max_model_len` is shorter than the model allows because the cache is small.
    pub limited_by_cache: bool,
    /// Estimate of the activations of the largest step.
    pub workspace_bytes: u64,
    /// Memory that the weights will take.
    pub weight_bytes: u64,
    /// Memory that adapters may take.
    pub adapter_bytes: u64,
}

impl MemoryPlan {
    /// Memory of the whole cache.
    pub fn kv_cache_bytes(&self) -> u64 {
        u64::from(self.num_blocks) * self.block_bytes
    }
}

/// Why no plan is possible; each says what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// Not even one block fits.
    #[error(
        "a KV cache of {got} bytes holds no block of {needed} bytes; raise `--kv-cache-memory`"
    )]
    NoBlock {
        /// Memory given.
        got: u64,
        /// Memory of one block.
        needed: u64,
    },
    /// The length the user fixed is longer than the model's.
    #[error(
        "`--max-model-len {asked}` is longer than the {context} tokens the model can read; where its \
         positions can be stretched, `--rope-scaling yarn` does so"
    )]
    BeyondContext {
        /// Length asked for.
        asked: usize,
        /// The model's own.
        context: usize,
    },
    /// The length the user fixed does not fit in the cache.
    #[error(
        "a sequence of `--max-model-len {asked}` tokens needs {needed} bytes of KV cache and there \
         are {got}; raise `--kv-cache-memory` or lower `--max-model-len`"
    )]
    SequenceTooLong {
        /// Length asked for.
        asked: usize,
        /// Memory it needs.
        needed: u64,
        /// Memory of the cache.
        got: u64,
    },
}

/// Divides the memory.
///
/// Without `--kv-cache-memory` the cache gets its share of what the weights leave free, and no more
/// than `max_num_seqs` sequences of full length could ever use.
pub fn plan(config: &ModelConfig, request: &MemoryRequest) -> Result<MemoryPlan, MemoryError> {
    let context = config.max_position_embeddings;
    if let Some(asked) = request.max_model_len
        && context < asked
    {
        return Err(MemoryError::BeyondContext { asked, context });
    }
    let block_size = request.block_size as u64;
    let bytes_per_token =
        config.kv_bytes_per_token(request.kv_cache_dtype) as u64 + request.draft.kv_bytes_per_token;
    let weight_bytes = request.weight_bytes + request.draft.weight_bytes;
    let block_bytes = bytes_per_token.saturating_mul(block_size);
    let wanted_len = request.max_model_len.unwrap_or(context);
    let useful_blocks =
        (wanted_len as u64).div_ceil(block_size).saturating_mul(request.max_num_seqs as u64);
    let kv_cache_bytes = request.kv_cache_bytes.unwrap_or_else(|| {
        let taken = weight_bytes + request.adapter_bytes;
        let free = request.available_bytes.saturating_sub(taken);
        let share = match request.cache_share {
            CacheShare::Quarter => free / 4,
            CacheShare::Rest => free.saturating_sub(workspace_bytes(config, request)),
        };
        share.min(useful_blocks.saturating_mul(block_bytes))
    });
    let num_blocks = kv_cache_bytes / block_bytes.max(1);
    if num_blocks == 0 {
        return Err(MemoryError::NoBlock { got: kv_cache_bytes, needed: block_bytes });
    }
    let num_blocks = u32::try_from(num_blocks).unwrap_or(u32::MAX / request.block_size as u32);
    let capacity = usize::try_from(u64::from(num_blocks) * block_size).unwrap_or(usize::MAX);
    if let Some(asked) = request.max_model_len
        && capacity < asked
    {
        let needed = (asked as u64).saturating_mul(bytes_per_token);
        return Err(MemoryError::SequenceTooLong { asked, needed, got: kv_cache_bytes });
    }
    Ok(MemoryPlan {
        num_blocks,
        block_bytes,
        max_model_len: wanted_len.min(capacity),
        limited_by_cache: capacity < wanted_len,
        workspace_bytes: workspace_bytes(config, request),
        weight_bytes,
        adapter_bytes: request.adapter_bytes,
    })
}

/// What is alive at once: the residual stream twice, an MLP's input and output, logits, and what
/// attention adds up.
fn workspace_bytes(config: &ModelConfig, request: &MemoryRequest) -> u64 {
    let activations = activation_bytes(config, request.max_num_batched_tokens);
    let layers = activations + request.attention_bytes + request.expert_bytes;
    layers + request.logits_bytes + request.draft.workspace_bytes
}

/// The same of the layers alone.
pub fn activation_bytes(config: &ModelConfig, max_num_batched_tokens: usize) -> u64 {
    let per_token = 4 * config.hidden_size + config.feed_forward_values_per_token();
    4 * max_num_batched_tokens as u64 * per_token as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rope::RopeScaling;

    fn config() -> ModelConfig {
        ModelConfig {
            architecture: "qwen2".to_owned(),
            hidden_size: 896,
            intermediate_size: 4864,
            num_hidden_layers: 24,
            num_attention_heads: 14,
            num_key_value_heads: 2,
            head_dim: 64,
            vocab_size: 151_936,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            rope_scaling: RopeScaling::None,
            experts: None,
            sliding_window: None,
        }
    }

    fn request() -> MemoryRequest {
        MemoryRequest {
            kv_cache_bytes: None,
            max_model_len: None,
            block_size: 16,
            kv_cache_dtype: KvDtype::F16,
            max_num_seqs: 64,
            max_num_batched_tokens: 256,
            available_bytes: 8 << 30,
            weight_bytes: 500 << 20,
            adapter_bytes: 0,
            logits_bytes: 32 * 151_936 * 8,
            attention_bytes: 0,
            expert_bytes: 0,
            cache_share: CacheShare::Quarter,
            draft: DraftMemory::default(),
        }
    }

    #[test]
    fn a_small_cache_shortens_the_longest_sequence() {
        let request = MemoryRequest { kv_cache_bytes: Some(24 << 20), ..request() };
        let plan = plan(&config(), &request).expect("a plan");
        assert_eq!(plan.block_bytes, 12_288 * 16);
        assert_eq!(plan.num_blocks, 128);
        assert_eq!(plan.max_model_len, 2048);
        assert!(plan.limited_by_cache);
    }

    #[test]
    fn a_fixed_length_that_does_not_fit_is_refused() {
        let request = MemoryRequest {
            kv_cache_bytes: Some(24 << 20),
            max_model_len: Some(4096),
            ..request()
        };
        assert!(matches!(
            plan(&config(), &request),
            Err(MemoryError::SequenceTooLong { asked: 4096, .. })
        ));
        let request = MemoryRequest { max_model_len: Some(40_000), ..request };
        assert!(matches!(plan(&config(), &request), Err(MemoryError::BeyondContext { .. })));
        let request = MemoryRequest { kv_cache_bytes: Some(1000), max_model_len: None, ..request };
        assert!(matches!(plan(&config(), &request), Err(MemoryError::NoBlock { .. })));
    }

    #[test]
    fn a_card_is_filled() {
        let request = MemoryRequest {
            cache_share: CacheShare::Rest,
            max_num_seqs: 256,
            available_bytes: 40 << 30,
            adapter_bytes: 3 << 30,
            ..request()
        };
        let plan = plan(&config(), &request).expect("a plan");
        let weight_bytes = plan.weight_bytes + plan.adapter_bytes;
        let used = plan.kv_cache_bytes() + weight_bytes + plan.workspace_bytes;
        assert!(used <= 40 << 30);
        assert!((40 << 30) - used < plan.block_bytes);
    }

    #[test]
    fn the_default_is_a_quarter_of_what_is_free() {
        let plan = plan(&config(), &request()).expect("a plan");
        let free = (8_u64 << 30) - (500 << 20);
        assert!(plan.kv_cache_bytes() <= free / 4);
        assert!(free / 4 - plan.kv_cache_bytes() < plan.block_bytes);
        assert!(!plan.limited_by_cache);
    }
}
