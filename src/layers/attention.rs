//! Grouped-query self-attention with rotary positions over a paged cache.

use candle_core::Result;

use super::linear::{Linear, Projection};
use super::lora::{Adaptation, Site};
pub use crate::ops::kv_cache::{KvCache, KvDtype};
pub use crate::ops::paged_attention::AttentionMetadata;
pub use crate::ops::rope::{RopeConfig, RopeScaling, RopeTable, YarnScaling};

use crate::ops::head_norm::{HeadNorms, norm_heads};
use crate::ops::paged_attention::{Attending, paged_attention};
use crate::ops::rope::rope_and_cache;
use crate::ops::tensor::{Device, Tensor};
use crate::weights::checkpoint::Checkpoint;

/// Head counts and sizes of one attention layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Where queries and keys are normalised: what is added to the mean square of a head.
    pub head_norm_eps: Option<f32>,
    /// How many tokens a token looks at, itself included; all of them if absent.
    pub window: Option<usize>,
}

/// Self-attention of one decoder layer.
pub struct Attention {
    qkv_proj: Linear,
    head_norms: Option<HeadNorms>,
    o_proj: Linear,
    how: Attending,
}

impl Attention {
    /// Loads `<prefix>q_proj` and its siblings.
    pub fn load(
        checkpoint: &Checkpoint,
        prefix: &str,
        shape: AttentionShape,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let AttentionShape { hidden_size, num_heads, num_kv_heads, head_dim, .. } = shape;
        let weight = |name: &str| checkpoint.vector(&format!("{prefix}{name}.weight"), head_dim);
        let head_norms = match shape.head_norm_eps {
            None => None,
            Some(eps) => Some(HeadNorms {
                q_weight: Tensor::from_vec(weight("q_norm")?, (1, head_dim), device)?,
                k_weight: Tensor::from_vec(weight("k_norm")?, (1, head_dim), device)?,
                num_heads,
                num_kv_heads,
                eps,
            }),
        };
        let qkv = [
            Projection { name: "q_proj", out_features: num_heads * head_dim },
            Projection { name: "k_proj", out_features: num_kv_heads * head_dim },
            Projection { name: "v_proj", out_features: num_kv_heads * head_dim },
        ];
        let o = [Projection { name: "o_proj", out_features: hidden_size }];
        Ok(Self {
            qkv_proj: Linear::load(checkpoint, prefix, &qkv, hidden_size, device)?,
            head_norms,
            o_proj: Linear::load(checkpoint, prefix, &o, num_heads * head_dim, device)?,
            how: Attending { scale: (head_dim as f32).sqrt().recip(), window: shape.window },
        })
    }

    /// `[num_tokens, hidden_size]` to the same shape; writes the tokens' keys and values.
    pub fn forward(
        &self,
        x: &Tensor,
        adapted: Adaptation<'_>,
        (rope, kv): (&RopeTable, &KvCache),
        metadata: &AttentionMetadata,
    ) -> Result<Tensor> {
        // [num_tokens, (num_heads + 2 num_kv_heads) head_dim]
        let qkv = self.qkv_proj.forward_adapted(x, adapted, Site::Qkv)?;
        if let Some(norms) = &self.head_norms {
            norm_heads(&qkv, norms)?;
        }
        let q = rope_and_cache(&qkv, rope, kv, metadata)?; // [num_tokens, num_heads head_dim]
        let attended = paged_attention(&q, kv, metadata, self.how)?;
        self.o_proj.forward_adapted(&attended, adapted, Site::Output)
    }

    /// Memory that the weights take.
    pub fn num_bytes(&self) -> usize {
        self.qkv_proj.num_bytes() + self.o_proj.num_bytes()
    }
}
