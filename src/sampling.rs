//! Turns logits and parameters into a token, reproducibly.
//!
//! A draw is a function of the row of logits, the request's parameters and its random counter
//! (seed, choice, position), never of what else is in the batch. **Invariant:** no row is ever
//! sorted whole; the module `row` finds the largest logits from the maxima of short chunks.
//!
//! Start at [`Sampler::sample`]; [`DeviceSampler`] does the same on a card.

pub mod device_sampler;
pub mod logprobs;
pub mod params;
pub mod rng;
pub mod sampler;

mod penalties;
mod row;

pub use device_sampler::DeviceSampler;
pub use params::SamplingParams;
pub use sampler::Sampler;
