//! `POST /v1/fim/completions`: what belongs at a cursor, answered in the shape of a chat.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::caller::Caller;
use super::chat::{ChatRenderer, fold};
use super::error::ApiError;
use super::extract::{GenerationBody, ignored_header};
use super::generation::{Generation, ResponseHead, run_sized};
use super::models::check_model;
use super::sse;
use super::state::AppState;
use crate::chat::fim::prepare_fim;
use crate::chat::prompt::{PromptContext, PromptError};
use crate::openai::completion::FimRequest;

pub(super) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: GenerationBody<FimRequest>,
) -> Result<Response, ApiError> {
    check_model(&body.request.model, &state, &caller)?;
    let head = ResponseHead::new("fim", &body.request.model);
    let ignored = ignored_header(&body.ignored);
    let is_stream = body.fields.stream == Some(true);
    let (model, limits, random_seed) =
        (Arc::clone(&state.model), state.prompt_limits(), state.seed());
    let prepared = run_sized(body.num_bytes, &state, move || {
        let context = PromptContext { model: &model, limits, id: &head.id, random_seed };
        let prepared = prepare_fim(&body.request, &body.fields, &context)?;
        let renderer = ChatRenderer::new(head, model, &body.fields, &prepared);
        Ok::<_, PromptError>((prepared, renderer))
    });
    let (prepared, renderer) = prepared.await??;
    let generation = Generation::submit(&state, &caller, vec![prepared])?;
    let mut response = if is_stream {
        sse::response(generation, renderer, &state.limits).await?
    } else {
        Json(fold(generation, renderer).await?).into_response()
    };
    response.headers_mut().extend(ignored);
    Ok(response)
}
