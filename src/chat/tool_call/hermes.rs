//! Calls as Qwen2.5 writes them: a JSON object in `<tool_call>` tags.

use std::sync::Arc;

use super::call_reader::CallReader;
use super::tag_finder::{Found, TagFinder};
use super::{CLOSE_TAG, CallWriter, MAX_HELD_BYTES, OPEN_TAG, ToolReading};
use crate::chat::answer::Pieces;

/// The parser of one choice.
#[derive(Clone, Debug)]
pub(super) struct HermesParser {
    reading: Arc<ToolReading>,
    finder: TagFinder,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// Between calls.
    Outside,
    /// Behind an opening tag; `source` is what came since.
    Opened { reader: CallReader, source: String },
    /// In the arguments of a call that was passed on.
    Arguments(CallReader),
    /// Behind the arguments, in the rest of the object; `source` is what came since.
    Rest { reader: CallReader, source: String },
    /// Behind the object, before the closing tag; `source` is what came since.
    Closing { source: String },
}

impl HermesParser {
    pub(super) fn new(reading: &Arc<ToolReading>) -> Self {
        let finder = TagFinder::new(&[OPEN_TAG]);
        Self { reading: Arc::clone(reading), finder, state: State::Outside }
    }

    pub(super) fn push(&mut self, c: char, calls: &mut CallWriter, out: &mut Pieces) {
        match &mut self.state {
            State::Outside => {
                if self.finder.push(c, out) != Found::Nothing {
                    let reader = CallReader::new();
                    self.state = State::Opened { reader, source: String::new() };
                }
            }
            State::Opened { .. } => self.push_opened(c, calls, out),
            State::Arguments(reader) => {
                // Behind the name, an object of arguments goes on to its end whatever it holds.
                let is_sound = reader.push(c).is_ok();
                calls.arguments(&reader.take_arguments(), out);
                if !is_sound || reader.arguments_ended() {
                    let reader = reader.clone();
                    self.state = State::Rest { reader, source: String::new() };
                }
            }
            State::Rest { .. } => self.push_rest(c, calls, out),
            State::Closing { source } => {
                source.push(c);
                let tag = source.trim_start_matches(is_padding);
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

    fn push_opened(&mut self, c: char, calls: &mut CallWriter, out: &mut Pieces) {
        let State::Opened { reader, source } = &mut self.state else { return };
        source.push(c);
        let is_sound = reader.push(c).is_ok()
            && reader.name().is_none_or(|name| self.reading.tool(name).is_some())
            && source.len() <= MAX_HELD_BYTES;
        if !is_sound {
            let source = std::mem::take(source);
            self.state = State::Outside;
            self.finder.pass(OPEN_TAG, out);
            self.push_again(&source, calls, out);
            return;
        }
        let is_known = reader.has_arguments() || reader.ended();
        let Some(name) = reader.name().filter(|_| is_known) else { return };
        self.finder.drop_space();
        calls.begin(name, out);
        let (has_arguments, is_whole) = (reader.has_arguments(), reader.arguments_ended());
        let arguments = if has_arguments { reader.take_arguments() } else { "{}".to_owned() };
        calls.arguments(&arguments, out);
        self.state = if reader.ended() {
            State::Closing { source: String::new() }
        } else if is_whole {
            State::Rest { reader: reader.clone(), source: String::new() }
        } else {
            State::Arguments(reader.clone())
        };
    }

    fn push_rest(&mut self, c: char, calls: &mut CallWriter, out: &mut Pieces) {
        let State::Rest { reader, source } = &mut self.state else { return };
        source.push(c);
        if reader.push(c).is_err() || MAX_HELD_BYTES < source.len() {
            // Models forget the last brace.
            let source = std::mem::take(source);
            self.state = State::Closing { source: String::new() };
            self.push_again(&source, calls, out);
        } else if reader.ended() {
            self.state = State::Closing { source: String::new() };
        }
    }

    /// Reads text that was taken for something else before. Each round holds less than before, or
    /// is outside of calls, so this ends.
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
            State::Outside | State::Arguments(_) => {}
            State::Opened { source, .. } => {
                self.finder.pass(OPEN_TAG, out);
                self.finder.pass(&source, out);
            }
            State::Rest { .. } | State::Closing { .. } => calls.end(),
        }
        self.finder.finish(calls.has_calls(), out);
    }
}

/// What may stand between the object and the closing tag: white space, and braces too many.
fn is_padding(c: char) -> bool {
    c == '}' || c.is_whitespace()
}
