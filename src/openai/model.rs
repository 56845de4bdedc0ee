//! `/v1/models`.

use serde::Serialize;

#[derive(Clone, Debug, Serialize)]
pub struct ModelList {
    pub object: &'static str,
    pub data: Vec<Model>,
}

/// OpenAI's fields, and `root`, `parent` and `max_model_len` as vLLM has them.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    pub root: String,
    pub parent: Option<String>,
    pub max_model_len: usize,
    /// Ours: what `/v1/embeddings` makes a vector of, `mean` or `last`.
    pub embedding_pooling: &'static str,
}
