//! The only error that becomes a response, and the only place that knows status codes.

use std::time::Duration;

use axum::Json;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use crate::access::{Refusal, Resource};
use crate::chat::output::OutputError;
use crate::chat::prompt::PromptError;
use crate::engine::SubmitError;
use crate::openai::error::{ErrorBody, ErrorObject};
use crate::telemetry::metrics;

/// Longest message sent to a client: some echo what the client sent.
const MAX_MESSAGE_CHARS: usize = 1024;
/// Longest advice to wait: clients ignore more than two minutes.
const MAX_RETRY_AFTER_SECONDS: usize = 30;
/// Pause advised while the server goes away or recovers.
const RESTART_SECONDS: usize = 5;

/// Why a request gets no answer of the usual kind.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("{message}")]
    Invalid { message: String, param: Option<String> },
    #[error("{message}")]
    TooLong { message: String, param: &'static str },
    #[error("`{0}`: Required parameter \"{0}\" missing from request.")]
    Empty(&'static str),
    #[error("{0}")]
    Unsupported(&'static str),
    #[error(
        "this server asks for an API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
    )]
    NoKey,
    #[error("this API key is not known here, or works no more")]
    WrongKey,
    #[error("this API key does not allow the model `{0}`")]
    ModelForbidden(String),
    #[error("only an API key with the role `admin` opens this path")]
    NotAnAdmin,
    #[error("this API key allows {}: try again in {:.3} s", allowed(*resource, *limit), wait.as_secs_f64())]
    RateLimited { resource: Resource, limit: u64, wait: Duration },
    #[error("the prompt has more tokens than this API key may use in a minute, which are {limit}")]
    BeyondQuota { limit: u64 },
    #[error("the model `{0}` does not exist")]
    ModelNotFound(String),
    #[error("{message}")]
    AdapterNotFound { message: String, param: &'static str },
    #[error("{0}")]
    AdaptersInUse(String),
    #[error("there is no response `{0}`: it never was, was not stored, or its time is over")]
    ResponseNotFound(String),
    #[error("there is no response `{0}`: it never was, was not stored, or its time is over")]
    PreviousNotFound(String),
    #[error(
        "this server answers only to localhost, to addresses and to what `--allowed-host` names: a page \
         of another name may not be what it seems"
    )]
    UnknownHost,
    #[error("no such path: {0}")]
    NotFound(String),
    #[error("this path does not accept {0}")]
    MethodNotAllowed(String),
    #[error("the body is longer than {0} bytes")]
    BodyTooLarge(usize),
    #[error("the body could not be read")]
    BodyUnreadable,
    #[error("the body did not arrive in time")]
    BodyTimeout,
    #[error("the content type must be application/json")]
    UnsupportedMediaType,
    #[error("the server is busy: {num_waiting} requests are waiting")]
    Overloaded { num_waiting: usize, retry_after: Duration },
    #[error("the request's time was over before its answer was complete")]
    DeadlineExceeded,
    #[error("the server is busy compiling grammars")]
    Compiling,
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the model is still loading")]
    Loading,
    #[error("the server is short of memory")]
    MemoryShort,
    #[error("the engine is not running")]
    EngineDead,
    #[error("the engine could not compute this request; the server's log says why")]
    EngineFailed,
    #[error("internal error; the server's log says more")]
    Internal,
}

impl ApiError {
    /// The body, which is also what a stream sends when it fails midway.
    pub(super) fn body(&self) -> ErrorBody {
        let (kind, code) = self.kind_and_code();
        let param = match self {
            Self::Invalid { param, .. } => param.clone(),
            Self::TooLong { param, .. }
            | Self::Empty(param)
            | Self::AdapterNotFound { param, .. } => Some((*param).to_owned()),
            Self::ModelNotFound(_) | Self::ModelForbidden(_) => Some("model".to_owned()),
            Self::ResponseNotFound(_) => Some("response_id".to_owned()),
            Self::PreviousNotFound(_) => Some("previous_response_id".to_owned()),
            _ => None,
        };
        let message = self.to_string().chars().take(MAX_MESSAGE_CHARS).collect();
        let code = code.map(str::to_owned);
        ErrorBody { error: ErrorObject { message, kind: kind.to_owned(), param, code } }
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. }
            | Self::Empty(_)
            | Self::Unsupported(_)
            | Self::TooLong { .. }
            | Self::BodyUnreadable
            | Self::BeyondQuota { .. }
            | Self::PreviousNotFound(_) => StatusCode::BAD_REQUEST,
            Self::NoKey | Self::WrongKey => StatusCode::UNAUTHORIZED,
            Self::ModelForbidden(_) | Self::NotAnAdmin => StatusCode::FORBIDDEN,
            Self::ModelNotFound(_)
            | Self::NotFound(_)
            | Self::ResponseNotFound(_)
            | Self::AdapterNotFound { .. } => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::UnknownHost => StatusCode::MISDIRECTED_REQUEST,
            Self::BodyTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Overloaded { .. } | Self::Compiling | Self::RateLimited { .. } => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Self::ShuttingDown
            | Self::Loading
            | Self::MemoryShort
            | Self::EngineDead
            | Self::AdaptersInUse(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Self::EngineFailed | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn kind_and_code(&self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Invalid { .. } | Self::BodyUnreadable => ("invalid_request_error", None),
            Self::TooLong { .. } => ("invalid_request_error", Some("context_length_exceeded")),
            Self::Empty("model") => ("invalid_request_error", Some("empty_model")),
            Self::Empty(_) => ("invalid_request_error", Some("empty_input")),
            Self::Unsupported(_) => ("invalid_request_error", Some("unsupported_operation")),
            Self::NoKey | Self::WrongKey => ("invalid_request_error", Some("invalid_api_key")),
            Self::ModelForbidden(_) => ("invalid_request_error", Some("model_not_allowed")),
            Self::NotAnAdmin => ("invalid_request_error", Some("insufficient_permissions")),
            Self::RateLimited { resource: Resource::Tokens, .. } => {
                ("tokens", Some("rate_limit_exceeded"))
            }
            Self::RateLimited { .. } => ("requests", Some("rate_limit_exceeded")),
            Self::BeyondQuota { .. } => ("tokens", Some("request_beyond_quota")),
            Self::ModelNotFound(_) => ("invalid_request_error", Some("model_not_found")),
            Self::AdapterNotFound { .. } => ("invalid_request_error", Some("adapter_not_found")),
            Self::AdaptersInUse(_) => ("server_error", Some("adapters_in_use")),
            Self::ResponseNotFound(_) => ("invalid_request_error", Some("response_not_found")),
            Self::PreviousNotFound(_) => {
                ("invalid_request_error", Some("previous_response_not_found"))
            }
            Self::UnknownHost => ("invalid_request_error", Some("host_not_allowed")),
            Self::NotFound(_) => ("invalid_request_error", Some("not_found")),
            Self::MethodNotAllowed(_) => ("invalid_request_error", Some("method_not_allowed")),
            Self::BodyTooLarge(_) => ("invalid_request_error", Some("body_too_large")),
            Self::BodyTimeout => ("invalid_request_error", Some("body_timeout")),
            Self::UnsupportedMediaType => ("invalid_request_error", Some("unsupported_media_type")),
            Self::Overloaded { .. } | Self::Compiling => {
                ("rate_limit_error", Some("engine_overloaded"))
            }
            Self::DeadlineExceeded => ("server_error", Some("deadline_exceeded")),
            Self::ShuttingDown => ("server_error", Some("shutting_down")),
            Self::Loading => ("server_error", Some("loading")),
            Self::MemoryShort => ("server_error", Some("memory_short")),
            Self::EngineDead => ("server_error", Some("engine_dead")),
            Self::EngineFailed => ("server_error", Some("engine_failed")),
            Self::Internal => ("server_error", Some("internal_error")),
        }
    }

    fn retry_after(&self) -> Option<usize> {
        match self {
            Self::Overloaded { retry_after, .. } => {
                let seconds = retry_after.as_secs_f64().ceil() as usize;
                Some(seconds.clamp(1, MAX_RETRY_AFTER_SECONDS))
            }
            Self::ShuttingDown
            | Self::Loading
            | Self::MemoryShort
            | Self::EngineDead
            | Self::AdaptersInUse(_)
            | Self::Compiling => Some(RESTART_SECONDS),
            // Rounded up: who comes a moment too early is refused again.
            Self::RateLimited { wait, .. } => Some(wait.as_millis().div_ceil(1000).max(1) as usize),
            _ => None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = self.body();
        let (kind, code) = self.kind_and_code();
        metrics::http_error(code.unwrap_or(kind));
        let mut response = (self.status(), Json(&body)).into_response();
        response.extensions_mut().insert(body);
        if let Some(seconds) = self.retry_after() {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Self::RateLimited { wait, .. } = &self {
            let millis = wait.as_nanos().div_ceil(1_000_000).max(1) as u64;
            let name = HeaderName::from_static("retry-after-ms");
            response.headers_mut().insert(name, HeaderValue::from(millis));
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
        }
        if matches!(self, Self::EngineFailed | Self::DeadlineExceeded) {
            // The same request would fail again, or come too late for its client; and official
            // clients retry a 500 by themselves.
            let name = HeaderName::from_static("x-should-retry");
            response.headers_mut().insert(name, HeaderValue::from_static("false"));
        }
        response
    }
}

fn allowed(resource: Resource, limit: u64) -> String {
    match resource {
        Resource::Requests => format!("{limit} requests per minute"),
        Resource::Tokens => format!("{limit} tokens per minute"),
        Resource::Seats => format!("{limit} requests at a time"),
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Wait { resource, limit, wait } => Self::RateLimited { resource, limit, wait },
            Refusal::Never { limit } => Self::BeyondQuota { limit },
        }
    }
}

impl From<PromptError> for ApiError {
    fn from(error: PromptError) -> Self {
        match error {
            PromptError::Invalid { param, message } => {
                Self::Invalid { message, param: Some(param) }
            }
            PromptError::TooLong { param, message } => Self::TooLong { message, param },
            PromptError::Busy => Self::Compiling,
            PromptError::Encode(reason) => {
                tracing::error!(%reason, "cannot encode a prompt");
                Self::Internal
            }
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Busy { num_waiting, retry_after }
            | SubmitError::TooLate { num_waiting, wait: retry_after } => {
                Self::Overloaded { num_waiting, retry_after }
            }
            SubmitError::TooLong { .. } => Self::TooLong { message, param: "max_tokens" },
            SubmitError::Stopping => Self::ShuttingDown,
            SubmitError::Dead { reason } => {
                tracing::error!(%reason, "refused a request: the engine is dead");
                Self::EngineDead
            }
        }
    }
}

impl From<OutputError> for ApiError {
    fn from(error: OutputError) -> Self {
        match error {
            OutputError::Expired => Self::DeadlineExceeded,
            OutputError::Aborted => Self::ShuttingDown,
            OutputError::Failed(_) => Self::EngineFailed,
        }
    }
}
