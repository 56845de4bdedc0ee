//! What operators ask. Not for clients: it tells of everybody's requests.

mod lora;
mod state;
mod usage;

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use super::health::is_ready;
use super::state::AppState;
use crate::engine::Health;
use crate::telemetry;
use crate::telemetry::metrics::ServerState;

/// Every route for operators.
pub(super) fn routes() -> Router<AppState> {
    Router::new()
        // One a line: they are compared with their description.
        .route("/metrics", get(metrics))
        .route("/admin/state", get(state::state))
        .route("/admin/usage", get(usage::report))
        .route("/v1/load_lora_adapter", post(lora::load))
        .route("/v1/unload_lora_adapter", post(lora::unload))
}

/// `GET /metrics`, in Prometheus' text format.
async fn metrics(State(state): State<AppState>) -> Response {
    let health = state.engine.health();
    state.adapters.observe();
    telemetry::metrics::server_state(&ServerState {
        is_ready: is_ready(&state),
        is_engine_up: !matches!(health, Health::Dead { .. }),
        stalled_for: match health {
            Health::Stalled { running_for, .. } => running_for,
            _ => Duration::ZERO,
        },
    });
    let content_type = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (content_type, telemetry::metrics::render()).into_response()
}
