//! What a client asked, validated once at the door.

use std::sync::Arc;

use crate::grammar::Grammar;
pub use crate::sampling::params::{
    GenerationDefaults, InvalidParam, SamplingOptions, SamplingParams,
};
use crate::text::TokenId;

/// When a sequence ends, apart from stop strings, which are matched on text by `chat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopConditions {
    /// At most this many tokens are generated. Zero only computes the prompt.
    pub max_tokens: usize,
    /// Drawing one of these ends the sequence: the model's end-of-sequence set (unless
    /// `ignore_eos`) and the request's own `stop_token_ids`.
    pub stop_token_ids: Arc<[TokenId]>,
}

/// A request the engine can run. Nothing later re-checks it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Identifies the request in logs and events.
    pub id: Arc<str>,
    /// The prompt; never empty.
    pub prompt: Arc<[TokenId]>,
    /// How tokens are drawn.
    pub params: Arc<SamplingParams>,
    /// When to end.
    pub stop: StopConditions,
    /// How many choices to generate; at least one.
    pub n: u32,
    /// What every choice must look like. A choice whose grammar is complete ends, whatever
    /// `ignore_eos` and `min_tokens` say.
    pub grammar: Option<Arc<Grammar>>,
    /// Prefix-cache hits happen only between requests with the same salt.
    pub cache_salt: Option<Arc<str>>,
}
