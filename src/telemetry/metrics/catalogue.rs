//! Every metric's name, help and buckets.

use metrics::Unit;

pub(super) const NUM_REQUESTS_RUNNING: &str = "vllm:num_requests_running";
pub(super) const NUM_REQUESTS_WAITING: &str = "vllm:num_requests_waiting";
pub(super) const NUM_REQUESTS_SWAPPED: &str = "vllm:num_requests_swapped";
pub(super) const KV_CACHE_USAGE: &str = "vllm:kv_cache_usage_perc";
pub(super) const GPU_CACHE_USAGE: &str = "vllm:gpu_cache_usage_perc";
pub(super) const CPU_CACHE_USAGE: &str = "vllm:cpu_cache_usage_perc";
pub(super) const GPU_PREFIX_CACHE_HIT_RATE: &str = "vllm:gpu_prefix_cache_hit_rate";
pub(super) const CACHE_CONFIG_INFO: &str = "vllm:cache_config_info";
pub(super) const BUILD_INFO: &str = "qwen_build_info";
pub(super) const READY: &str = "qwen_ready";
pub(super) const ENGINE_UP: &str = "qwen_engine_up";
pub(super) const ENGINE_STALLED: &str = "qwen_engine_stalled_seconds";
pub(super) const ADAPTERS_HELD: &str = "qwen_adapters";
pub(super) const ADAPTER_BYTES: &str = "qwen_adapter_bytes";
pub(super) const UPTIME: &str = "qwen_uptime_seconds";
pub(super) const HTTP_IN_FLIGHT: &str = "qwen_http_requests_in_flight";

/// Written by itself, see `adapters`.
pub(super) const LORA_REQUESTS: &str = "vllm:lora_requests_info";
pub(super) const LORA_REQUESTS_HELP: &str =
    "Adapters of requests that run and that wait, as labels; the value is the time.";

pub(super) const PREFIX_CACHE_QUERIES: &str = "vllm:prefix_cache_queries_total";
pub(super) const PREFIX_CACHE_HITS: &str = "vllm:prefix_cache_hits_total";
pub(super) const GPU_PREFIX_CACHE_QUERIES: &str = "vllm:gpu_prefix_cache_queries_total";
pub(super) const GPU_PREFIX_CACHE_HITS: &str = "vllm:gpu_prefix_cache_hits_total";
pub(super) const SPEC_DECODE_DRAFTS: &str = "vllm:spec_decode_num_drafts_total";
pub(super) const SPEC_DECODE_DRAFT_TOKENS: &str = "vllm:spec_decode_num_draft_tokens_total";
pub(super) const SPEC_DECODE_ACCEPTED: &str = "vllm:spec_decode_num_accepted_tokens_total";
pub(super) const SPEC_DECODE_ACCEPTED_PER_POS: &str =
    "vllm:spec_decode_num_accepted_tokens_per_pos_total";
pub(super) const PROMPT_TOKENS: &str = "vllm:prompt_tokens_total";
pub(super) const PROMPT_TOKENS_CACHED: &str = "vllm:prompt_tokens_cached_total";
pub(super) const PROMPT_TOKENS_BY_SOURCE: &str = "vllm:prompt_tokens_by_source_total";
pub(super) const GENERATION_TOKENS: &str = "vllm:generation_tokens_total";
pub(super) const NUM_PREEMPTIONS: &str = "vllm:num_preemptions_total";
pub(super) const REQUEST_SUCCESS: &str = "vllm:request_success_total";
pub(super) const REQUESTS_CANCELLED: &str = "qwen_requests_cancelled_total";
pub(super) const REQUESTS_EXPIRED: &str = "qwen_requests_expired_total";
pub(super) const ENGINE_RESTARTS: &str = "qwen_engine_restarts_total";
pub(super) const LEDGER_WRITE_FAILURES: &str = "qwen_ledger_write_failures_total";
pub(super) const LEDGER_UNWRITTEN_REQUESTS: &str = "qwen_ledger_unwritten_requests";
pub(super) const STEPS_FAILED: &str = "qwen_steps_failed_total";
pub(super) const CLIENT_REQUESTS: &str = "qwen_client_requests_total";
pub(super) const CLIENT_TOKENS: &str = "qwen_client_tokens_total";
pub(super) const HTTP_REQUESTS: &str = "qwen_http_requests_total";
pub(super) const HTTP_ERRORS: &str = "qwen_http_errors_total";

pub(super) const TIME_TO_FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds";
pub(super) const INTER_TOKEN_LATENCY: &str = "vllm:inter_token_latency_seconds";
pub(super) const TIME_PER_OUTPUT_TOKEN: &str = "vllm:time_per_output_token_seconds";
pub(super) const REQUEST_TIME_PER_OUTPUT_TOKEN: &str = "vllm:request_time_per_output_token_seconds";
pub(super) const E2E_REQUEST_LATENCY: &str = "vllm:e2e_request_latency_seconds";
pub(super) const REQUEST_QUEUE_TIME: &str = "vllm:request_queue_time_seconds";
pub(super) const TIME_IN_QUEUE: &str = "vllm:time_in_queue_requests";
pub(super) const REQUEST_INFERENCE_TIME: &str = "vllm:request_inference_time_seconds";
pub(super) const REQUEST_PREFILL_TIME: &str = "vllm:request_prefill_time_seconds";
pub(super) const REQUEST_DECODE_TIME: &str = "vllm:request_decode_time_seconds";
pub(super) const REQUEST_PROMPT_TOKENS: &str = "vllm:request_prompt_tokens";
pub(super) const REQUEST_PREFILL_KV_COMPUTED: &str = "vllm:request_prefill_kv_computed_tokens";
pub(super) const REQUEST_GENERATION_TOKENS: &str = "vllm:request_generation_tokens";
pub(super) const REQUEST_MAX_GENERATION_TOKENS: &str = "vllm:request_max_num_generation_tokens";
pub(super) const REQUEST_PARAMS_N: &str = "vllm:request_params_n";
pub(super) const REQUEST_PARAMS_MAX_TOKENS: &str = "vllm:request_params_max_tokens";
pub(super) const ITERATION_TOKENS: &str = "vllm:iteration_tokens_total";
pub(super) const STEP_SECONDS: &str = "qwen_step_seconds";
pub(super) const STEP_PHASE_SECONDS: &str = "qwen_step_phase_seconds";
pub(super) const STEP_SEQUENCES: &str = "qwen_step_sequences";
pub(super) const GRAMMAR_COMPILE_SECONDS: &str = "qwen_grammar_compile_seconds";
pub(super) const HTTP_REQUEST_SECONDS: &str = "qwen_http_request_seconds";

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
const CHOICES_BUCKETS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const ITERATION_BUCKETS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16_384.0];
const SEQUENCES_BUCKETS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
const STEP_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const PHASE_BUCKETS: &[f64] = &[
    0.000_01, 0.000_1, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
    30.0,
];

pub(super) const GAUGES: &[(&str, &str)] = &[
    (NUM_REQUESTS_RUNNING, "Sequences that hold cache blocks."),
    (NUM_REQUESTS_WAITING, "Sequences in the queue."),
    (NUM_REQUESTS_SWAPPED, "Always 0: nothing is swapped out. For older dashboards."),
    (KV_CACHE_USAGE, "Share of KV-cache blocks that sequences hold; 1 means all of them."),
    (GPU_CACHE_USAGE, "Older name of vllm:kv_cache_usage_perc."),
    (CPU_CACHE_USAGE, "Always 0: there is no second cache. For older dashboards."),
    (GPU_PREFIX_CACHE_HIT_RATE, "Hits by queries of the prefix cache since the start, 0 to 1."),
    (CACHE_CONFIG_INFO, "How the KV cache is divided; always 1."),
    (BUILD_INFO, "What runs; always 1."),
    (READY, "1 when requests are welcome: the model is loaded and nothing shuts down."),
    (ENGINE_UP, "1 unless the engine has given up."),
    (ENGINE_STALLED, "How long the running step has taken, if that is too long; else 0."),
    (ADAPTERS_HELD, "Adapters in memory, also unloaded ones that requests still use."),
    (ADAPTER_BYTES, "Memory that they take."),
    (UPTIME, "Time since the start."),
    (HTTP_IN_FLIGHT, "Requests whose answers have not been sent to their ends."),
    (LEDGER_UNWRITTEN_REQUESTS, "Requests whose usage waits in memory because writing it failed."),
];

pub(super) const COUNTERS: &[(&str, &str)] = &[
    (PREFIX_CACHE_QUERIES, "Prompt tokens looked up in the prefix cache."),
    (PREFIX_CACHE_HITS, "Prompt tokens found in the prefix cache."),
    (GPU_PREFIX_CACHE_QUERIES, "Older name of vllm:prefix_cache_queries_total."),
    (GPU_PREFIX_CACHE_HITS, "Older name of vllm:prefix_cache_hits_total."),
    (SPEC_DECODE_DRAFTS, "How often a sequence had guesses in a step."),
    (SPEC_DECODE_DRAFT_TOKENS, "Guessed tokens."),
    (SPEC_DECODE_ACCEPTED, "Guessed tokens that came true."),
    (SPEC_DECODE_ACCEPTED_PER_POS, "The same tokens by their place among a step's guesses."),
    (PROMPT_TOKENS, "Prompt tokens of requests that left the queue."),
    (PROMPT_TOKENS_CACHED, "Those of them that were found in the prefix cache."),
    (PROMPT_TOKENS_BY_SOURCE, "The same tokens by where their keys and values came from."),
    (GENERATION_TOKENS, "Generated tokens."),
    (NUM_PREEMPTIONS, "Sequences that gave their blocks back to be recomputed later."),
    (REQUEST_SUCCESS, "Choices that ended, by reason."),
    (REQUESTS_CANCELLED, "Requests whose client left, by how far they had come."),
    (REQUESTS_EXPIRED, "Requests that were not answered within the time their client gave."),
    (STEPS_FAILED, "Steps that failed; their sequences were computed again."),
    (ENGINE_RESTARTS, "How often the engine or its runner was built anew."),
    (LEDGER_WRITE_FAILURES, "Attempts to write the usage ledger that failed."),
    (CLIENT_REQUESTS, "Requests to be computed, by client and how they ended."),
    (CLIENT_TOKENS, "Tokens by client: prompt, cached (a part of prompt), completion."),
    (HTTP_REQUESTS, "Requests by route, method and status, once their answers are over."),
    (HTTP_ERRORS, "Refusals and failures by the code that clients are told."),
];

/// Name, help, unit, buckets.
pub(super) const HISTOGRAMS: &[(&str, &str, Unit, &[f64])] = &[
    (TIME_TO_FIRST_TOKEN, "Submission to first token.", Unit::Seconds, FIRST_TOKEN_BUCKETS),
    (INTER_TOKEN_LATENCY, "From one token to the next.", Unit::Seconds, TOKEN_BUCKETS),
    (TIME_PER_OUTPUT_TOKEN, "Older name of the latency above.", Unit::Seconds, TOKEN_BUCKETS),
    (
        REQUEST_TIME_PER_OUTPUT_TOKEN,
        "Mean time between the tokens of a request's longest choice.",
        Unit::Seconds,
        TOKEN_BUCKETS,
    ),
    (E2E_REQUEST_LATENCY, "From submission to the end.", Unit::Seconds, REQUEST_BUCKETS),
    (REQUEST_QUEUE_TIME, "Time in the queue.", Unit::Seconds, REQUEST_BUCKETS),
    (TIME_IN_QUEUE, "Older name of the time in the queue.", Unit::Seconds, REQUEST_BUCKETS),
    (REQUEST_INFERENCE_TIME, "From the queue to the last token.", Unit::Seconds, REQUEST_BUCKETS),
    (REQUEST_PREFILL_TIME, "From the queue to the first token.", Unit::Seconds, REQUEST_BUCKETS),
    (REQUEST_DECODE_TIME, "From the first token to the last.", Unit::Seconds, REQUEST_BUCKETS),
    (REQUEST_PROMPT_TOKENS, "Prompt tokens per request.", Unit::Count, LENGTH_BUCKETS),
    (
        REQUEST_PREFILL_KV_COMPUTED,
        "Prompt tokens per request that the cache did not have.",
        Unit::Count,
        LENGTH_BUCKETS,
    ),
    (REQUEST_GENERATION_TOKENS, "Generated tokens per request.", Unit::Count, LENGTH_BUCKETS),
    (
        REQUEST_MAX_GENERATION_TOKENS,
        "Generated tokens of a request's longest choice.",
        Unit::Count,
        LENGTH_BUCKETS,
    ),
    (REQUEST_PARAMS_N, "Choices asked for per request.", Unit::Count, CHOICES_BUCKETS),
    (REQUEST_PARAMS_MAX_TOKENS, "Most tokens allowed per choice.", Unit::Count, LENGTH_BUCKETS),
    (ITERATION_TOKENS, "Tokens computed per step.", Unit::Count, ITERATION_BUCKETS),
    (STEP_SECONDS, "Time the model takes for a step.", Unit::Seconds, STEP_BUCKETS),
    (STEP_PHASE_SECONDS, "Where the time of a step goes.", Unit::Seconds, PHASE_BUCKETS),
    (STEP_SEQUENCES, "Sequences computed per step.", Unit::Count, SEQUENCES_BUCKETS),
    (GRAMMAR_COMPILE_SECONDS, "Time to compile a grammar.", Unit::Seconds, STEP_BUCKETS),
    (
        HTTP_REQUEST_SECONDS,
        "From a request's head to the end of its answer, by route.",
        Unit::Seconds,
        FIRST_TOKEN_BUCKETS,
    ),
];
