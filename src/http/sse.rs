//! Server-sent events: chunks as `data:` lines, a comment now and then, an end that clients know.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
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
/// A comment, which clients skip.
const KEEP_ALIVE: &[u8] = b":keep-alive\n\n";

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

    /// The name of the chunk's event, where clients go by names. Such streams end without a sign.
    fn name(_: &Self::Chunk) -> Option<&'static str> {
        None
    }

    /// The status of the chunk, where clients are told one.
    fn status(_: &Self::Chunk) -> u16 {
        200
    }

    /// Chunks that tell of an error midway; `None` for OpenAI's error body.
    fn fail(&mut self, _: &ApiError, _: Usage) -> Option<Vec<Self::Chunk>> {
        None
    }

    /// What keeps a silent stream alive.
    fn keep_alive() -> KeepAlive {
        KeepAlive::new().text("keep-alive")
    }
}

/// Takes a generation through a renderer up to its end, for a whole answer: the chunks are left out.
pub(super) async fn fold(
    renderer: &mut impl RenderChunks,
    mut generation: Generation,
) -> Result<Usage, ApiError> {
    while let Some(item) = generation.next().await {
        let (prompt, update) = item?;
        renderer.update(prompt, update, generation.usage());
    }
    Ok(generation.usage())
}

/// An event of a stream, in text.
struct SentEvent {
    name: Option<&'static str>,
    status: u16,
    data: String,
}

impl SentEvent {
    fn of<R: RenderChunks>(chunk: &R::Chunk) -> Self {
        Self { name: R::name(chunk), status: R::status(chunk), data: to_json(chunk) }
    }

    fn bare(data: String) -> Self {
        Self { name: None, status: 200, data }
    }

    /// As DashScope frames it: no blank behind a colon, because its clients compare the names.
    fn into_native_frame(self, id: u64) -> Bytes {
        let Self { name, status, data } = self;
        let name = name.unwrap_or("result");
        format!("id:{id}\nevent:{name}\n:HTTP_STATUS/{status}\ndata:{data}\n\n").into()
    }

    fn into_event(self) -> Event {
        let event = Event::default().data(self.data);
        match self.name {
            Some(name) => event.event(name),
            None => event,
        }
    }
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

/// Waits for the first piece of an answer, so that what fails before has a status of its own, but no
/// longer than until a keep-alive is due.
async fn begin<R: RenderChunks>(
    generation: Generation,
    renderer: R,
    limits: &HttpLimits,
) -> Result<Producer<R>, ApiError> {
    let mut producer = Producer::new(generation, renderer);
    if let Ok(begun) = timeout(limits.keep_alive, producer.begin()).await {
        begun?;
    }
    Ok(producer)
}

/// The response that streams a generation.
pub(super) async fn response<R: RenderChunks>(
    generation: Generation,
    renderer: R,
    limits: &HttpLimits,
) -> Result<Response, ApiError> {
    let producer = begin(generation, renderer, limits).await?;
    let keep_alive = R::keep_alive().interval(limits.keep_alive);
    let mut response = Sse::new(events(producer)).keep_alive(keep_alive).into_response();
    // Proxies must not collect a stream before they pass it on.
    let name = HeaderName::from_static("x-accel-buffering");
    response.headers_mut().insert(name, HeaderValue::from_static("no"));
    Ok(response)
}

/// The same, framed as DashScope's native streams are.
pub(super) async fn native_response<R: RenderChunks>(
    generation: Generation,
    renderer: R,
    limits: &HttpLimits,
) -> Result<Response, ApiError> {
    let producer = begin(generation, renderer, limits).await?;
    let headers = [
        (CONTENT_TYPE, "text/event-stream;charset=UTF-8"),
        (CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    let body = Body::from_stream(native_frames(producer, limits.keep_alive));
    Ok((headers, body).into_response())
}

fn native_frames<R: RenderChunks>(
    producer: Producer<R>,
    keep_alive: Duration,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold((producer, 0), move |(mut producer, id)| async move {
        loop {
            if let Some(event) = producer.ready.pop_front() {
                let id = id + 1;
                return Some((Ok(event.into_native_frame(id)), (producer, id)));
            }
            match timeout(keep_alive, producer.refill()).await {
                Err(_) => return Some((Ok(Bytes::from_static(KEEP_ALIVE)), (producer, id))),
                Ok(refilled) => {
                    if let Err(error) = refilled? {
                        producer.fail(&error);
                    }
                }
            }
        }
    })
}

struct Producer<R> {
    /// `None` after the last update.
    generation: Option<Generation>,
    renderer: R,
    ready: VecDeque<SentEvent>,
    usage: Usage,
    is_named: bool,
}

fn events<R: RenderChunks>(producer: Producer<R>) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(producer, |mut producer| async move {
        loop {
            if let Some(event) = producer.ready.pop_front() {
                return Some((Ok(event.into_event()), producer));
            }
            if let Err(error) = producer.refill().await? {
                producer.fail(&error);
            }
        }
    })
}

impl<R: RenderChunks> Producer<R> {
    fn new(generation: Generation, renderer: R) -> Self {
        let mut producer = Self {
            usage: generation.usage(),
            ready: VecDeque::new(),
            is_named: false,
            generation: Some(generation),
            renderer,
        };
        let chunks = producer.renderer.begin();
        producer.send(&chunks);
        producer
    }

    fn send(&mut self, chunks: &[R::Chunk]) {
        self.ready.extend(chunks.iter().map(SentEvent::of::<R>));
        self.is_named |= self.ready.back().is_some_and(|event| event.name.is_some());
    }

    fn fail(&mut self, error: &ApiError) {
        match self.renderer.fail(error, self.usage) {
            Some(chunks) => self.send(&chunks),
            None => self.ready.push_back(SentEvent::bare(to_json(&error.body()))),
        }
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
        let next = generation.next().await;
        self.usage = generation.usage();
        match next {
            Some(Ok((prompt, update))) => {
                let chunks = self.renderer.update(prompt, update, self.usage);
                self.send(&chunks);
            }
            Some(Err(error)) => {
                self.generation = None;
                return Some(Err(error));
            }
            None => {
                let chunks = self.renderer.end(self.usage);
                self.send(&chunks);
                if !self.is_named {
                    self.ready.push_back(SentEvent::bare(DONE.to_owned()));
                }
                self.generation = None;
            }
        }
        Some(Ok(()))
    }
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("wire types have string keys and cannot fail to serialise")
}
