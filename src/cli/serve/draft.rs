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

/// A token must mean the same to both models; padding at the end of a vocabulary means nothing.
///
/// # Errors
/// If one does not.
pub(super) fn check_tokenizer(planned: &PlannedModel) -> Result<()> {
    let Some(draft) = planned.draft_checkpoint() else { return Ok(()) };
    let vocab_size = planned.config.vocab_size;
    let model = TextSide::read(planned.checkpoint.source(), vocab_size)?.tokenizer;
    let draft = TextSide::read(draft.source(), vocab_size)
        .context("the tokenizer of the draft model cannot be read")?
        .tokenizer;
    let Some(token) = first_difference(&model, &draft) else { return Ok(()) };
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
