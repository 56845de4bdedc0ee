//! Embeddings: texts become requests that only pool, and their vectors what clients read.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::chat::encoding::encode;
use crate::chat::options::{check_token_ids, priority};
use crate::chat::prompt::{PromptContext, PromptError};
use crate::engine::request::{Request, SamplingParams, StopConditions};
use crate::openai::completion::Prompt;
use crate::openai::embedding::{EmbeddingRequest, EmbeddingValues, EncodingFormat};
use crate::text::TokenId;

/// As many inputs as OpenAI allows.
const MAX_INPUTS: usize = 2048;

/// Prepares an embedding request: one engine request per input.
pub fn prepare_embeddings(
    request: &EmbeddingRequest,
    context: &PromptContext<'_>,
) -> Result<Vec<Request>, PromptError> {
    check_dimensions(request.dimensions, context.model.embedding_size)?;
    if request.cache_salt.as_deref() == Some("") {
        return Err(PromptError::invalid("cache_salt", "must not be empty"));
    }
    let priority = priority(request.priority, request.service_tier.as_deref())?;
    let cache_salt: Option<Arc<str>> = request.cache_salt.as_deref().map(Arc::from);
    let stop_token_ids: Arc<[TokenId]> = Arc::new([]);
    let params = Arc::new(SamplingParams::default());
    let pooled = |(index, tokens): (usize, Vec<TokenId>)| {
        check_length(index, tokens.len(), context.limits.max_model_len)?;
        Ok(Request {
            id: context.id.into(),
            prompt: tokens.into(),
            params: Arc::clone(&params),
            stop: StopConditions { max_tokens: 0, stop_token_ids: Arc::clone(&stop_token_ids) },
            n: 1,
            grammar: None,
            thinking: None,
            cache_salt: cache_salt.clone(),
            priority,
            pins: Arc::new([]),
            fairness_id: None,
            deadline: None,
            pooling: Some(context.model.pooling),
            adapter: None,
        })
    };
    inputs(&request.input, context)?.into_iter().enumerate().map(pooled).collect()
}

/// Qwen2.5 is not trained so that the beginning of a vector stands for the whole.
fn check_dimensions(dimensions: Option<i64>, size: usize) -> Result<(), PromptError> {
    match dimensions {
        Some(wanted) if usize::try_from(wanted) != Ok(size) => Err(PromptError::invalid(
            "dimensions",
            format!(
                "this model's embeddings have {size} dimensions and cannot be shortened, got \
                 {wanted}"
            ),
        )),
        _ => Ok(()),
    }
}

fn check_length(index: usize, num_tokens: usize, max_model_len: usize) -> Result<(), PromptError> {
    if num_tokens <= max_model_len {
        return Ok(());
    }
    Err(PromptError::TooLong {
        param: "input",
        message: format!(
            "This model's maximum context length is {max_model_len} tokens. However, input \
             {index} resulted in {num_tokens} tokens. Please reduce the length of the input."
        ),
    })
}

fn inputs(input: &Prompt, context: &PromptContext<'_>) -> Result<Vec<Vec<TokenId>>, PromptError> {
    let check_ids = |ids: &[TokenId], param: &str| {
        if ids.is_empty() {
            return Err(PromptError::invalid(param, "must not be empty"));
        }
        check_token_ids(param, ids, &context.limits)?;
        Ok(ids.to_vec())
    };
    let count = match input {
        Prompt::Texts(texts) => texts.len(),
        Prompt::TokenLists(lists) => lists.len(),
        Prompt::Text(_) | Prompt::Tokens(_) => 1,
    };
    if !(1..=MAX_INPUTS).contains(&count) {
        return Err(PromptError::invalid(
            "input",
            format!("must hold between 1 and {MAX_INPUTS} inputs, got {count}"),
        ));
    }
    match input {
        Prompt::Text(text) => Ok(vec![encode(text, "input", context)?]),
        Prompt::Texts(texts) => texts.iter().map(|text| encode(text, "input", context)).collect(),
        Prompt::Tokens(ids) => Ok(vec![check_ids(ids, "input")?]),
        Prompt::TokenLists(lists) => lists
            .iter()
            .enumerate()
            .map(|(index, ids)| check_ids(ids, &format!("input[{index}]")))
            .collect(),
    }
}

/// A pooled vector as clients read it: of length one, so that a dot product is the similarity.
pub fn embedding_values(mut vector: Vec<f32>, format: EncodingFormat) -> EmbeddingValues {
    let square: f64 = vector.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    let length = square.sqrt().max(f64::MIN_POSITIVE);
    for value in &mut vector {
        *value = (f64::from(*value) / length) as f32;
    }
    match format {
        EncodingFormat::Float => EmbeddingValues::Floats(vector),
        EncodingFormat::Base64 => {
            let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
            EmbeddingValues::Base64(STANDARD.encode(bytes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one_in_both_formats() {
        let floats = embedding_values(vec![3.0, -4.0], EncodingFormat::Float);
        assert_eq!(floats, EmbeddingValues::Floats(vec![0.6, -0.8]));
        let text = embedding_values(vec![3.0, -4.0], EncodingFormat::Base64);
        let EmbeddingValues::Base64(text) = text else { panic!("not base64") };
        let bytes = STANDARD.decode(text).expect("base64");
        let values: Vec<f32> = bytes
            .chunks_exact(4)
            .map(|chunk| f32::from_le_bytes(chunk.try_into().expect("four bytes")))
            .collect();
        assert_eq!(values, [0.6, -0.8]);
        let zero = embedding_values(vec![0.0; 2], EncodingFormat::Float);
        assert_eq!(zero, EmbeddingValues::Floats(vec![0.0; 2]));
    }

    #[test]
    fn only_the_own_size_can_be_asked_for() {
        assert!(check_dimensions(None, 896).is_ok());
        assert!(check_dimensions(Some(896), 896).is_ok());
        for wanted in [-1, 0, 256, 1024] {
            assert!(check_dimensions(Some(wanted), 896).is_err());
        }
    }
}
