//! Who asks: what is known about the sender of a request before its body is read.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;

use super::access_log::Account;
use super::error::ApiError;
use super::request_id::RequestId;
use super::state::AppState;

/// Who sends requests where nobody is asked for a name.
const ANONYMOUS: &str = "anonymous";

/// The sender of a request. An extractor, so that a handler has it by naming it.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// The id of the request in logs and headers.
    pub(super) request_id: Arc<str>,
    /// Who it is, by the name that the operator gave.
    pub(super) client: Arc<str>,
    /// Where what came of the request is left.
    pub(super) account: Account,
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, ApiError> {
        let RequestId(request_id) = parts.extensions.get().cloned().ok_or(ApiError::Internal)?;
        let account = parts.extensions.get().cloned().unwrap_or_default();
        let client: Arc<str> = ANONYMOUS.into();
        tracing::Span::current().record("client", &*client);
        Ok(Self { request_id, client, account })
    }
}
