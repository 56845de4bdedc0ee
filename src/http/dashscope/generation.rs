//! `text-generation` and `multimodal-generation`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use uuid::Uuid;

use super::body::NativeBody;
use crate::chat::dashscope::{AnswerWriter, Endpoint, Progress, prepare};
use crate::chat::output::Update;
use crate::chat::prompt::{Prepared, PromptContext, PromptError};
use crate::dashscope::{Answer, ErrorBody, Input, Output, Parameters};
use crate::http::caller::Caller;
use crate::http::dashscope_errors::error_body;
use crate::http::error::ApiError;
use crate::http::extract::{ignored_header, refuse_ignored};
use crate::http::generation::{Generation, preparation_bytes, run_sized};
use crate::http::models::check_model;
use crate::http::sse::{self, RenderChunks};
use crate::http::state::AppState;
use crate::openai::generation::{GenerationFields, Usage};

type Body = NativeBody<Input, Parameters, GenerationFields>;

pub(in crate::http) async fn text(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    create(Endpoint::Text, state, caller, body).await
}

pub(in crate::http) async fn media(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    create(Endpoint::Multimodal, state, caller, body).await
}

async fn create(
    endpoint: Endpoint,
    state: AppState,
    caller: Caller,
    mut body: Body,
) -> Result<Response, ApiError> {
    check_model(&body.model, &state, &caller)?;
    let (is_stream, strict) = (body.is_stream, body.strict);
    let mut ignored = std::mem::take(&mut body.ignored);
    if body.fields.stream == Some(true) && !is_stream {
        ignored.push("parameters.stream".to_owned());
    }
    body.fields.stream = Some(is_stream);
    let (prepared, writer, more_ignored) = prepare_body(endpoint, &state, &caller, body).await?;
    ignored.extend(more_ignored);
    refuse_ignored(&ignored, strict)?;
    let generation = Generation::submit(&state, &caller, vec![prepared])?;
    let renderer = AnswerRenderer { writer, request_id: caller.request_id };
    let mut response = if is_stream {
        sse::native_response(generation, renderer, &state.limits).await?
    } else {
        renderer.fold(generation).await?
    };
    response.headers_mut().extend(ignored_header(&ignored));
    Ok(response)
}

async fn prepare_body(
    endpoint: Endpoint,
    state: &AppState,
    caller: &Caller,
    body: Body,
) -> Result<(Prepared, AnswerWriter, Vec<String>), ApiError> {
    let (model, limits, random_seed) =
        (Arc::clone(&state.model), state.prompt_limits(), state.seed());
    let request_id = caller.request_id.to_string();
    // Tools come with a grammar, and compiling it may block.
    let has_tools = body.parameters.tools.is_some();
    let num_bytes =
        if has_tools { usize::MAX } else { preparation_bytes(&body.fields, body.num_bytes) };
    let prepared = run_sized(num_bytes, state, move || {
        let id = format!("gen-{}", Uuid::now_v7().simple());
        let context = PromptContext { model: &model, limits, id: &id, random_seed };
        let Body { input, parameters, fields, .. } = &body;
        let answer = prepare(endpoint, input, parameters, fields, &context)?;
        let progress = match parameters.incremental_output {
            Some(true) => Progress::Increments,
            _ => Progress::SoFar,
        };
        let request = &answer.prepared.request;
        let mut writer = AnswerWriter::new(answer.format, progress, request_id, request.n);
        if has_tools {
            writer = writer.with_index();
        }
        if request.params.logprobs.is_some() {
            writer = writer.with_logprobs(Arc::clone(&model));
        }
        Ok::<_, PromptError>((answer.prepared, writer, answer.ignored))
    });
    Ok(prepared.await??)
}

/// What a native stream tells.
#[derive(Serialize)]
#[serde(untagged)]
enum NativeEvent {
    Result(Answer<Output>),
    Error {
        #[serde(skip)]
        status: u16,
        #[serde(flatten)]
        body: ErrorBody,
    },
}

struct AnswerRenderer {
    writer: AnswerWriter,
    request_id: Arc<str>,
}

impl AnswerRenderer {
    /// The whole answer: what the writer has when the frames are left out.
    async fn fold(mut self, generation: Generation) -> Result<Response, ApiError> {
        let usage = sse::fold(&mut self, generation).await?;
        Ok(Json(self.writer.into_whole(&usage)).into_response())
    }
}

impl RenderChunks for AnswerRenderer {
    type Chunk = NativeEvent;

    fn begin(&mut self) -> Vec<NativeEvent> {
        Vec::new()
    }

    fn update(&mut self, _: usize, update: Update, usage: Usage) -> Vec<NativeEvent> {
        let Update::Delta(delta) = update else { return Vec::new() };
        self.writer.push(delta, &usage).into_iter().map(NativeEvent::Result).collect()
    }

    fn end(&mut self, _: Usage) -> Vec<NativeEvent> {
        Vec::new()
    }

    fn name(event: &NativeEvent) -> Option<&'static str> {
        match event {
            NativeEvent::Result(_) => Some("result"),
            NativeEvent::Error { .. } => Some("error"),
        }
    }

    fn status(event: &NativeEvent) -> u16 {
        match event {
            NativeEvent::Result(_) => 200,
            NativeEvent::Error { status, .. } => *status,
        }
    }

    fn fail(&mut self, error: &ApiError, _: Usage) -> Option<Vec<NativeEvent>> {
        let status = error.status();
        let body = error_body(status, &error.body(), &self.request_id);
        Some(vec![NativeEvent::Error { status: status.as_u16(), body }])
    }
}
