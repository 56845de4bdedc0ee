//! Anthropic's wire schema for `/v1/messages`: types and nothing else.
#![allow(missing_docs, reason = "the names are Anthropic's and documented there")]

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The fields only this endpoint has; sampling is in
/// [`GenerationFields`](crate::openai::generation::GenerationFields).
#[derive(Clone, Debug, Default, Deserialize)]
pub struct MessagesRequest {
    pub model: String,
    pub messages: Vec<InputMessage>,
    /// Required where something is generated.
    pub max_tokens: Option<u64>,
    pub system: Option<InputContent>,
    pub stop_sequences: Option<Vec<String>>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Map<String, Value>>,
    pub thinking: Option<Map<String, Value>>,
    pub output_config: Option<Map<String, Value>>,
    pub metadata: Option<Metadata>,
    pub cache_control: Option<Value>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Metadata {
    pub user_id: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct InputMessage {
    pub role: InputRole,
    pub content: InputContent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputRole {
    User,
    Assistant,
}

/// Blocks stay JSON here: which kinds are understood is decided where they are read.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of content blocks")]
pub enum InputContent {
    Text(String),
    Blocks(Vec<Value>),
}

#[derive(Clone, Debug, Serialize)]
pub struct Message {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub role: &'static str,
    pub model: String,
    pub content: Vec<ContentBlock>,
    pub stop_reason: Option<StopReason>,
    pub stop_sequence: Option<String>,
    pub usage: MessageUsage,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentBlock {
    Text { text: String },
    Thinking { thinking: String, signature: String },
    ToolUse { id: String, name: String, input: Value },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    EndTurn,
    MaxTokens,
    StopSequence,
    ToolUse,
}

/// The three input counts add up to the prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MessageUsage {
    pub input_tokens: usize,
    pub cache_creation_input_tokens: usize,
    pub cache_read_input_tokens: usize,
    pub output_tokens: usize,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamEvent {
    MessageStart { message: Message },
    ContentBlockStart { index: usize, content_block: ContentBlock },
    ContentBlockDelta { index: usize, delta: BlockDelta },
    ContentBlockStop { index: usize },
    MessageDelta { delta: MessageEnd, usage: MessageUsage },
    MessageStop,
    Ping,
    Error { error: ErrorObject },
}

impl StreamEvent {
    /// The event's name in the stream, which is its type.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
            Self::Ping => "ping",
            Self::Error { .. } => "error",
        }
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum BlockDelta {
    #[serde(rename = "text_delta")]
    Text {
        text: String,
    },
    #[serde(rename = "thinking_delta")]
    Thinking {
        thinking: String,
    },
    InputJsonDelta {
        partial_json: String,
    },
}

#[derive(Clone, Debug, Serialize)]
pub struct MessageEnd {
    pub stop_reason: Option<StopReason>,
    pub stop_sequence: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct TokenCount {
    pub input_tokens: usize,
}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, Serialize)]
pub struct ErrorBody {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub error: ErrorObject,
    pub request_id: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct ErrorObject {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub message: String,
}
