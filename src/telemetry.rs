//! Logs, metrics and traces: set up once, names defined once.

pub mod logging;
pub mod metrics;
pub mod traces;
