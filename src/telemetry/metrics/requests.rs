//! What the HTTP side records. Labels are bounded: routes are templates, clients have the names
//! that the operator gave, and codes are ours.

use std::time::Duration;

use metrics::{counter, gauge, histogram};

use super::catalogue::{
    CLIENT_REQUESTS, CLIENT_TOKENS, ENGINE_STALLED, ENGINE_UP, HTTP_ERRORS, HTTP_IN_FLIGHT,
    HTTP_REQUEST_SECONDS, HTTP_REQUESTS, LEDGER_UNWRITTEN_REQUESTS, LEDGER_WRITE_FAILURES, READY,
};

/// A request whose answer is over.
#[derive(Clone, Copy, Debug)]
pub struct HttpRequest<'a> {
    /// The template of its path.
    pub route: &'a str,
    /// Its method, one of the usual.
    pub method: &'static str,
    /// The status of its answer.
    pub status: u16,
    /// Until the end of its answer.
    pub duration: Duration,
}

/// A request has arrived; [`http_ended`] follows.
pub fn http_began() {
    gauge!(HTTP_IN_FLIGHT).increment(1.0);
}

/// Records a request whose answer is over.
pub fn http_ended(request: &HttpRequest<'_>) {
    gauge!(HTTP_IN_FLIGHT).decrement(1.0);
    let labels = [
        ("route", request.route.to_owned()),
        ("method", request.method.to_owned()),
        ("status", request.status.to_string()),
    ];
    counter!(HTTP_REQUESTS, &labels).increment(1);
    let route = request.route.to_owned();
    histogram!(HTTP_REQUEST_SECONDS, "route" => route).record(request.duration);
}

/// A client was told an error.
pub fn http_error(code: &str) {
    counter!(HTTP_ERRORS, "code" => code.to_owned()).increment(1);
}

/// What a request that was to be computed has used.
#[derive(Clone, Copy, Debug)]
pub struct ClientRequest<'a> {
    /// Whose request.
    pub client: &'a str,
    /// How it ended.
    pub outcome: &'static str,
    /// Tokens of its prompts.
    pub prompt_tokens: usize,
    /// How many of them the prefix cache had.
    pub cached_tokens: usize,
    /// Generated tokens.
    pub completion_tokens: usize,
}

/// Records what a client has used.
pub fn client_request(request: &ClientRequest<'_>) {
    let client = request.client.to_owned();
    counter!(CLIENT_REQUESTS, "client" => client, "outcome" => request.outcome).increment(1);
    for (kind, num_tokens) in [
        ("prompt", request.prompt_tokens),
        ("cached", request.cached_tokens),
        ("completion", request.completion_tokens),
    ] {
        let client = request.client.to_owned();
        counter!(CLIENT_TOKENS, "client" => client, "kind" => kind).increment(num_tokens as u64);
    }
}

/// What probes are told, for those who only look at metrics.
#[derive(Clone, Copy, Debug)]
pub struct ServerState {
    /// Whether requests are welcome.
    pub is_ready: bool,
    /// Whether the engine has not given up.
    pub is_engine_up: bool,
    /// How long the running step has taken, if that is too long.
    pub stalled_for: Duration,
}

/// Records what probes are told.
pub fn server_state(state: &ServerState) {
    let flag = |is_set| if is_set { 1.0 } else { 0.0 };
    gauge!(READY).set(flag(state.is_ready));
    gauge!(ENGINE_UP).set(flag(state.is_engine_up));
    gauge!(ENGINE_STALLED).set(state.stalled_for.as_secs_f64());
}

/// Usage could not be written.
pub fn ledger_write_failed() {
    counter!(LEDGER_WRITE_FAILURES).increment(1);
}

/// So many requests are not in the ledger that should be.
pub fn ledger_unwritten(num_requests: u64) {
    gauge!(LEDGER_UNWRITTEN_REQUESTS).set(num_requests as f64);
}
