//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, with vLLM's fields and answers.

use axum::extract::State;
use axum::response::{IntoResponse, Response};

use crate::http::adapters::AdapterError;
use crate::http::error::ApiError;
use crate::http::extract::{ApiJson, ignored_header};
use crate::http::state::AppState;
use crate::openai::adapter::{LoadAdapterRequest, UnloadAdapterRequest};

pub(super) async fn load(
    State(state): State<AppState>,
    body: ApiJson<LoadAdapterRequest>,
) -> Result<Response, ApiError> {
    if (state.is_memory_short)() {
        return Err(ApiError::MemoryShort);
    }
    let ignored = ignored_header(&body.ignored);
    let LoadAdapterRequest { lora_name, lora_path, load_inplace } = body.value;
    let answer = format!("Success: LoRA adapter '{lora_name}' added successfully.");
    let replaces = load_inplace.unwrap_or(false);
    change(state, move |state| state.adapters.add_below_root(&lora_name, &lora_path, replaces))
        .await?;
    let mut response = answer.into_response();
    response.headers_mut().extend(ignored);
    Ok(response)
}

pub(super) async fn unload(
    State(state): State<AppState>,
    body: ApiJson<UnloadAdapterRequest>,
) -> Result<Response, ApiError> {
    let ignored = ignored_header(&body.ignored);
    let UnloadAdapterRequest { lora_name } = body.value;
    let answer = format!("Success: LoRA adapter '{lora_name}' removed successfully.");
    change(state, move |state| state.adapters.remove(&lora_name)).await?;
    let mut response = answer.into_response();
    response.headers_mut().extend(ignored);
    Ok(response)
}

/// Files are read, and weights freed, where others do not wait for it.
async fn change(
    state: AppState,
    change: impl FnOnce(&AppState) -> Result<(), AdapterError> + Send + 'static,
) -> Result<(), ApiError> {
    let changed = tokio::task::spawn_blocking(move || change(&state)).await;
    changed.map_err(|error| {
        tracing::error!(%error, "changing the adapters panicked");
        ApiError::Internal
    })??;
    Ok(())
}
