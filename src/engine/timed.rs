//! Where the time of a step goes: a runner around the real one that looks at the clock.

use std::time::Instant;

use crate::engine::thread::now;
use crate::scheduler::step::{Runner, SchedulerOutput, SeqOutput, TokenMasks};
use crate::telemetry::metrics::{self, StepPhase};

/// When a step went from one part to the next.
#[derive(Clone, Copy, Debug)]
struct Times {
    /// From when until when it was launched; absent if that was part of the step before.
    launch: Option<(Instant, Instant)>,
    sample: Instant,
    sampled: Instant,
}

/// A runner whose calls are timed.
#[derive(Debug)]
pub(super) struct Timed<R> {
    runner: R,
    /// Of the step that is under way.
    launch: Option<(Instant, Instant)>,
    /// Of the latest step; absent if it failed.
    times: Option<Times>,
}

impl<R> Timed<R> {
    pub(super) fn new(runner: R) -> Self {
        Self { runner, launch: None, times: None }
    }

    /// Records the parts of the step that was executed between these times, if nothing went wrong
    /// in it.
    pub(super) fn record_phases(&self, began_at: Instant, ended_at: Instant) {
        let Some(Times { launch, sample, sampled }) = self.times else { return };
        if let Some((began, ended)) = launch {
            metrics::step_phase(StepPhase::Launch, ended - began);
        }
        let launched = launch.map_or(began_at, |(_, ended)| ended);
        metrics::step_phase(StepPhase::Mask, sample - launched);
        metrics::step_phase(StepPhase::Sample, sampled - sample);
        metrics::step_phase(StepPhase::Update, ended_at - sampled);
    }

    /// Times what finishes a step.
    fn finish<T, E>(&mut self, finish: impl FnOnce(&mut R) -> Result<T, E>) -> Result<T, E> {
        self.times = None;
        let (launch, sample) = (self.launch.take(), now());
        let finished = finish(&mut self.runner)?;
        self.times = Some(Times { launch, sample, sampled: now() });
        Ok(finished)
    }
}

impl<R: Runner> Runner for Timed<R> {
    type Error = R::Error;

    fn launch(&mut self, step: &SchedulerOutput) -> Result<(), R::Error> {
        (self.launch, self.times) = (None, None);
        let began = now();
        self.runner.launch(step)?;
        self.launch = Some((began, now()));
        Ok(())
    }

    fn sample(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, R::Error> {
        self.finish(|runner| runner.sample(step, masks))
    }

    fn sample_ahead(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
        next: &SchedulerOutput,
    ) -> Result<Vec<SeqOutput>, R::Error> {
        self.finish(|runner| runner.sample_ahead(step, masks, next))
    }

    fn with_threads(&self, work: &mut dyn FnMut()) {
        self.runner.with_threads(work);
    }

    fn is_asynchronous(&self) -> bool {
        self.runner.is_asynchronous()
    }

    fn num_blocks(&self) -> Option<u32> {
        self.runner.num_blocks()
    }

    fn is_broken(&self) -> bool {
        self.runner.is_broken()
    }
}
