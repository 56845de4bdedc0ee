//! What runs the tensors: CPU threads, later accelerators.

pub mod threads;
