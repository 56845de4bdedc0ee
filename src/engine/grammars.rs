//! Keeps the grammars of sequences in step with their tokens.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::grammar::{Grammar, GrammarError, GrammarMatcher};
use crate::scheduler::SeqId;
use crate::scheduler::step::{
    Continuation, SampleError, SampledToken, ScheduledSeq, SchedulerOutput, SeqOutput, TokenMasks,
};

/// One matcher for every sequence with a grammar. Whoever has none costs nothing.
#[derive(Debug, Default)]
pub(super) struct Grammars {
    matchers: BTreeMap<SeqId, GrammarMatcher>,
}

impl Grammars {
    pub(super) fn add(&mut self, id: SeqId, grammar: &Arc<Grammar>) {
        self.matchers.insert(id, GrammarMatcher::new(Arc::clone(grammar)));
    }

    pub(super) fn remove(&mut self, id: SeqId) {
        self.matchers.remove(&id);
    }

    /// The masks of those that draw a token in this step. A matcher that fails gives none; it says
    /// so once more when it is to follow the token.
    pub(super) fn masks(&mut self, step: &SchedulerOutput) -> TokenMasks {
        if self.matchers.is_empty() {
            return TokenMasks::new();
        }
        let drawing = step.scheduled.iter().filter(|scheduled| scheduled.sample.is_some());
        drawing
            .filter_map(|scheduled| {
                let mask = self.matchers.get_mut(&scheduled.id)?.mask().ok()??;
                Some((scheduled.id, mask))
            })
            .collect()
    }

    /// Follows the drawn tokens, and adds what must come after them.
    pub(super) fn advance(&mut self, step: &SchedulerOutput, outputs: &mut [SeqOutput]) {
        if self.matchers.is_empty() {
            return;
        }
        for (scheduled, output) in step.scheduled.iter().zip(outputs) {
            if let Some(Ok(token)) = &output.sampled
                && let Some(matcher) = self.matchers.get_mut(&scheduled.id)
            {
                match follow(matcher, scheduled, token) {
                    Ok(continuation) => output.continuation = continuation,
                    Err(GrammarError(reason)) => {
                        output.sampled = Some(Err(SampleError::Grammar(reason)));
                    }
                }
            }
        }
    }
}

/// Tokens that are not drawn have no log-probabilities, so who wants them draws every token.
fn follow(
    matcher: &mut GrammarMatcher,
    scheduled: &ScheduledSeq,
    token: &SampledToken,
) -> Result<Continuation, GrammarError> {
    matcher.accept(token.id)?;
    let wants_logprobs =
        scheduled.sample.as_ref().is_some_and(|sample| sample.params.logprobs.is_some());
    let forced = if wants_logprobs { Vec::new() } else { matcher.forced()? };
    Ok(Continuation { forced, is_complete: matcher.is_over() })
}
