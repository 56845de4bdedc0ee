//! Decides which tokens run next. Pure: no tensors, clocks, async or randomness.

pub mod step;

/// Identifies a sequence for the lifetime of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);
