//! Who asks: what is known about the sender of a request before its body is read.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{FromRequestParts, Request as HttpRequest};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderValue};

use super::access_log::Account;
use super::auth::Guest;
use super::error::ApiError;
use super::key_ring::Holder;
use super::meter::Meter;
use super::models::Chosen;
use super::request_id::RequestId;
use super::state::{AppState, PrefixSharing};
use crate::engine::request::{Priority, Request};

/// The header with which a client says how long it waits.
const REQUEST_TIMEOUT: &str = "x-request-timeout";
/// Longer than any answer takes.
const MAX_TIMEOUT_SECONDS: f64 = 86_400.0;
/// Who sends requests where nobody is asked for a name.
pub(super) const ANONYMOUS: &str = "anonymous";

/// The sender of a request. An extractor, so that a handler has it by naming it.
#[derive(Clone)]
pub(super) struct Caller {
    /// The id of the request in logs and headers.
    pub(super) request_id: Arc<str>,
    /// Who it is, by the name that the operator gave.
    pub(super) client: Arc<str>,
    /// When it stops waiting for its answer.
    pub(super) deadline: Option<Instant>,
    /// Counts what is computed for this request, if that is counted.
    pub(super) meter: Option<Arc<Meter>>,
    /// Where what came of the request is left.
    pub(super) account: Account,
    /// The adapter that it names.
    pub(super) chosen: Chosen,
    /// Nobody, where no keys are asked for.
    guest: Option<Guest>,
}

impl Caller {
    /// The holder of a key whose request was not let in.
    pub(super) fn of(
        holder: &Holder,
        request: &HttpRequest,
        state: &AppState,
    ) -> Result<Self, ApiError> {
        let client = Arc::clone(holder.key.name.as_arc());
        let request_id = request_id(request.extensions())?;
        let chosen = Chosen::default();
        let meter = Meter::open(state, Arc::clone(&client), chosen.clone()).map(Arc::new);
        let account = request.extensions().get().cloned().unwrap_or_default();
        Ok(Self { request_id, client, deadline: None, meter, account, chosen, guest: None })
    }

    /// Whose key it is.
    pub(super) fn holder(&self) -> Option<&Holder> {
        self.guest.as_ref().map(|guest| &*guest.holder)
    }

    /// Whether this client may use the model that goes by `name`.
    pub(super) fn may_use(&self, name: &str) -> bool {
        self.holder().is_none_or(|holder| holder.key.allows_model(name))
    }

    /// Puts on a request what the engine needs to know of its sender.
    pub(super) fn sign(&self, request: &mut Request, state: &AppState) {
        // The engine's lines in the log are to be found by the id that the client knows.
        request.id = Arc::clone(&self.request_id);
        request.deadline = self.deadline;
        request.adapter = self.chosen.adapter().cloned();
        let Some(holder) = self.holder() else { return };
        request.fairness_id = Some(Arc::clone(&self.client));
        request.priority = request.priority.at_most(Priority::new(holder.key.priority));
        if state.prefix_sharing == PrefixSharing::WithinKey {
            // No name holds a NUL, so no other key's salt is the same.
            let own = request.cache_salt.as_deref().unwrap_or_default();
            request.cache_salt = Some(format!("{}\0{own}", self.client).into());
        }
    }
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.request_id, self.client)
    }
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let request_id = request_id(&parts.extensions)?;
        let client = client(&parts.extensions);
        let guest = parts.extensions.get().cloned();
        let asked = parts.headers.get(REQUEST_TIMEOUT).map(timeout).transpose()?;
        let timeout = asked.into_iter().chain(state.limits.request_timeout).min();
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let meter = parts.extensions.get().cloned();
        let account = parts.extensions.get().cloned().unwrap_or_default();
        let chosen = parts.extensions.get().cloned().unwrap_or_default();
        tracing::Span::current().record("client", &*client);
        Ok(Self { request_id, client, deadline, meter, account, chosen, guest })
    }
}

/// Who sent the request that these belong to.
pub(super) fn client(extensions: &Extensions) -> Arc<str> {
    match extensions.get::<Guest>() {
        Some(guest) => Arc::clone(guest.holder.key.name.as_arc()),
        None => ANONYMOUS.into(),
    }
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

fn request_id(extensions: &Extensions) -> Result<Arc<str>, ApiError> {
    let RequestId(id) = extensions.get().cloned().ok_or(ApiError::Internal)?;
    Ok(id)
}
