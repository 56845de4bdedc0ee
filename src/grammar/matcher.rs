//! Follows one output along its grammar.
//!
//! ```text
//! no trigger:            constrained ──complete──► over
//! trigger, then End:     free ──token──► constrained ──complete──► over
//! trigger, then Repeat:  free ──token──► constrained ──complete──► free …
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::api::StopReason;
use llguidance::{Matcher, TokenParser};

use crate::text::{TokenBitmask, TokenId};

/// Where a grammar applies when it is not the whole output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// The token after which the grammar begins. It is not part of the grammar.
    pub token: TokenId,
    /// What is allowed before it.
    pub before: Before,
    /// What comes after the grammar is complete.
    pub then: Then,
}

/// What is allowed before a trigger, apart from any text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// The output may end without ever reaching the trigger.
    MayEnd,
    /// The output may not end before the trigger: end-of-sequence tokens are not drawn.
    MustReach,
}

/// What comes after the constrained part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Free text, in which the trigger may come again.
    Repeat,
    /// Nothing: the output is over.
    End,
}

/// The output cannot go on under its grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);

/// A compiled constraint. Immutable but for caches inside; cheap to clone and to share.
#[derive(Clone)]
pub struct Grammar {
    start: Arc<TokenParser>,
    trigger: Option<Trigger>,
    /// All tokens but those that end a sequence.
    without_eos: Arc<TokenBitmask>,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Grammar").field("trigger", &self.trigger).finish_non_exhaustive()
    }
}

impl Grammar {
    pub(super) fn new(start: TokenParser, without_eos: Arc<TokenBitmask>) -> Self {
        Self { start: Arc::new(start), trigger: None, without_eos }
    }

    /// The same grammar, which applies only after `trigger`.
    #[must_use]
    pub fn after(&self, trigger: Trigger) -> Self {
        Self { trigger: Some(trigger), ..self.clone() }
    }

    /// What the shared automaton takes in memory and how many states it has, or nothing if a panic
    /// has left it in doubt.
    pub(super) fn size(&self) -> Option<(usize, usize)> {
        let stats = catch_unwind(AssertUnwindSafe(|| self.start.parser.lexer_stats())).ok()?;
        Some((stats.num_bytes, stats.num_states))
    }

    pub(super) fn begin(&self) -> Matcher {
        Matcher::new(Ok((*self.start).clone()))
    }
}

/// How far one output has come.
pub struct GrammarMatcher {
    grammar: Arc<Grammar>,
    phase: Phase,
}

enum Phase {
    /// Nothing has been asked yet; matchers of queued sequences take no memory.
    Unstarted,
    /// Before the trigger.
    Free,
    Constrained(Box<Matcher>),
    Over,
}

impl std::fmt::Debug for GrammarMatcher {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("GrammarMatcher")
            .field("grammar", &self.grammar)
            .finish_non_exhaustive()
    }
}

impl GrammarMatcher {
    /// A matcher of an output that has not begun.
    pub fn new(grammar: Arc<Grammar>) -> Self {
        Self { grammar, phase: Phase::Unstarted }
    }

    /// The tokens that may come next; `None` if any may.
    ///
    /// # Errors
    /// If none may, or the grammar takes more work than is allowed. The matcher stays unusable.
    pub fn mask(&mut self) -> Result<Option<TokenBitmask>, GrammarError> {
        self.start();
        match &mut self.phase {
            Phase::Constrained(matcher) => {
                let mask = matcher.compute_mask_or_eos().map_err(|error| failure(&error))?;
                Ok(Some(TokenBitmask::from_words(mask.into())))
            }
            Phase::Free => {
                let must_reach = self.grammar.trigger.map(|trigger| trigger.before);
                let is_held = must_reach == Some(Before::MustReach);
                Ok(is_held.then(|| (*self.grammar.without_eos).clone()))
            }
            Phase::Unstarted | Phase::Over => Ok(None),
        }
    }

    /// Follows a token that was drawn.
    ///
    /// # Errors
    /// If the grammar does not allow it, or the matcher has failed before.
    pub fn accept(&mut self, token: TokenId) -> Result<(), GrammarError> {
        self.start();
        match &mut self.phase {
            Phase::Constrained(matcher) => {
                matcher.consume_token(token).map_err(|error| failure(&error))?;
            }
            Phase::Free if self.grammar.trigger.is_some_and(|trigger| trigger.token == token) => {
                self.phase = Phase::Constrained(Box::new(self.grammar.begin()));
            }
            Phase::Unstarted | Phase::Free | Phase::Over => {}
        }
        self.settle()
    }

    /// The tokens that must follow, in the tokenizer's usual spelling. They are followed already.
    ///
    /// # Errors
    /// If the grammar takes more work than is allowed.
    pub fn forced(&mut self) -> Result<Vec<TokenId>, GrammarError> {
        self.start();
        let Phase::Constrained(matcher) = &mut self.phase else { return Ok(Vec::new()) };
        let tokens = matcher.consume_ff_tokens();
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError(plain(&error)));
        }
        self.settle()?;
        Ok(tokens)
    }

    /// Whether the output is complete: nothing may follow.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// Whether the grammar decides about the next token, as it does not before its trigger.
    pub fn is_constrained(&self) -> bool {
        match &self.phase {
            Phase::Constrained(_) => true,
            Phase::Unstarted => self.grammar.trigger.is_none(),
            Phase::Free | Phase::Over => false,
        }
    }

    fn start(&mut self) {
        if matches!(self.phase, Phase::Unstarted) {
            self.phase = match self.grammar.trigger {
                Some(_) => Phase::Free,
                None => Phase::Constrained(Box::new(self.grammar.begin())),
            };
        }
    }

    /// Leaves a constrained part that is complete.
    fn settle(&mut self) -> Result<(), GrammarError> {
        let Phase::Constrained(matcher) = &self.phase else { return Ok(()) };
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError(plain(&error)));
        }
        let then = self.grammar.trigger.map_or(Then::End, |trigger| trigger.then);
        match (matcher.stop_reason(), then) {
            (StopReason::NotStopped, _) => {}
            (StopReason::NoExtension | StopReason::NoExtensionBias, Then::Repeat) => {
                self.phase = Phase::Free;
            }
            (reason, _) if reason.is_ok() => self.phase = Phase::Over,
            (reason, _) => return Err(GrammarError(reason.to_string())),
        }
        Ok(())
    }
}

fn failure(error: &impl std::fmt::Display) -> GrammarError {
    GrammarError(plain(&error.to_string()))
}

/// The first line of what llguidance says; the rest is for its own developers.
pub(super) fn plain(message: &str) -> String {
    const MAX_CHARS: usize = 300;
    let line = message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no reason");
    line.chars().take(MAX_CHARS).collect()
}
