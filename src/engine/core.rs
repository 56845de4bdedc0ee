//! One step: schedule, run, record. No clock and no channel, so tests drive it by hand.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::engine::grammars::Grammars;
pub use crate::engine::grammars::Guidance;
use crate::scheduler::step::{Runner, SchedulerOutput, SeqOutput};
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
    /// The sequences of the step. They are forgotten; everybody else starts again unnoticed.
    pub lost: Vec<SeqId>,
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
}

impl<R: Runner> EngineCore<R> {
    /// Joins the two; the scheduler's cache must be the runner's.
    pub fn new(scheduler: Scheduler, runner: R) -> Self {
        Self { scheduler, runner, grammars: Grammars::default() }
    }

    /// To look at.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Says how long the engine has been running: pins live by this clock.
    pub fn advance_to(&mut self, since_start: Duration) {
        self.scheduler.advance_to(since_start);
    }

    /// Decides the next step.
    pub fn schedule(&mut self) -> SchedulerOutput {
        self.scheduler.schedule()
    }

    /// Puts a sequence into the queue, with what it must keep to.
    pub fn add(&mut self, spec: SequenceSpec, guidance: Guidance<'_>) -> Result<(), DoesNotFit> {
        let id = spec.id;
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

    /// Runs what [`Scheduler::schedule`] decided.
    ///
    /// A panic of the runner is contained here: the runner owns nothing but the device's memory,
    /// and [`Scheduler::reset`] makes sure that none of it is read again before it is rewritten.
    pub fn execute(&mut self, step: &SchedulerOutput) -> StepOutcome {
        if step.scheduled.is_empty() {
            return StepOutcome { events: self.scheduler.take_started(), failed: None };
        }
        let (runner, grammars) = (&mut self.runner, &mut self.grammars);
        let outputs = catch_unwind(AssertUnwindSafe(|| run(runner, grammars, step)))
            .unwrap_or_else(|panic| Err(StepError::Panicked(panic_message(panic.as_ref()))));
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

    fn recover(&mut self, step: &SchedulerOutput, error: StepError) -> StepOutcome {
        let events = self.scheduler.take_started();
        let lost: Vec<_> = step.scheduled.iter().map(|scheduled| scheduled.id).collect();
        for &id in &lost {
            self.abort(id);
        }
        self.scheduler.reset();
        StepOutcome { events, failed: Some(FailedStep { error, lost }) }
    }
}

fn run<R: Runner>(
    runner: &mut R,
    grammars: &mut Grammars,
    step: &SchedulerOutput,
) -> Result<Vec<SeqOutput>, StepError> {
    runner.launch(step).map_err(|err| StepError::Runner(err.to_string()))?;
    // A device computes meanwhile.
    let masks = grammars.masks(step);
    let outputs = runner.sample(step, &masks).map_err(|err| StepError::Runner(err.to_string()))?;
    if outputs.len() != step.scheduled.len() {
        return Err(StepError::Protocol("one output per scheduled sequence is required"));
    }
    for (scheduled, output) in step.scheduled.iter().zip(&outputs) {
        if scheduled.sample.is_some() != output.sampled.is_some() {
            return Err(StepError::Protocol("exactly the sampled sequences yield a token"));
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
    Ok(outputs)
}

/// What a panic said.
pub(super) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
