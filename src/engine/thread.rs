//! The engine thread: takes commands, steps while there is work, sleeps while there is none.
//!
//! The only place below `http` that reads the clock.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::device::threads::STACK_BYTES;
use crate::engine::active::{ActiveRequests, phase_label};
use crate::engine::core::{EngineCore, FailedStep, panic_message};
use crate::engine::event::Event;
use crate::engine::handle::{Command, EngineHandle, RequestKey, Submission};
use crate::engine::heartbeat::Heartbeat;
use crate::engine::pace::Pace;
use crate::engine::seats::Seats;
use crate::engine::stats::{EngineLimits, EngineStats, Lifecycle};
use crate::engine::timed::Timed;
use crate::engine::watchdog;
use crate::kv::{HashKey, KvCacheManager};
use crate::scheduler::step::{Runner, SchedulerOutput};
use crate::scheduler::{Scheduler, SchedulerConfig, SchedulerStats, SeqId, SpeculationConfig};
use crate::telemetry::metrics::{self, StepPhase};

/// Time a step may take for each of its tokens, beside [`EngineConfig::stall_timeout`], before the
/// engine counts as stalled. 72 billion weights are 144 billion operations a token; a slow CPU does
/// 100 billion a second.
const STALL_TIMEOUT_PER_TOKEN: Duration = Duration::from_secs(2);

/// How long building a runner anew may take before the engine counts as stalled.
const REBUILD_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// How the engine is set up. Everything was decided before; nothing is guessed here.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// At most this many sequences run at a time.
    pub max_num_seqs: usize,
    /// At most this many tokens are computed in a step; at least two.
    pub max_num_batched_tokens: usize,
    /// At most this many of them belong to prompts while other sequences are generating.
    pub max_prefill_tokens_while_decoding: usize,
    /// The shortest prompt goes first; one that arrives a step later counts as this much longer.
    pub prefill_ageing_tokens_per_step: usize,
    /// How many steps earlier a sequence counts as having arrived for each unit of priority.
    pub steps_per_priority: u64,
    /// Tokens per block of the KV cache.
    pub block_size: usize,
    /// Blocks of the KV cache; the runner must have as many.
    pub num_blocks: u32,
    /// Prompt and generated tokens of one sequence together, at most.
    pub max_model_len: usize,
    /// Sequences that may become longer than this many tokens have stretched positions.
    pub stretched_beyond: Option<usize>,
    /// Present when the next tokens are guessed.
    pub speculation: Option<SpeculationConfig>,
    /// After so many steps in the queue a sequence may take the place of a client's that has at
    /// least two more running than its own.
    pub fairness_patience_steps: u64,
    /// How long a step with generating sequences should take; prompts beside them get what is left.
    pub target_itl: Option<Duration>,
    /// Within which time a request should have its first token. One that would wait longer is
    /// refused at once.
    pub target_ttft: Option<Duration>,
    /// At most this many sequences wait beside those that run.
    pub max_queue: usize,
    /// At most this many prompt tokens wait in the queue.
    pub max_queue_tokens: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// A step that takes longer than this, and a little more per token, is reported as a stall.
    pub stall_timeout: Duration,
    /// After this many failed steps in a row the runner is built anew.
    pub max_failed_steps: u32,
    /// Whether sequences share the blocks of equal prefixes.
    pub prefix_caching: bool,
    /// Names cached blocks; random per process, so that clients can predict nothing.
    pub hash_key: HashKey,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_num_batched_tokens: 256,
            max_prefill_tokens_while_decoding: 96,
            prefill_ageing_tokens_per_step: 64,
            steps_per_priority: 100,
            block_size: 16,
            num_blocks: 2048,
            max_model_len: 32_768,
            stretched_beyond: None,
            speculation: None,
            fairness_patience_steps: 64,
            target_itl: None,
            target_ttft: None,
            max_queue: 1024,
            max_queue_tokens: 1 << 20,
            vocab_size: 151_936,
            stall_timeout: Duration::from_secs(60),
            max_failed_steps: 16,
            prefix_caching: true,
            hash_key: random_hash_key(),
        }
    }
}

impl EngineConfig {
    /// What requests may ask for: a sequence must fit into the cache when it runs alone.
    pub fn limits(&self) -> EngineLimits {
        let num_blocks = self.num_blocks as usize;
        EngineLimits {
            max_model_len: self.max_model_len.min(num_blocks * self.block_size),
            num_blocks,
            block_size: self.block_size,
            max_num_seqs: self.max_num_seqs,
            max_queue: self.max_queue,
            max_queue_tokens: self.max_queue_tokens,
            target_ttft: self.target_ttft,
            vocab_size: self.vocab_size,
        }
    }

    pub(super) fn scheduler(&self) -> Scheduler {
        let config = SchedulerConfig {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_prefill_tokens_while_decoding: self.max_prefill_tokens_while_decoding,
            prefill_ageing_tokens_per_step: self.prefill_ageing_tokens_per_step,
            steps_per_priority: self.steps_per_priority,
            fairness_patience_steps: self.fairness_patience_steps,
            target_itl: self.target_itl,
            target_ttft: self.target_ttft,
            max_model_len: self.limits().max_model_len,
            stretched_beyond: self.stretched_beyond,
            speculation: self.speculation,
        };
        let kv = KvCacheManager::new(self.num_blocks, self.block_size, self.hash_key);
        let kv = if self.prefix_caching { kv } else { kv.without_sharing() };
        Scheduler::new(config, kv)
    }
}

/// A key from the operating system's generator.
fn random_hash_key() -> HashKey {
    let mut key = [0; 32];
    for half in key.chunks_exact_mut(16) {
        half.copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    }
    HashKey(key)
}

/// The time, for the rest of the engine.
pub(super) fn now() -> Instant {
    Instant::now()
}

/// Starts the engine. The runner is built on the engine thread, because it may belong to it; until
/// then requests are queued. [`EngineHandle::ready`] tells when, or why not. It is built again when
/// it does not work any more.
///
/// Metrics should be installed before: what is said once at the start is lost otherwise.
pub fn spawn<R, F>(config: EngineConfig, make_runner: F) -> (EngineHandle, JoinHandle<()>)
where
    R: Runner + 'static,
    F: FnMut() -> Result<R, String> + Send + 'static,
{
    let limits = config.limits();
    let (commands, receiver) = channel();
    let stats = EngineStats {
        num_free_blocks: limits.num_blocks,
        num_blocks: limits.num_blocks,
        ..EngineStats::default()
    };
    let (stats_sender, stats) = watch::channel(stats);
    let (lifecycle_sender, lifecycle) = watch::channel(Lifecycle::Loading);
    let seats = Arc::new(Seats::default());
    let heartbeat = Arc::new(Heartbeat::new());
    let handle = EngineHandle {
        limits,
        commands,
        seats: Arc::clone(&seats),
        next_id: Arc::default(),
        stats,
        lifecycle,
        heartbeat: Arc::clone(&heartbeat),
    };
    let start = move || {
        let alive = Arc::new(());
        watchdog::watch(Arc::clone(&heartbeat), Arc::downgrade(&alive));
        metrics::engine_started(limits.block_size, limits.num_blocks);
        let mut outbox = Outbox {
            commands: receiver,
            active: ActiveRequests::new(Arc::clone(&seats)),
            seats,
            heartbeat,
            stats: stats_sender,
            recorded: SchedulerStats::default(),
            pace: Pace::default(),
        };
        let run = || live(&config, make_runner, &mut outbox, &lifecycle_sender);
        let ended = catch_unwind(AssertUnwindSafe(run))
            .unwrap_or_else(|panic| Err(format!("panic: {}", panic_message(panic.as_ref()))));
        let state = match ended {
            Ok(()) => Lifecycle::Ended,
            Err(reason) => Lifecycle::Dead { reason },
        };
        lifecycle_sender.send_replace(state.clone());
        if let Lifecycle::Dead { reason } = state {
            tracing::error!(reason, "the engine is dead");
            outbox.fail_everything(&reason);
        }
    };
    let builder = std::thread::Builder::new().name("engine".to_owned());
    let thread = builder.stack_size(STACK_BYTES).spawn(start);
    (handle, thread.expect("the operating system can start one thread"))
}

/// The life of the engine thread; an error is its cause of death.
fn live<R, F>(
    config: &EngineConfig,
    mut make_runner: F,
    outbox: &mut Outbox,
    lifecycle: &watch::Sender<Lifecycle>,
) -> Result<(), String>
where
    R: Runner,
    F: FnMut() -> Result<R, String>,
{
    let runner = make_runner()?;
    let num_blocks = runner.num_blocks().unwrap_or(config.num_blocks);
    let mut config = EngineConfig { num_blocks, ..config.clone() };
    let mut core = EngineCore::new(config.scheduler(), Timed::new(runner));
    outbox.heartbeat.watch(core.phase());
    outbox.pace = expected_pace(&mut core, &config)?;
    loop {
        lifecycle.send_replace(Lifecycle::Running);
        let thread = EngineThread::new(&mut core, outbox, &config);
        match catch_unwind(AssertUnwindSafe(|| thread.run())) {
            Ok(End::Drained) => return Ok(()),
            Ok(End::DeviceLost(reason)) => return Err(format!("the device is lost: {reason}")),
            Ok(End::RunnerBroken(reason)) => {
                tracing::error!(reason, "building the model anew; requests go on afterwards");
                lifecycle.send_replace(Lifecycle::Loading);
                // The old one gives its memory back before there is another.
                let state = core.into_state();
                outbox.heartbeat.begin((0, 0), REBUILD_TIMEOUT);
                let runner = make_runner()?;
                let num_blocks = runner.num_blocks().unwrap_or(config.num_blocks);
                core = EngineCore::resume(state, Timed::new(runner));
                core.probe().map_err(|error| format!("a new runner fails too: {error}"))?;
                outbox.heartbeat.end();
                if num_blocks != config.num_blocks {
                    config.num_blocks = num_blocks;
                    outbox.fail_active("the cache has another size than before");
                    core.start_anew(config.scheduler());
                }
            }
            Err(panic) => {
                // A bug of ours: who was being answered cannot be, but whoever knocks can.
                let reason = format!("panic: {}", panic_message(panic.as_ref()));
                tracing::error!(reason, "the engine starts anew");
                outbox.fail_active(&reason);
                core.start_anew(config.scheduler());
            }
        }
        metrics::engine_restarted();
    }
}

/// Who promises first tokens within a time must know at the first request how long they take.
fn expected_pace<R: Runner>(
    core: &mut EngineCore<Timed<R>>,
    config: &EngineConfig,
) -> Result<Pace, String> {
    if config.target_ttft.is_none() {
        return Ok(Pace::default());
    }
    let mut timed = || {
        let began_at = now();
        let num_tokens = core.rehearse().map_err(|error| error.to_string())?;
        Ok::<_, String>(began_at.elapsed() / num_tokens as u32)
    };
    // The first time is that of memory never touched before.
    timed()?;
    timed().map(Pace::expecting)
}

/// The thread's side of the channels. It outlives the scheduler and the runner, so that a bug in
/// them leaves nobody without an answer.
struct Outbox {
    commands: Receiver<Command>,
    active: ActiveRequests,
    seats: Arc<Seats>,
    heartbeat: Arc<Heartbeat>,
    stats: watch::Sender<EngineStats>,
    /// What metrics know already.
    recorded: SchedulerStats,
    pace: Pace,
}

impl Outbox {
    /// Ends the requests the engine has taken on.
    fn fail_active(&mut self, reason: &str) {
        self.heartbeat.end();
        self.active.fail_all(reason, now());
    }

    /// Ends those, and the ones it has not looked at yet.
    fn fail_everything(&mut self, reason: &str) {
        self.fail_active(reason);
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Add(submission) = command {
                self.seats.give_back(&submission.claim());
                let _ = submission.events.send(Event::Failed(reason.to_owned()));
            }
        }
    }
}

/// Why the engine thread stopped stepping.
enum End {
    /// Everything was answered and nothing more comes.
    Drained,
    /// This process will not get the device to work again.
    DeviceLost(String),
    /// The runner computes nothing any more.
    RunnerBroken(String),
}

struct EngineThread<'a, R> {
    core: &'a mut EngineCore<Timed<R>>,
    outbox: &'a mut Outbox,
    stall_timeout: Duration,
    max_failed_steps: u32,
    num_steps: u64,
    /// Failed steps in a row.
    failures: u32,
}

impl<'a, R: Runner> EngineThread<'a, R> {
    fn new(
        core: &'a mut EngineCore<Timed<R>>,
        outbox: &'a mut Outbox,
        config: &EngineConfig,
    ) -> Self {
        let num_steps = outbox.stats.borrow().num_steps;
        Self {
            core,
            outbox,
            stall_timeout: config.stall_timeout,
            max_failed_steps: config.max_failed_steps,
            num_steps,
            failures: 0,
        }
    }

    fn run(mut self) -> End {
        while self.take_commands() {
            let expired = self.outbox.active.expire(now());
            if !expired.is_empty() {
                self.abort_sequences(expired);
                self.publish_stats();
            }
            if !self.core.scheduler().is_idle()
                && let Some(end) = self.step()
            {
                return end;
            }
        }
        End::Drained
    }

    /// Does what was asked since the last step; sleeps while there is nothing to compute. Returns
    /// false when there is nothing left to live for.
    fn take_commands(&mut self) -> bool {
        let is_idle = self.core.scheduler().is_idle();
        if is_idle {
            if self.outbox.seats.are_closed_and_empty() {
                return false;
            }
            let Ok(command) = self.outbox.commands.recv() else { return false };
            self.obey(command);
        }
        let mut is_changed = is_idle;
        while let Ok(command) = self.outbox.commands.try_recv() {
            self.obey(command);
            is_changed = true;
        }
        if is_changed {
            self.publish_stats();
        }
        true
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Add(submission) => self.add(&submission),
            Command::AbortRequest(key) => self.abort_request(key),
            Command::FinishChoice(key, choice) => {
                let sequence = self.outbox.active.finish_choice(key, choice, now());
                self.abort_sequences(sequence);
            }
            Command::AbortAll => {
                let sequences = self.outbox.active.abort_all(now());
                self.abort_sequences(sequences);
            }
            Command::Report(reply) => {
                let report = self.outbox.active.report(&self.core.scheduler().snapshot(), now());
                // Whoever asked may have given up.
                let _ = reply.send(report);
            }
            Command::Wake => {}
        }
    }

    fn add(&mut self, submission: &Submission) {
        self.outbox.active.add(submission);
        let guidance = submission.guidance();
        for spec in submission.sequences() {
            if self.core.add(spec, guidance).is_err() {
                // The handle refuses such requests; it and the scheduler must agree.
                let reason = "the request does not fit into the cache";
                let sequences = self.outbox.active.fail(submission.key, reason, now());
                self.abort_sequences(sequences);
                return;
            }
        }
    }

    fn abort_request(&mut self, key: RequestKey) {
        let sequences = self.outbox.active.forget(key);
        let core = &mut *self.core;
        let phases = sequences.into_iter().filter_map(|id| core.abort(id));
        if let Some(phase) = phases.max() {
            metrics::request_cancelled(phase_label(phase));
        }
    }

    fn abort_sequences(&mut self, ids: impl IntoIterator<Item = SeqId>) {
        for id in ids {
            self.core.abort(id);
        }
    }

    fn step(&mut self) -> Option<End> {
        self.core.advance_to(self.outbox.heartbeat.origin.elapsed());
        let scheduling_at = now();
        self.outbox.heartbeat.begin((0, 0), self.stall_timeout);
        let before = self.core.scheduler().stats();
        let step = self.core.schedule();
        let num_tokens = num_tokens(&step);
        let began_at = now();
        let allowed = self.stall_timeout + STALL_TIMEOUT_PER_TOKEN * num_tokens;
        self.outbox.heartbeat.begin((step.scheduled.len(), num_tokens), allowed);
        let outcome = self.core.execute(&step);
        self.outbox.heartbeat.end();
        let ended_at = now();
        let duration = ended_at - began_at;
        self.num_steps += 1;
        self.outbox.pace.observe(&before, &self.core.scheduler().stats(), duration);
        metrics::step_ended(&metrics::Step {
            duration,
            num_tokens,
            num_sequences: step.scheduled.len(),
        });
        metrics::step_phase(StepPhase::Schedule, began_at - scheduling_at);
        self.core.runner().record_phases(began_at, ended_at);
        // Before the events: whoever reads the end of a stream finds its blocks free.
        self.publish_stats();
        for event in outcome.events {
            let orphans = self.outbox.active.deliver(event, ended_at);
            self.abort_sequences(orphans);
        }
        if let Some(failed) = outcome.failed {
            return self.survive(&failed);
        }
        self.core.observe(duration);
        self.failures = 0;
        None
    }

    /// A failed step costs a request only when it fails alone, and the runner only when it cannot
    /// compute anything else either.
    fn survive(&mut self, failed: &FailedStep) -> Option<End> {
        let reason = failed.error.to_string();
        self.failures += 1;
        let is_sound = failed.is_runner_sound;
        tracing::error!(reason, failures = self.failures, is_sound, "a step failed");
        self.outbox.stats.send_modify(|stats| stats.num_failed_steps += 1);
        metrics::step_failed();
        let culprits = failed.culprit.as_slice();
        let orphans = self.outbox.active.fail_sequences(culprits, &reason, now());
        self.abort_sequences(orphans);
        self.publish_stats();
        if self.core.runner().is_broken() {
            return Some(End::DeviceLost(reason));
        }
        let is_broken = !is_sound || self.max_failed_steps <= self.failures;
        is_broken.then_some(End::RunnerBroken(reason))
    }

    fn publish_stats(&mut self) {
        let stats = self.core.scheduler().stats();
        let num_blocks = self.core.scheduler().kv().num_blocks();
        let num_steps = self.num_steps;
        self.outbox.stats.send_modify(|published| {
            *published = EngineStats {
                num_running: stats.num_running,
                num_waiting: stats.num_waiting,
                num_pending: stats.num_pending,
                num_free_blocks: num_blocks - stats.num_held_blocks,
                num_blocks,
                num_steps,
                num_preemptions: stats.num_preemptions,
                num_failed_steps: published.num_failed_steps,
                is_full: stats.is_full,
                num_tokens_ahead: stats.num_tokens_ahead,
                num_unstarted_tokens: stats.num_unstarted_tokens,
                wait_per_token: self.outbox.pace.wait_per_token(),
                wait_per_place: self.outbox.pace.wait_per_place(stats.num_running),
            };
        });
        // An engine that started anew counts from zero again.
        let recorded = std::mem::replace(&mut self.outbox.recorded, stats);
        metrics::scheduler_state(&metrics::SchedulerState {
            num_running: stats.num_running,
            num_waiting: stats.num_waiting,
            kv_cache_usage: stats.num_held_blocks as f64 / num_blocks as f64,
            prefix_hit_rate: stats.num_prefix_hits as f64 / stats.num_prefix_queries.max(1) as f64,
            new_preemptions: stats.num_preemptions.saturating_sub(recorded.num_preemptions),
            new_prefix_queries: stats
                .num_prefix_queries
                .saturating_sub(recorded.num_prefix_queries),
            new_prefix_hits: stats.num_prefix_hits.saturating_sub(recorded.num_prefix_hits),
        });
        let speculation = stats.speculation.since(&recorded.speculation);
        metrics::speculated(metrics::Speculated {
            num_drafts: speculation.num_drafts,
            num_draft_tokens: speculation.num_draft_tokens,
            num_accepted_per_position: &speculation.num_accepted_per_position,
        });
    }
}

fn num_tokens(step: &SchedulerOutput) -> u32 {
    step.scheduled.iter().map(|scheduled| scheduled.tokens.len() as u32).sum()
}
