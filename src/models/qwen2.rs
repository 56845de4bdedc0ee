//! Qwen2 and Qwen2.5: the Llama layout with biases on the query, key and value projections.
//!
//! Source: `modeling_qwen2.py` of Hugging Face transformers and the Qwen2 report (arXiv 2407.10671).

use super::decoder::Architecture;

/// Nothing beside the decoder that all share; biases are read where the file has them.
pub const QWEN2: Architecture =
    Architecture { name: "qwen2", has_head_norms: false, experts: None };
