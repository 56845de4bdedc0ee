//! A feed-forward part made of experts, of which each token goes to a few (Shazeer et al. 2017).

use anyhow::ensure;
use candle_core::Result;

use super::linear::{Linear, Projection};
use super::lora::Adaptation;
use super::mlp::Mlp;
use crate::ops::experts::{Routes, add_gated};
use crate::ops::tensor::{Device, Tensor};
use crate::weights::checkpoint::Checkpoint;

/// Sizes of one such part, and how experts are chosen.
#[derive(Clone, Copy, Debug)]
pub struct SparseMlpShape {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Experts to choose from.
    pub num_experts: usize,
    /// Experts of a token.
    pub num_experts_per_tok: usize,
    /// Width inside an expert.
    pub moe_intermediate_size: usize,
    /// Width inside the expert that every token goes to; zero if there is none.
    pub shared_expert_intermediate_size: usize,
    /// Whether the weights of a token's experts sum up to one.
    pub norm_topk_prob: bool,
}

/// Experts, the router that chooses among them, and the one that all share.
pub struct SparseMlp {
    gate: Linear,
    experts: Vec<Mlp>,
    shared: Option<Shared>,
    shape: SparseMlpShape,
}

/// The expert of all tokens, and the gate that says how much of it a token gets.
struct Shared {
    gate: Linear,
    expert: Mlp,
}

impl SparseMlp {
    /// Whether a checkpoint has experts under this prefix; it may have them in some layers only.
    pub fn is_in(checkpoint: &Checkpoint, prefix: &str) -> bool {
        checkpoint.contains(&format!("{prefix}gate.weight"))
    }

    /// Loads `<prefix>gate`, `<prefix>experts.0.gate_proj` and its siblings.
    pub fn load(
        checkpoint: &Checkpoint,
        prefix: &str,
        shape: SparseMlpShape,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let SparseMlpShape { hidden_size, num_experts, .. } = shape;
        let linear = |name, out_features| {
            let projection = [Projection { name, out_features }];
            Linear::load(checkpoint, prefix, &projection, hidden_size, device)
        };
        let mlp = |name: &str, size| {
            Mlp::load(checkpoint, &format!("{prefix}{name}."), hidden_size, size, device)
        };
        let shared = match shape.shared_expert_intermediate_size {
            0 => None,
            size => Some(Shared {
                gate: linear("shared_expert_gate", 1)?,
                expert: mlp("shared_expert", size)?,
            }),
        };
        let prefixes: Vec<_> =
            (0..num_experts).map(|index| format!("{prefix}experts.{index}.")).collect();
        let sizes = (hidden_size, shape.moe_intermediate_size);
        let experts = Mlp::load_each(checkpoint, &prefixes, sizes, device)?;
        ensure!(
            matches!(device, Device::Cpu) || !experts.iter().any(Mlp::has_column_order),
            "the experts of `{prefix}` have their columns ordered by activation (`desc_act`), which \
             runs on the CPU only; pass `--device cpu`, or use a checkpoint without it"
        );
        Ok(Self { gate: linear("gate", num_experts)?, experts, shared, shape })
    }

    /// `[num_tokens, hidden_size]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let SparseMlpShape { hidden_size, num_experts_per_tok, norm_topk_prob, .. } = self.shape;
        let logits = self.gate.forward_f32(x)?; // [num_tokens, num_experts]
        let routes = Routes::choose(&logits, num_experts_per_tok, norm_topk_prob)?;
        let made = Mlp::forward_each(&self.experts, &routes.spread(x)?)?; // hidden_size columns
        let out = routes.combine(&made, hidden_size)?;
        let Some(Shared { gate, expert }) = &self.shared else { return Ok(out) };
        add_gated(&out, &gate.forward_f32(x)?, &expert.forward(x, Adaptation::NONE)?)
    }

    /// Memory that the weights take.
    pub fn num_bytes(&self) -> usize {
        let experts: usize = self.experts.iter().map(Mlp::num_bytes).sum();
        let shared = |shared: &Shared| shared.gate.num_bytes() + shared.expert.num_bytes();
        experts + self.gate.num_bytes() + self.shared.as_ref().map_or(0, shared)
    }
}
