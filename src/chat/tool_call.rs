//! Finds tool calls in generated text, piece by piece.
//!
//! A parser is fed text as it is generated. **Invariants:** however the text is cut, what comes
//! out is the same; text that turns out to be no call comes out as content; the source text of
//! arguments is passed on as it comes, never parsed and written again.

mod bare;
mod call_reader;
mod hermes;
mod qwen_coder;
mod tag_finder;

use std::sync::Arc;

use crate::chat::answer::Pieces;
use crate::chat::output::ToolCallDelta;
use crate::chat::tools::{Demand, Tool};
use bare::BareCalls;
use hermes::HermesParser;
use qwen_coder::QwenCoderParser;

/// Opens a call in both formats.
pub(super) const OPEN_TAG: &str = "<tool_call>";
/// Ends a call in both formats.
pub(super) const CLOSE_TAG: &str = "</tool_call>";
/// Most text that is held back until it is known to be a call or not.
const MAX_HELD_BYTES: usize = 16 << 10;
/// Letters and digits behind `call_`.
const NUM_ID_CHARS: usize = 24;

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ToolCallFormat {
    /// A JSON object with `name` and `arguments` in `<tool_call>` tags.
    #[default]
    Hermes,
    /// `<function=…>` and `<parameter=…>` elements in `<tool_call>` tags.
    QwenCoder,
}

/// Whether an answer that is nothing but the JSON object of a call is that call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BareToolCalls {
    /// It is. Small models often leave the tags out.
    #[default]
    Accepted,
    /// It is text.
    Text,
}

/// What a parser needs to know.
#[derive(Clone, Debug)]
pub struct ToolReading {
    /// How the model writes calls.
    pub format: ToolCallFormat,
    /// The tools that may be called; whatever names another is text.
    pub tools: Arc<[Tool]>,
    /// What is asked of answers without tags.
    pub bare: BareToolCalls,
    /// Whether calls are all the text may hold. What is left of one that was cut before its name
    /// was known is then dropped: it is nothing that a client could use.
    pub demand: Demand,
    /// Most calls in a choice.
    pub max_calls: u32,
    /// What ids of calls are derived from: unique to the request.
    pub id_seed: Arc<str>,
}

impl ToolReading {
    fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }
}

/// Reads one choice.
#[derive(Clone, Debug)]
pub struct ToolCallParser {
    /// Present while the whole text may still be a call without tags.
    bare: Option<BareCalls>,
    tagged: TaggedParser,
    calls: CallWriter,
}

#[derive(Clone, Debug)]
enum TaggedParser {
    Hermes(HermesParser),
    QwenCoder(QwenCoderParser),
}

impl ToolCallParser {
    /// A parser before the text of the choice with this index.
    pub fn new(reading: &Arc<ToolReading>, choice: u32) -> Self {
        let tagged = match reading.format {
            ToolCallFormat::Hermes => TaggedParser::Hermes(HermesParser::new(reading)),
            ToolCallFormat::QwenCoder => TaggedParser::QwenCoder(QwenCoderParser::new(reading)),
        };
        let is_bare = reading.bare == BareToolCalls::Accepted;
        let calls = CallWriter::new(reading, choice);
        Self { bare: is_bare.then(|| BareCalls::new(reading)), tagged, calls }
    }

    /// Reads the next piece of text.
    pub fn push(&mut self, text: &str, out: &mut Pieces) {
        let Some(bare) = &mut self.bare else {
            self.tagged.push(text, &mut self.calls, out);
            return;
        };
        if let Some(released) = bare.push(text) {
            self.bare = None;
            self.tagged.push(&released, &mut self.calls, out);
        }
    }

    /// Ends the text.
    pub fn finish(&mut self, out: &mut Pieces) {
        if let Some(bare) = self.bare.take() {
            match bare.finish() {
                Ok(calls) => {
                    for (name, arguments) in calls {
                        self.calls.begin(&name, out);
                        self.calls.arguments(&arguments, out);
                        self.calls.end();
                    }
                }
                Err(text) => self.tagged.push(&text, &mut self.calls, out),
            }
        }
        self.tagged.finish(&mut self.calls, out);
        if self.calls.reading.demand == Demand::MustCall {
            out.content.clear();
        }
    }

    /// Whether calls were found, none of which was cut short. Known at the end of the text.
    pub fn has_whole_calls(&self) -> bool {
        self.calls.has_calls() && self.calls.num_ended == self.calls.num_begun
    }

    /// Whether as many calls have ended as the choice may have.
    pub fn is_complete(&self) -> bool {
        self.calls.is_complete()
    }
}

impl TaggedParser {
    fn push(&mut self, text: &str, calls: &mut CallWriter, out: &mut Pieces) {
        for c in text.chars() {
            if calls.is_complete() {
                return;
            }
            match self {
                Self::Hermes(parser) => parser.push(c, calls, out),
                Self::QwenCoder(parser) => parser.push(c, calls, out),
            }
        }
    }

    fn finish(&mut self, calls: &mut CallWriter, out: &mut Pieces) {
        if calls.is_complete() {
            return;
        }
        match self {
            Self::Hermes(parser) => parser.finish(calls, out),
            Self::QwenCoder(parser) => parser.finish(calls, out),
        }
    }
}

/// Writes calls as deltas, each with its index and id.
#[derive(Clone, Debug)]
struct CallWriter {
    reading: Arc<ToolReading>,
    choice: u32,
    num_begun: u32,
    num_ended: u32,
}

impl CallWriter {
    fn new(reading: &Arc<ToolReading>, choice: u32) -> Self {
        Self { reading: Arc::clone(reading), choice, num_begun: 0, num_ended: 0 }
    }

    /// The first part of the next call, unless there are enough.
    fn begin(&mut self, name: &str, out: &mut Pieces) {
        if self.is_complete() {
            return;
        }
        let index = self.num_begun;
        self.num_begun += 1;
        let id = Some(call_id(&self.reading.id_seed, self.choice, index));
        let name = Some(name.to_owned());
        out.tool_calls.push(ToolCallDelta { index, id, name, arguments: String::new() });
    }

    /// More of the arguments of the call that was begun last.
    fn arguments(&mut self, text: &str, out: &mut Pieces) {
        if text.is_empty() || self.is_complete() {
            return;
        }
        let index = self.num_begun - 1;
        let is_open = |last: &&mut ToolCallDelta| last.index == index && last.id.is_none();
        if let Some(last) = out.tool_calls.last_mut().filter(is_open) {
            last.arguments.push_str(text);
        } else {
            let arguments = text.to_owned();
            out.tool_calls.push(ToolCallDelta { index, id: None, name: None, arguments });
        }
    }

    fn end(&mut self) {
        self.num_ended = self.num_begun;
    }

    fn is_complete(&self) -> bool {
        self.reading.max_calls <= self.num_ended
    }

    fn has_calls(&self) -> bool {
        0 < self.num_begun
    }
}

/// An id that no other call has: looks random, but the same request yields it again.
pub fn call_id(seed: &str, choice: u32, index: u32) -> String {
    const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let hash = blake3::hash(format!("{seed}/{choice}/{index}").as_bytes());
    let chars = hash.as_bytes()[..NUM_ID_CHARS]
        .iter()
        .map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()]));
    "call_".chars().chain(chars).collect()
}

#[cfg(test)]
mod tests;
