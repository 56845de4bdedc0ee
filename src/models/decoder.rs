//! The decoder that the Qwen architectures share: a stack of layers with a residual stream between
//! an embedding and an output head. What sets an architecture apart is an [`Architecture`].

use candle_core::Result;

use super::{ForwardBatch, Model, ModelConfig};
use crate::layers::attention::{
    Attention, AttentionMetadata, AttentionShape, KvCache, RopeConfig, RopeTable,
};
use crate::layers::embedding::Embedding;
use crate::layers::linear::{Linear, Projection};
use crate::layers::lora::Adaptation;
use crate::layers::mlp::Mlp;
use crate::layers::norm::RmsNorm;
use crate::layers::sparse_mlp::{SparseMlp, SparseMlpShape};
use crate::layers::{Device, Tensor, gather_rows};
use crate::weights::checkpoint::Checkpoint;

/// What sets an architecture apart.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    /// Its name in GGUF files.
    pub name: &'static str,
    /// Whether queries and keys are normalised head by head before they are rotated.
    pub has_head_norms: bool,
    /// Present where layers may have experts.
    pub experts: Option<ExpertRules>,
}

/// How an architecture uses its experts.
#[derive(Clone, Copy, Debug)]
pub struct ExpertRules {
    /// Whether the weights of a token's experts sum up to one, where the file does not say.
    pub norm_topk_prob: bool,
}

/// What stands behind the attention of a layer.
enum FeedForward {
    Dense(Mlp),
    Sparse(Box<SparseMlp>),
}

impl FeedForward {
    fn load(
        architecture: &Architecture,
        checkpoint: &Checkpoint,
        prefix: &str,
        config: &ModelConfig,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let hidden_size = config.hidden_size;
        // Files say by their tensors which layers have experts.
        if let (Some(rules), Some(experts)) = (architecture.experts, config.experts)
            && SparseMlp::is_in(checkpoint, prefix)
        {
            let shape = SparseMlpShape {
                hidden_size,
                num_experts: experts.num_experts,
                num_experts_per_tok: experts.num_experts_per_tok,
                moe_intermediate_size: experts.moe_intermediate_size,
                shared_expert_intermediate_size: experts.shared_expert_intermediate_size,
                norm_topk_prob: experts.norm_topk_prob.unwrap_or(rules.norm_topk_prob),
            };
            let mlp = SparseMlp::load(checkpoint, prefix, shape, device)?;
            return Ok(Self::Sparse(Box::new(mlp)));
        }
        let mlp = Mlp::load(checkpoint, prefix, hidden_size, config.intermediate_size, device)?;
        Ok(Self::Dense(mlp))
    }

    /// `[num_tokens, hidden_size]` to the same shape. Adapters have nothing for experts.
    fn forward(&self, x: &Tensor, adapted: Adaptation<'_>) -> Result<Tensor> {
        match self {
            Self::Dense(mlp) => mlp.forward(x, adapted),
            Self::Sparse(mlp) => mlp.forward(x),
        }
    }

    fn num_bytes(&self) -> usize {
        match self {
            Self::Dense(mlp) => mlp.num_bytes(),
            Self::Sparse(mlp) => mlp.num_bytes(),
        }
    }
}

struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: FeedForward,
}

impl DecoderLayer {
    fn load(
        architecture: &Architecture,
        checkpoint: &Checkpoint,
        index: usize,
        config: &ModelConfig,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let prefix = format!("model.layers.{index}.");
        let norm = |name: &str| {
            let name = format!("{prefix}{name}");
            RmsNorm::load(checkpoint, &name, config.hidden_size, config.rms_norm_eps, device)
        };
        let shape = AttentionShape {
            hidden_size: config.hidden_size,
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            head_norm_eps: architecture.has_head_norms.then_some(config.rms_norm_eps),
            window: config.window_of(index),
        };
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(checkpoint, &format!("{prefix}self_attn."), shape, device)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: FeedForward::load(
                architecture,
                checkpoint,
                &format!("{prefix}mlp."),
                config,
                device,
            )?,
        })
    }

    /// `residual` is the stream before this layer, `x` what the layer below adds to it, if there is
    /// one.
    fn forward(
        &self,
        (x, residual): (Option<Tensor>, Tensor),
        adapted: Adaptation<'_>,
        (rope, kv): (&RopeTable, &KvCache),
        metadata: &AttentionMetadata,
    ) -> Result<(Option<Tensor>, Tensor)> {
        let (residual, x) = if let Some(x) = x {
            self.input_layernorm.add_forward(&x, &residual)?
        } else {
            let x = self.input_layernorm.forward(&residual)?;
            (residual, x)
        };
        let x = self.self_attn.forward(&x, adapted, (rope, kv), metadata)?;
        let (residual, x) = self.post_attention_layernorm.add_forward(&x, &residual)?;
        Ok((Some(self.mlp.forward(&x, adapted)?), residual))
    }

    fn num_bytes(&self) -> usize {
        self.self_attn.num_bytes() + self.mlp.num_bytes()
    }
}

/// A decoder with its output head.
pub struct Decoder {
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Linear,
    rope: RopeTable,
}

impl Decoder {
    /// Loads all parameters, for sequences of a greatest length; `on_layer` hears how many of the
    /// layers are done.
    pub fn load(
        architecture: &Architecture,
        checkpoint: &Checkpoint,
        (config, max_model_len): (&ModelConfig, usize),
        device: &Device,
        on_layer: &mut dyn FnMut(usize),
    ) -> anyhow::Result<Self> {
        let embed_tokens = Embedding::load(
            checkpoint,
            "model.embed_tokens",
            config.vocab_size,
            config.hidden_size,
            device,
        )?;
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            layers.push(DecoderLayer::load(architecture, checkpoint, index, config, device)?);
            on_layer(index + 1);
        }
        // A file without an output head ties it to the embedding.
        let tied = !checkpoint.contains("lm_head.weight");
        let name = if tied { "model.embed_tokens" } else { "lm_head" };
        let rope = RopeConfig {
            head_dim: config.head_dim,
            theta: f64::from(config.rope_theta),
            max_positions: max_model_len,
            scaling: config.rope_scaling,
        };
        let head = [Projection { name, out_features: config.vocab_size }];
        Ok(Self {
            embed_tokens,
            layers,
            norm: RmsNorm::load(
                checkpoint,
                "model.norm",
                config.hidden_size,
                config.rms_norm_eps,
                device,
            )?,
            lm_head: Linear::load(checkpoint, "", &head, config.hidden_size, device)?,
            rope: RopeTable::new(&rope, device)?,
        })
    }
}

impl Model for Decoder {
    fn forward(&self, batch: &ForwardBatch, kv: &[KvCache]) -> Result<Tensor> {
        let embedded = self.embed_tokens.forward(&batch.input_ids)?; // [num_tokens, hidden_size]
        let mut state = (None, embedded);
        for (index, (layer, kv)) in self.layers.iter().zip(kv).enumerate() {
            let adapted = Adaptation::new(&batch.adapted, index);
            state = layer.forward(state, adapted, (&self.rope, kv), &batch.attention)?;
        }
        // Only the rows whose logits are wanted go on.
        let (x, residual) = state;
        let residual = gather_rows(&residual, &batch.logits_indices)?; // [num_logits, hidden_size]
        let Some(x) = x else { return self.norm.forward(&residual) };
        let x = gather_rows(&x, &batch.logits_indices)?;
        Ok(self.norm.add_forward(&x, &residual)?.1)
    }

    fn compute_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.forward_f32(hidden) // [num_logits, vocab_size]
    }

    fn num_weight_bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(DecoderLayer::num_bytes).sum();
        layers + self.lm_head.num_bytes() + self.embed_tokens.num_bytes()
    }
}
