//! One mathematical operation per file.

pub mod embedding;
pub mod gguf_blocks;
pub mod matmul;
