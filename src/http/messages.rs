//! Anthropic's `POST /v1/messages` and `/v1/messages/count_tokens`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive};
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

use super::anthropic_errors::error_object;
use super::caller::Caller;
use super::error::ApiError;
use super::extract::{GenerationBody, ignored_header, refuse_ignored};
use super::generation::{Generation, preparation_bytes, run_sized};
use super::models::check_model;
use super::sse::{self, RenderChunks};
use super::state::AppState;
use crate::anthropic::{MessagesRequest, StreamEvent, TokenCount};
use crate::chat::anthropic::{MessageWriter, convert};
use crate::chat::output::Update;
use crate::chat::prompt::{Prepared, PromptContext, PromptError};
use crate::openai::generation::Usage;

type Body = GenerationBody<MessagesRequest>;

pub(super) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    check_model(&body.request.model, &state, &caller)?;
    if body.request.max_tokens.is_none() {
        let message = "`max_tokens`: missing field `max_tokens`".to_owned();
        return Err(ApiError::Invalid { message, param: Some("max_tokens".to_owned()) });
    }
    let is_stream = body.fields.stream == Some(true);
    let id = format!("msg_{}", Uuid::now_v7().simple());
    let writer = MessageWriter::new(id.clone(), body.request.model.clone());
    let (prepared, ignored) = prepare(&state, id, body).await?;
    let generation = Generation::submit(&state, &caller, vec![prepared])?;
    let renderer = MessageRenderer { writer };
    let mut response = if is_stream {
        sse::response(generation, renderer, &state.limits).await?
    } else {
        renderer.fold(generation).await?
    };
    response.headers_mut().extend(ignored_header(&ignored));
    Ok(response)
}

pub(super) async fn count_tokens(
    State(state): State<AppState>,
    caller: Caller,
    mut body: Body,
) -> Result<Response, ApiError> {
    check_model(&body.request.model, &state, &caller)?;
    body.request.max_tokens = None;
    let (prepared, ignored) = prepare(&state, String::new(), body).await?;
    let count = TokenCount { input_tokens: prepared.request.prompt.len() };
    let mut response = Json(count).into_response();
    response.headers_mut().extend(ignored_header(&ignored));
    Ok(response)
}

/// The request, and the names of its fields without effect.
async fn prepare(
    state: &AppState,
    id: String,
    body: Body,
) -> Result<(Prepared, Vec<String>), ApiError> {
    let (model, limits, random_seed) =
        (Arc::clone(&state.model), state.prompt_limits(), state.seed());
    let strict = body.fields.strict_params;
    let mut ignored = body.ignored.clone();
    // Whatever may hold a grammar may block.
    let has_grammar = body.request.tools.is_some() || body.request.output_config.is_some();
    let num_bytes =
        if has_grammar { usize::MAX } else { preparation_bytes(&body.fields, body.num_bytes) };
    let prepared = run_sized(num_bytes, state, move || {
        let converted = convert(&body.request, &body.fields)?;
        let context = PromptContext { model: &model, limits, id: &id, random_seed };
        let prepared = converted.prepare(&context)?;
        let ignored = converted.all_ignored(&prepared);
        Ok::<_, PromptError>((prepared, ignored))
    });
    let (prepared, more_ignored) = prepared.await??;
    ignored.extend(more_ignored);
    refuse_ignored(&ignored, strict)?;
    Ok((prepared, ignored))
}

struct MessageRenderer {
    writer: MessageWriter,
}

impl MessageRenderer {
    /// The whole answer: what the writer has when the events are left out.
    async fn fold(mut self, generation: Generation) -> Result<Response, ApiError> {
        let usage = sse::fold(&mut self, generation).await?;
        self.end(usage);
        Ok(Json(self.writer.into_message()).into_response())
    }
}

impl RenderChunks for MessageRenderer {
    type Chunk = StreamEvent;

    fn begin(&mut self) -> Vec<StreamEvent> {
        Vec::new()
    }

    fn update(&mut self, _: usize, update: Update, usage: Usage) -> Vec<StreamEvent> {
        if let Update::Delta(delta) = update {
            self.writer.push(delta, &usage);
        }
        self.writer.take_events()
    }

    fn end(&mut self, usage: Usage) -> Vec<StreamEvent> {
        self.writer.end(&usage);
        self.writer.take_events()
    }

    fn name(event: &StreamEvent) -> Option<&'static str> {
        Some(event.name())
    }

    fn fail(&mut self, error: &ApiError, _: Usage) -> Option<Vec<StreamEvent>> {
        Some(vec![StreamEvent::Error { error: error_object(error) }])
    }

    fn keep_alive() -> KeepAlive {
        let ping = Event::default().event("ping").data("{\"type\":\"ping\"}");
        KeepAlive::new().event(ping)
    }
}
