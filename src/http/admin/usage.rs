//! `GET /admin/usage`: what `qwen-server usage` prints, over HTTP.

use std::time::SystemTime;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::ledger::Store;
use crate::ledger::report::{Format, QueryText, Report};

/// What may stand behind the question mark.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fields {
    since: Option<String>,
    until: Option<String>,
    by: Option<String>,
    format: Option<String>,
}

/// Reads the file, which lags behind by less than a second.
pub(super) async fn report(
    State(state): State<AppState>,
    fields: Result<Query<Fields>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Some(ledger) = state.ledger.clone() else {
        return Err(ApiError::Unsupported("no usage is kept: start with --usage-ledger FILE"));
    };
    let Query(Fields { since, until, by, format }) = fields
        .map_err(|rejection| ApiError::Invalid { message: rejection.body_text(), param: None })?;
    let query = QueryText { since, until, by }.parse(SystemTime::now());
    let query = query.map_err(|(name, message)| invalid(name, &message))?;
    let format = format.as_deref().unwrap_or("json").parse::<Format>();
    let format = format.map_err(|message| invalid("format", &message))?;
    let prices = state.prices;
    let report = tokio::task::spawn_blocking(move || {
        Report::read(&Store::open_existing(ledger.path())?, query, &prices)
    });
    let report = report.await.map_err(|_| ApiError::Internal)?.map_err(|error| {
        let error = format!("{:#}", anyhow::Error::from(error));
        tracing::error!(error, "cannot read the usage ledger");
        ApiError::Internal
    })?;
    let content_type = match format {
        Format::Table => "text/plain; charset=utf-8",
        Format::Csv => "text/csv; charset=utf-8",
        Format::Json => "application/json",
    };
    Ok(([(CONTENT_TYPE, content_type)], report.render(format)).into_response())
}

fn invalid(name: &str, message: &str) -> ApiError {
    ApiError::Invalid { message: format!("`{name}`: {message}"), param: Some(name.to_owned()) }
}
