//! The end of every request: one line in the log and one count in the metrics when the last byte
//! of its answer is gone, or its client is. Never what was said.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use tracing::Span;

use super::request_id::RequestId;
use crate::openai::generation::Usage;
use crate::telemetry::traces::{RequestTrace, TraceParent};
use crate::telemetry::{metrics, traces};

/// The header in which clients name their trace.
const TRACEPARENT: &str = "traceparent";
/// The route of requests that have none.
const NO_ROUTE: &str = "none";
/// What counts as the status of an answer that nobody waited for; nginx' number.
const CLIENT_LEFT: u16 = 499;

/// What came of a request that was to be computed.
#[derive(Clone, Debug)]
pub(super) struct Computed {
    pub(super) usage: Usage,
    pub(super) client: Arc<str>,
    /// What the answer calls the model.
    pub(super) model: String,
    /// When it left the queue.
    pub(super) started: Option<Instant>,
    /// When the first piece of the answer was sent.
    pub(super) first_token: Option<Instant>,
    pub(super) finish_reasons: Vec<&'static str>,
    pub(super) outcome: &'static str,
}

/// Where whoever computes a request leaves what came of it, for the line at its end.
#[derive(Clone, Debug, Default)]
pub(super) struct Account(Arc<OnceLock<Computed>>);

impl Account {
    pub(super) fn settle(&self, computed: Computed) {
        // A request is computed once.
        let _ = self.0.set(computed);
    }
}

/// Middleware that sees the answer as clients do. Everything inside happens in the request's span,
/// the sending of the answer too.
pub(super) async fn with_access_log(mut request: Request, next: Next) -> Response {
    let account = Account::default();
    request.extensions_mut().insert(account.clone());
    let mut end = RequestEnd::new(&request, account);
    let response = next.run(request).await;
    end.status = Some(response.status());
    response.map(|body| Body::new(ObservedBody { body, end }))
}

/// Tells of the request when it is dropped.
struct RequestEnd {
    request_id: Option<RequestId>,
    parent: Option<TraceParent>,
    route: Option<MatchedPath>,
    method: &'static str,
    began_at: Instant,
    /// Absent until there is an answer.
    status: Option<StatusCode>,
    account: Account,
    span: Span,
}

impl RequestEnd {
    fn new(request: &Request, account: Account) -> Self {
        metrics::http_began();
        let header = request.headers().get(TRACEPARENT).filter(|_| traces::are_on());
        Self {
            request_id: request.extensions().get().cloned(),
            parent: header.and_then(|value| TraceParent::parse(value.to_str().ok()?)),
            route: request.extensions().get().cloned(),
            method: method_name(request.method()),
            began_at: Instant::now(),
            status: None,
            account,
            span: Span::current(),
        }
    }
}

impl Drop for RequestEnd {
    fn drop(&mut self) {
        let duration = self.began_at.elapsed();
        let route = self.route.as_ref().map_or(NO_ROUTE, MatchedPath::as_str);
        let status = self.status.map_or(CLIENT_LEFT, |status| status.as_u16());
        metrics::http_ended(&metrics::HttpRequest { route, method: self.method, status, duration });
        self.span.in_scope(|| self.write_line(route, status, duration));
        if traces::are_on() {
            self.write_trace(route, status, duration);
        }
    }
}

impl RequestEnd {
    fn write_line(&self, route: &str, status: u16, duration: Duration) {
        let (method, total_ms) = (self.method, duration.as_millis() as u64);
        let Some(computed) = self.account.0.get() else {
            // Probes and scrapes come every few seconds and say nothing.
            let is_probe = route.starts_with("/health") || route == "/metrics";
            if is_probe && status < 400 {
                tracing::debug!(method, route, status, total_ms, "request finished");
            } else {
                tracing::info!(method, route, status, total_ms, "request finished");
            }
            return;
        };
        let usage = &computed.usage;
        tracing::info!(
            method,
            route,
            status,
            outcome = computed.outcome,
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = usage.prompt_tokens_details.cached_tokens,
            completion_tokens = usage.completion_tokens,
            first_token_ms = self.after(computed.first_token).map(|after| after.as_millis() as u64),
            total_ms,
            "request finished"
        );
    }

    fn write_trace(&self, route: &str, status: u16, duration: Duration) {
        let Some(computed) = self.account.0.get() else { return };
        let usage = &computed.usage;
        traces::record(&RequestTrace {
            parent: self.parent,
            request_id: self.request_id.as_ref().map_or("", |id| &id.0),
            client: &computed.client,
            model: &computed.model,
            route,
            method: self.method,
            status,
            outcome: computed.outcome,
            finish_reasons: &computed.finish_reasons,
            input_tokens: usage.prompt_tokens,
            cached_tokens: usage.prompt_tokens_details.cached_tokens,
            output_tokens: usage.completion_tokens,
            ended_at: SystemTime::now(),
            duration,
            queued: self.after(computed.started),
            first_token: self.after(computed.first_token),
        });
    }

    fn after(&self, moment: Option<Instant>) -> Option<Duration> {
        moment.map(|moment| moment.saturating_duration_since(self.began_at))
    }
}

/// A method as a label; clients may send any word as one.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// An answer on its way, with what is to be done when it is over.
struct ObservedBody {
    // Dropped first: the answer's own end belongs into the line.
    body: Body,
    end: RequestEnd,
}

impl HttpBody for ObservedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Self { body, end } = &mut *self;
        end.span.in_scope(|| Pin::new(body).poll_frame(context))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
