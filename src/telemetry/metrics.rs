//! Every metric: its name once, its meaning, its buckets, and the function that records it.
//!
//! Names and meanings are vLLM's wherever it has the same thing, today's and the older ones, so
//! that dashboards and autoscalers work unchanged; what only we have begins with `qwen_`. Recorded
//! at layer boundaries, never inside handlers. Without [`install`] recording does nothing.

mod adapters;
mod catalogue;
mod engine;
mod process;
mod requests;

use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

pub use adapters::{AdaptedRequest, adapter_limit, adapters_held};
#[allow(clippy::wildcard_imports, reason = "all of them are names of metrics")]
use catalogue::*;
pub use engine::{
    EndedRequest, GrammarTimer, SchedulerState, Speculated, Step, StepPhase, engine_restarted,
    engine_started, first_token, generated_token, next_token, request_cancelled, request_ended,
    request_expired, request_finished, request_started, scheduler_state, speculated, step_ended,
    step_failed, step_phase,
};
pub use requests::{
    ClientRequest, HttpRequest, ServerState, client_request, http_began, http_ended, http_error,
    ledger_unwritten, ledger_write_failed, server_state,
};

struct Installed {
    handle: PrometheusHandle,
    model_name: String,
    at: Instant,
}

static INSTALLED: OnceLock<Option<Installed>> = OnceLock::new();

/// Starts recording, once per process; later calls change nothing. Every metric carries the label
/// `model_name`.
pub fn install(model_name: &str) {
    INSTALLED.get_or_init(|| {
        let recorder = builder(model_name).expect("every bucket list has values").build_recorder();
        let handle = recorder.handle();
        // Another recorder in the same process keeps its place.
        metrics::set_global_recorder(recorder).ok()?;
        describe();
        engine::prepare();
        Some(Installed { handle, model_name: model_name.to_owned(), at: Instant::now() })
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
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    process::describe(since_epoch.as_secs_f64());
    begin_at_zero();
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

/// A counter that was never incremented would be missing from the first scrape, and the first
/// increment invisible to `rate`.
fn begin_at_zero() {
    for name in [
        PREFIX_CACHE_QUERIES,
        PREFIX_CACHE_HITS,
        GPU_PREFIX_CACHE_QUERIES,
        GPU_PREFIX_CACHE_HITS,
        PROMPT_TOKENS,
        PROMPT_TOKENS_CACHED,
        GENERATION_TOKENS,
        NUM_PREEMPTIONS,
        REQUESTS_EXPIRED,
        STEPS_FAILED,
        ENGINE_RESTARTS,
        LEDGER_WRITE_FAILURES,
    ] {
        counter!(name).increment(0);
    }
    for (name, label, values) in [
        (REQUEST_SUCCESS, "finished_reason", &["stop", "length", "abort", "error"][..]),
        (REQUESTS_CANCELLED, "phase", &["waiting", "prefill", "decode"]),
        (PROMPT_TOKENS_BY_SOURCE, "source", &["local_compute", "local_cache_hit"]),
    ] {
        for value in values {
            counter!(name, label => *value).increment(0);
        }
    }
    for name in [
        NUM_REQUESTS_RUNNING,
        NUM_REQUESTS_WAITING,
        NUM_REQUESTS_SWAPPED,
        KV_CACHE_USAGE,
        GPU_CACHE_USAGE,
        CPU_CACHE_USAGE,
        GPU_PREFIX_CACHE_HIT_RATE,
        ADAPTERS_HELD,
        ADAPTER_BYTES,
        LEDGER_UNWRITTEN_REQUESTS,
    ] {
        gauge!(name).set(0.0);
    }
}

fn installed() -> Option<&'static Installed> {
    INSTALLED.get().and_then(Option::as_ref)
}

/// All metrics in Prometheus' text format; empty when nothing was installed.
pub fn render() -> String {
    let Some(installed) = installed() else { return String::new() };
    gauge!(UPTIME).set(installed.at.elapsed().as_secs_f64());
    process::observe();
    installed.handle.render() + &adapters::render(&installed.model_name)
}

/// Sorts collected samples into their buckets, so that memory does not grow while nobody scrapes.
/// May wait for somebody who scrapes, so the engine leaves it to others.
pub fn upkeep() {
    if let Some(installed) = installed() {
        installed.handle.run_upkeep();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Goal: every metric is rendered under exactly its name with the model's label, and installing
    /// twice is harmless. Method: record each once and look for the lines.
    #[test]
    fn renders_every_metric() {
        install("test-model");
        install("other-model");
        record_everything();
        upkeep();
        let text = render();
        for (name, _) in GAUGES.iter().chain(COUNTERS) {
            let is_there = |line: &str| {
                line.starts_with(&format!("{name}{{")) && line.contains("model_name=\"test-model\"")
            };
            assert!(text.lines().any(is_there), "{name} is missing in\n{text}");
            assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help in\n{text}");
        }
        for (name, ..) in HISTOGRAMS {
            assert!(text.contains(&format!("{name}_bucket{{")), "{name} is missing in\n{text}");
            assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help in\n{text}");
        }
        for sample in [
            "vllm:request_success_total{model_name=\"test-model\",finished_reason=\"stop\"} 1",
            "vllm:cache_config_info{model_name=\"test-model\",block_size=\"16\",num_gpu_blocks=\"100\"} 1",
            "vllm:request_prefill_kv_computed_tokens_sum{model_name=\"test-model\"} 3",
            "vllm:request_time_per_output_token_seconds_sum{model_name=\"test-model\"} 0.02",
            "qwen_client_tokens_total{model_name=\"test-model\",client=\"alice\",kind=\"cached\"} 4",
            "qwen_http_requests_in_flight{model_name=\"test-model\"} 0",
        ] {
            assert!(text.contains(sample), "no {sample} in\n{text}");
        }
        assert!(text.contains("process_resident_memory_bytes{") || !cfg!(target_os = "linux"));
    }

    fn record_everything() {
        engine_started(16, 100);
        engine_restarted();
        request_expired();
        ledger_write_failed();
        ledger_unwritten(3);
        adapters_held(1, 4096);
        scheduler_state(&SchedulerState {
            num_running: 2,
            num_waiting: 1,
            kv_cache_usage: 0.5,
            prefix_hit_rate: 0.5,
            new_preemptions: 1,
            new_prefix_queries: 8,
            new_prefix_hits: 4,
        });
        speculated(Speculated {
            num_drafts: 1,
            num_draft_tokens: 3,
            num_accepted_per_position: &[1, 1, 0],
        });
        let moment = Duration::from_millis(20);
        step_ended(&Step { duration: moment, num_tokens: 7, num_sequences: 2 });
        step_phase(StepPhase::Launch, moment);
        step_failed();
        request_started(5, 2, moment);
        first_token(moment, moment);
        next_token(moment);
        generated_token();
        request_finished("stop");
        request_cancelled("prefill");
        request_ended(&EndedRequest {
            latency: moment,
            inference_time: moment,
            decode_time: moment,
            num_prompt_tokens: 5,
            num_cached_tokens: 2,
            num_output_tokens: 3,
            longest_output: 2,
            n: 2,
            max_tokens: 9,
        });
        drop(GrammarTimer::start());
        http_began();
        http_ended(&HttpRequest { route: "/x", method: "GET", status: 200, duration: moment });
        http_error("not_found");
        client_request(&ClientRequest {
            client: "alice",
            outcome: "finished",
            prompt_tokens: 9,
            cached_tokens: 4,
            completion_tokens: 1,
        });
        server_state(&ServerState {
            is_ready: true,
            is_engine_up: true,
            stalled_for: Duration::ZERO,
        });
    }
}
