//! `POST /v1/chat/completions/render` and `/v1/completions/render`: a request is checked and its
//! prompt made as always, and shown instead of run.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::caller::Caller;
use super::error::ApiError;
use super::extract::{GenerationBody, ignored_header};
use super::generation::{ResponseHead, preparation_bytes, run_sized};
use super::models::check_model;
use super::state::AppState;
use crate::chat::prompt::{PromptContext, PromptError, prepare_chat, prepare_completion};
use crate::openai::chat::ChatCompletionRequest;
use crate::openai::completion::CompletionRequest;

pub(super) async fn chat(
    State(state): State<AppState>,
    caller: Caller,
    body: GenerationBody<ChatCompletionRequest>,
) -> Result<Response, ApiError> {
    check_model(&body.request.model, &state, &caller)?;
    let head = ResponseHead::new("chatcmpl", &body.request.model);
    let has_tools = body.request.tools.is_some() || body.request.functions.is_some();
    let num_bytes = if has_tools { usize::MAX } else { body.num_bytes };
    answer(&state, &head, (body, num_bytes), |body, context| {
        let prepared = prepare_chat(&body.request, &body.fields, context)?;
        Ok(prepared.rendered(&body.fields, context.model))
    })
    .await
}

pub(super) async fn completion(
    State(state): State<AppState>,
    caller: Caller,
    body: GenerationBody<CompletionRequest>,
) -> Result<Response, ApiError> {
    check_model(&body.request.model, &state, &caller)?;
    let head = ResponseHead::new("cmpl", &body.request.model);
    let num_bytes = body.num_bytes;
    answer(&state, &head, (body, num_bytes), |body, context| {
        let prepared = prepare_completion(&body.request, &body.fields, context)?;
        let rendered = prepared.iter().map(|one| one.rendered(&body.fields, context.model));
        Ok(rendered.collect::<Vec<_>>())
    })
    .await
}

async fn answer<T: Send + 'static, R: Serialize + Send + 'static>(
    state: &AppState,
    head: &ResponseHead,
    (body, num_bytes): (GenerationBody<T>, usize),
    render: fn(&GenerationBody<T>, &PromptContext<'_>) -> Result<R, PromptError>,
) -> Result<Response, ApiError> {
    let ignored = ignored_header(&body.ignored);
    let (model, limits, id) = (Arc::clone(&state.model), state.prompt_limits(), head.id.clone());
    let num_bytes = preparation_bytes(&body.fields, num_bytes);
    let rendered = run_sized(num_bytes, state, move || {
        let context = PromptContext { model: &model, limits, id: &id, random_seed: 0 };
        render(&body, &context)
    });
    let mut response = Json(rendered.await??).into_response();
    response.headers_mut().extend(ignored);
    Ok(response)
}
