//! What a client asked, validated once at the door.

use std::sync::Arc;
use std::time::Instant;

use crate::grammar::Grammar;
pub use crate::kv::Pin;
pub use crate::sampling::params::{
    GenerationDefaults, InvalidParam, SamplingOptions, SamplingParams,
};
pub use crate::scheduler::step::Pooling;
pub use crate::scheduler::{Adapter, Priority};
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

/// How long a choice may think, in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinkingBudget {
    /// Most tokens of thought, without those that open and end it.
    pub num_tokens: usize,
    /// The token that opens a thought if it is the first; `None` if the prompt has opened one.
    pub open: Option<TokenId>,
    /// The token that ends a thought.
    pub close: TokenId,
    /// What a thought that takes too long is ended with; `close` is in it.
    pub end: Arc<[TokenId]>,
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
    /// How long every choice may think.
    pub thinking: Option<ThinkingBudget>,
    /// Prefix-cache hits happen only between requests with the same salt.
    pub cache_salt: Option<Arc<str>>,
    /// How urgent it is.
    pub priority: Priority,
    /// On whose behalf. Those who ask at the same time share the engine evenly.
    pub fairness_id: Option<Arc<str>>,
    /// When its client stops waiting for an answer.
    pub deadline: Option<Instant>,
    /// Beginnings of the prompt to keep in the cache for a while.
    pub pins: Arc<[Pin]>,
    /// Present when the prompt's embedding is wanted; then nothing is generated.
    pub pooling: Option<Pooling>,
    /// What it is computed with beside the model.
    pub adapter: Option<Adapter>,
}
