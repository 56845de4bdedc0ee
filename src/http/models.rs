//! `GET /v1/models` and `/v1/models/{id}`, and which model a request means.

use std::sync::{Arc, OnceLock};

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};

use super::adapters::Listed;
use super::caller::Caller;
use super::error::ApiError;
use super::state::AppState;
use crate::engine::request::{Adapter, Pooling};
use crate::openai::model::{Model, ModelList};

/// The adapter that a request names, once its body is read: for whoever signs, counts or names it.
/// Every handler's [`check_model`] tells it.
#[derive(Clone, Debug, Default)]
pub(super) struct Chosen(Arc<OnceLock<Adapter>>);

impl Chosen {
    /// The adapter; none if the request is for the model itself.
    pub(super) fn adapter(&self) -> Option<&Adapter> {
        self.0.get()
    }

    /// What serves the request, by the name it has here.
    pub(super) fn served_name(&self, state: &AppState) -> Arc<str> {
        let name = self.adapter().map(|adapter| Arc::clone(adapter.name()));
        name.unwrap_or_else(|| state.model.name.as_str().into())
    }
}

pub(super) async fn list(State(state): State<AppState>, caller: Caller) -> Json<ModelList> {
    let names = state.model.names().filter(|name| caller.may_use(name));
    let adapters = state.adapters.all().into_iter();
    let adapters = adapters.filter(|listed| caller.may_use(listed.adapter.name()));
    let data = names
        .map(|name| model(name, &state))
        .chain(adapters.map(|listed| adapter(&listed, &state)))
        .collect();
    Json(ModelList { object: "list", data })
}

pub(super) async fn retrieve(
    State(state): State<AppState>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NotFound("the name is not UTF-8".into()))?;
    // What is found is answered with: it may be unloaded at any time.
    let listed = state.adapters.find(&id).filter(|_| caller.may_use(&id));
    if let Some(listed) = listed {
        return Ok(Json(adapter(&listed, &state)));
    }
    check_model(&id, &state, &caller)?;
    Ok(Json(model(&id, &state)))
}

/// Requests must address the model by one of its names or an adapter, and one that their key allows.
pub(super) fn check_model(name: &str, state: &AppState, caller: &Caller) -> Result<(), ApiError> {
    if !caller.may_use(name) {
        return Err(ApiError::ModelForbidden(name.to_owned()));
    }
    if let Some(listed) = state.adapters.find(name) {
        // A request is checked once.
        let _ = caller.chosen.0.set(listed.adapter);
        return Ok(());
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

fn adapter(listed: &Listed, state: &AppState) -> Model {
    Model {
        created: listed.created,
        root: listed.path.display().to_string(),
        parent: Some(state.model.name.clone()),
        ..model(listed.adapter.name(), state)
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
