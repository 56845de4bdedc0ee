//! `text-embedding`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::body::NativeBody;
use crate::chat::embedding::{embedding_values, prepare_embeddings};
use crate::chat::prompt::{PromptContext, PromptError};
use crate::dashscope::{
    Answer, Embedding, EmbeddingInput, EmbeddingParameters, Embeddings, Texts, Usage,
};
use crate::http::caller::Caller;
use crate::http::embeddings::{pooling_header, vectors};
use crate::http::error::ApiError;
use crate::http::extract::ignored_header;
use crate::http::generation::run_sized;
use crate::http::models::check_model;
use crate::http::state::AppState;
use crate::openai::completion::Prompt;
use crate::openai::embedding::{EmbeddingRequest, EmbeddingValues, EncodingFormat};

type Body = NativeBody<EmbeddingInput, EmbeddingParameters>;

pub(in crate::http) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    check_model(&body.model, &state, &caller)?;
    let ignored = ignored_header(&body.ignored);
    let (model, limits) = (Arc::clone(&state.model), state.prompt_limits());
    let id = Arc::clone(&caller.request_id);
    let requests = run_sized(body.num_bytes, &state, move || {
        let context = PromptContext { model: &model, limits, id: &id, random_seed: 0 };
        let request = embedding_request(body)?;
        prepare_embeddings(&request, &context).map_err(own_name)
    });
    let requests = requests.await??;
    let total_tokens = requests.iter().map(|request| request.prompt.len()).sum();
    let vectors = vectors(&state, &caller, requests).await?;
    let embeddings = vectors.into_iter().enumerate().map(|(text_index, vector)| {
        let embedding = match embedding_values(vector, EncodingFormat::Float) {
            EmbeddingValues::Floats(values) => values,
            EmbeddingValues::Base64(_) => Vec::new(),
        };
        Embedding { embedding, text_index }
    });
    let answer = Answer {
        output: Embeddings { embeddings: embeddings.collect() },
        usage: Usage { total_tokens: Some(total_tokens), ..Usage::default() },
        request_id: caller.request_id.to_string(),
    };
    let mut response = Json(answer).into_response();
    response.headers_mut().extend(ignored);
    response.headers_mut().extend([pooling_header(&state)]);
    Ok(response)
}

fn embedding_request(body: Body) -> Result<EmbeddingRequest, PromptError> {
    if body.parameters.output_type.as_deref().is_some_and(|kind| kind != "dense") {
        let flaw = "only `dense` vectors can be made here";
        return Err(PromptError::invalid("parameters.output_type", flaw));
    }
    Ok(EmbeddingRequest {
        model: body.model,
        input: match body.input.texts {
            Texts::One(text) => Prompt::Text(text),
            Texts::Many(texts) => Prompt::Texts(texts),
        },
        encoding_format: None,
        dimensions: body.parameters.dimension,
        cache_salt: None,
        priority: None,
        service_tier: None,
    })
}

/// What is wrong, said of the field that the client sent.
fn own_name(error: PromptError) -> PromptError {
    let name = |param: &str| match param {
        "dimensions" => "parameters.dimension".to_owned(),
        param => param.replacen("input", "input.texts", 1),
    };
    match error {
        PromptError::Invalid { param, message } => {
            let own = name(&param);
            let message = message.replacen(&format!("`{param}`"), &format!("`{own}`"), 1);
            PromptError::Invalid { param: own, message }
        }
        PromptError::TooLong { message, .. } => {
            PromptError::TooLong { param: "input.texts", message }
        }
        error => error,
    }
}
