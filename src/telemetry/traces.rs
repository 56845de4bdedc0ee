//! Traces: one per request that was to be computed, written when it is over from what is known
//! then, so that tracing costs nothing while tokens flow. Names are those of OpenTelemetry's
//! conventions for generative AI. **Invariant:** no attribute carries a prompt, an answer or a key.
//!
//! Without the feature `otel`, or without a collector in the environment, nothing is written.

#[cfg(feature = "otel")]
mod otlp;

use std::time::{Duration, SystemTime};

/// A request that is over.
#[derive(Clone, Debug)]
pub struct RequestTrace<'a> {
    /// The trace it belongs to, if its client named one.
    pub parent: Option<TraceParent>,
    /// The id of the request in logs.
    pub request_id: &'a str,
    /// Whose request.
    pub client: &'a str,
    /// What the answer calls the model.
    pub model: &'a str,
    /// The template of its path.
    pub route: &'a str,
    /// Its method.
    pub method: &'static str,
    /// The status of its answer.
    pub status: u16,
    /// How it ended.
    pub outcome: &'static str,
    /// Why its choices ended, in their order of ending.
    pub finish_reasons: &'a [&'static str],
    /// Tokens of its prompts.
    pub input_tokens: usize,
    /// Those of them that the prefix cache had.
    pub cached_tokens: usize,
    /// Generated tokens.
    pub output_tokens: usize,
    /// When it ended.
    pub ended_at: SystemTime,
    /// From its arrival to its end.
    pub duration: Duration,
    /// From its arrival to leaving the queue, to the first token.
    pub queued: Option<Duration>,
    /// From its arrival to the first token.
    pub first_token: Option<Duration>,
}

/// The trace and span of a client, out of the header `traceparent` (W3C Trace Context).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// The trace.
    pub trace_id: u128,
    /// The client's span.
    pub span_id: u64,
    /// Whether the client records it.
    pub is_sampled: bool,
}

impl TraceParent {
    /// Reads the header. `None` if it is not one: a trace must not fail a request.
    pub fn parse(header: &str) -> Option<Self> {
        let mut parts = header.trim().split('-');
        let version = hex(parts.next()?, 2)?;
        let trace_id = hex(parts.next()?, 32)?;
        let span_id = hex(parts.next()?, 16)? as u64;
        let flags = hex(parts.next()?, 2)?;
        // Later versions may have more parts, the first one has not.
        let is_well_formed = version != 0xff && (version != 0 || parts.next().is_none());
        let is_known = is_well_formed && trace_id != 0 && span_id != 0;
        is_known.then_some(Self { trace_id, span_id, is_sampled: flags & 1 == 1 })
    }
}

fn hex(text: &str, len: usize) -> Option<u128> {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let is_whole = text.len() == len && text.bytes().all(is_hex);
    is_whole.then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

/// Sends what is left when it is dropped, and gives up after a moment.
#[derive(Debug, Default)]
#[must_use = "traces end with it"]
pub struct Traces {
    #[cfg(feature = "otel")]
    _exporter: Option<otlp::Exporter>,
}

/// Starts sending traces where the environment says, once per process. Later calls change nothing.
///
/// # Errors
/// If the environment names a collector that cannot be one.
pub fn install(is_on: bool, service_name: Option<&str>) -> Result<Traces, String> {
    #[cfg(feature = "otel")]
    if is_on {
        return otlp::install(service_name).map(|exporter| Traces { _exporter: Some(exporter) });
    }
    if is_on {
        tracing::warn!("traces are wanted, but this build has no feature `otel`");
    }
    let _ = service_name;
    Ok(Traces::default())
}

/// Whether anybody will see a trace.
pub fn are_on() -> bool {
    #[cfg(feature = "otel")]
    return otlp::is_installed();
    #[cfg(not(feature = "otel"))]
    false
}

/// Writes the trace of a request. Never waits: if the collector cannot keep up, traces are lost.
pub fn record(trace: &RequestTrace<'_>) {
    #[cfg(feature = "otel")]
    otlp::record(trace);
    let _ = trace;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_taken_over_only_if_it_is_one() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parent = TraceParent::parse(good).unwrap();
        assert_eq!(parent.trace_id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!((parent.span_id, parent.is_sampled), (0x00f0_67aa_0ba9_02b7, true));
        let unsampled = good.replace("-01", "-00");
        assert!(!TraceParent::parse(&unsampled).unwrap().is_sampled);
        assert!(TraceParent::parse(&good.replacen("00", "cc", 1)).is_some(), "a later version");
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad}");
        }
    }
}
