//! `/v1/responses`.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::chat::{ChatTokenLogprob, PromptCacheOptions};

/// The fields only this endpoint has; the rest is in
/// [`GenerationFields`](super::generation::GenerationFields).
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ResponsesRequest {
    pub model: String,
    pub input: Option<Input>,
    pub instructions: Option<String>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    pub max_tool_calls: Option<i64>,
    pub text: Option<Map<String, Value>>,
    pub reasoning: Option<Map<String, Value>>,
    pub max_output_tokens: Option<u64>,
    pub top_logprobs: Option<i64>,
    pub metadata: Option<Map<String, Value>>,
    pub store: Option<bool>,
    pub previous_response_id: Option<String>,
    pub truncation: Option<String>,
    pub include: Option<Vec<String>>,
    pub background: Option<bool>,
    pub conversation: Option<IgnoredAny>,
    pub prompt: Option<IgnoredAny>,
    pub user: Option<String>,
    pub safety_identifier: Option<String>,
    pub prompt_cache_key: Option<String>,
    pub prompt_cache_options: Option<PromptCacheOptions>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub enable_thinking: Option<bool>,
    pub thinking_budget: Option<i64>,
}

/// Items stay JSON here: which kinds are understood is decided where they are read.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of items")]
pub enum Input {
    Text(String),
    Items(Vec<Value>),
}

#[derive(Clone, Debug, Serialize)]
pub struct Response {
    pub id: String,
    pub object: &'static str,
    pub created_at: u64,
    pub completed_at: Option<u64>,
    pub status: Status,
    pub error: Option<ResponseError>,
    pub incomplete_details: Option<IncompleteDetails>,
    pub model: String,
    pub output: Vec<OutputItem>,
    pub usage: Option<ResponseUsage>,
    #[serde(flatten)]
    pub echo: RequestEcho,
}

/// What a response repeats of its request, with the values that were in effect.
#[derive(Clone, Debug, Serialize)]
pub struct RequestEcho {
    pub background: bool,
    pub instructions: Option<String>,
    pub max_output_tokens: Option<u64>,
    pub max_tool_calls: Option<i64>,
    pub metadata: Map<String, Value>,
    pub parallel_tool_calls: bool,
    pub previous_response_id: Option<String>,
    pub prompt_cache_key: Option<String>,
    pub reasoning: Value,
    pub safety_identifier: Option<String>,
    pub service_tier: &'static str,
    pub store: bool,
    pub temperature: f32,
    pub text: Value,
    pub tool_choice: Value,
    pub tools: Vec<Value>,
    pub top_logprobs: i64,
    pub top_p: f32,
    pub truncation: &'static str,
    pub user: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

#[derive(Clone, Debug, Serialize)]
pub struct ResponseError {
    pub code: &'static str,
    pub message: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct IncompleteDetails {
    pub reason: &'static str,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    Message { id: String, role: &'static str, status: Status, content: Vec<ContentPart> },
    FunctionCall { id: String, call_id: String, name: String, arguments: String, status: Status },
    Reasoning { id: String, summary: Vec<Value>, content: Vec<ContentPart>, status: Status },
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentPart {
    OutputText { text: String, annotations: Vec<Value>, logprobs: Vec<ChatTokenLogprob> },
    ReasoningText { text: String },
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct ResponseUsage {
    pub input_tokens: usize,
    pub input_tokens_details: InputTokensDetails,
    pub output_tokens: usize,
    pub output_tokens_details: OutputTokensDetails,
    pub total_tokens: usize,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct InputTokensDetails {
    pub cached_tokens: usize,
    pub cache_write_tokens: usize,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct OutputTokensDetails {
    pub reasoning_tokens: usize,
}

/// An event of a stream. Its name is its type.
#[derive(Clone, Debug, Serialize)]
pub struct StreamEvent {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub sequence_number: u64,
    #[serde(flatten)]
    pub body: EventBody,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum EventBody {
    Response {
        response: Box<Response>,
    },
    Item {
        output_index: usize,
        item: OutputItem,
    },
    Part {
        item_id: String,
        output_index: usize,
        content_index: usize,
        part: ContentPart,
    },
    TextDelta {
        item_id: String,
        output_index: usize,
        content_index: usize,
        delta: String,
        /// Of output only; reasoning has none.
        #[serde(skip_serializing_if = "Option::is_none")]
        logprobs: Option<Vec<ChatTokenLogprob>>,
    },
    TextDone {
        item_id: String,
        output_index: usize,
        content_index: usize,
        text: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        logprobs: Option<Vec<ChatTokenLogprob>>,
    },
    ArgumentsDelta {
        item_id: String,
        output_index: usize,
        delta: String,
    },
    ArgumentsDone {
        item_id: String,
        output_index: usize,
        name: String,
        arguments: String,
    },
}

#[derive(Clone, Debug, Serialize)]
pub struct DeletedResponse {
    pub id: String,
    pub object: &'static str,
    pub deleted: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct InputItemList {
    pub object: &'static str,
    pub data: Vec<Value>,
    pub first_id: Option<String>,
    pub last_id: Option<String>,
    pub has_more: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct InputTokens {
    pub object: &'static str,
    pub input_tokens: usize,
}
