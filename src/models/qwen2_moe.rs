//! Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2 with experts, one of which every token goes to, as far as a
//! gate lets it.
//!
//! Source: `modeling_qwen2_moe.py` of Hugging Face transformers and the Qwen2 report (arXiv
//! 2407.10671, section 2.2.2).

use super::decoder::{Architecture, ExpertRules};
use super::qwen2::QWEN2;

/// The weights of a token's experts are the router's probabilities as they are.
pub const QWEN2_MOE: Architecture = Architecture {
    name: "qwen2moe",
    experts: Some(ExpertRules { norm_topk_prob: false }),
    ..QWEN2
};
