//! Traces as spans over OTLP: protobuf over HTTP, sent in batches by a thread of its own through
//! the HTTP client that also fetches models. The queue before that thread is bounded.

use std::future::Future;
use std::io::Read;
use std::pin::Pin;
use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::trace::{
    Span, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt, TraceFlags, TraceState,
    Tracer, TracerProvider,
};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::EnvResourceDetector;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use super::{RequestTrace, TraceParent};

const SERVICE_NAME: &str = "qwen-server";
/// How long a collector may take for a batch.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the end of the process waits for the last batch.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest answer of a collector that is read.
const MAX_ANSWER_BYTES: u64 = 64 << 10;

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// The thread that sends spans.
#[derive(Debug)]
pub(super) struct Exporter(SdkTracerProvider);

impl Drop for Exporter {
    fn drop(&mut self) {
        // A collector that is away has cost its traces, and no more than this time.
        let _ = self.0.shutdown_with_timeout(FLUSH_TIMEOUT);
    }
}

pub(super) fn install(service_name: Option<&str>) -> Result<Exporter, String> {
    let exporter = SpanExporter::builder().with_http().with_http_client(Client::new()).build();
    let exporter = exporter.map_err(|error| format!("cannot send traces: {error}"))?;
    let resource = Resource::builder_empty()
        .with_detector(Box::new(EnvResourceDetector::new()))
        .with_service_name(service_name.unwrap_or(SERVICE_NAME).to_owned())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let provider =
        SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
    TRACER.get_or_init(|| provider.tracer("qwen-server"));
    Ok(Exporter(provider))
}

pub(super) fn is_installed() -> bool {
    TRACER.get().is_some()
}

pub(super) fn record(trace: &RequestTrace<'_>) {
    let Some(tracer) = TRACER.get() else { return };
    let began_at = trace.ended_at - trace.duration;
    let parent = trace.parent.map_or_else(Context::new, remote_parent);
    let name = format!("{} {}", operation(trace.route), trace.model);
    let builder = SpanBuilder::from_name(name)
        .with_kind(SpanKind::Server)
        .with_start_time(began_at)
        .with_attributes(attributes(trace));
    let mut span = tracer.build_with_context(builder, &parent);
    if trace.outcome == "failed" || 500 <= trace.status {
        span.set_status(Status::error(trace.outcome));
    }
    let context = parent.with_remote_span_context(span.span_context().clone());
    let phases = [
        ("queue", Some(Duration::ZERO), trace.queued),
        ("prefill", trace.queued, trace.first_token),
        ("decode", trace.first_token, Some(trace.duration)),
    ];
    for (name, from, to) in phases {
        if let (Some(from), Some(to)) = (from, to) {
            let builder = SpanBuilder::from_name(name).with_start_time(began_at + from);
            let mut phase = tracer.build_with_context(builder, &context);
            phase.end_with_timestamp(began_at + to.max(from));
        }
    }
    span.end_with_timestamp(trace.ended_at);
}

fn remote_parent(parent: TraceParent) -> Context {
    let flags = if parent.is_sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
    let (trace_id, span_id) = (parent.trace_id.into(), parent.span_id.into());
    let span = SpanContext::new(trace_id, span_id, flags, true, TraceState::NONE);
    Context::new().with_remote_span_context(span)
}

/// The conventions' name for what a route does.
fn operation(route: &str) -> &'static str {
    match route {
        _ if route.contains("embedding") => "embeddings",
        "/v1/completions" | "/v1/fim/completions" => "text_completion",
        _ => "chat",
    }
}

fn attributes(trace: &RequestTrace<'_>) -> Vec<KeyValue> {
    let text = |name: &'static str, value: &str| KeyValue::new(name, value.to_owned());
    let number = |name: &'static str, value: usize| KeyValue::new(name, value as i64);
    let reasons = trace.finish_reasons.iter().map(|reason| StringValue::from(*reason)).collect();
    let mut all = vec![
        text("gen_ai.operation.name", operation(trace.route)),
        text("gen_ai.provider.name", SERVICE_NAME),
        text("gen_ai.request.model", trace.model),
        text("gen_ai.response.model", trace.model),
        KeyValue::new("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons))),
        number("gen_ai.usage.input_tokens", trace.input_tokens),
        number("gen_ai.usage.cache_read.input_tokens", trace.cached_tokens),
        number("gen_ai.usage.output_tokens", trace.output_tokens),
        text("http.request.method", trace.method),
        text("http.route", trace.route),
        number("http.response.status_code", trace.status.into()),
        text("qwen.request.id", trace.request_id),
        text("qwen.request.client", trace.client),
        text("qwen.request.outcome", trace.outcome),
    ];
    let seconds = trace.first_token.map(|time| time.as_secs_f64());
    all.extend(seconds.map(|time| KeyValue::new("gen_ai.server.time_to_first_token", time)));
    all
}

/// The client that also fetches models. It blocks the thread of the exporter and nobody else.
#[derive(Debug)]
struct Client(ureq::Agent);

impl Client {
    fn new() -> Self {
        Self(ureq::AgentBuilder::new().timeout(SEND_TIMEOUT).build())
    }

    fn send(&self, request: &Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let mut call = self.0.request(request.method().as_str(), &request.uri().to_string());
        for (name, value) in request.headers() {
            call = call.set(name.as_str(), value.to_str()?);
        }
        let answer = match call.send_bytes(request.body()) {
            Ok(answer) | Err(ureq::Error::Status(_, answer)) => answer,
            Err(error) => return Err(error.into()),
        };
        let status = answer.status();
        let mut body = Vec::new();
        answer.into_reader().take(MAX_ANSWER_BYTES).read_to_end(&mut body)?;
        Ok(Response::builder().status(status).body(body.into())?)
    }
}

impl HttpClient for Client {
    fn send_bytes<'client, 'future>(
        &'client self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'future>>
    where
        'client: 'future,
        Self: 'future,
    {
        Box::pin(async move { self.send(&request) })
    }
}
