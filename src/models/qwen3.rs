//! Qwen3: heads of a width of their own, whose queries and keys are normalised before they are
//! rotated, and no biases.
//!
//! Source: `modeling_qwen3.py` of Hugging Face transformers and the Qwen3 report (arXiv 2505.09388).

use super::decoder::Architecture;

/// The norm of heads stands in for the biases of Qwen2.
pub const QWEN3: Architecture = Architecture { name: "qwen3", has_head_norms: true, experts: None };
