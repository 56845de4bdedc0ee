//! Ends thoughts that take too long.

use crate::engine::request::ThinkingBudget;
use crate::text::TokenId;

/// How far the thought of one sequence has come. Fed every token once.
#[derive(Clone, Debug)]
pub(super) struct Thought {
    budget: ThinkingBudget,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first token.
    Before,
    /// After this many tokens of thought.
    Inside(usize),
    /// After this many tokens of the forced end.
    Ending(usize),
    Over,
}

impl Thought {
    pub(super) fn new(budget: &ThinkingBudget) -> Self {
        let state = if budget.open.is_some() { State::Before } else { State::Inside(0) };
        Self { budget: budget.clone(), state }
    }

    /// The token that must come next, if the thought has to end.
    pub(super) fn forced(&self) -> Option<TokenId> {
        match self.state {
            State::Inside(num_tokens) if self.budget.num_tokens <= num_tokens => {
                self.budget.end.first().copied()
            }
            State::Ending(num_tokens) => self.budget.end.get(num_tokens).copied(),
            _ => None,
        }
    }

    /// Follows a token, whether it was forced or not.
    pub(super) fn push(&mut self, token: TokenId) {
        let is_forced = self.forced() == Some(token);
        self.state = match self.state {
            State::Before if self.budget.open == Some(token) => State::Inside(0),
            State::Inside(_) if is_forced => State::Ending(1),
            State::Inside(num_tokens) if token != self.budget.close => {
                State::Inside(num_tokens + 1)
            }
            State::Ending(num_tokens) if is_forced => State::Ending(num_tokens + 1),
            _ => State::Over,
        };
        if self.state == State::Ending(self.budget.end.len()) {
            self.state = State::Over;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: TokenId = 1;
    const CLOSE: TokenId = 2;

    /// What comes of a model that wants to say `wanted`.
    fn said(num_tokens: usize, open: Option<TokenId>, wanted: &[TokenId]) -> Vec<TokenId> {
        let budget = ThinkingBudget { num_tokens, open, close: CLOSE, end: [10, CLOSE, 10].into() };
        let mut thought = Thought::new(&budget);
        let mut wanted = wanted.iter().copied();
        let mut said = Vec::new();
        while let Some(token) = thought.forced().or_else(|| wanted.next()) {
            thought.push(token);
            said.push(token);
        }
        said
    }

    #[test]
    fn a_thought_within_its_budget_is_left_alone() {
        assert_eq!(said(3, None, &[5, 6, CLOSE, 7, 8, 9, 9]), [5, 6, CLOSE, 7, 8, 9, 9]);
        assert_eq!(said(2, Some(OPEN), &[OPEN, 5, CLOSE, 7, 7]), [OPEN, 5, CLOSE, 7, 7]);
        // An answer without a thought, and one that only speaks of the tag.
        assert_eq!(said(1, Some(OPEN), &[5, OPEN, 6, 7]), [5, OPEN, 6, 7]);
    }

    #[test]
    fn a_thought_that_takes_too_long_is_ended_once() {
        assert_eq!(said(2, None, &[5, 6, 7, 8, 9]), [5, 6, 10, CLOSE, 10, 7, 8, 9]);
        assert_eq!(said(1, Some(OPEN), &[OPEN, 5, 7]), [OPEN, 5, 10, CLOSE, 10, 7]);
        assert_eq!(said(0, None, &[7, OPEN, 8]), [10, CLOSE, 10, 7, OPEN, 8]);
        // The first token of the end counts as thought while there is room for it.
        assert_eq!(said(2, None, &[10, 10, 7]), [10, 10, 10, CLOSE, 10, 7]);
    }
}
