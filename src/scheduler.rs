//! Decides which tokens run next. Pure: no tensors, clocks, async or randomness.
//!
//! There is no prefill phase and no decode phase. Every sequence has tokens whose keys and values
//! are not computed yet; each step hands out a token budget so that they catch up. Chunked prefill,
//! prefix-cache hits and recomputation after preemption are all the same rule. Start reading at
//! [`Scheduler::schedule`].

mod acceptance;
pub mod adapter;
mod admission;
mod ahead;
pub mod fairness;
mod prefill_budget;
pub mod priority;
mod prompt_lookup;
mod queue;
#[expect(clippy::module_inception, reason = "the file is named for its type")]
mod scheduler;
pub mod sequence;
pub mod snapshot;
pub mod speculation;
mod stats;
pub mod step;
mod step_cost;

pub use adapter::Adapter;
pub use fairness::FairnessId;
pub use priority::Priority;
pub use scheduler::{DoesNotFit, Scheduler, SchedulerConfig, SeqEvent, SeqFinish, SeqPhase};
pub use sequence::SequenceSpec;
pub use speculation::{Drafter, SpeculationConfig};
pub use stats::{SchedulerStats, SpeculationStats};

/// Identifies a sequence for the lifetime of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);
