//! `POST /v1/embeddings`.

use std::pin::pin;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};

use super::caller::Caller;
use super::error::ApiError;
use super::extract::{ApiJson, ignored_header};
use super::generation::run_sized;
use super::models::{check_model, pooling_name};
use super::request_log::RequestLog;
use super::state::AppState;
use crate::chat::embedding::{embedding_values, prepare_embeddings};
use crate::chat::prompt::PromptContext;
use crate::engine::request::Request;
use crate::engine::{Event, FinishReason};
use crate::openai::embedding::{Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage};
use crate::openai::generation::Usage;

/// Inputs of one request that are computed at once, so that a long list leaves seats to others.
const MAX_AT_ONCE: usize = 16;

pub(super) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: ApiJson<EmbeddingRequest>,
) -> Result<Response, ApiError> {
    check_model(&body.value.model, &state, &caller)?;
    let ignored = ignored_header(&body.ignored);
    let format = body.value.encoding_format.unwrap_or_default();
    let name = body.value.model.clone();
    let (model, limits) = (Arc::clone(&state.model), state.prompt_limits());
    let id = Arc::clone(&caller.request_id);
    let requests = run_sized(body.num_bytes, &state, move || {
        let context = PromptContext { model: &model, limits, id: &id, random_seed: 0 };
        prepare_embeddings(&body.value, &context)
    });
    let requests = requests.await??;
    let prompt_tokens = requests.iter().map(|request| request.prompt.len()).sum();
    let vectors = vectors(&state, &caller, requests).await?;
    let embedding = |(index, vector)| Embedding {
        object: "embedding",
        index,
        embedding: embedding_values(vector, format),
    };
    let mut response = Json(EmbeddingList {
        object: "list",
        data: vectors.into_iter().enumerate().map(embedding).collect(),
        model: name,
        usage: EmbeddingUsage { prompt_tokens, total_tokens: prompt_tokens },
    })
    .into_response();
    response.headers_mut().extend(ignored);
    response.headers_mut().extend([pooling_header(&state)]);
    Ok(response)
}

/// Says what vectors are made of.
pub(super) fn pooling_header(state: &AppState) -> (HeaderName, HeaderValue) {
    let pooling = HeaderValue::from_static(pooling_name(state.model.pooling));
    (HeaderName::from_static("x-embedding-pooling"), pooling)
}

/// The vectors of inputs, in order, with a line in the log about them all.
pub(super) async fn vectors(
    state: &AppState,
    caller: &Caller,
    requests: Vec<Request>,
) -> Result<Vec<Vec<f32>>, ApiError> {
    let mut log = RequestLog::new(caller, state);
    if state.engine.is_loading() {
        return Err(ApiError::Loading);
    }
    log.reserve(requests.iter().map(|request| request.prompt.len()).sum())?;
    let mut log = log.begin(Usage::default());
    let computed = stream::iter(requests).map(|mut request| {
        caller.sign(&mut request, state);
        pooled(state, request)
    });
    let mut computed = pin!(computed.buffered(MAX_AT_ONCE));
    let mut vectors = Vec::new();
    while let Some(result) = computed.next().await {
        let (vector, num_tokens) = result.inspect_err(|_| log.end("failed"))?;
        // One by one: who leaves, or is refused midway, has used what was computed until then.
        log.usage.prompt_tokens += num_tokens;
        log.usage.total_tokens += num_tokens;
        vectors.push(vector);
    }
    log.end("finished");
    Ok(vectors)
}

/// The vector of one input, and its number of tokens. Dropping this future takes the input back from
/// the engine.
async fn pooled(state: &AppState, request: Request) -> Result<(Vec<f32>, usize), ApiError> {
    let num_tokens = request.prompt.len();
    let mut events = state.engine.generate(request)?;
    let mut vector = None;
    while let Some(event) = events.next().await {
        match event {
            Event::Pooled(pooled) => vector = Some(pooled),
            Event::Finished { reason: FinishReason::Abort, .. } => {
                return Err(ApiError::ShuttingDown);
            }
            Event::Expired => return Err(ApiError::DeadlineExceeded),
            Event::Failed(_) => return Err(ApiError::EngineFailed),
            _ => {}
        }
    }
    vector.map(|vector| (vector, num_tokens)).ok_or(ApiError::EngineFailed)
}
