//! From a request's bytes to wire types, or to an error that names the field.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::IntoResponse;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::body::Body;
use super::error::ApiError;
use super::generation::run_sized;
use super::state::AppState;
use crate::chat::options::is_ignored;
use crate::openai::generation::GenerationFields;

/// Longest `x-ignored-params` header.
const MAX_IGNORED_BYTES: usize = 512;
/// How many large bodies are parsed at a time: each may take several times its bytes.
const MAX_LARGE_BODIES: usize = 4;

static LARGE_BODIES: Semaphore = Semaphore::const_new(MAX_LARGE_BODIES);

/// The right to keep a large body; a small one needs none.
pub(super) type Permit = Option<SemaphorePermit<'static>>;

/// A JSON body of type `T`.
pub(super) struct ApiJson<T> {
    pub(super) value: T,
    /// Names of fields that have no effect.
    pub(super) ignored: Vec<String>,
    pub(super) num_bytes: usize,
    _permit: Permit,
}

/// What every endpoint may be told about fields it does not know.
#[derive(Deserialize)]
pub(super) struct Strictness {
    pub(super) strict_params: Option<bool>,
}

impl<T: DeserializeOwned + Send + 'static> FromRequest<AppState> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let bytes = read(request, state).await?;
        let permit = permit(bytes.len(), state).await?;
        run_sized(bytes.len(), state, move || Self::decode(&bytes, permit)).await?
    }
}

impl<T: DeserializeOwned> ApiJson<T> {
    fn decode(bytes: &[u8], permit: Permit) -> Result<Self, ApiError> {
        let mut body = Body::scan(bytes)?;
        let value: T = body.read()?;
        let strictness: Strictness = body.read()?;
        let ignored = ignored(&body, strictness.strict_params)?;
        Ok(Self { value, ignored, num_bytes: bytes.len(), _permit: permit })
    }
}

/// A body of a generating endpoint: its own fields, and those all share.
pub(super) struct GenerationBody<T> {
    pub(super) request: T,
    pub(super) fields: GenerationFields,
    /// Names of fields that have no effect.
    pub(super) ignored: Vec<String>,
    pub(super) num_bytes: usize,
    _permit: Permit,
}

impl<T: DeserializeOwned + Send + 'static> FromRequest<AppState> for GenerationBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let bytes = read(request, state).await?;
        let permit = permit(bytes.len(), state).await?;
        run_sized(bytes.len(), state, move || Self::decode(&bytes, permit)).await?
    }
}

impl<T: DeserializeOwned> GenerationBody<T> {
    fn decode(bytes: &[u8], permit: Permit) -> Result<Self, ApiError> {
        let mut body = Body::scan(bytes)?;
        body.check_json("input")?;
        let request: T = body.read()?;
        let fields: GenerationFields = body.read()?;
        let ignored = ignored(&body, fields.strict_params)?;
        Ok(Self { request, fields, ignored, num_bytes: bytes.len(), _permit: permit })
    }
}

/// Names of fields that have no effect; an error if one of them must have, or if it is strict.
fn ignored(body: &Body<'_>, strict: Option<bool>) -> Result<Vec<String>, ApiError> {
    let mut names = Vec::new();
    for field in body.unknown() {
        if is_ignored(&field.name, field.is_null, field.is_neutral)? {
            names.push(field.name.clone());
        }
    }
    refuse_ignored(&names, strict)?;
    Ok(names)
}

/// An error if fields have no effect though they must, because the request is strict.
pub(super) fn refuse_ignored(names: &[String], strict: Option<bool>) -> Result<(), ApiError> {
    match names.first().filter(|_| strict == Some(true)) {
        None => Ok(()),
        Some(name) => {
            let message = format!("`{name}`: has no effect here, and `strict_params` is true");
            Err(ApiError::Invalid { message, param: Some(name.clone()) })
        }
    }
}

/// Waits until a body of this size may be parsed. The permit stays with the body until its prompt
/// is made, because that is what takes memory.
pub(super) async fn permit(num_bytes: usize, state: &AppState) -> Result<Permit, ApiError> {
    if num_bytes <= state.limits.max_inline_body_bytes {
        return Ok(None);
    }
    LARGE_BODIES.acquire().await.map(Some).map_err(|_| ApiError::Internal)
}

/// The `x-ignored-params` header, if anything was ignored.
pub(super) fn ignored_header(ignored: &[String]) -> Option<(HeaderName, HeaderValue)> {
    let is_plain =
        |name: &&String| name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',');
    let mut list = String::new();
    for name in ignored.iter().filter(is_plain) {
        if MAX_IGNORED_BYTES < list.len() + name.len() {
            continue;
        }
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(name);
    }
    let value = HeaderValue::from_str(&list).ok().filter(|value| !value.is_empty())?;
    Some((HeaderName::from_static("x-ignored-params"), value))
}

pub(super) async fn read(request: Request, state: &AppState) -> Result<Bytes, ApiError> {
    if !is_json(request.headers()) {
        return Err(ApiError::UnsupportedMediaType);
    }
    if (state.is_memory_short)() {
        return Err(ApiError::MemoryShort);
    }
    let body = timeout(state.limits.body_timeout, Bytes::from_request(request, state));
    body.await.map_err(|_| ApiError::BodyTimeout)?.map_err(|rejection| {
        match rejection.into_response().status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::BodyTooLarge(state.limits.max_body_bytes),
            _ => ApiError::BodyUnreadable,
        }
    })
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json"
        || (essence.starts_with("application/") && essence.ends_with("+json"))
}
