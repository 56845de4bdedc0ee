//! A runner without a model, for tests of everything above it.
//!
//! Use it with `#[path = "support/fake_runner.rs"] mod fake_runner;`. Its tokens depend on the
//! request alone. Faults are asked for by the request itself: put one of the marker tokens at the
//! end of a prompt.

#![allow(dead_code, reason = "every test binary uses another part")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use qwen_server::scheduler::step::{
    NonFiniteLogits, Runner, SampleError, SampleRequest, SampledToken, ScheduledSeq,
    SchedulerOutput, SeqOutput, TokenLogprobs, TokenMasks,
};
use qwen_server::text::{TokenBitmask, TokenId};

/// A prompt with this token makes the runner return an error.
pub(crate) const ERROR_TOKEN: TokenId = 900;
/// A prompt with this token makes the runner panic.
pub(crate) const PANIC_TOKEN: TokenId = 901;
/// A prompt that ends with this token has logits that are not finite.
pub(crate) const NAN_TOKEN: TokenId = 902;

/// Lets the steps of a runner pass one by one; dropping it opens the way for good.
pub(crate) struct Gate(Sender<()>);

impl Gate {
    /// Lets this many more steps pass.
    pub(crate) fn let_pass(&self, num_steps: usize) {
        for _ in 0..num_steps {
            self.0.send(()).expect("the runner lives");
        }
    }
}

/// See the module.
pub(crate) struct FakeRunner {
    /// Generated tokens are below this.
    pub(crate) vocab_size: u32,
    /// How long a step takes.
    pub(crate) step_delay: Duration,
    /// When not empty: what every request is answered, token by token; the last one repeats.
    pub(crate) script: Vec<TokenId>,
    /// When present: every step waits for its permission.
    pub(crate) gate: Option<Receiver<()>>,
    /// Counts steps that began.
    pub(crate) num_steps: Arc<AtomicUsize>,
}

impl Default for FakeRunner {
    fn default() -> Self {
        Self {
            vocab_size: 512,
            step_delay: Duration::ZERO,
            script: Vec::new(),
            gate: None,
            num_steps: Arc::default(),
        }
    }
}

/// For an engine that never needs another runner.
pub(crate) fn once<R>(runner: R) -> impl FnMut() -> Result<R, String> {
    let mut runner = Some(runner);
    move || runner.take().ok_or_else(|| "there is no other runner".to_owned())
}

impl FakeRunner {
    /// Makes every step wait for the returned gate.
    pub(crate) fn gated(mut self) -> (Self, Gate) {
        let (sender, receiver) = channel();
        self.gate = Some(receiver);
        (self, Gate(sender))
    }

    /// The token a request gets: a function of its last token, its seed and the random counter.
    pub(crate) fn next_token(&self, last: TokenId, request: &SampleRequest) -> TokenId {
        if let Some(end) = self.script.len().checked_sub(1) {
            return self.script[request.num_output_tokens.min(end)];
        }
        let mixed = [request.params.seed as u32, request.choice, request.num_output_tokens as u32]
            .into_iter()
            .fold(last, |hash, part| (hash ^ part).wrapping_mul(0x9E37_79B1).rotate_left(9));
        let allowed = |token: &TokenId| !request.forbidden.contains(token);
        let candidates = (0..self.vocab_size).map(|i| mixed.wrapping_add(i) % self.vocab_size);
        candidates.into_iter().find(allowed).expect("something is allowed")
    }

    fn sampled(
        &self,
        scheduled: &ScheduledSeq,
        request: &SampleRequest,
        mask: Option<&TokenBitmask>,
    ) -> Result<SampledToken, SampleError> {
        let last = *scheduled.tokens.last().expect("a scheduled sequence has tokens");
        if last == NAN_TOKEN {
            return Err(NonFiniteLogits.into());
        }
        let wanted = self.next_token(last, request);
        let ids = (wanted..self.vocab_size).chain(0..wanted);
        let id = ids.into_iter().find(|&id| mask.is_none_or(|mask| mask.allows(id)));
        let id = id.expect("something is allowed");
        let logprobs = request.params.logprobs.map(|num_top| self.logprobs(id, num_top));
        Ok(SampledToken { id, logprobs })
    }

    fn logprobs(&self, token: TokenId, num_top: u32) -> TokenLogprobs {
        let others = (0..self.vocab_size).filter(|&other| other != token);
        let ranked = std::iter::once(token).chain(others).zip(1_u8..);
        let top = ranked.take(num_top as usize).map(|(id, rank)| (id, -f32::from(rank))).collect();
        TokenLogprobs { token, logprob: -1.0, top }
    }
}

/// The sum of the token ids, and a constant.
pub(crate) fn pooled(scheduled: &ScheduledSeq) -> Option<Vec<f64>> {
    let pool = scheduled.pool.as_ref()?;
    let sum = pool.sum.first().copied().unwrap_or(0.0);
    let ids = scheduled.tokens[pool.rows.clone()].iter().map(|&id| f64::from(id));
    Some(vec![sum + ids.sum::<f64>(), 1.0])
}

impl Runner for FakeRunner {
    type Error = String;

    fn launch(&mut self, step: &SchedulerOutput) -> Result<(), String> {
        self.num_steps.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &self.gate
            && gate.recv().is_err()
        {
            self.gate = None;
        }
        if !self.step_delay.is_zero() {
            std::thread::sleep(self.step_delay);
        }
        let mut tokens = step.scheduled.iter().flat_map(|scheduled| &scheduled.tokens);
        let fault = tokens.find(|&&token| token == ERROR_TOKEN || token == PANIC_TOKEN);
        assert_ne!(fault, Some(&PANIC_TOKEN), "the prompt asked for a panic");
        if fault.is_some() { Err("the prompt asked for an error".to_owned()) } else { Ok(()) }
    }

    fn sample(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, String> {
        let output = |scheduled: &ScheduledSeq| {
            let mask = masks.get(&scheduled.id);
            let request = scheduled.sample.as_ref();
            let sampled = request.map(|request| self.sampled(scheduled, request, mask));
            let wanted = scheduled.prompt_logprobs.iter();
            let prompt_logprobs = wanted
                .flat_map(|wanted| {
                    wanted.targets.iter().map(|&token| self.logprobs(token, wanted.num_top))
                })
                .collect();
            let pooled = pooled(scheduled);
            SeqOutput { sampled, prompt_logprobs, pooled, ..SeqOutput::default() }
        };
        Ok(step.scheduled.iter().map(output).collect())
    }
}
