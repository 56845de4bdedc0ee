//! qwen-server: a self-hosted inference server for Qwen open weights.

pub mod engine;
pub mod kv;
pub mod sampling;
pub mod scheduler;
pub mod telemetry;
pub mod text;
