//! What the engine and the grammar compiler record.

use std::time::{Duration, Instant};

use metrics::{counter, gauge, histogram};

#[allow(clippy::wildcard_imports, reason = "all of them are names of metrics")]
use super::catalogue::*;

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
    /// Share of prompt tokens that were found in the prefix cache since the start.
    pub prefix_hit_rate: f64,
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
    gauge!(GPU_CACHE_USAGE).set(state.kv_cache_usage);
    gauge!(GPU_PREFIX_CACHE_HIT_RATE).set(state.prefix_hit_rate);
    counter!(NUM_PREEMPTIONS).increment(state.new_preemptions);
    for name in [PREFIX_CACHE_QUERIES, GPU_PREFIX_CACHE_QUERIES] {
        counter!(name).increment(state.new_prefix_queries);
    }
    for name in [PREFIX_CACHE_HITS, GPU_PREFIX_CACHE_HITS] {
        counter!(name).increment(state.new_prefix_hits);
    }
}

/// A step was computed.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// From its beginning to its end, without scheduling.
    pub duration: Duration,
    /// Tokens in it.
    pub num_tokens: u32,
    /// Sequences in it.
    pub num_sequences: usize,
}

/// Records a step.
pub fn step_ended(step: &Step) {
    histogram!(STEP_SECONDS).record(step.duration);
    histogram!(ITERATION_TOKENS).record(step.num_tokens);
    histogram!(STEP_SEQUENCES).record(step.num_sequences as f64);
}

/// Records a part of a step.
pub fn step_phase(phase: &'static str, duration: Duration) {
    histogram!(STEP_PHASE_SECONDS, "phase" => phase).record(duration);
}

/// A step failed.
pub fn step_failed() {
    counter!(STEPS_FAILED).increment(1);
}

/// A request left the queue.
pub fn request_started(num_prompt_tokens: usize, num_cached_tokens: usize, queue_time: Duration) {
    let (all, cached) = (num_prompt_tokens as u64, num_cached_tokens as u64);
    counter!(PROMPT_TOKENS).increment(all);
    counter!(PROMPT_TOKENS_CACHED).increment(cached);
    for (source, num_tokens) in
        [("local_compute", all.saturating_sub(cached)), ("local_cache_hit", cached)]
    {
        counter!(PROMPT_TOKENS_BY_SOURCE, "source" => source).increment(num_tokens);
    }
    histogram!(REQUEST_QUEUE_TIME).record(queue_time);
    histogram!(TIME_IN_QUEUE).record(queue_time);
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

/// A request that was answered to its end.
#[derive(Clone, Copy, Debug)]
pub struct EndedRequest {
    /// From submission to the end.
    pub latency: Duration,
    /// From the queue to the last token.
    pub inference_time: Duration,
    /// From the first token to the last.
    pub decode_time: Duration,
    /// Its prompt.
    pub num_prompt_tokens: usize,
    /// What the prefix cache had of it.
    pub num_cached_tokens: usize,
    /// Of all its choices.
    pub num_output_tokens: usize,
    /// Of its longest choice.
    pub longest_output: usize,
    /// Choices it asked for.
    pub n: u32,
    /// Tokens that each of them could have had.
    pub max_tokens: usize,
}

/// Records a request that was answered to its end.
pub fn request_ended(request: &EndedRequest) {
    histogram!(E2E_REQUEST_LATENCY).record(request.latency);
    histogram!(REQUEST_INFERENCE_TIME).record(request.inference_time);
    histogram!(REQUEST_DECODE_TIME).record(request.decode_time);
    let num_computed = request.num_prompt_tokens.saturating_sub(request.num_cached_tokens);
    for (name, num_tokens) in [
        (REQUEST_PROMPT_TOKENS, request.num_prompt_tokens),
        (REQUEST_PREFILL_KV_COMPUTED, num_computed),
        (REQUEST_GENERATION_TOKENS, request.num_output_tokens),
        (REQUEST_MAX_GENERATION_TOKENS, request.longest_output),
        (REQUEST_PARAMS_N, request.n as usize),
        (REQUEST_PARAMS_MAX_TOKENS, request.max_tokens),
    ] {
        histogram!(name).record(num_tokens as f64);
    }
    if 1 < request.longest_output {
        let num_pauses = request.longest_output as f64 - 1.0;
        let pause = request.decode_time.as_secs_f64() / num_pauses;
        histogram!(REQUEST_TIME_PER_OUTPUT_TOKEN).record(pause);
    }
}

/// Measures how long a grammar takes to compile, until it is dropped.
#[derive(Debug)]
pub struct GrammarTimer(Instant);

impl GrammarTimer {
    /// Compilation begins.
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Drop for GrammarTimer {
    fn drop(&mut self) {
        histogram!(GRAMMAR_COMPILE_SECONDS).record(self.0.elapsed());
    }
}
