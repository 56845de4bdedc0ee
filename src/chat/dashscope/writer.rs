//! Deltas become the frames of a stream, or the whole answer, which is what all frames add up to.

use std::sync::Arc;

use super::request::ResultFormat;
use crate::chat::model::ServedModel;
use crate::chat::output::{Delta, ToolCallDelta};
use crate::dashscope::{
    Answer, Choice, Content, FrameChoice, Function, Logprobs, Message, Output, OutputTokensDetails,
    PromptTokensDetails, TextPart, ToolCall, Usage,
};
use crate::openai;
use crate::openai::generation::FinishReason;

const ASSISTANT: &str = "assistant";
const FUNCTION: &str = "function";
/// What `finish_reason` is until there is one.
const NOT_FINISHED: &str = "null";

/// What each frame of a stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// What came since the last one: `incremental_output`.
    Increments,
    /// Everything so far.
    SoFar,
}

/// Builds one answer.
pub struct AnswerWriter {
    format: ResultFormat,
    progress: Progress,
    request_id: String,
    /// Present when log-probabilities are wanted.
    model: Option<Arc<ServedModel>>,
    has_index: bool,
    choices: Vec<Part>,
}

/// A choice so far, or a piece of one.
#[derive(Clone, Debug, Default)]
struct Part {
    content: String,
    reasoning: String,
    calls: Vec<ToolCall>,
    logprobs: Option<Logprobs>,
    finish: Option<&'static str>,
}

impl AnswerWriter {
    /// An answer without text, of `n` choices.
    pub fn new(format: ResultFormat, progress: Progress, request_id: String, n: u32) -> Self {
        let choices = vec![Part::default(); n as usize];
        Self { format, progress, request_id, model: None, has_index: 1 < n, choices }
    }

    /// Frames say which choice they are of even if there is only one.
    #[must_use]
    pub fn with_index(mut self) -> Self {
        self.has_index = true;
        self
    }

    /// Writes log-probabilities, with the texts of `model`'s tokens.
    #[must_use]
    pub fn with_logprobs(mut self, model: Arc<ServedModel>) -> Self {
        self.model = Some(model);
        self
    }

    /// Takes in a piece of the answer, after which `usage` is what was used so far. Returns the
    /// frames that tell of it: one with each kind of content and, by itself, one with the end.
    pub fn push(&mut self, delta: Delta, usage: &openai::generation::Usage) -> Vec<Answer<Output>> {
        let choice = delta.choice;
        let usage = native_usage(usage);
        let pieces = self.pieces(delta);
        let frame = |piece: Part| {
            let so_far = &mut self.choices[choice as usize];
            so_far.append(&piece);
            let shown = match self.progress {
                Progress::Increments => piece,
                Progress::SoFar => so_far.clone(),
            };
            let output = frame_output(self.format, shown, self.has_index.then_some(choice));
            Answer { output, usage, request_id: self.request_id.clone() }
        };
        pieces.into_iter().map(frame).collect()
    }

    /// The whole answer.
    pub fn into_whole(self, usage: &openai::generation::Usage) -> Answer<Output> {
        let format = self.format;
        let mut choices = self.choices.into_iter();
        let output = match format {
            ResultFormat::Text => text_output(choices.next().unwrap_or_default()),
            ResultFormat::Message | ResultFormat::Parts => {
                let choice = |(index, part): (u32, Part)| {
                    let (message, logprobs, finish_reason) = part.into_message(format);
                    Choice { finish_reason, message, index, logprobs }
                };
                Output::Choices { choices: (0..).zip(choices).map(choice).collect() }
            }
        };
        Answer { output, usage: native_usage(usage), request_id: self.request_id }
    }

    fn pieces(&self, delta: Delta) -> Vec<Part> {
        let mut pieces = Vec::new();
        if !delta.reasoning.is_empty() {
            pieces.push(Part { reasoning: delta.reasoning, ..Part::default() });
        }
        if !delta.text.is_empty() {
            pieces.push(Part { content: delta.text, ..Part::default() });
        }
        let calls = delta.tool_calls.into_iter().map(fragment);
        pieces.extend(calls.map(|call| Part { calls: vec![call], ..Part::default() }));
        if let Some(finish) = delta.finish {
            pieces.push(Part { finish: Some(finish_name(finish.reason)), ..Part::default() });
        }
        if let (Some(model), Some(first)) = (&self.model, pieces.first_mut()) {
            let content = model.chat_logprobs(&delta.tokens).content;
            first.logprobs = Some(Logprobs { content });
        }
        pieces
    }
}

impl Part {
    fn append(&mut self, piece: &Self) {
        self.content.push_str(&piece.content);
        self.reasoning.push_str(&piece.reasoning);
        for call in &piece.calls {
            match self.calls.iter_mut().find(|known| known.index == call.index) {
                Some(known) => known.function.arguments.push_str(&call.function.arguments),
                None => self.calls.push(call.clone()),
            }
        }
        if let Some(logprobs) = &piece.logprobs {
            let all = self.logprobs.get_or_insert_default();
            all.content.extend(logprobs.content.iter().cloned());
        }
        self.finish = self.finish.or(piece.finish);
    }

    fn into_message(self, format: ResultFormat) -> (Message, Option<Logprobs>, &'static str) {
        let content = match format {
            ResultFormat::Parts if self.content.is_empty() => Content::Parts(Vec::new()),
            ResultFormat::Parts => Content::Parts(vec![TextPart { text: self.content }]),
            ResultFormat::Text | ResultFormat::Message => Content::Text(self.content),
        };
        let message = Message {
            content,
            reasoning_content: self.reasoning,
            tool_calls: self.calls,
            role: ASSISTANT,
        };
        (message, self.logprobs, self.finish.unwrap_or(NOT_FINISHED))
    }
}

fn frame_output(format: ResultFormat, part: Part, index: Option<u32>) -> Output {
    if format == ResultFormat::Text {
        return text_output(part);
    }
    let (message, logprobs, finish_reason) = part.into_message(format);
    let choice = FrameChoice { message, logprobs, index, finish_reason };
    Output::FrameChoices { choices: vec![choice] }
}

fn text_output(part: Part) -> Output {
    Output::Text {
        finish_reason: part.finish.unwrap_or(NOT_FINISHED),
        text: part.content,
        reasoning_content: part.reasoning,
    }
}

/// The first fragment of a call has its id and name.
fn fragment(call: ToolCallDelta) -> ToolCall {
    ToolCall {
        index: call.index,
        id: call.id.unwrap_or_default(),
        kind: FUNCTION,
        function: Function { name: call.name, arguments: call.arguments },
    }
}

fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ToolCalls | FinishReason::FunctionCall => "tool_calls",
    }
}

/// Counts by their native names.
pub fn native_usage(usage: &openai::generation::Usage) -> Usage {
    let details = &usage.prompt_tokens_details;
    Usage {
        total_tokens: Some(usage.total_tokens),
        output_tokens: Some(usage.completion_tokens),
        input_tokens: Some(usage.prompt_tokens),
        output_tokens_details: Some(OutputTokensDetails {
            reasoning_tokens: usage.completion_tokens_details.reasoning_tokens,
        }),
        prompt_tokens_details: Some(PromptTokensDetails {
            cached_tokens: details.cached_tokens,
            cache_creation_input_tokens: details.cache_creation_input_tokens,
        }),
    }
}
