//! `POST /tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::error::ApiError;
use super::extract::ApiJson;
use super::generation::run_sized;
use super::models::check_model;
use super::state::AppState;
use crate::chat::model::ServedModel;
use crate::chat::prompt::{PromptContext, PromptLimits};
use crate::chat::tokenize as chat;
use crate::openai::tokenize::{
    DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse,
};

pub(super) async fn tokenize(
    State(state): State<AppState>,
    ApiJson { value: request, num_bytes }: ApiJson<TokenizeRequest>,
) -> Result<Json<TokenizeResponse>, ApiError> {
    if let Some(model) = &request.model {
        check_model(model, &state)?;
    }
    let (model, limits) = (Arc::clone(&state.model), state.prompt_limits());
    let response =
        run_sized(num_bytes, &state, move || chat::tokenize(&request, &context(&model, limits)))
            .await?;
    Ok(Json(response?))
}

pub(super) async fn detokenize(
    State(state): State<AppState>,
    ApiJson { value: request, .. }: ApiJson<DetokenizeRequest>,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    if let Some(model) = &request.model {
        check_model(model, &state)?;
    }
    let context = context(&state.model, state.prompt_limits());
    Ok(Json(chat::detokenize(&request, &context)?))
}

fn context(model: &ServedModel, limits: PromptLimits) -> PromptContext<'_> {
    PromptContext { model, limits, id: "", random_seed: 0 }
}
