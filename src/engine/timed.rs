//! Where the time of a step goes: a runner around the real one that looks at the clock.

use std::time::Instant;

use crate::engine::thread::now;
use crate::scheduler::step::{Runner, SchedulerOutput, SeqOutput, TokenMasks};
use crate::telemetry::metrics::{self, StepPhase};

/// When a step went from one part to the next.
#[derive(Clone, Copy, Debug)]
struct Times {
    launch: Instant,
    launched: Instant,
    sample: Instant,
    sampled: Instant,
}

/// A runner whose calls are timed.
#[derive(Debug)]
pub(super) struct Timed<R> {
    runner: R,
    /// Of the latest step; absent if it failed.
    times: Option<Times>,
}

impl<R> Timed<R> {
    pub(super) fn new(runner: R) -> Self {
        Self { runner, times: None }
    }

    /// Records the parts of the step that ended just now, if nothing went wrong in it.
    pub(super) fn record_phases(&self, ended_at: Instant) {
        let Some(times) = self.times else { return };
        metrics::step_phase(StepPhase::Launch, times.launched - times.launch);
        metrics::step_phase(StepPhase::Mask, times.sample - times.launched);
        metrics::step_phase(StepPhase::Sample, times.sampled - times.sample);
        metrics::step_phase(StepPhase::Update, ended_at - times.sampled);
    }
}

impl<R: Runner> Runner for Timed<R> {
    type Error = R::Error;

    fn launch(&mut self, step: &SchedulerOutput) -> Result<(), R::Error> {
        self.times = None;
        let launch = now();
        self.runner.launch(step)?;
        let launched = now();
        self.times = Some(Times { launch, launched, sample: launched, sampled: launched });
        Ok(())
    }

    fn sample(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, R::Error> {
        let times = self.times.take();
        let sample = now();
        let outputs = self.runner.sample(step, masks)?;
        self.times = times.map(|times| Times { sample, sampled: now(), ..times });
        Ok(outputs)
    }

    fn num_blocks(&self) -> Option<u32> {
        self.runner.num_blocks()
    }

    fn is_broken(&self) -> bool {
        self.runner.is_broken()
    }
}
