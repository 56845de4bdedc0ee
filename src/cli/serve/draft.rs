//! The model of `--speculative`: finding it, and whether it speaks the same language.

use anyhow::{Context, Result};

use crate::cli::progress::DownloadProgress;
use crate::cli::text_side::TextSide;
use crate::cli::{Hinted, hub_from_environment};
use crate::runner::load::PlannedModel;
use crate::text::{TokenId, Tokenizer};
use crate::weights::checkpoint::Checkpoint;
use crate::weights::resolve::resolve;

/// Finds the draft model's files.
///
/// # Errors
/// If there are none, or they cannot be read.
pub(super) fn open(name: &str) -> Result<Checkpoint> {
    let find = || {
        let resolved = resolve(name, &hub_from_environment()?, &mut DownloadProgress::new())?;
        anyhow::Ok(Checkpoint::open(&resolved.path)?)
    };
    find().with_context(|| {
        format!("cannot load the draft model `{name}` (`--speculative`; `ngram` needs none)")
    })
}

/// A token must mean the same to the draft model, if there is one, as to the model with this
/// tokenizer; padding at the end of a vocabulary means nothing.
///
/// # Errors
/// If one does not.
pub(super) fn check_tokenizer(planned: &PlannedModel, tokenizer: &Tokenizer) -> Result<()> {
    let Some(draft) = planned.draft_checkpoint() else { return Ok(()) };
    let draft = TextSide::read(draft.source(), planned.config.vocab_size)
        .context("the tokenizer of the draft model cannot be read")?
        .tokenizer;
    let Some(token) = first_difference(tokenizer, &draft) else { return Ok(()) };
    let message = format!("the draft model has another tokenizer: token {token} is not the same");
    let hint = "pass a smaller model of the same family to `--speculative`, or `ngram`";
    Err(Hinted { message, hint: hint.to_owned() }.into())
}

fn first_difference(one: &Tokenizer, other: &Tokenizer) -> Option<TokenId> {
    let num_shared = one.vocab_size().min(other.vocab_size()) as TokenId;
    let differs = |&id: &TokenId| {
        let (one, other) = (one.token_bytes(id), other.token_bytes(id));
        one.zip(other).is_some_and(|(one, other)| one != other)
    };
    (0..num_shared).find(differs)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn tokens_that_differ_are_found() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny/hf-bf16/tokenizer.json");
        let json = std::fs::read(file).unwrap();
        let one = Tokenizer::from_json(&json).unwrap();
        assert_eq!(first_difference(&one, &Tokenizer::from_json(&json).unwrap()), None);
        let mut other: Value = serde_json::from_slice(&json).unwrap();
        let vocabulary = &mut other["model"]["vocab"];
        let ids = ["a", "b"].map(|token| vocabulary[token].as_u64().unwrap());
        (vocabulary["a"], vocabulary["b"]) = (ids[1].into(), ids[0].into());
        let other = Tokenizer::from_json(&serde_json::to_vec(&other).unwrap()).unwrap();
        let first = ids[0].min(ids[1]) as TokenId;
        assert_eq!(first_difference(&one, &other), Some(first));
    }
}
