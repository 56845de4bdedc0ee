//! Renders conversations to prompts, and turns generated tokens back into text.
//!
//! [`prompt`] is the way in: it checks a request and builds what the engine runs. [`output`] is
//! the way out: events become deltas of text. Both know OpenAI's wire types, and nothing of HTTP.

pub mod answer;
pub mod anthropic;
pub mod best_of;
pub mod constraint;
pub mod converted;
pub mod dashscope;
pub mod embedding;
mod encoding;
mod fields;
pub mod fim;
pub mod logprobs;
pub mod messages;
pub mod model;
pub mod options;
pub mod output;
mod pinning;
pub mod prompt;
pub mod reasoning;
mod rendered;
pub mod responses;
pub mod template;
mod thinking;
pub mod tokenize;
pub mod tool_call;
mod tool_grammar;
pub mod tools;
