//! One step: schedule, run, record. No clock and no channel, so tests drive it by hand.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use crate::engine::grammars::Grammars;
pub use crate::engine::grammars::Guidance;
use crate::kv::BlockId;
use crate::scheduler::step::{
    Runner, SampleRequest, ScheduledSeq, SchedulerOutput, SeqOutput, TokenMasks,
};
use crate::scheduler::{DoesNotFit, Scheduler, SeqEvent, SeqId, SeqPhase, SequenceSpec};

/// Why nothing came of a step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The runner said so.
    #[error("the model runner failed: {0}")]
    Runner(String),
    /// The runner panicked.
    #[error("the model runner panicked: {0}")]
    Panicked(String),
    /// The runner answered something else than it was asked.
    #[error("the model runner broke its rules: {0}")]
    Protocol(&'static str),
}

/// A step that failed, already recovered from.
#[derive(Clone, Debug)]
pub struct FailedStep {
    /// What happened.
    pub error: StepError,
    /// The sequence to blame, which is forgotten. Everybody else starts again unnoticed.
    pub culprit: Option<SeqId>,
    /// Whether the runner can still compute anything.
    pub is_runner_sound: bool,
}

/// Where an engine thread is, for whoever wonders why it takes so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Waiting for something to do, or obeying commands.
    BetweenSteps,
    /// Deciding what to compute.
    Scheduling,
    /// Starting the model, which on a CPU is computing it.
    Launching,
    /// Waiting for the model's results, and drawing tokens.
    Sampling,
    /// Recording what was computed.
    Recording,
}

/// The phase an engine thread is in, which other threads may read.
#[derive(Debug)]
pub struct PhaseCell(AtomicU8);

impl Default for PhaseCell {
    fn default() -> Self {
        Self(AtomicU8::new(Phase::BetweenSteps as u8))
    }
}

impl PhaseCell {
    /// The phase.
    pub fn get(&self) -> Phase {
        let phases = [Phase::Scheduling, Phase::Launching, Phase::Sampling, Phase::Recording];
        let current = self.0.load(Ordering::Relaxed);
        phases.into_iter().find(|phase| *phase as u8 == current).unwrap_or(Phase::BetweenSteps)
    }

    pub(super) fn set(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Relaxed);
    }
}

/// What a step brought about.
#[derive(Clone, Debug, Default)]
pub struct StepOutcome {
    /// In order, per sequence.
    pub events: Vec<SeqEvent>,
    /// Present when the runner failed.
    pub failed: Option<FailedStep>,
}

/// The scheduler and the device it schedules for.
#[derive(Debug)]
pub struct EngineCore<R> {
    scheduler: Scheduler,
    runner: R,
    grammars: Grammars,
    phase: Arc<PhaseCell>,
    /// What the runner has begun, behind the step that was executed last.
    begun: Option<SchedulerOutput>,
}

/// All that an engine knows, without its runner.
#[derive(Debug)]
pub struct EngineState {
    scheduler: Scheduler,
    grammars: Grammars,
    phase: Arc<PhaseCell>,
}

/// The id of a sequence that is none: what is computed to see whether anything can be.
pub const PROBE: SeqId = SeqId(u64::MAX);

impl<R: Runner> EngineCore<R> {
    /// Joins the two; the scheduler's cache must be the runner's.
    pub fn new(scheduler: Scheduler, runner: R) -> Self {
        let (grammars, phase) = (Grammars::default(), Arc::default());
        Self { scheduler, runner, grammars, phase, begun: None }
    }

    /// Takes the runner away.
    pub fn into_state(self) -> EngineState {
        EngineState { scheduler: self.scheduler, grammars: self.grammars, phase: self.phase }
    }

    /// Goes on with another runner. Every sequence is computed again from its known tokens, and its
    /// client does not notice.
    pub fn resume(state: EngineState, runner: R) -> Self {
        let EngineState { mut scheduler, grammars, phase } = state;
        scheduler.reset();
        Self { scheduler, runner, grammars, phase, begun: None }
    }

    /// Forgets every sequence.
    pub fn start_anew(&mut self, scheduler: Scheduler) {
        self.scheduler = scheduler;
        self.grammars = Grammars::default();
        self.begun = None;
    }

    /// Tells others where this is.
    pub fn phase(&self) -> &Arc<PhaseCell> {
        &self.phase
    }

    /// To look at.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Says how long the engine has been running: pins live by this clock.
    pub fn advance_to(&mut self, since_start: Duration) {
        self.scheduler.advance_to(since_start);
    }

    /// Decides the next step, unless it has begun already.
    pub fn schedule(&mut self) -> SchedulerOutput {
        self.phase.set(Phase::Scheduling);
        let begun = self.begun.take();
        let settled = begun.and_then(|mut step| self.scheduler.settle(&mut step).then_some(step));
        settled.unwrap_or_else(|| self.scheduler.schedule())
    }

    /// Says how long the step took that was executed last.
    pub fn observe(&mut self, duration: Duration) {
        self.scheduler.observe(duration);
    }

    /// Puts a sequence into the queue, with what it must keep to.
    pub fn add(
        &mut self,
        mut spec: SequenceSpec,
        guidance: Guidance<'_>,
    ) -> Result<(), DoesNotFit> {
        let id = spec.id;
        spec.is_guided |= guidance.is_some();
        self.scheduler.add(spec)?;
        self.grammars.add(id, guidance);
        Ok(())
    }

    /// Forgets a sequence. `None` when it is not known any more.
    pub fn abort(&mut self, id: SeqId) -> Option<SeqPhase> {
        self.grammars.remove(id);
        self.scheduler.abort(id)
    }

    /// The runner.
    pub fn runner(&self) -> &R {
        &self.runner
    }

    /// Runs what [`EngineCore::schedule`] decided.
    ///
    /// A panic of the runner is contained here: the runner owns nothing but the device's memory,
    /// and [`Scheduler::reset`] makes sure that none of it is read again before it is rewritten.
    pub fn execute(&mut self, step: &SchedulerOutput) -> StepOutcome {
        if step.scheduled.is_empty() {
            return StepOutcome { events: self.scheduler.take_started(), failed: None };
        }
        let outputs = contain(|| self.run(step));
        self.phase.set(Phase::Recording);
        match outputs {
            Ok(mut outputs) => {
                self.grammars.advance(step, &mut outputs);
                let events = self.scheduler.update(step, outputs);
                for event in &events {
                    if let SeqEvent::Finished(id, _) | SeqEvent::Failed(id, _) = event {
                        self.grammars.remove(*id);
                    }
                }
                StepOutcome { events, failed: None }
            }
            Err(error) => self.recover(step, error),
        }
    }

    /// One of several sequences may have broken the step, so nobody is lost yet: the scheduler runs
    /// them alone from here on, until one of them fails alone.
    fn recover(&mut self, step: &SchedulerOutput, error: StepError) -> StepOutcome {
        let events = self.scheduler.take_started();
        let culprit = self.scheduler.fail_step(step);
        if let Some(id) = culprit {
            self.grammars.remove(id);
        }
        let is_runner_sound = self.probe().is_ok();
        StepOutcome { events, failed: Some(FailedStep { error, culprit, is_runner_sound }) }
    }

    /// Whether the runner can compute and draw a token. Nobody may hold a block.
    ///
    /// # Errors
    /// If it cannot.
    pub fn probe(&mut self) -> Result<(), StepError> {
        self.compute_alone(1)
    }

    /// Computes a prompt of nobody, as long as a step may be, to be timed. Returns its length. Nobody
    /// may hold a block.
    ///
    /// # Errors
    /// If the runner cannot.
    pub fn rehearse(&mut self) -> Result<usize, StepError> {
        let num_tokens = self.scheduler.max_step_tokens();
        self.compute_alone(num_tokens)?;
        Ok(num_tokens)
    }

    fn compute_alone(&mut self, num_tokens: usize) -> Result<(), StepError> {
        let kv = self.scheduler.kv();
        assert_eq!(kv.num_held_blocks(), 0, "a probe writes into blocks");
        let num_blocks = kv.blocks_for(num_tokens) as u32;
        let probe = ScheduledSeq {
            id: PROBE,
            start: 0,
            tokens: vec![0; num_tokens],
            num_drafts: 0,
            token_before: None,
            blocks: (0..num_blocks).map(BlockId).collect(),
            rope_start: 0,
            sample: Some(SampleRequest {
                params: Arc::default(),
                choice: 0,
                num_output_tokens: 0,
                forbidden: Vec::new(),
                history: None,
            }),
            prompt_logprobs: None,
            pool: None,
            adapter: None,
            drawn_by: None,
        };
        let step = SchedulerOutput { scheduled: vec![probe], preempted: Vec::new() };
        contain(|| self.run(&step)).map(drop)
    }

    fn run(&mut self, step: &SchedulerOutput) -> Result<Vec<SeqOutput>, StepError> {
        let failed = |error: R::Error| StepError::Runner(error.to_string());
        if !step.is_begun() {
            self.phase.set(Phase::Launching);
            self.runner.launch(step).map_err(failed)?;
        }
        // A device computes meanwhile.
        let mut masks = TokenMasks::new();
        self.runner.with_threads(&mut || masks = self.grammars.masks(step));
        let next = self.schedule_ahead(step);
        self.phase.set(Phase::Sampling);
        let outputs = match &next {
            None => self.runner.sample(step, &masks),
            Some(next) => self.runner.sample_ahead(step, &masks, next),
        };
        let outputs = outputs.map_err(failed)?;
        check(step, &outputs)?;
        self.begun = next;
        Ok(outputs)
    }

    fn schedule_ahead(&mut self, step: &SchedulerOutput) -> Option<SchedulerOutput> {
        let is_worthwhile = self.runner.is_asynchronous();
        is_worthwhile.then(|| self.scheduler.schedule_ahead(step)).flatten()
    }
}

/// A panic as an error.
fn contain<T>(work: impl FnOnce() -> Result<T, StepError>) -> Result<T, StepError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(StepError::Panicked(panic_message(panic.as_ref()))))
}

/// Whether the runner kept to its rules.
fn check(step: &SchedulerOutput, outputs: &[SeqOutput]) -> Result<(), StepError> {
    if outputs.len() != step.scheduled.len() {
        return Err(StepError::Protocol("one output per scheduled sequence is required"));
    }
    for (scheduled, output) in step.scheduled.iter().zip(outputs) {
        if scheduled.sample.is_some() != output.sampled.is_some() {
            return Err(StepError::Protocol("exactly the sampled sequences yield a token"));
        }
        if scheduled.num_drafts < output.verified.len() {
            return Err(StepError::Protocol("no more is verified than was guessed"));
        }
        if scheduled.pool.is_some() != output.pooled.is_some() {
            return Err(StepError::Protocol("exactly the pooled sequences yield a sum"));
        }
        let num_targets = scheduled.prompt_logprobs.as_ref().map_or(0, |asked| asked.targets.len());
        let is_failed = matches!(output.sampled, Some(Err(_)));
        if !is_failed && num_targets != output.prompt_logprobs.len() {
            return Err(StepError::Protocol("one log-probability per target is required"));
        }
    }
    Ok(())
}

/// What a panic said.
pub(super) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
