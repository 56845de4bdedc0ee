//! Hyperparameters under the names of Hugging Face's `config.json`.

mod config_json;

use crate::config::RopeScalingChoice;
use crate::layers::attention::{KvDtype, RopeScaling};
use crate::weights::checkpoint::{Checkpoint, CheckpointError, Source};
use crate::weights::gguf::{Gguf, Metadata};

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
    /// Longest sequence the model can read: what it was trained for, or more with stretched positions.
    pub max_position_embeddings: usize,
    /// Added to the mean square before its root is taken.
    pub rms_norm_eps: f32,
    /// Base of the rotary angles.
    pub rope_theta: f32,
    /// How positions are stretched in sequences longer than those it was trained for.
    pub rope_scaling: RopeScaling,
    /// Present where layers have experts.
    pub experts: Option<ExpertsConfig>,
    /// Present where layers look at the latest tokens only.
    pub sliding_window: Option<SlidingWindow>,
}

/// What GGUF files call a window's length and the layers that have it, behind the architecture.
pub const SLIDING_WINDOW_KEYS: [&str; 2] =
    ["attention.sliding_window", "attention.sliding_window_pattern"];

/// Layers that look at the latest tokens only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlidingWindow {
    /// How many tokens a token looks at, itself included.
    pub num_tokens: usize,
    /// Which layers these are.
    pub layers: Vec<bool>,
}

impl SlidingWindow {
    /// Reads llama.cpp's keys: the window's length, and which layers have it.
    ///
    /// Without the latter the former is nothing to go by: converters take it over from models that
    /// do not use it (`use_sliding_window`), and llama.cpp does not look at it in Qwen's files.
    fn from_gguf(
        metadata: &Metadata,
        architecture: &str,
        num_layers: usize,
    ) -> Result<Option<Self>, CheckpointError> {
        let [length, pattern] = SLIDING_WINDOW_KEYS.map(|key| format!("{architecture}.{key}"));
        let bad = |what: String| Err(CheckpointError::Hyperparameter(what));
        let Some(layers) = metadata.optional(&pattern, Metadata::bools)? else { return Ok(None) };
        if layers.len() != num_layers {
            return bad(format!("`{pattern}` is of {} layers, not of {num_layers}", layers.len()));
        }
        if !layers.contains(&true) {
            return Ok(None);
        }
        match metadata.optional(&length, Metadata::u32)? {
            None | Some(0) => bad(format!("`{pattern}` wants windows, but `{length}` has none")),
            Some(num_tokens) => Ok(Some(Self { num_tokens: num_tokens as usize, layers })),
        }
    }
}

/// The experts of a model. Which layers have them is said by the parameters that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// Experts of a layer to choose from.
    pub num_experts: usize,
    /// Experts that a token goes to.
    pub num_experts_per_tok: usize,
    /// Width inside an expert.
    pub moe_intermediate_size: usize,
    /// Width inside the expert that every token goes to; zero if there is none.
    pub shared_expert_intermediate_size: usize,
    /// Whether the weights of a token's experts sum up to one; `None` leaves it to the architecture.
    pub norm_topk_prob: Option<bool>,
}

impl ExpertsConfig {
    /// Reads what GGUF files say of experts, if they have any. Older ones leave out the widths, as
    /// llama.cpp knows them by those of the dense layers.
    fn from_gguf(
        metadata: &Metadata,
        architecture: &str,
        intermediate_size: usize,
    ) -> Result<Option<Self>, CheckpointError> {
        let size = |key: &str| -> Result<Option<usize>, CheckpointError> {
            let value = metadata.optional(&format!("{architecture}.{key}"), Metadata::u32)?;
            Ok(value.map(|value| value as usize))
        };
        let Some(num_experts) = size("expert_count")?.filter(|count| 0 < *count) else {
            return Ok(None);
        };
        let bad = |what: &str| Err(CheckpointError::Hyperparameter(what.to_owned()));
        // Softmax is 1; Qwen's experts are chosen by nothing else.
        if size("expert_gating_func")?.is_some_and(|function| function != 1) {
            return bad("experts that are not chosen by softmax are not supported");
        }
        let scale = format!("{architecture}.expert_weights_scale");
        if metadata
            .optional(&scale, Metadata::f32)?
            .is_some_and(|scale| ![0.0, 1.0].contains(&scale))
        {
            return bad("experts whose weights are scaled are not supported");
        }
        let num_experts_per_tok = size("expert_used_count")?.unwrap_or(0);
        if num_experts_per_tok == 0 || num_experts < num_experts_per_tok {
            return bad("`expert_used_count` is not between one and `expert_count`");
        }
        let wide = size("expert_feed_forward_length")?;
        let moe_intermediate_size = wide.unwrap_or(intermediate_size / num_experts_per_tok);
        let shared = match size("expert_shared_feed_forward_length")? {
            None if architecture == "qwen2moe" => intermediate_size,
            shared => shared.unwrap_or(0),
        };
        if moe_intermediate_size == 0 {
            return bad("hyperparameter `expert_feed_forward_length` is zero");
        }
        let norm = format!("{architecture}.expert_weights_norm");
        Ok(Some(Self {
            num_experts,
            num_experts_per_tok,
            moe_intermediate_size,
            shared_expert_intermediate_size: shared,
            norm_topk_prob: metadata.optional(&norm, Metadata::bool)?,
        }))
    }
}

impl ModelConfig {
    /// The architecture by its GGUF name, such as `qwen2`, even if no model of it can be run.
    pub fn architecture_of(checkpoint: &Checkpoint) -> Result<String, CheckpointError> {
        match checkpoint.source() {
            Source::Gguf(gguf) => Ok(gguf.metadata().str("general.architecture")?.to_owned()),
            Source::Repository(repository) => Ok(config_json::architecture(repository.config())?),
        }
    }

    /// Reads the hyperparameters from the files and checks that they make sense together. Positions
    /// are stretched as `scaling` says.
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        scaling: RopeScalingChoice,
    ) -> Result<Self, CheckpointError> {
        let mut config = match checkpoint.source() {
            Source::Gguf(gguf) => Self::from_gguf(gguf)?,
            Source::Repository(repository) => config_json::read(repository)?,
        };
        config.check()?;
        config.stretch(scaling, checkpoint.source())?;
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
        let intermediate_size = size("feed_forward_length")?;
        let num_hidden_layers = size("block_count")?;
        Ok(Self {
            rope_scaling: RopeScaling::None,
            experts: ExpertsConfig::from_gguf(metadata, &architecture, intermediate_size)?,
            sliding_window: SlidingWindow::from_gguf(metadata, &architecture, num_hidden_layers)?,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
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

    /// Values that the feed-forward part of a layer holds of one token at most: what is inside of it
    /// and, of experts, what each puts out.
    pub fn feed_forward_values_per_token(&self) -> usize {
        let sparse = self.experts.map_or(0, |experts| {
            let one = 3 * experts.moe_intermediate_size + 2 * self.hidden_size;
            let shared = 3 * experts.shared_expert_intermediate_size + self.hidden_size;
            experts.num_experts + experts.num_experts_per_tok * one + shared
        });
        sparse.max(3 * self.intermediate_size)
    }

    /// How many tokens a token looks at in a layer, itself included; all of them if absent.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        let sliding = self.sliding_window.as_ref()?;
        sliding.layers.get(layer).copied().unwrap_or(false).then_some(sliding.num_tokens)
    }

    /// Bytes that keys and values of one token take in all layers.
    pub fn kv_bytes_per_token(&self, dtype: KvDtype) -> usize {
        2 * self.num_hidden_layers * self.num_key_value_heads * dtype.row_bytes(self.head_dim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::gguf::writer::Writer;

    #[test]
    fn a_file_says_which_layers_have_a_window() {
        let read = |writer: Writer| {
            let file = tempfile::NamedTempFile::new().unwrap();
            let tensor = [0; 32];
            let bytes = writer.tensor("token_embd.weight", &[4, 2], 0, &tensor).build();
            std::fs::write(file.path(), bytes).unwrap();
            let gguf = Gguf::open(file.path()).unwrap();
            SlidingWindow::from_gguf(gguf.metadata(), "qwen2", 3)
        };
        let [length, pattern] = SLIDING_WINDOW_KEYS.map(|key| format!("qwen2.{key}"));
        let layers = [false, true, true];
        let window = SlidingWindow { num_tokens: 7, layers: layers.to_vec() };
        let sliding = || Writer::new().u32(&length, 7);
        for (writer, expected) in [
            (Writer::new(), None),
            (sliding(), None),
            (sliding().bools(&pattern, &[false; 3]), None),
            (sliding().bools(&pattern, &layers), Some(window.clone())),
            (sliding().i32s(&pattern, &[0, 1, 1]), Some(window)),
        ] {
            assert_eq!(read(writer).unwrap(), expected);
        }
        for (writer, part) in [
            (Writer::new().bools(&pattern, &layers), "`qwen2.attention.sliding_window` has none"),
            (Writer::new().u32(&length, 0).bools(&pattern, &layers), "has none"),
            (sliding().bools(&pattern, &[true; 2]), "is of 2 layers, not of 3"),
            (sliding().u32(&pattern, 2), "an array of true and false"),
        ] {
            let message = read(writer).unwrap_err().to_string();
            assert!(message.contains(part), "{part}: {message}");
        }
    }
}
