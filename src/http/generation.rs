//! A submitted request: its prompts' updates as one stream, its usage, its line in the log.
//!
//! Dropping a [`Generation`] aborts what still runs. That is the one path for "the client left",
//! streaming or not.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::stream::SelectAll;
use futures_util::{Stream, StreamExt};
use tracing::Span;
use uuid::Uuid;

use super::caller::Caller;
use super::error::ApiError;
use super::request_log::RequestLog;
use super::state::{AppState, unix_seconds};
use crate::chat::constraint;
use crate::chat::output::{OutputError, RequestOutput, Update};
use crate::chat::prompt::Prepared;
use crate::engine::EventStream;
use crate::openai::generation::{GenerationFields, Usage};

/// What every response to one request, whole or in chunks, begins with.
#[derive(Clone, Debug)]
pub(super) struct ResponseHead {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

impl ResponseHead {
    /// `prefix` is the kind of object the id names.
    pub(super) fn new(prefix: &str, model: &str) -> Self {
        Self {
            id: format!("{prefix}-{}", Uuid::now_v7().simple()),
            created: unix_seconds(),
            model: model.to_owned(),
        }
    }
}

/// A request that runs.
pub(super) struct Generation {
    prompts: SelectAll<PromptUpdates>,
    usage: Usage,
    log: RequestLog,
}

impl Generation {
    /// Submits every prompt, or none: dropping the streams of the first aborts them.
    pub(super) fn submit(
        state: &AppState,
        caller: &Caller,
        prepared: Vec<Prepared>,
    ) -> Result<Self, ApiError> {
        let mut log = RequestLog::new(caller, state);
        if state.engine.is_loading() {
            return Err(ApiError::Loading);
        }
        let prompt_tokens = prepared.iter().map(|one| one.request.prompt.len()).sum();
        log.reserve(prompt_tokens)?;
        let usage = Usage { prompt_tokens, total_tokens: prompt_tokens, ..Usage::default() };
        let mut prompts = SelectAll::new();
        for (index, mut prepared) in prepared.into_iter().enumerate() {
            caller.sign(&mut prepared.request, state);
            let events = state.engine.generate(prepared.request)?;
            let output = prepared.output;
            prompts.push(PromptUpdates { index, events, output, is_over: false });
        }
        Ok(Self { prompts, usage, log: log.begin(usage) })
    }

    /// The next update and the prompt it belongs to; `None` after every choice has ended. Nothing
    /// follows an error.
    pub(super) async fn next(&mut self) -> Option<Result<(usize, Update), ApiError>> {
        let Some((prompt, result)) = self.prompts.next().await else {
            self.log.end("finished");
            return None;
        };
        let update = match result {
            Ok(update) => update,
            Err(error) => {
                self.log.end("failed");
                if let OutputError::Failed(reason) = &error {
                    tracing::error!(%reason, "the engine failed a request");
                }
                return Some(Err(error.into()));
            }
        };
        match &update {
            Update::Started { num_cached_tokens, num_pinned_tokens, .. } => {
                self.log.start();
                let details = &mut self.usage.prompt_tokens_details;
                details.cached_tokens += num_cached_tokens;
                details.cache_write_tokens = *num_pinned_tokens;
                details.cache_creation_input_tokens = *num_pinned_tokens;
            }
            Update::Delta(delta) => {
                self.usage.completion_tokens += delta.tokens.len();
                self.usage.total_tokens += delta.tokens.len();
                self.usage.completion_tokens_details.reasoning_tokens += delta.num_reasoning_tokens;
                self.log.delta(delta.finish.as_ref().map(|finish| finish.reason));
            }
        }
        self.log.usage = self.usage;
        Some(Ok((prompt, update)))
    }

    /// What was used so far.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }
}

impl Drop for Generation {
    /// What was generated for a client that did not read it was generated all the same.
    fn drop(&mut self) {
        let prompts = self.prompts.iter_mut();
        let num_unread: usize = prompts.map(|prompt| prompt.events.num_unread_tokens()).sum();
        self.log.usage.completion_tokens += num_unread;
        self.log.usage.total_tokens += num_unread;
    }
}

/// The updates of one prompt.
struct PromptUpdates {
    index: usize,
    events: EventStream,
    output: RequestOutput,
    is_over: bool,
}

impl Stream for PromptUpdates {
    type Item = (usize, Result<Update, OutputError>);

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(update) = this.output.next_update() {
                return Poll::Ready(Some((this.index, Ok(update))));
            }
            if this.is_over || this.output.is_finished() {
                return Poll::Ready(None);
            }
            let pushed = match ready!(this.events.poll_next_unpin(context)) {
                Some(event) => this.output.push(event),
                None => Err(OutputError::Failed("the events ended early".into())),
            };
            match pushed {
                Ok(None) => {}
                Ok(Some(choice)) => this.events.cancel_choice(choice),
                Err(error) => {
                    this.is_over = true;
                    return Poll::Ready(Some((this.index, Err(error))));
                }
            }
        }
    }
}

/// The size of the body as far as preparing it goes: a grammar always counts as large, because
/// compiling it may block.
pub(super) fn preparation_bytes(fields: &GenerationFields, num_bytes: usize) -> usize {
    if constraint::is_asked_for(fields) { usize::MAX } else { num_bytes }
}

/// Runs `work` here when the body it reads is small, else where it may block.
pub(super) async fn run_sized<T: Send + 'static>(
    num_bytes: usize,
    state: &AppState,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    if num_bytes <= state.limits.max_inline_body_bytes {
        return Ok(work());
    }
    let span = Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work)).await.map_err(|error| {
        tracing::error!(%error, "preparing a request panicked");
        ApiError::Internal
    })
}
