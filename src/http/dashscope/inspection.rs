//! The tokenizer and the list of models.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};

use super::body::NativeBody;
use crate::chat::dashscope as chat;
use crate::chat::prompt::PromptContext;
use crate::dashscope::{
    Answer, Input, Model, ModelPage, ModelsAnswer, NoParameters, Tokens, Usage,
};
use crate::http::caller::Caller;
use crate::http::error::ApiError;
use crate::http::extract::ignored_header;
use crate::http::generation::run_sized;
use crate::http::models::check_model;
use crate::http::state::AppState;

/// Models on a page that does not say how many it wants, and most of them.
const DEFAULT_PAGE: usize = 10;
const MAX_PAGE: usize = 100;

pub(in crate::http) async fn tokenize(
    State(state): State<AppState>,
    caller: Caller,
    body: NativeBody<Input, NoParameters>,
) -> Result<Response, ApiError> {
    check_model(&body.model, &state, &caller)?;
    let ignored = ignored_header(&body.ignored);
    let (model, limits) = (Arc::clone(&state.model), state.prompt_limits());
    let tokens = run_sized(body.num_bytes, &state, move || {
        let context = PromptContext { model: &model, limits, id: "", random_seed: 0 };
        chat::tokenize(&body.input, &context)
    });
    let (token_ids, tokens) = tokens.await??;
    let usage = Usage { input_tokens: Some(token_ids.len()), ..Usage::default() };
    let request_id = caller.request_id.to_string();
    let answer = Answer { output: Tokens { token_ids, tokens }, usage, request_id };
    let mut response = Json(answer).into_response();
    response.headers_mut().extend(ignored);
    Ok(response)
}

/// A page of models, or the one that the query names.
pub(in crate::http) async fn models(
    State(state): State<AppState>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let query = query.unwrap_or_default();
    let field = |name: &str| {
        let mut fields = query.split('&').filter_map(|field| field.split_once('='));
        fields.find(|(key, value)| *key == name && !value.is_empty()).map(|(_, value)| value)
    };
    let number = |name: &str, default: usize, max: usize| match field(name) {
        None => Ok(default),
        Some(text) => match text.parse::<usize>() {
            Ok(number) if (1..=max).contains(&number) => Ok(number),
            _ => Err(invalid(name, max)),
        },
    };
    let page_no = number("page_no", 1, usize::MAX)?;
    let page_size = number("page_size", DEFAULT_PAGE, MAX_PAGE)?;
    let names: Vec<String> = if let Some(name) = field("model").map(unescape) {
        let is_here =
            |name: &String| state.model.answers_to(name) || state.adapters.find(name).is_some();
        Some(name).filter(is_here).into_iter().collect()
    } else {
        let adapters = state.adapters.all().into_iter();
        let adapters = adapters.map(|listed| listed.adapter.name().to_string());
        state.model.names().map(str::to_owned).chain(adapters).collect()
    };
    let names: Vec<String> = names.into_iter().filter(|name| caller.may_use(name)).collect();
    let total = names.len();
    let context_window = state.engine.limits().max_model_len;
    let model = |model: String| Model {
        name: model.clone(),
        description: format!("{}, served by qwen-server", state.model.name),
        model,
        context_window,
    };
    let first = page_size.saturating_mul(page_no - 1);
    let models = names.into_iter().skip(first).take(page_size).map(model).collect();
    let output = ModelPage { total, page_no, page_size, models };
    Ok(Json(ModelsAnswer { request_id: caller.request_id.to_string(), output }).into_response())
}

fn invalid(name: &str, max: usize) -> ApiError {
    let message = match max {
        usize::MAX => format!("`{name}`: must be a number of at least 1"),
        max => format!("`{name}`: must be between 1 and {max}"),
    };
    ApiError::Invalid { message, param: Some(name.to_owned()) }
}

/// Text of a query without its escapes. What is no escape stays as it is.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        let escaped = behind.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        let escaped = escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (first, escaped) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &behind[2..];
                continue;
            }
            (b'+', _) => bytes.push(b' '),
            (byte, _) => bytes.push(*byte),
        }
        rest = behind;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
