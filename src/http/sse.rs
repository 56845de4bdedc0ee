//! Server-sent events: chunks as `data:` lines, a comment now and then, an end that clients know.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, stream};
use serde::Serialize;
use tokio::time::timeout;

use super::error::ApiError;
use super::generation::Generation;
use super::state::HttpLimits;
use crate::chat::output::Update;
use crate::openai::generation::{GenerationFields, Usage};
use crate::openai::stream::ChunkUsage;

/// What ends a stream that did not fail.
const DONE: &str = "[DONE]";

/// Turns updates into the chunks of an endpoint.
pub(super) trait RenderChunks: Send + 'static {
    /// The endpoint's chunk type.
    type Chunk: Serialize;

    /// Chunks that need no update.
    fn begin(&mut self) -> Vec<Self::Chunk>;
    /// Chunks for an update of a prompt.
    fn update(&mut self, prompt: usize, update: Update, usage: Usage) -> Vec<Self::Chunk>;
    /// Chunks after the last update.
    fn end(&mut self, usage: Usage) -> Vec<Self::Chunk>;
}

/// When chunks carry usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UsageMode {
    /// Never.
    Off,
    /// In a last chunk without choices; null before.
    Final,
    /// In every chunk, as far as it is known.
    Continuous,
}

impl UsageMode {
    pub(super) fn of(fields: &GenerationFields) -> Self {
        let options = fields.stream_options.clone().unwrap_or_default();
        match (options.include_usage, options.continuous_usage_stats) {
            (Some(true), Some(true)) => Self::Continuous,
            (Some(true), _) => Self::Final,
            _ => Self::Off,
        }
    }

    /// The `usage` of a chunk with choices.
    pub(super) fn in_chunk(self, usage: Usage) -> ChunkUsage {
        match self {
            Self::Off => ChunkUsage::NotAsked,
            Self::Final => ChunkUsage::Pending,
            Self::Continuous => ChunkUsage::Known(usage),
        }
    }
}

/// The response that streams a generation. It begins with the first piece of an answer, so that
/// what fails before has a status of its own, but no later than a keep-alive is due.
pub(super) async fn response<R: RenderChunks>(
    generation: Generation,
    renderer: R,
    limits: &HttpLimits,
) -> Result<Response, ApiError> {
    let mut producer = Producer::new(generation, renderer);
    if let Ok(begun) = timeout(limits.keep_alive, producer.begin()).await {
        begun?;
    }
    let keep_alive = KeepAlive::new().interval(limits.keep_alive).text("keep-alive");
    let mut response = Sse::new(events(producer)).keep_alive(keep_alive).into_response();
    // Proxies must not collect a stream before they pass it on.
    let name = HeaderName::from_static("x-accel-buffering");
    response.headers_mut().insert(name, HeaderValue::from_static("no"));
    Ok(response)
}

struct Producer<R> {
    /// `None` after the last update.
    generation: Option<Generation>,
    renderer: R,
    ready: VecDeque<String>,
}

fn events<R: RenderChunks>(producer: Producer<R>) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(producer, |mut producer| async move {
        loop {
            if let Some(data) = producer.ready.pop_front() {
                return Some((Ok(Event::default().data(data)), producer));
            }
            if let Err(error) = producer.refill().await? {
                producer.ready.push_back(to_json(&error.body()));
            }
        }
    })
}

impl<R: RenderChunks> Producer<R> {
    fn new(generation: Generation, mut renderer: R) -> Self {
        let ready = renderer.begin().iter().map(to_json).collect();
        Self { generation: Some(generation), renderer, ready }
    }

    /// Waits for the first piece of an answer, which is more than what a stream begins with.
    async fn begin(&mut self) -> Result<(), ApiError> {
        let num_first = self.ready.len();
        while self.ready.len() == num_first {
            match self.refill().await {
                Some(refilled) => refilled?,
                None => break,
            }
        }
        Ok(())
    }

    /// Waits for more data; `None` when the stream is over. Nothing is lost when it is dropped.
    async fn refill(&mut self) -> Option<Result<(), ApiError>> {
        let generation = self.generation.as_mut()?;
        match generation.next().await {
            Some(Ok((prompt, update))) => {
                let chunks = self.renderer.update(prompt, update, generation.usage());
                self.ready.extend(chunks.iter().map(to_json));
            }
            Some(Err(error)) => {
                self.generation = None;
                return Some(Err(error));
            }
            None => {
                let chunks = self.renderer.end(generation.usage());
                self.ready.extend(chunks.iter().map(to_json));
                self.ready.push_back(DONE.to_owned());
                self.generation = None;
            }
        }
        Some(Ok(()))
    }
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("wire types have string keys and cannot fail to serialise")
}
