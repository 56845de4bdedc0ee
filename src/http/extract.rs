//! From a request's bytes to wire types, or to an error that names the field.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::IntoResponse;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::error::ApiError;
use super::generation::run_sized;
use super::state::AppState;
use crate::chat::options::is_ignored;
use crate::openai::chat::ChatCompletionRequest;
use crate::openai::completion::CompletionRequest;
use crate::openai::generation::GenerationFields;

/// Longest `x-ignored-params` header.
const MAX_IGNORED_BYTES: usize = 512;

/// A JSON body of type `T`.
pub(super) struct ApiJson<T> {
    pub(super) value: T,
    pub(super) num_bytes: usize,
}

impl<T: DeserializeOwned + Send + 'static> FromRequest<AppState> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let bytes = read(request, state).await?;
        let num_bytes = bytes.len();
        let value = run_sized(num_bytes, state, move || parse(&parse_json(&bytes)?)).await??;
        Ok(Self { value, num_bytes })
    }
}

/// The fields of one generating endpoint that `GenerationFields` does not know.
pub(super) trait EndpointFields: DeserializeOwned + Send + 'static {
    /// Fields the endpoint's own type does not know.
    fn other(&self) -> &Map<String, Value>;
}

impl EndpointFields for ChatCompletionRequest {
    fn other(&self) -> &Map<String, Value> {
        &self.other
    }
}

impl EndpointFields for CompletionRequest {
    fn other(&self) -> &Map<String, Value> {
        &self.other
    }
}

/// A body of a generating endpoint: its own fields, and those all share.
pub(super) struct GenerationBody<T> {
    pub(super) request: T,
    pub(super) fields: GenerationFields,
    /// Names of fields that have no effect.
    pub(super) ignored: Vec<String>,
    pub(super) num_bytes: usize,
}

impl<T: EndpointFields> FromRequest<AppState> for GenerationBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let bytes = read(request, state).await?;
        run_sized(bytes.len(), state, move || Self::decode(&bytes)).await?
    }
}

impl<T: EndpointFields> GenerationBody<T> {
    fn decode(bytes: &[u8]) -> Result<Self, ApiError> {
        let value = parse_json(bytes)?;
        let request: T = parse(&value)?;
        let fields: GenerationFields = parse(&value)?;
        let unknown = request.other().iter().filter(|(name, _)| fields.other.contains_key(*name));
        let ignored = unknown.filter(|(name, value)| is_ignored(name, value));
        let ignored = ignored.map(|(name, _)| name.clone()).collect();
        Ok(Self { request, fields, ignored, num_bytes: bytes.len() })
    }
}

/// The `x-ignored-params` header, if anything was ignored.
pub(super) fn ignored_header(ignored: &[String]) -> Option<(HeaderName, HeaderValue)> {
    let is_plain =
        |name: &&String| name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',');
    let mut list = String::new();
    for name in ignored.iter().filter(is_plain) {
        if MAX_IGNORED_BYTES < list.len() + name.len() {
            break;
        }
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(name);
    }
    let value = HeaderValue::from_str(&list).ok().filter(|value| !value.is_empty())?;
    Some((HeaderName::from_static("x-ignored-params"), value))
}

async fn read(request: Request, state: &AppState) -> Result<Bytes, ApiError> {
    if !is_json(request.headers()) {
        return Err(ApiError::UnsupportedMediaType);
    }
    let body = timeout(state.limits.body_timeout, Bytes::from_request(request, state));
    body.await.map_err(|_| ApiError::BodyTimeout)?.map_err(|rejection| {
        match rejection.into_response().status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::BodyTooLarge(state.limits.max_body_bytes),
            _ => ApiError::BodyUnreadable,
        }
    })
}

fn parse_json(bytes: &[u8]) -> Result<Value, ApiError> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| ApiError::Invalid {
        message: format!("the body is not valid JSON: {error}"),
        param: None,
    })?;
    if !value.is_object() {
        let message = "the body must be a JSON object".to_owned();
        return Err(ApiError::Invalid { message, param: None });
    }
    Ok(value)
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json"
        || (essence.starts_with("application/") && essence.ends_with("+json"))
}

fn parse<T: DeserializeOwned>(value: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let message = error.inner().to_string();
        let path = match (path.as_str(), missing_field(&message)) {
            (".", Some(field)) => field.to_owned(),
            (path, Some(field)) => format!("{path}.{field}"),
            (path, None) => path.to_owned(),
        };
        ApiError::Invalid { message: format!("`{path}`: {message}"), param: Some(path) }
    })
}

/// serde reports a missing field at its parent.
fn missing_field(message: &str) -> Option<&str> {
    message.strip_prefix("missing field `")?.split('`').next()
}
