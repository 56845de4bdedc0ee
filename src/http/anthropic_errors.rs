//! Errors on Anthropic's paths, in Anthropic's shape.

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::request_id::RequestId;
use crate::anthropic;
use crate::openai::error::ErrorBody;

const PATHS: &str = "/v1/messages";
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// Whether a client of Anthropic's asks there.
pub(super) fn is_anthropic(path: &str) -> bool {
    path.strip_prefix(PATHS).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Middleware that sees every error, whoever made it.
pub(super) async fn with_anthropic_errors(request: Request, next: Next) -> Response {
    if !is_anthropic(request.uri().path()) {
        return next.run(request).await;
    }
    let id = request.extensions().get().map(|RequestId(id)| id.to_string()).unwrap_or_default();
    let mut response = next.run(request).await;
    if let Some(body) = response.extensions_mut().remove::<ErrorBody>() {
        let error = object(response.status(), body.error.message);
        let body = anthropic::ErrorBody { kind: "error", error, request_id: id.clone() };
        let (mut parts, _) = response.into_parts();
        let (new, body) = Json(body).into_response().into_parts();
        parts.headers.remove(header::CONTENT_LENGTH);
        parts.headers.extend(new.headers);
        response = Response::from_parts(parts, body);
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// The error as a stream tells of it.
pub(super) fn error_object(error: &ApiError) -> anthropic::ErrorObject {
    object(error.status(), error.body().error.message)
}

fn object(status: StatusCode, message: String) -> anthropic::ErrorObject {
    let kind = match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "api_error",
    };
    anthropic::ErrorObject { kind, message }
}
