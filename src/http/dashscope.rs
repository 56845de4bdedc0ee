//! DashScope's native endpoints.

mod body;
mod embedding;
mod generation;
mod inspection;
mod refused;

pub(super) use embedding::create as embed;
pub(super) use generation::{media, text};
pub(super) use inspection::{models, tokenize};
pub(super) use refused::refusal;
