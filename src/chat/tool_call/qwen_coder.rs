//! Calls as Qwen3-Coder writes them: XML-like elements, whose text becomes JSON by the schema.

use std::sync::Arc;

use serde_json::Value;

use super::tag_finder::{Found, TagFinder};
use super::{CLOSE_TAG, CallWriter, MAX_HELD_BYTES, OPEN_TAG, ToolReading};
use crate::chat::answer::Pieces;
use crate::chat::tools::fits;

const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

/// The parser of one choice.
#[derive(Clone, Debug)]
pub(super) struct QwenCoderParser {
    reading: Arc<ToolReading>,
    finder: TagFinder,
    state: State,
    /// The schema of the parameters of the function being called.
    schema: Value,
    num_parameters: usize,
}

#[derive(Clone, Debug)]
enum State {
    /// Between calls.
    Outside,
    /// Behind `<tool_call>`; `source` is what came since.
    Opened { source: String },
    /// In the function's name; `source` begins with the tags before it.
    Name { source: String, name: String },
    /// Between parameters; `source` is what came since the last.
    Function { source: String },
    /// In a parameter's name.
    ParameterName { name: String },
    /// In a parameter's value.
    Parameter(ParameterValue),
    /// Behind the function; `source` is what came since.
    Closing { source: String },
}

impl QwenCoderParser {
    pub(super) fn new(reading: &Arc<ToolReading>) -> Self {
        Self {
            reading: Arc::clone(reading),
            finder: TagFinder::new(&[OPEN_TAG, FUNCTION]),
            state: State::Outside,
            schema: Value::Null,
            num_parameters: 0,
        }
    }

    pub(super) fn push(&mut self, c: char, calls: &mut CallWriter, out: &mut Pieces) {
        match &mut self.state {
            State::Outside => match self.finder.push(c, out) {
                Found::Nothing => {}
                Found::Tag(0) => self.state = State::Opened { source: String::new() },
                Found::Tag(_) => {
                    // Models forget the tag around the function.
                    let (source, name) = (FUNCTION.to_owned(), String::new());
                    self.state = State::Name { source, name };
                }
            },
            State::Opened { source } => {
                source.push(c);
                let tag = source.trim_start();
                if tag == FUNCTION {
                    let source = format!("{OPEN_TAG}{source}");
                    self.state = State::Name { source, name: String::new() };
                } else if !FUNCTION.starts_with(tag) || MAX_HELD_BYTES < source.len() {
                    let source = std::mem::take(source);
                    self.state = State::Outside;
                    self.finder.pass(OPEN_TAG, out);
                    self.push_again(&source, calls, out);
                }
            }
            State::Name { .. } => self.push_name(c, calls, out),
            State::Function { .. } => self.push_function(c, calls, out),
            State::ParameterName { name } => {
                if c != '>' {
                    name.push(c);
                    return;
                }
                let name = std::mem::take(name);
                self.begin_parameter(&name, calls, out);
            }
            State::Parameter(value) => {
                let is_over = value.push(c);
                calls.arguments(&value.take(), out);
                if is_over {
                    self.state = State::Function { source: String::new() };
                }
            }
            State::Closing { source } => {
                source.push(c);
                let tag = source.trim_start();
                if tag == CLOSE_TAG {
                    self.state = State::Outside;
                    calls.end();
                } else if !CLOSE_TAG.starts_with(tag) || MAX_HELD_BYTES < source.len() {
                    let source = std::mem::take(source);
                    self.state = State::Outside;
                    calls.end();
                    self.push_again(&source, calls, out);
                }
            }
        }
    }

    fn push_name(&mut self, c: char, calls: &mut CallWriter, out: &mut Pieces) {
        let State::Name { source, name } = &mut self.state else { return };
        source.push(c);
        if c != '>' && c != '\n' && name.len() < MAX_HELD_BYTES {
            name.push(c);
            return;
        }
        let tool = self.reading.tool(name).filter(|_| c == '>');
        if let Some(tool) = tool {
            self.finder.drop_space();
            self.schema = tool.parameters.clone();
            self.num_parameters = 0;
            calls.begin(name, out);
            self.state = State::Function { source: String::new() };
        } else {
            let source = std::mem::take(source);
            self.state = State::Outside;
            // The first character is not looked at again, so this ends.
            self.finder.pass("<", out);
            self.push_again(&source[1..], calls, out);
        }
    }

    fn push_function(&mut self, c: char, calls: &mut CallWriter, out: &mut Pieces) {
        let State::Function { source } = &mut self.state else { return };
        source.push(c);
        let tag = source.trim_start();
        if tag == PARAMETER {
            self.state = State::ParameterName { name: String::new() };
        } else if tag == FUNCTION_END {
            self.end_arguments(calls, out);
        } else if !(PARAMETER.starts_with(tag) || FUNCTION_END.starts_with(tag))
            || MAX_HELD_BYTES < source.len()
        {
            let source = std::mem::take(source);
            self.end_arguments(calls, out);
            self.push_again(&source, calls, out);
        }
    }

    fn end_arguments(&mut self, calls: &mut CallWriter, out: &mut Pieces) {
        let end = if self.num_parameters == 0 { "{}" } else { "}" };
        calls.arguments(end, out);
        self.state = State::Closing { source: String::new() };
    }

    fn begin_parameter(&mut self, name: &str, calls: &mut CallWriter, out: &mut Pieces) {
        let start = if self.num_parameters == 0 { "{" } else { ", " };
        self.num_parameters += 1;
        let schema = self.schema.get("properties").and_then(|properties| properties.get(name));
        let value = ParameterValue::new(schema);
        let key = Value::from(name);
        let quote = if value.is_text() { "\"" } else { "" };
        calls.arguments(&format!("{start}{key}: {quote}"), out);
        self.state = State::Parameter(value);
    }

    /// Reads text that was taken for something else before.
    fn push_again(&mut self, source: &str, calls: &mut CallWriter, out: &mut Pieces) {
        for c in source.chars() {
            if calls.is_complete() {
                return;
            }
            self.push(c, calls, out);
        }
    }

    pub(super) fn finish(&mut self, calls: &mut CallWriter, out: &mut Pieces) {
        match std::mem::replace(&mut self.state, State::Outside) {
            State::Outside | State::Function { .. } | State::ParameterName { .. } => {}
            State::Opened { source } => self.finder.pass(&format!("{OPEN_TAG}{source}"), out),
            State::Name { source, .. } => self.finder.pass(&source, out),
            State::Parameter(value) => calls.arguments(&value.cut_short(), out),
            State::Closing { .. } => calls.end(),
        }
        self.finder.finish(calls.has_calls(), out);
    }
}

/// The value of a parameter on its way to JSON.
#[derive(Clone, Debug)]
struct ParameterValue {
    /// What the value must be; `None` for text, which is passed on as it comes.
    schema: Option<Value>,
    /// Source that is held back.
    held: String,
    /// JSON that can be passed on.
    ready: String,
    /// The line break behind the opening tag is not part of the value.
    is_at_start: bool,
}

impl ParameterValue {
    fn new(schema: Option<&Value>) -> Self {
        let is_text = schema
            .is_none_or(|schema| schema.get("type").and_then(Value::as_str) == Some("string"));
        let schema = schema.filter(|_| !is_text).cloned();
        Self { schema, held: String::new(), ready: String::new(), is_at_start: true }
    }

    fn is_text(&self) -> bool {
        self.schema.is_none()
    }

    /// Reads a character; whether it ended the value.
    fn push(&mut self, c: char) -> bool {
        if std::mem::take(&mut self.is_at_start) && c == '\n' {
            return false;
        }
        self.held.push(c);
        if let Some(value) = self.held.strip_suffix(PARAMETER_END) {
            let value = value.strip_suffix('\n').unwrap_or(value);
            self.ready = match &self.schema {
                None => format!("{}\"", escape(value)),
                Some(schema) => typed(value, schema),
            };
            return true;
        }
        if self.is_text() {
            let num_ready = self.held.len() - num_undecided(&self.held);
            let undecided = self.held.split_off(num_ready);
            self.ready = escape(&self.held);
            self.held = undecided;
        }
        false
    }

    fn take(&mut self) -> String {
        std::mem::take(&mut self.ready)
    }

    /// What is left of a value whose end never came.
    fn cut_short(self) -> String {
        if self.is_text() { escape(&self.held) } else { self.held }
    }
}

/// How many bytes at the end may belong to the closing tag or the line break before it.
fn num_undecided(text: &str) -> usize {
    let tag_start = text.rfind('<').filter(|start| PARAMETER_END.starts_with(&text[*start..]));
    let before = &text[..tag_start.unwrap_or(text.len())];
    text.len() - before.strip_suffix('\n').unwrap_or(before).len()
}

/// The inside of a JSON string.
fn escape(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// The value as JSON: what the schema wants of it, if it can be that.
fn typed(source: &str, schema: &Value) -> String {
    let trimmed = source.trim();
    let json = match trimmed {
        "True" => "true",
        "False" => "false",
        "None" => "null",
        other => other,
    };
    let text = Value::from(source);
    match serde_json::from_str::<Value>(json) {
        Ok(value) if fits(&value, schema) || !fits(&text, schema) => json.to_owned(),
        _ => text.to_string(),
    }
}
