//! Answers that are nothing but the JSON objects of calls, plain or in a fence of Markdown.

use std::sync::Arc;

use serde_json::Value;

use super::ToolReading;
use super::call_reader::CallReader;
use crate::chat::tools::fits;

const FENCE: &str = "```";
/// Longest word behind the opening fence.
const MAX_FENCE_LINE: usize = 16;

/// Holds an answer back while it can still be calls.
#[derive(Clone, Debug)]
pub(super) struct BareCalls {
    reading: Arc<ToolReading>,
    /// The answer so far.
    text: String,
    state: State,
    is_fenced: bool,
    calls: Vec<(String, String)>,
}

#[derive(Clone, Debug)]
enum State {
    /// Before an object; `source` is what came of a fence.
    Before { source: String },
    /// In an object, with its arguments so far.
    Object { reader: CallReader, arguments: String },
    /// Behind the closing fence.
    Behind,
}

impl BareCalls {
    pub(super) fn new(reading: &Arc<ToolReading>) -> Self {
        Self {
            reading: Arc::clone(reading),
            text: String::new(),
            state: State::Before { source: String::new() },
            is_fenced: false,
            calls: Vec::new(),
        }
    }

    /// Reads the next piece. Returns the whole text so far once it cannot be calls any more.
    pub(super) fn push(&mut self, text: &str) -> Option<String> {
        self.text.push_str(text);
        let is_possible = text.chars().all(|c| self.take(c));
        (!is_possible).then(|| std::mem::take(&mut self.text))
    }

    /// Ends the text: names and arguments of the calls, or the text that is none.
    pub(super) fn finish(self) -> Result<Vec<(String, String)>, String> {
        let is_between = match &self.state {
            State::Before { source } => source.is_empty() || FENCE.starts_with(source.as_str()),
            State::Object { .. } => false,
            State::Behind => true,
        };
        if is_between && !self.calls.is_empty() { Ok(self.calls) } else { Err(self.text) }
    }

    /// Whether the text can still be calls with this character.
    fn take(&mut self, c: char) -> bool {
        match &mut self.state {
            State::Before { source } if source.is_empty() => match c {
                '{' => self.take_object(CallReader::new(), String::new(), c),
                '`' => {
                    source.push(c);
                    !self.is_fenced || !self.calls.is_empty()
                }
                _ => c.is_whitespace(),
            },
            State::Before { source } => {
                source.push(c);
                if self.is_fenced {
                    if source == FENCE {
                        self.state = State::Behind;
                        return true;
                    }
                    return FENCE.starts_with(source.as_str());
                }
                self.take_fence(c)
            }
            State::Object { .. } => {
                let state = std::mem::replace(&mut self.state, State::Behind);
                let State::Object { reader, arguments } = state else { return false };
                self.take_object(reader, arguments, c)
            }
            State::Behind => c.is_whitespace(),
        }
    }

    /// In the line of the opening fence.
    fn take_fence(&mut self, c: char) -> bool {
        let State::Before { source } = &mut self.state else { return false };
        if !source.starts_with(FENCE) || source.len() == FENCE.len() {
            return self.calls.is_empty() && FENCE.starts_with(source.as_str());
        }
        if c != '\n' {
            return source.len() < MAX_FENCE_LINE;
        }
        let word = source[FENCE.len()..].trim().to_ascii_lowercase();
        source.clear();
        self.is_fenced = true;
        matches!(word.as_str(), "" | "json")
    }

    fn take_object(&mut self, mut reader: CallReader, mut arguments: String, c: char) -> bool {
        let is_sound = reader.push(c).is_ok() && !reader.has_other_members();
        let tool = reader.name().map(|name| self.reading.tool(name));
        if !is_sound || matches!(tool, Some(None)) {
            return false;
        }
        arguments.push_str(&reader.take_arguments());
        if !reader.ended() {
            self.state = State::Object { reader, arguments };
            return true;
        }
        let Some(Some(tool)) = tool else { return false };
        let value = serde_json::from_str::<Value>(&arguments);
        let is_valid = value.is_ok_and(|value| value.is_object() && fits(&value, &tool.parameters));
        self.calls.push((tool.name.clone(), arguments));
        self.state = State::Before { source: String::new() };
        is_valid
    }
}
