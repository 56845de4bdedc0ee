//! From a request's bytes to wire types, or to an error that names the field.

use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::{BodyDataStream, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use futures_util::StreamExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::body::Body;
use super::error::ApiError;
use super::generation::run_sized;
use super::state::{AppState, HttpLimits};
use crate::chat::options::is_ignored;
use crate::openai::generation::GenerationFields;

/// Longest `x-ignored-params` header.
const MAX_IGNORED_BYTES: usize = 512;
/// How many large bodies are parsed at a time: each may take several times its bytes.
const MAX_LARGE_BODIES: usize = 4;

/// Bytes of large bodies that may have arrived before their prompts are made.
const MAX_BODIES_BYTES: usize = 64 << 20;

static LARGE_BODIES: Semaphore = Semaphore::const_new(MAX_LARGE_BODIES);
static NUM_BODIES_BYTES: AtomicUsize = AtomicUsize::new(0);

/// The right to keep a large body until its prompt is made, because that is what takes memory; a small
/// one needs none.
#[derive(Default)]
pub(super) struct Permit {
    num_bytes: usize,
    turn: Option<SemaphorePermit<'static>>,
}

impl Permit {
    /// Counts what has arrived, and not what was announced: who sends nothing takes nothing from
    /// others. An error if all large bodies together become too large.
    fn grow(&mut self, num_bytes: usize) -> Result<(), ApiError> {
        self.num_bytes += num_bytes;
        let before = NUM_BODIES_BYTES.fetch_add(num_bytes, Ordering::Relaxed);
        // The only one may be of any size that is allowed at all.
        let is_only = before + num_bytes == self.num_bytes;
        if is_only || before + num_bytes <= MAX_BODIES_BYTES {
            Ok(())
        } else {
            Err(ApiError::MemoryShort)
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        NUM_BODIES_BYTES.fetch_sub(self.num_bytes, Ordering::Relaxed);
    }
}

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
        let (bytes, permit) = read(request, state).await?;
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
        let (bytes, permit) = read(request, state).await?;
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

/// Reads a body when there is room for it, and waits until it may be parsed.
pub(super) async fn read(request: Request, state: &AppState) -> Result<(Bytes, Permit), ApiError> {
    if !is_json(request.headers()) {
        return Err(ApiError::UnsupportedMediaType);
    }
    if (state.is_memory_short)() {
        return Err(ApiError::MemoryShort);
    }
    let limits = &state.limits;
    let mut permit = Permit::default();
    let arriving = arrive(request.into_body().into_data_stream(), limits, &mut permit);
    let bytes =
        timeout(limits.body_timeout, arriving).await.map_err(|_| ApiError::BodyTimeout)??;
    if limits.max_inline_body_bytes < bytes.len() {
        let turn = timeout(limits.body_timeout, LARGE_BODIES.acquire()).await;
        permit.turn = turn.map_err(|_| ApiError::MemoryShort)?.ok();
        // It may have been waiting for long.
        if (state.is_memory_short)() {
            return Err(ApiError::MemoryShort);
        }
    }
    Ok((bytes, permit))
}

/// Gathers a body.
async fn arrive(
    mut pieces: BodyDataStream,
    limits: &HttpLimits,
    permit: &mut Permit,
) -> Result<Bytes, ApiError> {
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| ApiError::BodyUnreadable)?;
        if limits.max_body_bytes < bytes.len() + piece.len() {
            return Err(ApiError::BodyTooLarge(limits.max_body_bytes));
        }
        bytes.try_reserve(piece.len()).map_err(|_| ApiError::MemoryShort)?;
        bytes.extend_from_slice(&piece);
        if limits.max_inline_body_bytes < bytes.len() {
            permit.grow(bytes.len() - permit.num_bytes)?;
        }
    }
    Ok(bytes.into())
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json"
        || (essence.starts_with("application/") && essence.ends_with("+json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: large bodies together take no more than there is room for, one alone is always read, and
    /// all room comes back.
    #[test]
    fn large_bodies_share_what_room_there_is() {
        let mut first = Permit::default();
        assert!(first.grow(MAX_BODIES_BYTES + 1).is_ok(), "alone");
        assert!(Permit::default().grow(1).is_err());
        drop(first);
        let mut halves = [Permit::default(), Permit::default()];
        assert!(halves.iter_mut().all(|half| half.grow(MAX_BODIES_BYTES / 2).is_ok()));
        assert!(Permit::default().grow(1).is_err());
        drop(halves);
        assert!(Permit::default().grow(1).is_ok());
        assert_eq!(NUM_BODIES_BYTES.load(Ordering::Relaxed), 0);
    }
}
