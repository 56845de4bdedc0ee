//! Reads generated text as what it means: reasoning, content, tool calls.

use std::sync::Arc;

use crate::chat::output::ToolCallDelta;
use crate::chat::reasoning::{ReasoningParser, ReasoningStart};
use crate::chat::tool_call::{ToolCallParser, ToolReading};

/// What to look for in the text of an answer. By default, all of it is content.
#[derive(Clone, Debug, Default)]
pub struct AnswerFormat {
    /// Where the model begins to reason, if it does.
    pub reasoning: Option<ReasoningStart>,
    /// How tools are called, if they may be.
    pub tools: Option<Arc<ToolReading>>,
}

/// What came out of a piece of text. Reasoning comes before content, and content before calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    /// Text to append to the reasoning.
    pub reasoning: String,
    /// Text to append to the content.
    pub content: String,
    /// Parts of calls.
    pub tool_calls: Vec<ToolCallDelta>,
}

impl Pieces {
    /// Whether nothing came out.
    pub fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.content.is_empty() && self.tool_calls.is_empty()
    }
}

/// Reads the text of one choice.
#[derive(Clone, Debug)]
pub struct AnswerReader {
    reasoning: Option<ReasoningParser>,
    tools: Option<ToolCallParser>,
}

impl AnswerReader {
    /// A reader before the text of the choice with this index.
    pub fn new(format: &AnswerFormat, choice: u32) -> Self {
        Self {
            reasoning: format.reasoning.map(ReasoningParser::new),
            tools: format.tools.as_ref().map(|reading| ToolCallParser::new(reading, choice)),
        }
    }

    /// Reads the next piece of text.
    pub fn push(&mut self, text: &str, out: &mut Pieces) {
        match &mut self.reasoning {
            None => self.push_content(text, out),
            Some(parser) => {
                let content = parser.push(text, &mut out.reasoning);
                self.push_content(&content, out);
            }
        }
    }

    /// Ends the text.
    pub fn finish(&mut self, out: &mut Pieces) {
        if let Some(parser) = &mut self.reasoning {
            let content = parser.finish(&mut out.reasoning);
            self.push_content(&content, out);
        }
        if let Some(parser) = &mut self.tools {
            parser.finish(out);
        }
    }

    fn push_content(&mut self, text: &str, out: &mut Pieces) {
        match &mut self.tools {
            Some(parser) => parser.push(text, out),
            None => out.content.push_str(text),
        }
    }

    /// Whether the next text belongs to the reasoning.
    pub fn is_reasoning(&self) -> bool {
        self.reasoning.as_ref().is_some_and(ReasoningParser::is_reasoning)
    }

    /// Whether calls were found, all of them whole.
    pub fn has_whole_calls(&self) -> bool {
        self.tools.as_ref().is_some_and(ToolCallParser::has_whole_calls)
    }

    /// Whether the choice needs no more text: it has as many calls as it may have.
    pub fn is_complete(&self) -> bool {
        self.tools.as_ref().is_some_and(ToolCallParser::is_complete)
    }
}
