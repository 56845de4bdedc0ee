//! The end of a request that was to be computed, wherever it comes.

use std::sync::Arc;
use std::time::Instant;

use super::access_log::Computed;
use super::caller::Caller;
use super::error::ApiError;
use super::state::AppState;
use crate::openai::generation::{FinishReason, Usage};
use crate::telemetry::metrics;

const REFUSED: &str = "refused";

/// Settles what a request takes from its client's quota and counts what its client has used when it
/// is over, however it ended.
pub(super) struct RequestLog {
    pub(super) caller: Caller,
    model: String,
    started: Option<Instant>,
    first_delta: Option<Instant>,
    pub(super) usage: Usage,
    /// Tokens of the prompt that were taken from the client's quota.
    num_reserved: usize,
    finish_reasons: Vec<&'static str>,
    outcome: &'static str,
}

impl RequestLog {
    pub(super) fn new(caller: &Caller, state: &AppState) -> Self {
        Self {
            caller: caller.clone(),
            model: caller.chosen.served_name(state).to_string(),
            started: None,
            first_delta: None,
            usage: Usage::default(),
            num_reserved: 0,
            finish_reasons: Vec::new(),
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
            Some(holder) => {
                // A list of inputs may have been computed in part.
                holder.give_back(self.num_reserved.saturating_sub(self.usage.prompt_tokens));
                holder.charge(self.usage.completion_tokens);
            }
            None => {}
        }
    }

    /// It left the queue.
    pub(super) fn start(&mut self) {
        self.started.get_or_insert_with(Instant::now);
    }

    /// A piece of the answer was sent, which may be a choice's last.
    pub(super) fn delta(&mut self, finish: Option<FinishReason>) {
        self.first_delta.get_or_insert_with(Instant::now);
        self.finish_reasons.extend(finish.map(reason_name));
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

/// As clients are told it.
fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ToolCalls | FinishReason::FunctionCall => "tool_calls",
    }
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        self.settle();
        let (usage, outcome) = (self.usage, self.outcome);
        if let Some(meter) = &self.caller.meter {
            meter.settle(&usage, matches!(outcome, REFUSED | "failed"));
        }
        metrics::client_request(&metrics::ClientRequest {
            client: &self.caller.client,
            outcome,
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.prompt_tokens_details.cached_tokens,
            completion_tokens: usage.completion_tokens,
        });
        self.caller.account.settle(Computed {
            usage,
            client: Arc::clone(&self.caller.client),
            model: std::mem::take(&mut self.model),
            started: self.started,
            first_token: self.first_delta,
            finish_reasons: std::mem::take(&mut self.finish_reasons),
            outcome,
        });
    }
}
