//! Who may come in: every request shows a key, unless the server has none.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::anthropic_errors::is_anthropic;
use super::caller::Caller;
use super::error::ApiError;
use super::key_ring::{Admission, Holder};
use super::rate_limit::{Names, rate_limit_headers};
use super::request_log::RequestLog;
use super::router::is_computing;
use super::state::AppState;
use crate::access::Role;

/// What probes ask; it tells nothing of anybody.
const OPEN_PATHS: [&str; 3] = ["/health", "/health/live", "/health/ready"];
/// Where a key may be, the first that is present counts: OpenAI's, Anthropic's and Azure's way.
const KEY_HEADERS: [&str; 2] = ["x-api-key", "api-key"];

/// Who was let in, as long as the request is worked on.
#[derive(Clone)]
pub(super) struct Guest {
    pub(super) holder: Arc<Holder>,
    _admission: Option<Arc<Admission>>,
}

/// Middleware before every handler, and before what says that there is none.
pub(super) async fn with_key(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(keys) = state.keys.as_ref() else { return next.run(request).await };
    if OPEN_PATHS.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let Some(secret) = secret(request.headers()) else { return ApiError::NoKey.into_response() };
    let Some(holder) = keys.find(secret) else { return ApiError::WrongKey.into_response() };
    tracing::Span::current().record("client", &**holder.key.name.as_arc());
    let is_anthropic = is_anthropic(request.uri().path());
    let names = if is_anthropic { Names::Anthropic } else { Names::OpenAi };
    let mut response = match admit(&holder, request.method()) {
        Ok(admission) => {
            let holder = Arc::clone(&holder);
            request.extensions_mut().insert(Guest { holder, _admission: admission });
            next.run(request).await
        }
        Err(error) => {
            // Refused here it reaches no handler, but is told of and counted like those that do.
            if is_computing(request.uri().path())
                && let Ok(caller) = Caller::of(&holder, &request, &state)
            {
                drop(RequestLog::new(&caller, &state));
            }
            error.into_response()
        }
    };
    response.headers_mut().extend(rate_limit_headers(&holder.allowances(), names));
    response
}

/// Asking what there is costs nothing; asking for work does, even if it then is refused.
fn admit(holder: &Arc<Holder>, method: &Method) -> Result<Option<Arc<Admission>>, ApiError> {
    if method == Method::POST { Ok(Some(Arc::new(holder.enter()?))) } else { Ok(None) }
}

/// Middleware before what only operators may ask.
pub(super) async fn with_admin_key(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Response {
    let guest: Option<&Guest> = request.extensions().get();
    let is_admin = guest.is_some_and(|guest| guest.holder.key.role == Role::Admin);
    if state.keys.is_some() && !is_admin {
        return ApiError::NotAnAdmin.into_response();
    }
    next.run(request).await
}

/// The key that a request shows.
fn secret(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
    let others = || KEY_HEADERS.iter().find_map(|name| headers.get(*name));
    bearer.or_else(|| others().map(|value| value.as_bytes().trim_ascii()))
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let at = value.iter().position(|byte| *byte == b' ')?;
    let (scheme, secret) = value.split_at(at);
    scheme.eq_ignore_ascii_case(b"bearer").then(|| secret.trim_ascii())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderName;

    use super::*;

    #[test]
    fn the_first_kind_of_header_counts() {
        let find = |headers: &[(&'static str, &'static str)]| {
            let headers: HeaderMap = headers
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()))
                .collect();
            secret(&headers).map(|secret| String::from_utf8(secret.to_vec()).unwrap())
        };
        let (auth, x_api_key, api_key) =
            (("authorization", "Bearer a"), ("x-api-key", "b"), ("api-key", "c"));
        assert_eq!(find(&[api_key, x_api_key, auth]).as_deref(), Some("a"));
        assert_eq!(find(&[api_key, x_api_key]).as_deref(), Some("b"));
        assert_eq!(find(&[api_key]).as_deref(), Some("c"));
        assert_eq!(find(&[]), None);
        assert_eq!(find(&[("authorization", "bearer  a ")]).as_deref(), Some("a"));
        // A wrong key is not a missing one, a key for somebody else's scheme is.
        assert_eq!(find(&[("authorization", "Bearer "), api_key]).as_deref(), Some(""));
        assert_eq!(find(&[("authorization", "Basic YTpi"), api_key]).as_deref(), Some("c"));
        assert_eq!(find(&[("authorization", "sk-123")]), None);
    }
}
