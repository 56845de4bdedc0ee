#![doc = include_str!("../docs/ARCHITECTURE.md")]

pub mod cli;
pub mod config;
pub mod device;
pub mod engine;
pub mod kv;
pub mod layers;
pub mod models;
pub mod ops;
pub mod runner;
pub mod sampling;
pub mod scheduler;
pub mod telemetry;
pub mod text;
pub mod weights;
