//! What the engine and the grammar compiler record.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

#[allow(clippy::wildcard_imports, reason = "all of them are names of metrics")]
use super::catalogue::*;

/// What is recorded for every step or token. Looking a metric up by its name takes about a
/// microsecond, thirty times as long as recording.
struct Handles {
    running: Gauge,
    waiting: Gauge,
    kv_cache_usage: [Gauge; 2],
    prefix_hit_rate: Gauge,
    prefix_queries: [Counter; 2],
    prefix_hits: [Counter; 2],
    preemptions: Counter,
    spec_drafts: Counter,
    spec_draft_tokens: Counter,
    spec_accepted: Counter,
    generation_tokens: Counter,
    token_latency: [Histogram; 2],
    step_seconds: Histogram,
    step_phases: [Histogram; 5],
    step_sequences: Histogram,
    iteration_tokens: Histogram,
}

static HANDLES: OnceLock<Handles> = OnceLock::new();

/// Looks up what is needed often. The recorder must be installed.
pub(super) fn prepare() {
    HANDLES.get_or_init(|| Handles {
        running: gauge!(NUM_REQUESTS_RUNNING),
        waiting: gauge!(NUM_REQUESTS_WAITING),
        kv_cache_usage: [KV_CACHE_USAGE, GPU_CACHE_USAGE].map(|name| gauge!(name)),
        prefix_hit_rate: gauge!(GPU_PREFIX_CACHE_HIT_RATE),
        prefix_queries: [PREFIX_CACHE_QUERIES, GPU_PREFIX_CACHE_QUERIES].map(|name| counter!(name)),
        prefix_hits: [PREFIX_CACHE_HITS, GPU_PREFIX_CACHE_HITS].map(|name| counter!(name)),
        preemptions: counter!(NUM_PREEMPTIONS),
        spec_drafts: counter!(SPEC_DECODE_DRAFTS),
        spec_draft_tokens: counter!(SPEC_DECODE_DRAFT_TOKENS),
        spec_accepted: counter!(SPEC_DECODE_ACCEPTED),
        generation_tokens: counter!(GENERATION_TOKENS),
        token_latency: [INTER_TOKEN_LATENCY, TIME_PER_OUTPUT_TOKEN].map(|name| histogram!(name)),
        step_seconds: histogram!(STEP_SECONDS),
        step_phases: STEP_PHASES.map(|phase| histogram!(STEP_PHASE_SECONDS, "phase" => phase)),
        step_sequences: histogram!(STEP_SEQUENCES),
        iteration_tokens: histogram!(ITERATION_TOKENS),
    });
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
    let Some(handles) = HANDLES.get() else { return };
    handles.running.set(state.num_running as f64);
    handles.waiting.set(state.num_waiting as f64);
    for usage in &handles.kv_cache_usage {
        usage.set(state.kv_cache_usage);
    }
    handles.prefix_hit_rate.set(state.prefix_hit_rate);
    handles.preemptions.increment(state.new_preemptions);
    for queries in &handles.prefix_queries {
        queries.increment(state.new_prefix_queries);
    }
    for hits in &handles.prefix_hits {
        hits.increment(state.new_prefix_hits);
    }
}

/// What came of guesses of the next tokens since the last call.
#[derive(Clone, Copy, Debug)]
pub struct Speculated<'a> {
    /// How often a sequence had guesses in a step.
    pub num_drafts: u64,
    /// All guesses.
    pub num_draft_tokens: u64,
    /// Those that came true, by their place.
    pub num_accepted_per_position: &'a [u64],
}

/// Records it.
pub fn speculated(added: Speculated<'_>) {
    let Some(handles) = HANDLES.get().filter(|_| 0 < added.num_drafts) else { return };
    handles.spec_drafts.increment(added.num_drafts);
    handles.spec_draft_tokens.increment(added.num_draft_tokens);
    handles.spec_accepted.increment(added.num_accepted_per_position.iter().sum());
    for (position, &count) in added.num_accepted_per_position.iter().enumerate() {
        if 0 < count {
            let labels = [("position", position.to_string())];
            counter!(SPEC_DECODE_ACCEPTED_PER_POS, &labels).increment(count);
        }
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
    let Some(handles) = HANDLES.get() else { return };
    handles.step_seconds.record(step.duration);
    handles.iteration_tokens.record(step.num_tokens);
    handles.step_sequences.record(step.num_sequences as f64);
}

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepPhase {
    /// Deciding what to compute.
    Schedule,
    /// Starting the model, which on a CPU is computing it.
    Launch,
    /// Asking grammars what may come.
    Mask,
    /// Waiting for the model's results, and drawing tokens.
    Sample,
    /// Recording what came.
    Update,
}

/// Values of the label `phase`, in the order of [`StepPhase`].
const STEP_PHASES: [&str; 5] = ["schedule", "launch", "mask", "sample", "update"];

/// Records a part of a step.
pub fn step_phase(phase: StepPhase, duration: Duration) {
    if let Some(handles) = HANDLES.get() {
        handles.step_phases[phase as usize].record(duration);
    }
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
    if let Some(handles) = HANDLES.get() {
        for latency in &handles.token_latency {
            latency.record(since_previous);
        }
    }
}

/// A token was generated, the first or another.
pub fn generated_token() {
    if let Some(handles) = HANDLES.get() {
        handles.generation_tokens.increment(1);
    }
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

/// The engine or its runner was built anew.
pub fn engine_restarted() {
    counter!(ENGINE_RESTARTS).increment(1);
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
