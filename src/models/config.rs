//! Hyperparameters under the names of Hugging Face's `config.json`.

mod config_json;

use crate::weights::checkpoint::{Checkpoint, CheckpointError, Source};
use crate::weights::gguf::Gguf;

/// What a decoder of the Qwen2 family needs to know about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture's name, such as `qwen2`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Number of rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Longest sequence the model was trained for.
    pub max_position_embeddings: usize,
    /// Added to the mean square before its root is taken.
    pub rms_norm_eps: f32,
    /// Base of the rotary angles.
    pub rope_theta: f32,
}

impl ModelConfig {
    /// The architecture by its GGUF name, such as `qwen2`, even if no model of it can be run.
    pub fn architecture_of(checkpoint: &Checkpoint) -> Result<String, CheckpointError> {
        match checkpoint.source() {
            Source::Gguf(gguf) => Ok(gguf.metadata().str("general.architecture")?.to_owned()),
            Source::Repository(repository) => Ok(config_json::architecture(repository.config())?),
        }
    }

    /// Reads the hyperparameters from the files and checks that they make sense together.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let config = match checkpoint.source() {
            Source::Gguf(gguf) => Self::from_gguf(gguf)?,
            Source::Repository(repository) => config_json::read(repository)?,
        };
        config.check()?;
        Ok(config)
    }

    /// Keys as in the GGUF specification, section "LLM": `<architecture>.block_count` and so on.
    fn from_gguf(gguf: &Gguf) -> Result<Self, CheckpointError> {
        let metadata = gguf.metadata();
        let architecture = metadata.str("general.architecture")?.to_owned();
        let size = |key: &str| -> Result<usize, CheckpointError> {
            Ok(metadata.u32(&format!("{architecture}.{key}"))? as usize)
        };
        let num_attention_heads = size("attention.head_count")?;
        let hidden_size = size("embedding_length")?;
        let key_length = size("attention.key_length").ok();
        let head_dim = key_length.unwrap_or(hidden_size / num_attention_heads.max(1));
        let embedding = gguf.tensor("token_embd.weight")?.0;
        let theta = metadata.f32(&format!("{architecture}.rope.freq_base"));
        Ok(Self {
            hidden_size,
            intermediate_size: size("feed_forward_length")?,
            num_hidden_layers: size("block_count")?,
            num_attention_heads,
            num_key_value_heads: size("attention.head_count_kv").unwrap_or(num_attention_heads),
            head_dim,
            vocab_size: embedding.shape.first().copied().unwrap_or(0),
            max_position_embeddings: size("context_length")?,
            rms_norm_eps: metadata
                .f32(&format!("{architecture}.attention.layer_norm_rms_epsilon"))?,
            rope_theta: theta.unwrap_or(10_000.0),
            architecture,
        })
    }

    fn check(&self) -> Result<(), CheckpointError> {
        let positive = [
            ("embedding_length", self.hidden_size),
            ("feed_forward_length", self.intermediate_size),
            ("block_count", self.num_hidden_layers),
            ("attention.head_count", self.num_attention_heads),
            ("attention.head_count_kv", self.num_key_value_heads),
            ("context_length", self.max_position_embeddings),
            ("rows of token_embd.weight", self.vocab_size),
        ];
        let bad = |what: String| Err(CheckpointError::Hyperparameter(what));
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return bad(format!("hyperparameter `{key}` is zero"));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return bad(format!(
                "{} query heads cannot share {} key-value heads evenly",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(8) {
            return bad(format!("head size {} is not a multiple of 8", self.head_dim));
        }
        if !(self.rms_norm_eps.is_finite() && self.rope_theta.is_finite())
            || self.rope_theta <= 0.0
            || self.rms_norm_eps < 0.0
        {
            return bad("rms_norm_eps or rope_theta is not a usable number".to_owned());
        }
        Ok(())
    }

    /// Bytes that keys and values of one token take in all layers.
    pub fn kv_bytes_per_token(&self, bytes_per_value: usize) -> usize {
        2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value
    }
}
