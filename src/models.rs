//! The Qwen architectures, each only what makes it different.

pub mod config;
pub mod decoder;
pub mod lora;
pub mod qwen2;
pub mod qwen2_moe;
pub mod qwen3;
pub mod qwen3_moe;
pub mod registry;
mod stretching;

use candle_core::Result;

pub use config::ModelConfig;

use crate::layers::attention::{AttentionMetadata, KvCache};
use crate::layers::lora::AdaptedRows;
use crate::layers::{Indices, Tensor};

/// The inputs of one forward pass over a flat batch of tokens of several sequences.
#[derive(Clone, Debug)]
pub struct ForwardBatch {
    /// `[num_tokens]`
    pub input_ids: Indices,
    /// Rows whose final hidden states are wanted.
    pub logits_indices: Indices,
    /// Where the tokens stand and where their keys and values live.
    pub attention: AttentionMetadata,
    /// The tokens that have adapters, by adapter.
    pub adapted: Vec<AdaptedRows>,
}

/// What every architecture is to the runner.
pub trait Model: Send {
    /// Computes keys and values of all tokens into `kv` (one cache a layer) and gives the final
    /// hidden states of the wanted rows, `[num_logits, hidden_size]`.
    fn forward(&self, batch: &ForwardBatch, kv: &[KvCache]) -> Result<Tensor>;

    /// The logits of hidden states, `[num_logits, vocab_size]`.
    fn compute_logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// Memory that the weights take.
    fn num_weight_bytes(&self) -> usize;
}
