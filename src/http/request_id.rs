//! Gives every request an id, and every response the headers that carry it.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;
use tracing::field::Empty;
use uuid::Uuid;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");

/// Longest id taken over from a client.
const MAX_ID_BYTES: usize = 128;

/// The id of a request in logs and in `x-request-id`: the client's own, or a fresh one.
#[derive(Clone, Debug)]
pub(super) struct RequestId(pub(super) Arc<str>);

/// Middleware around everything else.
pub(super) async fn with_request_id(mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = client_id(request.headers()).unwrap_or_else(|| Uuid::now_v7().to_string());
    request.extensions_mut().insert(RequestId(id.as_str().into()));
    let span = tracing::info_span!("request", request_id = id, client = Empty);
    let mut response = next.run(request).instrument(span).await;
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(X_REQUEST_ID, value);
    }
    headers.insert(PROCESSING_MS, HeaderValue::from(started.elapsed().as_millis() as u64));
    response
}

fn client_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(X_REQUEST_ID)?.to_str().ok()?;
    let is_usable = !id.is_empty() && id.len() <= MAX_ID_BYTES;
    (is_usable && id.bytes().all(|byte| byte.is_ascii_graphic())).then(|| id.to_owned())
}
