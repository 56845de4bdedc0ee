//! qwen-server: a self-hosted inference server for Qwen open weights.

pub mod chat;
pub mod engine;
pub mod kv;
pub mod sampling;
pub mod scheduler;
pub mod text;
