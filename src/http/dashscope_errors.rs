//! Errors on DashScope's paths, in DashScope's two shapes.

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::aliases::Dialect;
use super::request_id::RequestId;
use crate::dashscope;
use crate::openai::error::ErrorBody;

/// OpenAI's shape and the id beside it.
#[derive(Serialize)]
struct CompatibleBody {
    #[serde(flatten)]
    body: ErrorBody,
    request_id: String,
}

/// Middleware that sees every error, whoever made it. `max` is the most tokens of an input.
pub(super) async fn with_dashscope_errors(
    State(max): State<usize>,
    request: Request,
    next: Next,
) -> Response {
    let Some(dialect) = request.extensions().get::<Dialect>().copied() else {
        return next.run(request).await;
    };
    let id = request.extensions().get::<RequestId>().cloned();
    let mut response = next.run(request).await;
    let (Some(mut body), Some(id)) = (response.extensions_mut().remove::<ErrorBody>(), id) else {
        return response;
    };
    let is_too_long = body.error.code.as_deref() == Some("context_length_exceeded");
    let is_input = body.error.param.as_deref().is_some_and(|param| !param.contains("max_"));
    if is_too_long && is_input {
        let message = &body.error.message;
        body.error.message = format!("Range of input length should be [1, {max}]. {message}");
    }
    let status = response.status();
    let (mut parts, _) = response.into_parts();
    let (new, body) = match dialect {
        Dialect::Native => {
            let body = error_body(status, &body, &id.0);
            if body.code == INVALID_URL {
                // Clients try other statuses again.
                parts.status = StatusCode::BAD_REQUEST;
            }
            Json(body).into_response().into_parts()
        }
        Dialect::Compatible => {
            body.error.code = Some(compatible_code(status, &body).to_owned());
            Json(CompatibleBody { body, request_id: id.0.to_string() }).into_response().into_parts()
        }
    };
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.extend(new.headers);
    Response::from_parts(parts, body)
}

const INVALID_URL: &str = "InvalidURL";

/// The error as a native answer or stream tells of it.
pub(super) fn error_body(
    status: StatusCode,
    body: &ErrorBody,
    request_id: &str,
) -> dashscope::ErrorBody {
    let code = match body.error.code.as_deref() {
        Some("empty_model") => "BadRequest.EmptyModel",
        Some("empty_input") => "BadRequest.EmptyInput",
        Some("model_not_found") => "ModelNotFound",
        Some("unsupported_operation") => "UnsupportedOperation",
        Some("rate_limit_exceeded") if body.error.kind == "tokens" => "Throttling.AllocationQuota",
        Some("rate_limit_exceeded") => "Throttling.RateQuota",
        _ => match status {
            StatusCode::UNAUTHORIZED => "InvalidApiKey",
            StatusCode::FORBIDDEN => "AccessDenied",
            StatusCode::NOT_FOUND => INVALID_URL,
            StatusCode::METHOD_NOT_ALLOWED => "UnsupportedOperation",
            StatusCode::REQUEST_TIMEOUT => "RequestTimeOut",
            StatusCode::PAYLOAD_TOO_LARGE => "BadRequest.TooLarge",
            StatusCode::TOO_MANY_REQUESTS => "Throttling",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailable",
            StatusCode::GATEWAY_TIMEOUT => "GatewayTimeout",
            status if status.is_client_error() => "InvalidParameter",
            _ => "InternalError",
        },
    };
    let message = body.error.message.clone();
    dashscope::ErrorBody { code, message, request_id: request_id.to_owned() }
}

fn compatible_code(status: StatusCode, body: &ErrorBody) -> &'static str {
    if body.error.code.as_deref() == Some("model_not_found") {
        return "model_not_found";
    }
    if status == StatusCode::TOO_MANY_REQUESTS && body.error.kind == "tokens" {
        return "insufficient_quota";
    }
    match status {
        StatusCode::UNAUTHORIZED => "invalid_api_key",
        StatusCode::FORBIDDEN => "access_denied",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::TOO_MANY_REQUESTS => "limit_requests",
        StatusCode::SERVICE_UNAVAILABLE => "service_unavailable",
        status if status.is_client_error() => "invalid_parameter_error",
        _ => "internal_error",
    }
}
