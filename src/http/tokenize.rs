//! `POST /tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::caller::Caller;
use super::error::ApiError;
use super::extract::{ApiJson, ignored_header};
use super::generation::run_sized;
use super::models::check_model;
use super::state::AppState;
use crate::chat::model::ServedModel;
use crate::chat::prompt::{PromptContext, PromptLimits};
use crate::chat::tokenize as chat;
use crate::openai::tokenize::{DetokenizeRequest, TokenizeRequest};

pub(super) async fn tokenize(
    State(state): State<AppState>,
    caller: Caller,
    body: ApiJson<TokenizeRequest>,
) -> Result<Response, ApiError> {
    check_model(body.value.model.as_deref().unwrap_or(&state.model.name), &state, &caller)?;
    let ignored = ignored_header(&body.ignored);
    let (model, limits) = (Arc::clone(&state.model), state.prompt_limits());
    let response = run_sized(body.num_bytes, &state, move || {
        chat::tokenize(&body.value, &context(&model, limits))
    })
    .await??;
    let mut response = Json(response).into_response();
    response.headers_mut().extend(ignored);
    Ok(response)
}

pub(super) async fn detokenize(
    State(state): State<AppState>,
    caller: Caller,
    body: ApiJson<DetokenizeRequest>,
) -> Result<Response, ApiError> {
    check_model(body.value.model.as_deref().unwrap_or(&state.model.name), &state, &caller)?;
    let context = context(&state.model, state.prompt_limits());
    let mut response = Json(chat::detokenize(&body.value, &context)?).into_response();
    response.headers_mut().extend(ignored_header(&body.ignored));
    Ok(response)
}

fn context(model: &ServedModel, limits: PromptLimits) -> PromptContext<'_> {
    PromptContext { model, limits, id: "", random_seed: 0 }
}
