//! What a request used, counted once: when the last who holds its meter lets go.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;

use super::caller::client;
use super::models::Chosen;
use super::state::AppState;
use crate::ledger::{Counts, Ledger};
use crate::openai::generation::Usage;

/// The meter of one request. It runs from the request's head to the end of the answer, through the
/// [`Caller`](super::caller::Caller) that every handler has; whoever is told nothing else has been refused.
#[derive(Debug)]
pub(super) struct Meter {
    ledger: Ledger,
    client: Arc<str>,
    model: Arc<str>,
    chosen: Chosen,
    /// What was computed for it; nothing was before it is let in.
    settled: Mutex<Option<Counts>>,
}

impl Meter {
    pub(super) fn open(state: &AppState, client: Arc<str>, chosen: Chosen) -> Option<Self> {
        Some(Self {
            ledger: state.ledger.clone()?,
            client,
            // By the name it has here: what clients call it would fill the ledger with names.
            model: state.model.name.as_str().into(),
            chosen,
            settled: Mutex::default(),
        })
    }

    /// The request was let in and is over.
    pub(super) fn settle(&self, usage: &Usage, has_failed: bool) {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = settled.get_or_insert_default();
        *counts += Counts {
            requests: 0,
            errors: 0,
            prompt_tokens: usage.prompt_tokens as u64,
            cached_tokens: usage.prompt_tokens_details.cached_tokens as u64,
            completion_tokens: usage.completion_tokens as u64,
        };
        counts.errors |= u64::from(has_failed);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let settled = self.settled.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let refused = Counts { errors: 1, ..Counts::default() };
        let counts = Counts { requests: 1, ..settled.unwrap_or(refused) };
        let model = self.chosen.adapter().map_or(&self.model, |adapter| adapter.name());
        let names = (Arc::clone(&self.client), Arc::clone(model));
        self.ledger.record(SystemTime::now(), names, counts);
    }
}

/// Middleware around every handler that computes.
pub(super) async fn metered(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let chosen: Chosen = request.extensions().get().cloned().unwrap_or_default();
    if let Some(meter) = Meter::open(&state, client(request.extensions()), chosen) {
        request.extensions_mut().insert(Arc::new(meter));
    }
    next.run(request).await
}
