//! Log-probabilities in the three shapes clients know: chat, legacy completions, and vLLM's for
//! prompts.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::chat::model::ServedModel;
use crate::engine::event::{SampledToken, TokenLogprobs};
use crate::openai::chat::{ChatLogprobs, ChatTokenLogprob, TopLogprob};
use crate::openai::completion::CompletionLogprobs;
use crate::openai::generation::{PromptLogprob, PromptLogprobs};
use crate::text::TokenId;

/// JSON has no infinity; clients know this value for "impossible".
const LOWEST_LOGPROB: f32 = -9999.0;

impl ServedModel {
    /// The chat shape, for generated tokens that carry log-probabilities.
    pub fn chat_logprobs(&self, tokens: &[SampledToken]) -> ChatLogprobs {
        let content = tokens.iter().filter_map(|token| token.logprobs.as_ref());
        let content = content
            .map(|entry| ChatTokenLogprob {
                token: self.token_text(entry.token),
                logprob: finite(entry.logprob),
                bytes: self.token_bytes(entry.token).to_vec(),
                top_logprobs: entry
                    .top
                    .iter()
                    .map(|(id, logprob)| TopLogprob {
                        token: self.token_text(*id),
                        logprob: finite(*logprob),
                        bytes: self.token_bytes(*id).to_vec(),
                    })
                    .collect(),
            })
            .collect();
        ChatLogprobs { content, refusal: None }
    }

    /// vLLM's shape for a whole prompt, cut to the `num_top` most likely tokens beside the given.
    pub fn prompt_logprobs(&self, entries: &[TokenLogprobs], num_top: usize) -> PromptLogprobs {
        let entries = entries.iter().map(|entry| {
            let mut position = BTreeMap::new();
            let own_rank = entry.top.iter().position(|(id, _)| *id == entry.token);
            let own = (entry.token, entry.logprob, own_rank);
            let top = entry.top.iter().take(num_top).enumerate();
            let top = top.map(|(rank, (id, logprob))| (*id, *logprob, Some(rank)));
            for (id, logprob, rank) in top.chain([own]) {
                let value = PromptLogprob {
                    logprob: finite(logprob),
                    rank: rank.map(|rank| rank + 1),
                    decoded_token: self.token_text(id),
                };
                position.insert(id, value);
            }
            Some(position)
        });
        std::iter::once(None).chain(entries).collect()
    }

    /// The text of several tokens, special ones included.
    pub fn decode_all(&self, tokens: &[TokenId]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|id| self.token_bytes(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of one token; half a character is a replacement character.
    pub fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.tokenizer.token_bytes(id).unwrap_or_default()
    }
}

/// Writes the legacy shape piece by piece: offsets run on from piece to piece.
#[derive(Clone, Debug)]
pub struct CompletionLogprobsWriter {
    num_chars: usize,
    num_top: usize,
}

impl CompletionLogprobsWriter {
    /// Writes the `num_top` most likely tokens beside the given one, even if more are known.
    pub fn new(num_top: usize) -> Self {
        Self { num_chars: 0, num_top }
    }

    /// An echoed prompt; its first token has no probability.
    pub fn prompt(
        &mut self,
        model: &ServedModel,
        prompt: &[TokenId],
        entries: &[TokenLogprobs],
    ) -> CompletionLogprobs {
        let mut out = CompletionLogprobs::default();
        for (index, id) in prompt.iter().enumerate() {
            let entry = index.checked_sub(1).and_then(|index| entries.get(index));
            self.write(model, *id, entry, &mut out);
        }
        out
    }

    /// Generated tokens.
    pub fn tokens(&mut self, model: &ServedModel, tokens: &[SampledToken]) -> CompletionLogprobs {
        let mut out = CompletionLogprobs::default();
        for token in tokens {
            self.write(model, token.id, token.logprobs.as_ref(), &mut out);
        }
        out
    }

    fn write(
        &mut self,
        model: &ServedModel,
        id: TokenId,
        entry: Option<&TokenLogprobs>,
        out: &mut CompletionLogprobs,
    ) {
        out.text_offset.push(self.num_chars);
        // Every byte that does not continue a character begins one.
        let begins = |byte: &&u8| **byte & 0b1100_0000 != 0b1000_0000;
        self.num_chars += model.token_bytes(id).iter().filter(begins).count();
        out.tokens.push(model.token_text(id));
        out.token_logprobs.push(entry.map(|entry| finite(entry.logprob)));
        out.top_logprobs.push(entry.map(|entry| {
            let own = (entry.token, entry.logprob);
            let tokens = entry.top.iter().take(self.num_top).copied().chain([own]);
            tokens
                .map(|(id, logprob)| (model.token_text(id), Value::from(finite(logprob))))
                .collect::<Map<_, _>>()
        }));
    }
}

fn finite(logprob: f32) -> f32 {
    // `max` also turns a NaN into the lowest value.
    logprob.max(LOWEST_LOGPROB)
}

/// Joins two pieces of the legacy shape.
pub fn append_completion_logprobs(all: &mut CompletionLogprobs, piece: CompletionLogprobs) {
    all.text_offset.extend(piece.text_offset);
    all.token_logprobs.extend(piece.token_logprobs);
    all.tokens.extend(piece.tokens);
    all.top_logprobs.extend(piece.top_logprobs);
}
