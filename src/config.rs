//! Turns defaults, files, the environment and flags into settings.

pub mod hub_env;
