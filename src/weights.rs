//! Finds, checks and maps checkpoints.
//!
//! Start with [`resolve`], which turns what a user typed into files; [`gguf`] and [`repository`]
//! read them, and [`checkpoint`] is what both come to. [`catalogue`] knows the published releases
//! and [`hub`] fetches them.

pub mod catalogue;
pub mod checkpoint;
pub mod dummy;
pub mod gguf;
pub mod hub;
pub mod lora;
pub mod quantize;
pub mod repository;
pub mod resolve;
pub mod safetensors;
pub mod scheme;
pub mod tensor_bytes;
