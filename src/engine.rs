//! Owns the step loop, request lifetimes and cancellation: the only bridge between async code and
//! the model's thread.
//!
//! ```text
//! async tasks    EngineHandle::generate ──Command──►  engine thread: commands → schedule → run
//!                EventStream            ◄──Event────                 → update → events
//! ```
//!
//! **Invariant:** the engine thread never waits for a client, and a client never waits for a lock
//! of the engine thread. Start reading at [`handle::EngineHandle`], then [`thread`].

mod active;
pub mod core;
mod door;
pub mod event;
mod grammars;
pub mod handle;
mod heartbeat;
mod pace;
pub mod request;
mod seats;
pub mod snapshot;
pub mod stats;
mod thinking;
pub mod thread;
mod timed;
mod watchdog;

pub use event::{Event, FinishReason};
pub use handle::{EngineHandle, EventStream, SubmitError};
pub use request::{Request, StopConditions};
pub use stats::{EngineLimits, EngineStats, Health};
pub use thread::{EngineConfig, spawn};
