//! The parts models are made of. Quantised or dense, flash or plain, is decided below, in `ops`.

pub mod attention;
pub mod content;
pub mod embedding;
pub mod linear;
pub mod lora;
pub mod mlp;
pub mod norm;
pub mod sparse_mlp;

pub use crate::ops::gather_rows::gather_rows;
pub use crate::ops::indices::Indices;
pub use crate::ops::tensor::{Device, Tensor};
