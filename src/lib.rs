//! qwen-server: a self-hosted inference server for Qwen open weights.

pub mod chat;
pub mod engine;
pub mod http;
pub mod kv;
pub mod openai;
pub mod sampling;
pub mod scheduler;
pub mod telemetry;
pub mod text;
