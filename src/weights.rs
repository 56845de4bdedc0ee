//! Finds, checks and maps checkpoints.
//!
//! Start with [`resolve`], which turns what a user typed into files; [`gguf`] reads them.
//! [`catalogue`] knows the published releases and [`hub`] fetches them.

pub mod catalogue;
pub mod checkpoint;
pub mod dummy;
pub mod gguf;
pub mod hub;
pub mod resolve;
