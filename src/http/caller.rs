//! Who asks: what is known about the sender of a request before its body is read.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderValue};

use super::error::ApiError;
use super::meter::Meter;
use super::request_id::RequestId;
use super::state::AppState;

/// The header with which a client says how long it waits.
const REQUEST_TIMEOUT: &str = "x-request-timeout";
/// Longer than any answer takes.
const MAX_TIMEOUT_SECONDS: f64 = 86_400.0;
/// Who sends requests where nobody is asked for a name.
const ANONYMOUS: &str = "anonymous";

/// The sender of a request. An extractor, so that a handler has it by naming it.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// The id of the request in logs and headers.
    pub(super) request_id: Arc<str>,
    /// Who it is, by the name that the operator gave.
    pub(super) client: Arc<str>,
    /// When it stops waiting for its answer.
    pub(super) deadline: Option<Instant>,
    /// Counts what is computed for this request, if that is counted.
    pub(super) meter: Option<Arc<Meter>>,
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let RequestId(request_id) = parts.extensions.get().cloned().ok_or(ApiError::Internal)?;
        let asked = parts.headers.get(REQUEST_TIMEOUT).map(timeout).transpose()?;
        let timeout = asked.into_iter().chain(state.limits.request_timeout).min();
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let client = client(&parts.extensions);
        let meter = parts.extensions.get().cloned();
        Ok(Self { request_id, client, deadline, meter })
    }
}

/// Who sent the request that these belong to.
pub(super) fn client(_: &Extensions) -> Arc<str> {
    ANONYMOUS.into()
}

/// How long a client waits, in seconds, which may have a fraction.
fn timeout(value: &HeaderValue) -> Result<Duration, ApiError> {
    let seconds = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
    match seconds {
        Some(seconds) if 0.0 < seconds && seconds <= MAX_TIMEOUT_SECONDS => {
            Ok(Duration::from_secs_f64(seconds))
        }
        _ => Err(ApiError::Invalid {
            message: format!(
                "`{REQUEST_TIMEOUT}`: must be a number of seconds from 0 to {MAX_TIMEOUT_SECONDS}"
            ),
            param: Some(REQUEST_TIMEOUT.to_owned()),
        }),
    }
}
