//! Turns logits and parameters into a token, reproducibly.

pub mod params;

pub use params::SamplingParams;
