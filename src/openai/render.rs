//! `/v1/chat/completions/render` and `/v1/completions/render`, as vLLM has them: what a request
//! becomes before it runs. `prompt` is ours.

use std::collections::BTreeMap;

use serde::Serialize;

#[derive(Clone, Debug, Serialize)]
pub struct RenderedRequest {
    pub request_id: String,
    pub model: String,
    pub prompt: String,
    pub token_ids: Vec<u32>,
    /// What images became; always null for models that read text.
    pub features: Option<()>,
    pub sampling_params: RenderedSampling,
    pub stream: bool,
    pub cache_salt: Option<String>,
    pub priority: i64,
}

#[derive(Clone, Debug, Serialize)]
pub struct RenderedSampling {
    pub n: u32,
    pub temperature: f32,
    pub top_p: f32,
    /// Zero keeps all.
    pub top_k: u32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed: Option<i64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub max_tokens: usize,
    pub min_tokens: usize,
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    pub logit_bias: Option<BTreeMap<u32, f32>>,
    pub skip_special_tokens: bool,
    pub include_stop_str_in_output: bool,
}
