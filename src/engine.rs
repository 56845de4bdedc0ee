//! Owns the step loop, request lifetimes and cancellation: the only bridge between async code and
//! the model's thread.

pub mod event;
pub mod request;
