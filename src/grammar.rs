//! Constrains what a model may say: turns a [`Constraint`] into the tokens that may come next.
//!
//! ```text
//! Constraint ──GrammarCompiler──► Arc<Grammar> ──one per choice──► GrammarMatcher
//!              (off the engine)    (cached)                         mask → accept → forced
//! ```
//!
//! The automata are llguidance's. What it would ignore or build without bounds is refused before,
//! in `schema` and by the limits in `compile`. **Invariant:** a constraint is followed to its end
//! or refused; nothing is ever dropped silently. Start reading at [`GrammarCompiler::compile`].

mod cache;
pub mod compile;
pub mod constraint;
mod ebnf;
pub mod matcher;
mod pattern;
pub mod schema;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use compile::{CompileError, GrammarCompiler};
pub use constraint::Constraint;
pub use matcher::{Before, Grammar, GrammarError, GrammarMatcher, Then, Trigger};
pub use pattern::{search_pattern, text_pattern};
