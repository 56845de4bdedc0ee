//! qwen-server: a self-hosted inference server for Qwen open weights.

pub mod cli;
pub mod config;
pub mod engine;
pub mod kv;
pub mod sampling;
pub mod scheduler;
pub mod text;
