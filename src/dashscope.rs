//! DashScope's native wire schema: types and nothing else.
//!
//! Messages, tools and most parameters are OpenAI's; what surrounds them is not. The order of the
//! fields of answers is that of the hosted service, because some clients compare bytes.
#![allow(missing_docs, reason = "the names are DashScope's and documented there")]

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::openai::chat::ChatTokenLogprob;
use crate::openai::message::ChatMessage;

/// `input` of text and multimodal generation, and of the tokenizer.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Input {
    pub messages: Option<Vec<ChatMessage>>,
    pub prompt: Option<String>,
    /// Deprecated there; turns before `prompt`.
    pub history: Option<Vec<Turn>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Turn {
    pub user: String,
    pub bot: String,
}

/// `parameters` of generation beside those in
/// [`GenerationFields`](crate::openai::generation::GenerationFields).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Parameters {
    pub result_format: Option<String>,
    pub incremental_output: Option<bool>,
    pub max_tokens: Option<u64>,
    pub max_completion_tokens: Option<u64>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<i64>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    /// Arguments of calls are streamed in any case.
    pub tool_stream: Option<bool>,
    pub enable_thinking: Option<bool>,
    pub thinking_budget: Option<i64>,
    pub preserve_thinking: Option<bool>,
    pub reasoning_effort: Option<String>,
    pub use_raw_prompt: Option<bool>,
    pub cache_control: Option<Value>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// `input` of embeddings.
#[derive(Clone, Debug, Deserialize)]
pub struct EmbeddingInput {
    pub texts: Texts,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum Texts {
    One(String),
    Many(Vec<String>),
}

/// `parameters` of embeddings.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EmbeddingParameters {
    pub dimension: Option<i64>,
    pub output_type: Option<String>,
}

/// `parameters` of what has none.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NoParameters {}

/// A whole answer, or the data of a frame.
#[derive(Clone, Debug, Serialize)]
pub struct Answer<T> {
    pub output: T,
    pub usage: Usage,
    pub request_id: String,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Output {
    /// `result_format: text`.
    Text {
        finish_reason: &'static str,
        text: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        reasoning_content: String,
    },
    /// `result_format: message`.
    Choices { choices: Vec<Choice> },
    /// The same in a frame.
    FrameChoices { choices: Vec<FrameChoice> },
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    pub finish_reason: &'static str,
    pub message: Message,
    pub index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Logprobs>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FrameChoice {
    pub message: Message,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Logprobs>,
    /// Absent where there is one choice and no tool, as in the hosted service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// The string `null` until the choice ends.
    pub finish_reason: &'static str,
}

/// Clients read `content`, `reasoning_content` and `role` without asking whether they are there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Message {
    pub content: Content,
    pub reasoning_content: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    pub role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    /// Of multimodal generation; empty if there is no text.
    Parts(Vec<TextPart>),
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextPart {
    pub text: String,
}

/// A call, or a fragment of one, whose id is empty unless it is the first of its index.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ToolCall {
    pub index: u32,
    pub id: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub function: Function,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Function {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub arguments: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Logprobs {
    pub content: Vec<ChatTokenLogprob>,
}

/// Counts that do not apply to an answer are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_tokens_details: Option<OutputTokensDetails>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OutputTokensDetails {
    pub reasoning_tokens: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PromptTokensDetails {
    pub cached_tokens: usize,
    /// Present when the request asked to keep a prefix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_creation_input_tokens: Option<usize>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Tokens {
    pub token_ids: Vec<u32>,
    pub tokens: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Embeddings {
    pub embeddings: Vec<Embedding>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Embedding {
    pub embedding: Vec<f32>,
    pub text_index: usize,
}

/// A page of models. It has no `usage`.
#[derive(Clone, Debug, Serialize)]
pub struct ModelsAnswer {
    pub request_id: String,
    pub output: ModelPage,
}

#[derive(Clone, Debug, Serialize)]
pub struct ModelPage {
    pub total: usize,
    pub page_no: usize,
    pub page_size: usize,
    pub models: Vec<Model>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Model {
    pub model: String,
    pub name: String,
    pub description: String,
    pub context_window: usize,
}

/// The body of every answer that is not a success, and the data of an error in a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ErrorBody {
    pub code: &'static str,
    pub message: String,
    pub request_id: String,
}
