//! Keeps what guides sequences, their grammars and thinking budgets, in step with their tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::threads::parallel_for;
use crate::engine::request::ThinkingBudget;
use crate::engine::thinking::Thought;
use crate::grammar::{Grammar, GrammarError, GrammarMatcher};
use crate::scheduler::SeqId;
use crate::scheduler::step::{
    Continuation, SampleError, SampledToken, ScheduledSeq, SchedulerOutput, SeqOutput, TokenMasks,
};
use crate::text::{TokenBitmask, TokenId};

/// What a sequence must keep to beside its parameters. Most have nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guidance<'a> {
    /// What the output must look like.
    pub grammar: Option<&'a Arc<Grammar>>,
    /// How long it may think.
    pub thinking: Option<&'a ThinkingBudget>,
}

impl Guidance<'_> {
    /// Whether there is any.
    pub fn is_some(&self) -> bool {
        self.grammar.is_some() || self.thinking.is_some()
    }
}

/// One guide for every sequence that needs one. Whoever needs none costs nothing.
#[derive(Debug, Default)]
pub(super) struct Grammars {
    guides: BTreeMap<SeqId, Guide>,
}

impl Grammars {
    pub(super) fn add(&mut self, id: SeqId, guidance: Guidance<'_>) {
        if guidance.is_some() {
            let matcher = guidance.grammar.map(|grammar| GrammarMatcher::new(Arc::clone(grammar)));
            let thought = guidance.thinking.map(Thought::new);
            self.guides.insert(id, Guide { matcher, thought });
        }
    }

    pub(super) fn remove(&mut self, id: SeqId) {
        self.guides.remove(&id);
    }

    /// The masks of those that draw a token in this step, on all threads of the pool. A matcher that fails gives none; it says
    /// so once more when it is to follow the token.
    pub(super) fn masks(&mut self, step: &SchedulerOutput) -> TokenMasks {
        if self.guides.is_empty() {
            return TokenMasks::new();
        }
        let drawing = step.scheduled.iter().filter(|scheduled| scheduled.sample.is_some());
        let drawing: BTreeSet<SeqId> = drawing.map(|scheduled| scheduled.id).collect();
        let guides = self.guides.iter_mut().filter(|(id, _)| drawing.contains(id));
        let tasks: Vec<_> = guides.map(|(id, guide)| Mutex::new((*id, guide, None))).collect();
        parallel_for(tasks.len(), |task| {
            let mut task = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
            let (_, guide, mask) = &mut *task;
            *mask = guide.mask();
        });
        let done = tasks.into_iter().map(Mutex::into_inner);
        let masks = done.map(|task| task.unwrap_or_else(PoisonError::into_inner));
        masks.filter_map(|(id, _, mask)| Some((id, mask?))).collect()
    }

    /// Follows the drawn tokens, and adds what must come after them.
    pub(super) fn advance(&mut self, step: &SchedulerOutput, outputs: &mut [SeqOutput]) {
        if self.guides.is_empty() {
            return;
        }
        for (scheduled, output) in step.scheduled.iter().zip(outputs) {
            if let Some(Ok(token)) = &output.sampled
                && let Some(guide) = self.guides.get_mut(&scheduled.id)
            {
                match guide.follow(scheduled, token) {
                    Ok(continuation) => output.continuation = continuation,
                    Err(GrammarError(reason)) => {
                        output.sampled = Some(Err(SampleError::Grammar(reason)));
                    }
                }
            }
        }
    }
}

#[derive(Debug)]
struct Guide {
    matcher: Option<GrammarMatcher>,
    thought: Option<Thought>,
}

impl Guide {
    fn mask(&mut self) -> Option<TokenBitmask> {
        match (self.end_of_thought(), &mut self.matcher) {
            (Some(token), _) => Some(TokenBitmask::only(token)),
            (None, Some(matcher)) => matcher.mask().ok()?,
            (None, None) => None,
        }
    }

    /// Tokens that are not drawn have no log-probabilities, so who wants them draws every token.
    fn follow(
        &mut self,
        scheduled: &ScheduledSeq,
        token: &SampledToken,
    ) -> Result<Continuation, GrammarError> {
        self.accept(token.id)?;
        let wants_logprobs =
            scheduled.sample.as_ref().is_some_and(|sample| sample.params.logprobs.is_some());
        let mut forced = Vec::new();
        if !wants_logprobs {
            while let Some(token) = self.end_of_thought() {
                self.accept(token)?;
                forced.push(token);
            }
            if let Some(matcher) = &mut self.matcher {
                forced.extend(matcher.forced()?);
            }
        }
        let is_complete = self.matcher.as_ref().is_some_and(GrammarMatcher::is_over);
        Ok(Continuation { forced, is_complete })
    }

    fn accept(&mut self, token: TokenId) -> Result<(), GrammarError> {
        if let Some(thought) = &mut self.thought {
            thought.push(token);
        }
        self.matcher.as_mut().map_or(Ok(()), |matcher| matcher.accept(token))
    }

    /// The next token of the end of a thought, if it has to end. Where a grammar holds, it alone
    /// says what comes: one that begins behind the thought begins right behind the closing token.
    fn end_of_thought(&self) -> Option<TokenId> {
        let token = self.thought.as_ref()?.forced()?;
        let is_held = self.matcher.as_ref().is_some_and(GrammarMatcher::is_constrained);
        (!is_held).then_some(token)
    }
}
