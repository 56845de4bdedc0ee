//! Asks a smaller model what a larger one may say next, and the larger one whether that is so.
//!
//! The two have caches of the same shape, so one block table says where both keep a sequence's keys
//! and values. The draft model computes every token that the target computes, so whatever prefix is
//! found in the one cache is in the other, but perhaps for the last token of a sequence that ended with
//! a true guess: guesses behind such a prefix are worse. Where a step has room for guesses the draft
//! model goes on, token by token, with the random numbers that the target will use for the same
//! positions. Both are runners, and steps are plain data: nothing here knows a tensor.

use crate::scheduler::step::{
    Runner, ScheduledSeq, SchedulerOutput, SeqOutput, TokenMasks, UNDRAWN,
};

/// A runner and, if there is one, a draft model's.
pub struct DraftedRunner<R> {
    target: R,
    draft: Option<R>,
    /// Token ids of the target are below the first, those of the draft model below the second.
    vocab_sizes: (usize, usize),
    /// The launched step with its guesses.
    filled: Option<SchedulerOutput>,
}

impl<R: Runner> DraftedRunner<R> {
    /// Joins the two, whose vocabularies have these sizes. Padding makes the same ones differ: what
    /// one model says there means nothing to the other.
    pub fn new(target: R, draft: Option<R>, vocab_sizes: (usize, usize)) -> Self {
        Self { target, draft, vocab_sizes, filled: None }
    }

    /// Lets the draft model compute a step, and fills in what it guesses.
    fn fill(
        draft: &mut R,
        step: &mut SchedulerOutput,
        (target_size, draft_size): (usize, usize),
    ) -> Result<(), R::Error> {
        let no_masks = TokenMasks::new();
        let num_rounds = step.scheduled.iter().map(|seq| seq.num_drafts).max().unwrap_or(0);
        for round in 0..=num_rounds {
            let (places, asked): (Vec<usize>, Vec<ScheduledSeq>) = step
                .scheduled
                .iter()
                .enumerate()
                .filter_map(|(place, seq)| Some((place, asked(seq, round, draft_size)?)))
                .unzip();
            if asked.is_empty() {
                break;
            }
            let asked = SchedulerOutput { scheduled: asked, preempted: Vec::new() };
            draft.launch(&asked)?;
            let outputs = draft.sample(&asked, &no_masks)?;
            for (place, output) in places.into_iter().zip(outputs) {
                let seq = &mut step.scheduled[place];
                let guess = output.sampled.and_then(Result::ok).map(|token| token.id);
                let guess = guess.filter(|&id| (id as usize) < target_size);
                let index = seq.num_known() + round;
                if let Some(slot) = seq.tokens.get_mut(index) {
                    *slot = guess.unwrap_or(UNDRAWN);
                }
            }
        }
        Ok(())
    }
}

/// What the draft model does in a round: first it computes the known tokens, then one guess after
/// the other. `None` where it has nothing to do.
fn asked(seq: &ScheduledSeq, round: usize, draft_size: usize) -> Option<ScheduledSeq> {
    let num_known = seq.num_known();
    let (start, mut tokens) = match (round, seq.token_before) {
        (0, Some(before)) => (seq.start - 1, [&[before], &seq.tokens[..num_known]].concat()),
        (0, None) => (seq.start, seq.tokens[..num_known].to_vec()),
        _ if seq.num_drafts <= round => return None,
        _ => (seq.start + num_known + round - 1, vec![seq.tokens[num_known + round - 1]]),
    };
    for token in tokens.iter_mut().filter(|token| draft_size <= **token as usize) {
        *token = UNDRAWN;
    }
    let guesses = &seq.drafts()[..round];
    let sample = seq.sample.as_ref().filter(|_| round < seq.num_drafts);
    Some(ScheduledSeq {
        start,
        tokens,
        num_drafts: 0,
        token_before: None,
        sample: sample.map(|sample| sample.after(guesses)),
        prompt_logprobs: None,
        pool: None,
        // An adapter is the model's; without it guesses are a little worse.
        adapter: None,
        ..seq.clone()
    })
}

impl<R: Runner> Runner for DraftedRunner<R> {
    type Error = R::Error;

    fn launch(&mut self, step: &SchedulerOutput) -> Result<(), Self::Error> {
        let Some(draft) = &mut self.draft else { return self.target.launch(step) };
        let mut filled = step.clone();
        Self::fill(draft, &mut filled, self.vocab_sizes)?;
        self.target.launch(&filled)?;
        self.filled = Some(filled);
        Ok(())
    }

    fn sample(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, Self::Error> {
        let filled = self.filled.take();
        self.target.sample(filled.as_ref().unwrap_or(step), masks)
    }

    fn sample_ahead(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
        next: &SchedulerOutput,
    ) -> Result<Vec<SeqOutput>, Self::Error> {
        self.target.sample_ahead(step, masks, next)
    }

    fn with_threads(&self, work: &mut dyn FnMut()) {
        self.target.with_threads(work);
    }

    /// With a draft model no step is known before its tokens are.
    fn is_asynchronous(&self) -> bool {
        self.draft.is_none() && self.target.is_asynchronous()
    }

    fn num_blocks(&self) -> Option<u32> {
        self.target.num_blocks()
    }

    fn is_broken(&self) -> bool {
        self.target.is_broken() || self.draft.as_ref().is_some_and(Runner::is_broken)
    }
}
