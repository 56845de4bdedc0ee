//! Turns a scheduler's decision into device inputs, runs the model and returns tokens.
//!
//! Owns the weights, the KV cache and the sampler. **Invariant:** it decides nothing: which tokens
//! run, and where their keys and values live, comes from the scheduler.

pub mod batch;
pub mod drafted;
mod gpu_steps;
pub mod load;
pub mod memory;
pub mod model_runner;

pub use drafted::DraftedRunner;
pub use model_runner::ModelRunner;
