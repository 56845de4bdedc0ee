//! What requests and responses of all generating endpoints have in common.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::stream::StreamOptions;

/// Request fields that `/v1/chat/completions` and `/v1/completions` share: OpenAI's, and those
/// that clients of vLLM send beside them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct GenerationFields {
    pub n: Option<i64>,
    pub best_of: Option<i64>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub logit_bias: Option<BTreeMap<String, f64>>,
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<Vec<u32>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub min_tokens: Option<i64>,
    pub skip_special_tokens: Option<bool>,
    pub prompt_logprobs: Option<i64>,
    pub echo: Option<bool>,
    pub return_token_ids: Option<bool>,
    pub cache_salt: Option<String>,
    pub response_format: Option<Value>,
    pub structured_outputs: Option<Value>,
    pub guided_json: Option<Value>,
    pub guided_regex: Option<Value>,
    pub guided_choice: Option<Value>,
    pub guided_grammar: Option<Value>,
    pub priority: Option<i64>,
    pub service_tier: Option<String>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    /// Refuse fields that would have no effect, instead of naming them in a header.
    pub strict_params: Option<bool>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings or a list of lists of token ids"
)]
pub enum Stop {
    One(String),
    Many(Vec<String>),
    /// DashScope's native form of a single sequence.
    Tokens(Vec<u32>),
    /// Sequences of tokens, as DashScope has them.
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
    pub completion_tokens_details: CompletionTokensDetails,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PromptTokensDetails {
    pub cached_tokens: usize,
    /// Present when the request asked to keep a prefix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_write_tokens: Option<usize>,
    /// The same by DashScope's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_creation_input_tokens: Option<usize>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CompletionTokensDetails {
    pub reasoning_tokens: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    Stop,
    Length,
    ToolCalls,
    /// For requests with the older `functions`.
    FunctionCall,
}

/// vLLM's `stop_reason`: the stop string or the stop token that ended the choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    String(String),
    TokenId(u32),
}

/// vLLM's `prompt_logprobs`: null for the first token, then a map from token id.
pub type PromptLogprobs = Vec<Option<BTreeMap<u32, PromptLogprob>>>;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PromptLogprob {
    pub logprob: f32,
    pub rank: Option<usize>,
    pub decoded_token: String,
}
