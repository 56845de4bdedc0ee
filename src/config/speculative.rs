//! `--speculative`: who guesses the next tokens.

use std::convert::Infallible;
use std::str::FromStr;

/// Who guesses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DraftSource {
    /// What followed the last tokens earlier in the prompt or the answer (`ngram`).
    PromptLookup,
    /// A smaller model: its name or its files.
    Model(String),
}

/// How the next tokens are guessed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Speculative {
    /// Who guesses.
    pub source: DraftSource,
    /// Most guesses at once.
    pub num_tokens: usize,
}

impl FromStr for DraftSource {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "ngram" => Self::PromptLookup,
            model => Self::Model(model.to_owned()),
        })
    }
}
