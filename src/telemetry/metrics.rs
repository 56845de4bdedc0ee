//! Every metric: its name once, its meaning, its buckets, and the function that records it.
//!
//! Names and meanings are vLLM's wherever it has the same thing, so that dashboards and autoscalers
//! work unchanged; what only we have begins with `qwen_`. Recorded at layer boundaries, never
//! inside handlers. Without [`install`] recording does nothing.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

const NUM_REQUESTS_RUNNING: &str = "vllm:num_requests_running";
const NUM_REQUESTS_WAITING: &str = "vllm:num_requests_waiting";
const KV_CACHE_USAGE: &str = "vllm:kv_cache_usage_perc";
const PREFIX_CACHE_QUERIES: &str = "vllm:prefix_cache_queries_total";
const PREFIX_CACHE_HITS: &str = "vllm:prefix_cache_hits_total";
const PROMPT_TOKENS: &str = "vllm:prompt_tokens_total";
const GENERATION_TOKENS: &str = "vllm:generation_tokens_total";
const NUM_PREEMPTIONS: &str = "vllm:num_preemptions_total";
const REQUEST_SUCCESS: &str = "vllm:request_success_total";
const TIME_TO_FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds";
const INTER_TOKEN_LATENCY: &str = "vllm:inter_token_latency_seconds";
const TIME_PER_OUTPUT_TOKEN: &str = "vllm:time_per_output_token_seconds";
const E2E_REQUEST_LATENCY: &str = "vllm:e2e_request_latency_seconds";
const REQUEST_QUEUE_TIME: &str = "vllm:request_queue_time_seconds";
const REQUEST_PREFILL_TIME: &str = "vllm:request_prefill_time_seconds";
const REQUEST_DECODE_TIME: &str = "vllm:request_decode_time_seconds";
const REQUEST_PROMPT_TOKENS: &str = "vllm:request_prompt_tokens";
const REQUEST_GENERATION_TOKENS: &str = "vllm:request_generation_tokens";
const ITERATION_TOKENS: &str = "vllm:iteration_tokens_total";
const CACHE_CONFIG_INFO: &str = "vllm:cache_config_info";
const REQUESTS_CANCELLED: &str = "qwen_requests_cancelled_total";
const REQUESTS_EXPIRED: &str = "qwen_requests_expired_total";
const FAILED_STEPS: &str = "qwen_failed_steps_total";
const ENGINE_RESTARTS: &str = "qwen_engine_restarts_total";
const LEDGER_WRITE_FAILURES: &str = "qwen_ledger_write_failures_total";
const LEDGER_UNWRITTEN_REQUESTS: &str = "qwen_ledger_unwritten_requests";
const STEP_SECONDS: &str = "qwen_step_seconds";

const FIRST_TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const LENGTH_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0,
    20_000.0, 50_000.0, 100_000.0,
];
const ITERATION_BUCKETS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16_384.0];
const STEP_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

const GAUGES: &[(&str, &str)] = &[
    (NUM_REQUESTS_RUNNING, "Sequences that hold cache blocks."),
    (NUM_REQUESTS_WAITING, "Sequences in the queue."),
    (KV_CACHE_USAGE, "Share of KV-cache blocks that sequences hold; 1 means all of them."),
    (CACHE_CONFIG_INFO, "How the KV cache is divided; always 1."),
    (LEDGER_UNWRITTEN_REQUESTS, "Requests whose usage waits in memory because writing it failed."),
];

const COUNTERS: &[(&str, &str)] = &[
    (PREFIX_CACHE_QUERIES, "Prompt tokens looked up in the prefix cache."),
    (PREFIX_CACHE_HITS, "Prompt tokens found in the prefix cache."),
    (PROMPT_TOKENS, "Prompt tokens of requests that left the queue."),
    (GENERATION_TOKENS, "Generated tokens."),
    (NUM_PREEMPTIONS, "Sequences that gave their blocks back to be recomputed later."),
    (REQUEST_SUCCESS, "Choices that ended, by reason."),
    (REQUESTS_EXPIRED, "Requests that were not answered within the time their client gave."),
    (FAILED_STEPS, "Steps that failed; their sequences were computed again."),
    (ENGINE_RESTARTS, "How often the engine or its runner was built anew."),
    (REQUESTS_CANCELLED, "Requests whose client left, by how far they had come."),
    (LEDGER_WRITE_FAILURES, "Attempts to write the usage ledger that failed."),
];

/// Name, help, whether it measures seconds, buckets.
const HISTOGRAMS: &[(&str, &str, Unit, &[f64])] = &[
    (
        TIME_TO_FIRST_TOKEN,
        "From submission to the first token.",
        Unit::Seconds,
        FIRST_TOKEN_BUCKETS,
    ),
    (INTER_TOKEN_LATENCY, "From one token to the next.", Unit::Seconds, TOKEN_BUCKETS),
    (TIME_PER_OUTPUT_TOKEN, "Older name of the latency above.", Unit::Seconds, TOKEN_BUCKETS),
    (E2E_REQUEST_LATENCY, "From submission to the end.", Unit::Seconds, REQUEST_BUCKETS),
    (REQUEST_QUEUE_TIME, "Time in the queue.", Unit::Seconds, REQUEST_BUCKETS),
    (REQUEST_PREFILL_TIME, "From the queue to the first token.", Unit::Seconds, REQUEST_BUCKETS),
    (REQUEST_DECODE_TIME, "From the first token to the last.", Unit::Seconds, REQUEST_BUCKETS),
    (REQUEST_PROMPT_TOKENS, "Prompt tokens per request.", Unit::Count, LENGTH_BUCKETS),
    (REQUEST_GENERATION_TOKENS, "Generated tokens per request.", Unit::Count, LENGTH_BUCKETS),
    (ITERATION_TOKENS, "Tokens computed per step.", Unit::Count, ITERATION_BUCKETS),
    (STEP_SECONDS, "Time the model takes for a step.", Unit::Seconds, STEP_BUCKETS),
];

static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Starts recording, once per process; later calls change nothing. Every metric carries the label
/// `model_name`.
pub fn install(model_name: &str) {
    HANDLE.get_or_init(|| {
        let recorder = builder(model_name).expect("every bucket list has values").build_recorder();
        let handle = recorder.handle();
        // Another recorder in the same process keeps its place.
        metrics::set_global_recorder(recorder).ok()?;
        describe();
        Some(handle)
    });
}

fn builder(model_name: &str) -> Result<PrometheusBuilder, BuildError> {
    let mut builder = PrometheusBuilder::new().add_global_label("model_name", model_name);
    for (name, _, _, buckets) in HISTOGRAMS {
        builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets)?;
    }
    Ok(builder)
}

fn describe() {
    for (name, help) in GAUGES {
        describe_gauge!(*name, *help);
    }
    for (name, help) in COUNTERS {
        describe_counter!(*name, *help);
    }
    for (name, help, unit, _) in HISTOGRAMS {
        describe_histogram!(*name, *unit, *help);
    }
    // A counter that was never incremented would be missing from the first scrape.
    for name in [PREFIX_CACHE_QUERIES, PREFIX_CACHE_HITS, PROMPT_TOKENS, GENERATION_TOKENS] {
        counter!(name).increment(0);
    }
    for name in [NUM_PREEMPTIONS, REQUESTS_EXPIRED, FAILED_STEPS, ENGINE_RESTARTS] {
        counter!(name).increment(0);
    }
    counter!(LEDGER_WRITE_FAILURES).increment(0);
    for reason in ["stop", "length", "abort", "error"] {
        counter!(REQUEST_SUCCESS, "finished_reason" => reason).increment(0);
    }
    for phase in ["waiting", "prefill", "decode"] {
        counter!(REQUESTS_CANCELLED, "phase" => phase).increment(0);
    }
    for name in
        [NUM_REQUESTS_RUNNING, NUM_REQUESTS_WAITING, KV_CACHE_USAGE, LEDGER_UNWRITTEN_REQUESTS]
    {
        gauge!(name).set(0.0);
    }
}

/// All metrics in Prometheus' text format; empty when nothing was installed.
pub fn render() -> String {
    HANDLE.get().and_then(Option::as_ref).map(PrometheusHandle::render).unwrap_or_default()
}

/// Sorts collected samples into their buckets, so that memory does not grow while nobody scrapes.
pub fn upkeep() {
    if let Some(handle) = HANDLE.get().and_then(Option::as_ref) {
        handle.run_upkeep();
    }
}

/// The engine was set up.
pub fn engine_started(block_size: usize, num_blocks: usize) {
    let labels =
        [("block_size", block_size.to_string()), ("num_gpu_blocks", num_blocks.to_string())];
    gauge!(CACHE_CONFIG_INFO, &labels).set(1.0);
}

/// What the scheduler says after a step or after commands.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerState {
    /// Sequences that hold blocks.
    pub num_running: usize,
    /// Sequences in the queue.
    pub num_waiting: usize,
    /// Share of blocks that sequences hold.
    pub kv_cache_usage: f64,
    /// Preemptions since the last call.
    pub new_preemptions: u64,
    /// Tokens looked up in the prefix cache since the last call.
    pub new_prefix_queries: u64,
    /// Tokens found there since the last call.
    pub new_prefix_hits: u64,
}

/// Records the scheduler's state.
pub fn scheduler_state(state: &SchedulerState) {
    gauge!(NUM_REQUESTS_RUNNING).set(state.num_running as f64);
    gauge!(NUM_REQUESTS_WAITING).set(state.num_waiting as f64);
    gauge!(KV_CACHE_USAGE).set(state.kv_cache_usage);
    counter!(NUM_PREEMPTIONS).increment(state.new_preemptions);
    counter!(PREFIX_CACHE_QUERIES).increment(state.new_prefix_queries);
    counter!(PREFIX_CACHE_HITS).increment(state.new_prefix_hits);
}

/// A step was computed.
pub fn step_ended(duration: Duration, num_tokens: u32) {
    histogram!(STEP_SECONDS).record(duration);
    histogram!(ITERATION_TOKENS).record(num_tokens);
}

/// A request left the queue.
pub fn request_started(num_prompt_tokens: usize, queue_time: Duration) {
    counter!(PROMPT_TOKENS).increment(num_prompt_tokens as u64);
    histogram!(REQUEST_QUEUE_TIME).record(queue_time);
}

/// A request got its first token.
pub fn first_token(since_submission: Duration, since_start: Duration) {
    histogram!(TIME_TO_FIRST_TOKEN).record(since_submission);
    histogram!(REQUEST_PREFILL_TIME).record(since_start);
}

/// A choice got another token.
pub fn next_token(since_previous: Duration) {
    histogram!(INTER_TOKEN_LATENCY).record(since_previous);
    histogram!(TIME_PER_OUTPUT_TOKEN).record(since_previous);
}

/// A token was generated, the first or another.
pub fn generated_token() {
    counter!(GENERATION_TOKENS).increment(1);
}

/// A choice ended.
pub fn request_finished(reason: &'static str) {
    counter!(REQUEST_SUCCESS, "finished_reason" => reason).increment(1);
}

/// A client left.
pub fn request_cancelled(phase: &'static str) {
    counter!(REQUESTS_CANCELLED, "phase" => phase).increment(1);
}

/// A client's time was over.
pub fn request_expired() {
    counter!(REQUESTS_EXPIRED).increment(1);
}

/// A step failed.
pub fn step_failed() {
    counter!(FAILED_STEPS).increment(1);
}

/// The engine or its runner was built anew.
pub fn engine_restarted() {
    counter!(ENGINE_RESTARTS).increment(1);
}

/// Usage could not be written.
pub fn ledger_write_failed() {
    counter!(LEDGER_WRITE_FAILURES).increment(1);
}

/// So many requests are not in the ledger that should be.
pub fn ledger_unwritten(num_requests: u64) {
    gauge!(LEDGER_UNWRITTEN_REQUESTS).set(num_requests as f64);
}

/// A request that was answered to its end.
#[derive(Clone, Copy, Debug)]
pub struct EndedRequest {
    /// From submission to the end.
    pub latency: Duration,
    /// From the first token to the last.
    pub decode_time: Duration,
    /// Its prompt.
    pub num_prompt_tokens: usize,
    /// Of all its choices.
    pub num_output_tokens: usize,
}

/// Records a request that was answered to its end.
pub fn request_ended(request: &EndedRequest) {
    histogram!(E2E_REQUEST_LATENCY).record(request.latency);
    histogram!(REQUEST_DECODE_TIME).record(request.decode_time);
    histogram!(REQUEST_PROMPT_TOKENS).record(request.num_prompt_tokens as f64);
    histogram!(REQUEST_GENERATION_TOKENS).record(request.num_output_tokens as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: every metric is rendered under exactly its name with the model's label, and installing
    /// twice is harmless. Method: record each once and look for the lines.
    #[test]
    fn renders_every_metric() {
        install("test-model");
        install("other-model");
        engine_started(16, 100);
        scheduler_state(&SchedulerState {
            num_running: 2,
            num_waiting: 1,
            kv_cache_usage: 0.5,
            new_preemptions: 1,
            new_prefix_queries: 8,
            new_prefix_hits: 4,
        });
        let moment = Duration::from_millis(20);
        step_ended(moment, 7);
        request_started(5, moment);
        first_token(moment, moment);
        next_token(moment);
        generated_token();
        request_finished("stop");
        request_cancelled("prefill");
        request_ended(&EndedRequest {
            latency: moment,
            decode_time: moment,
            num_prompt_tokens: 5,
            num_output_tokens: 2,
        });
        upkeep();
        let text = render();
        for (name, _) in GAUGES.iter().chain(COUNTERS) {
            let is_there = |line: &str| {
                line.starts_with(&format!("{name}{{")) && line.contains("model_name=\"test-model\"")
            };
            assert!(text.lines().any(is_there), "{name} is missing in\n{text}");
        }
        for (name, ..) in HISTOGRAMS {
            assert!(text.contains(&format!("{name}_bucket{{")), "{name} is missing in\n{text}");
            assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help in\n{text}");
        }
        assert!(text.contains("finished_reason=\"stop\""));
        assert!(text.contains("num_gpu_blocks=\"100\""));
    }
}
