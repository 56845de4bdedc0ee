//! What the engine tells a request while it runs.

pub use crate::scheduler::step::{SampledToken, TokenLogprobs};

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was drawn, or the grammar is complete.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
    /// The request was cancelled by the engine (shutdown).
    Abort,
    /// The engine could not compute it; an [`Event::Failed`] says why.
    Error,
}

/// One thing that happened to a request. Per choice, `Token` events come in order and `Finished`
/// is last; the stream ends after every choice has finished or after `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request left the queue; sent once, before anything else.
    Started {
        /// Prompt tokens found in the prefix cache when the request's first choice started.
        num_cached_tokens: usize,
    },
    /// Log-probabilities of the next prompt tokens (choice 0 only), in order.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// So many prompt tokens that were not cached before are kept in the cache for a while. Sent
    /// once, before the first choice's first token, to a request with pins.
    Pinned {
        /// How many.
        num_tokens: usize,
    },
    /// The embedding of the prompt, of any length.
    Pooled(Vec<f32>),
    /// A token was generated. A stop token is reported too, just before `Finished`.
    Token {
        /// Which of the `n` choices.
        choice: u32,
        /// The token.
        token: SampledToken,
    },
    /// A choice ended.
    Finished {
        /// Which of the `n` choices.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
    /// Its deadline passed; nothing more is computed.
    Expired,
    /// The whole request failed.
    Failed(String),
}
