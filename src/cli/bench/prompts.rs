//! Prompts of a given length that no cache has seen.

use anyhow::Result;
use serde_json::{Value, json};

use crate::cli::client::{Client, StatusError};
use crate::sampling::rng;

/// Everyday words, which are one or two tokens each.
const WORDS: &str = "answer apple army autumn bank bird blue book bottle bread bridge brother \
    camera candle castle chair cheese child circle city cloud coffee corner country dance \
    daughter desert dinner doctor door dream earth engine evening family farmer field finger \
    fire fish flower forest friend garden glass gold green hammer harbor heart hill history \
    horse hotel house island journey kitchen lake language leaf letter library light machine \
    market meadow message mirror money moon morning mountain music needle night number ocean \
    office orange painter paper pencil people picture planet pocket question rain record river \
    road school season shadow silver sister snow song spring star station stone storm story \
    street summer table teacher theater thunder ticket tower train tree valley village voice \
    water weather window winter wood world yellow";

/// Makes prompts. The n-th of a seed is always the same.
#[derive(Clone, Debug)]
pub(crate) struct Prompts {
    pieces: Pieces,
    seed: u64,
    num_tokens: usize,
}

#[derive(Clone, Debug)]
enum Pieces {
    /// Ids to choose from: prompts have exactly the wanted length.
    Tokens(Vec<u64>),
    /// For servers that do not show their tokens: about the wanted length.
    Words,
}

impl Prompts {
    /// Asks the server for the token ids of common words.
    pub(crate) fn prepare(
        client: &Client,
        model: &str,
        (seed, num_tokens): (u64, usize),
    ) -> Result<Self> {
        let body = json!({"model": model, "prompt": WORDS, "add_special_tokens": false});
        let pieces = match client.post("/tokenize", &body) {
            // Another server's path of the same name may answer something else, or nothing.
            Ok(answer) => token_ids(&answer).map_or(Pieces::Words, Pieces::Tokens),
            Err(error) if is_missing(&error) => Pieces::Words,
            Err(error) => return Err(error),
        };
        Ok(Self { pieces, seed, num_tokens })
    }

    /// The prompt with this number, as the `prompt` field of a completion.
    pub(crate) fn prompt(&self, number: u32) -> Value {
        let choose = |len: usize| {
            (0..self.num_tokens)
                .map(move |i| (rng::uniform(self.seed, number, i) * len as f64) as usize)
        };
        match &self.pieces {
            Pieces::Tokens(ids) => choose(ids.len()).map(|i| ids[i]).collect(),
            Pieces::Words => {
                let words: Vec<&str> = WORDS.split_whitespace().collect();
                let text: Vec<&str> = choose(words.len()).map(|i| words[i]).collect();
                text.join(" ").into()
            }
        }
    }
}

fn token_ids(answer: &Value) -> Option<Vec<u64>> {
    let ids = answer["tokens"].as_array()?;
    let ids: Option<Vec<u64>> = ids.iter().map(Value::as_u64).collect();
    ids.filter(|ids| !ids.is_empty())
}

fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<StatusError>().is_some_and(|error| [404, 405].contains(&error.status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_their_length_and_differ() {
        let tokens = Pieces::Tokens((100..200).collect());
        for pieces in [tokens, Pieces::Words] {
            let prompts = Prompts { pieces, seed: 1, num_tokens: 50 };
            let first = prompts.prompt(0);
            assert_eq!(first, prompts.prompt(0));
            assert_ne!(first, prompts.prompt(1));
            let len = first
                .as_array()
                .map_or_else(|| first.as_str().unwrap().split(' ').count(), Vec::len);
            assert_eq!(len, 50);
        }
    }
}
