//! What an output must look like, as plain data.

use serde_json::{Value, json};

/// What an output must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under this schema.
    Json(Value),
    /// Text that matches this regular expression from its first to its last character.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of the language of a client's grammar: Lark, or EBNF with `::=`.
    Grammar(String),
    /// Text of the language of a grammar of our own, in llguidance's dialect of Lark.
    Lark(String),
}

impl Constraint {
    /// The JSON schema it amounts to, if it is about JSON.
    pub fn schema(&self) -> Option<Value> {
        match self {
            Self::JsonObject => Some(json!({"type": "object"})),
            Self::Json(schema) => Some(schema.clone()),
            Self::Regex(_) | Self::Choice(_) | Self::Grammar(_) | Self::Lark(_) => None,
        }
    }

    /// Names the constraint in caches: equal constraints have equal keys, and no others.
    pub(super) fn key(&self) -> [u8; 32] {
        let (kind, content) = match self {
            Self::JsonObject => ("object", String::new()),
            Self::Json(schema) => ("json", schema.to_string()),
            Self::Regex(regex) => ("regex", regex.clone()),
            Self::Choice(choices) => ("choice", Value::from(choices.as_slice()).to_string()),
            Self::Grammar(grammar) => ("grammar", grammar.clone()),
            Self::Lark(grammar) => ("lark", grammar.clone()),
        };
        *blake3::hash(format!("{kind}:{content}").as_bytes()).as_bytes()
    }

    /// Its size as text.
    pub(super) fn num_bytes(&self) -> usize {
        match self {
            Self::JsonObject => 0,
            Self::Json(schema) => schema.to_string().len(),
            Self::Regex(text) | Self::Grammar(text) | Self::Lark(text) => text.len(),
            Self::Choice(choices) => choices.iter().map(|choice| choice.len() + 4).sum(),
        }
    }
}
