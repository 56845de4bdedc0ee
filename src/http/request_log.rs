//! The end of a request that was to be computed, wherever it comes.

use std::time::Instant;

use super::caller::Caller;
use super::error::ApiError;
use crate::openai::generation::Usage;

const REFUSED: &str = "refused";

/// Settles what a request takes from its client's quota, reads its meter and writes one line when it
/// is over, however it ended. Never what was said.
pub(super) struct RequestLog {
    pub(super) caller: Caller,
    started: Instant,
    first_delta: Option<Instant>,
    pub(super) usage: Usage,
    /// Tokens of the prompt that were taken from the client's quota.
    num_reserved: usize,
    outcome: &'static str,
}

impl RequestLog {
    pub(super) fn new(caller: &Caller) -> Self {
        Self {
            caller: caller.clone(),
            started: Instant::now(),
            first_delta: None,
            usage: Usage::default(),
            num_reserved: 0,
            outcome: REFUSED,
        }
    }

    /// Takes the tokens of the prompt from the client's quota. What the completion takes follows at
    /// the end.
    pub(super) fn reserve(&mut self, num_tokens: usize) -> Result<(), ApiError> {
        if let Some(holder) = self.caller.holder() {
            holder.reserve(num_tokens)?;
            self.num_reserved = num_tokens;
        }
        Ok(())
    }

    fn settle(&self) {
        match self.caller.holder() {
            Some(holder) if self.outcome == REFUSED => holder.give_back(self.num_reserved),
            Some(holder) => holder.charge(self.usage.completion_tokens),
            None => {}
        }
    }

    /// A piece of the answer was sent.
    pub(super) fn delta(&mut self) {
        self.first_delta.get_or_insert_with(Instant::now);
    }

    /// Says how it ended; otherwise its client has left.
    pub(super) fn end(&mut self, outcome: &'static str) {
        self.outcome = outcome;
    }

    /// It was let in.
    pub(super) fn begin(mut self, usage: Usage) -> Self {
        self.usage = usage;
        self.outcome = "cancelled";
        self
    }
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        self.settle();
        if let Some(meter) = &self.caller.meter {
            meter.settle(&self.usage, matches!(self.outcome, REFUSED | "failed"));
        }
        let millis = |instant: Instant| (instant - self.started).as_millis() as u64;
        tracing::info!(
            request_id = %self.caller.request_id,
            client = %self.caller.client,
            prompt_tokens = self.usage.prompt_tokens,
            cached_tokens = self.usage.prompt_tokens_details.cached_tokens,
            completion_tokens = self.usage.completion_tokens,
            first_token_ms = self.first_delta.map(millis),
            total_ms = millis(Instant::now()),
            outcome = self.outcome,
            "request finished"
        );
    }
}
