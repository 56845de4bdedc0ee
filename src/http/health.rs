//! What probes, dashboards and operators ask.

use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::state::AppState;
use crate::engine::Health;

/// `GET /health/live`: whether restarting would help. A busy server is alive.
pub(super) async fn live(State(state): State<AppState>) -> Response {
    match engine_obstacle(&state) {
        None => ok(),
        Some(reason) => unavailable(&reason),
    }
}

/// `GET /health` and `/health/ready`: whether to send requests here.
pub(super) async fn ready(State(state): State<AppState>) -> Response {
    match engine_obstacle(&state).or_else(|| door_obstacle(&state)) {
        None => ok(),
        Some(reason) => unavailable(&reason),
    }
}

/// Whether requests are welcome.
pub(super) fn is_ready(state: &AppState) -> bool {
    engine_obstacle(state).or(door_obstacle(state)).is_none()
}

/// `GET /version`.
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

fn engine_obstacle(state: &AppState) -> Option<String> {
    match state.engine.health() {
        Health::Alive => None,
        Health::Stalled { running_for, phase } => {
            let seconds = running_for.as_secs();
            Some(format!("the engine makes no progress: {phase:?} for {seconds} s"))
        }
        Health::Dead { .. } => Some("the engine is not running".to_owned()),
    }
}

fn door_obstacle(state: &AppState) -> Option<String> {
    if state.is_draining.load(Ordering::Acquire) {
        return Some("the server is shutting down".to_owned());
    }
    (!state.engine.is_ready()).then(|| "the model is loading".to_owned())
}

fn ok() -> Response {
    Json(json!({"status": "ok"})).into_response()
}

fn unavailable(reason: &str) -> Response {
    let body = Json(json!({"status": "unavailable", "reason": reason}));
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}
