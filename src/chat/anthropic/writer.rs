//! Deltas become the content blocks of a message, and the events that tell of them.
//!
//! **Invariant:** at most one block is open, and it is the last.

use serde_json::{Map, Value};

use crate::anthropic::{
    BlockDelta, ContentBlock, Message, MessageEnd, MessageUsage, StopReason, StreamEvent,
};
use crate::chat::output::{Delta, Finish, ToolCallDelta};
use crate::openai::generation::{FinishReason, StopReason as Stopped, Usage};

/// Ids of calls begin with this here, and with the other in the rest of the server.
const ID_PREFIX: &str = "toolu_";
const OUR_ID_PREFIX: &str = "call_";

/// Builds one message.
pub struct MessageWriter {
    message: Message,
    /// The source text of an open call's input.
    input: String,
    is_begun: bool,
    is_open: bool,
    events: Vec<StreamEvent>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum BlockKind {
    Text,
    Thinking,
}

impl MessageWriter {
    /// A message without content. `model` is the name that the client used.
    pub fn new(id: String, model: String) -> Self {
        let message = Message {
            id,
            kind: "message",
            role: "assistant",
            model,
            content: Vec::new(),
            stop_reason: None,
            stop_sequence: None,
            usage: MessageUsage::default(),
        };
        Self { message, input: String::new(), is_begun: false, is_open: false, events: Vec::new() }
    }

    /// The events since the last call.
    pub fn take_events(&mut self) -> Vec<StreamEvent> {
        std::mem::take(&mut self.events)
    }

    /// The message, when it is over.
    pub fn into_message(self) -> Message {
        self.message
    }

    /// Takes in a piece of the answer, after which `usage` is what was used so far.
    pub fn push(&mut self, delta: Delta, usage: &Usage) {
        self.begin(usage);
        if !delta.reasoning.is_empty() {
            self.push_text(BlockKind::Thinking, delta.reasoning);
        }
        if !delta.text.is_empty() {
            self.push_text(BlockKind::Text, delta.text);
        }
        for call in delta.tool_calls {
            self.push_call(call);
        }
        if let Some(finish) = delta.finish {
            self.finish(finish);
        }
    }

    /// Ends the message.
    pub fn end(&mut self, usage: &Usage) {
        self.begin(usage);
        self.close();
        self.message.usage = message_usage(usage);
        let delta = MessageEnd {
            stop_reason: self.message.stop_reason,
            stop_sequence: self.message.stop_sequence.clone(),
        };
        self.events.push(StreamEvent::MessageDelta { delta, usage: self.message.usage });
        self.events.push(StreamEvent::MessageStop);
    }

    fn begin(&mut self, usage: &Usage) {
        if std::mem::replace(&mut self.is_begun, true) {
            return;
        }
        let usage = message_usage(usage);
        let message = Message { usage, ..self.message.clone() };
        self.events.push(StreamEvent::MessageStart { message });
        self.events.push(StreamEvent::Ping);
    }

    fn finish(&mut self, finish: Finish) {
        let reason = match (finish.reason, finish.stop_reason) {
            (FinishReason::Length, _) => StopReason::MaxTokens,
            (FinishReason::ToolCalls | FinishReason::FunctionCall, _) => StopReason::ToolUse,
            (FinishReason::Stop, Some(Stopped::String(sequence))) => {
                self.message.stop_sequence = Some(sequence);
                StopReason::StopSequence
            }
            (FinishReason::Stop, _) => StopReason::EndTurn,
        };
        self.message.stop_reason = Some(reason);
    }

    fn push_text(&mut self, kind: BlockKind, piece: String) {
        let open = match self.message.content.last().filter(|_| self.is_open) {
            Some(ContentBlock::Text { .. }) => Some(BlockKind::Text),
            Some(ContentBlock::Thinking { .. }) => Some(BlockKind::Thinking),
            Some(ContentBlock::ToolUse { .. }) | None => None,
        };
        if open != Some(kind) {
            self.close();
            self.open(match kind {
                BlockKind::Text => ContentBlock::Text { text: String::new() },
                BlockKind::Thinking => {
                    ContentBlock::Thinking { thinking: String::new(), signature: String::new() }
                }
            });
        }
        if let Some(ContentBlock::Text { text } | ContentBlock::Thinking { thinking: text, .. }) =
            self.message.content.last_mut()
        {
            text.push_str(&piece);
        }
        self.tell_delta(match kind {
            BlockKind::Text => BlockDelta::Text { text: piece },
            BlockKind::Thinking => BlockDelta::Thinking { thinking: piece },
        });
    }

    fn push_call(&mut self, call: ToolCallDelta) {
        if let Some(id) = call.id {
            self.close();
            let id = match id.strip_prefix(OUR_ID_PREFIX) {
                Some(rest) => format!("{ID_PREFIX}{rest}"),
                None => id,
            };
            self.open(ContentBlock::ToolUse {
                id,
                name: call.name.unwrap_or_default(),
                input: Value::Object(Map::new()),
            });
        }
        if !call.arguments.is_empty() {
            self.input.push_str(&call.arguments);
            self.tell_delta(BlockDelta::InputJsonDelta { partial_json: call.arguments });
        }
    }

    fn open(&mut self, block: ContentBlock) {
        self.is_open = true;
        let index = self.message.content.len();
        self.events.push(StreamEvent::ContentBlockStart { index, content_block: block.clone() });
        self.message.content.push(block);
    }

    fn close(&mut self) {
        if !std::mem::replace(&mut self.is_open, false) {
            return;
        }
        let source = std::mem::take(&mut self.input);
        if let Some(ContentBlock::ToolUse { input, .. }) = self.message.content.last_mut()
            // Input that was cut short stays empty; `stop_reason` says so.
            && let Ok(value @ Value::Object(_)) = serde_json::from_str(&source)
        {
            *input = value;
        }
        let index = self.message.content.len().saturating_sub(1);
        self.events.push(StreamEvent::ContentBlockStop { index });
    }

    fn tell_delta(&mut self, delta: BlockDelta) {
        let index = self.message.content.len().saturating_sub(1);
        self.events.push(StreamEvent::ContentBlockDelta { index, delta });
    }
}

/// Tokens are counted once: as read from the cache, as newly kept there, or as neither.
fn message_usage(usage: &Usage) -> MessageUsage {
    let details = &usage.prompt_tokens_details;
    let cached = details.cached_tokens.min(usage.prompt_tokens);
    let rest = usage.prompt_tokens - cached;
    let kept = details.cache_creation_input_tokens.unwrap_or(0).min(rest);
    MessageUsage {
        input_tokens: rest - kept,
        cache_creation_input_tokens: kept,
        cache_read_input_tokens: cached,
        output_tokens: usage.completion_tokens,
    }
}
