//! What operators ask. Not for clients: it tells of everybody's requests.

mod usage;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::state::AppState;
use crate::telemetry;

/// Every route for operators.
pub(super) fn routes() -> Router<AppState> {
    Router::new().route("/metrics", get(metrics)).route("/admin/usage", get(usage::report))
}

/// `GET /metrics`, in Prometheus' text format.
async fn metrics() -> Response {
    let content_type = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (content_type, telemetry::metrics::render()).into_response()
}
