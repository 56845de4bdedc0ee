//! `GET /v1/models` and `/v1/models/{id}`.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};

use super::caller::Caller;
use super::error::ApiError;
use super::state::AppState;
use crate::engine::request::Pooling;
use crate::openai::model::{Model, ModelList};

pub(super) async fn list(State(state): State<AppState>, caller: Caller) -> Json<ModelList> {
    let names = state.model.names().filter(|name| caller.may_use(name));
    let data = names.map(|name| model(name, &state)).collect();
    Json(ModelList { object: "list", data })
}

pub(super) async fn retrieve(
    State(state): State<AppState>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NotFound("the name is not UTF-8".into()))?;
    check_model(&id, &state, &caller)?;
    Ok(Json(model(&id, &state)))
}

/// Requests must address the model by one of its names, and one that their key allows.
pub(super) fn check_model(name: &str, state: &AppState, caller: &Caller) -> Result<(), ApiError> {
    if !caller.may_use(name) {
        return Err(ApiError::ModelForbidden(name.to_owned()));
    }
    if state.model.answers_to(name) {
        return Ok(());
    }
    Err(ApiError::ModelNotFound(name.to_owned()))
}

/// What embeddings are made of, as model cards and headers say it.
pub(super) fn pooling_name(pooling: Pooling) -> &'static str {
    match pooling {
        Pooling::Mean => "mean",
        Pooling::Last => "last",
    }
}

fn model(name: &str, state: &AppState) -> Model {
    Model {
        id: name.to_owned(),
        object: "model",
        created: state.created,
        owned_by: "qwen-server",
        root: state.model.root.clone(),
        parent: None,
        max_model_len: state.engine.limits().max_model_len,
        embedding_pooling: pooling_name(state.model.pooling),
    }
}
