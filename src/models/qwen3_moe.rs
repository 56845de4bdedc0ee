//! Qwen3-30B-A3B and Qwen3-235B-A22B: Qwen3 with experts and none that all tokens share.
//!
//! Source: `modeling_qwen3_moe.py` of Hugging Face transformers and the Qwen3 report (arXiv
//! 2505.09388).

use super::decoder::{Architecture, ExpertRules};
use super::qwen3::QWEN3;

/// The weights of a token's experts sum up to one.
pub const QWEN3_MOE: Architecture =
    Architecture { name: "qwen3moe", experts: Some(ExpertRules { norm_topk_prob: true }), ..QWEN3 };
