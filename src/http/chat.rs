//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::caller::Caller;
use super::error::ApiError;
use super::extract::{GenerationBody, ignored_header, refuse_ignored};
use super::generation::{Generation, ResponseHead, preparation_bytes, run_sized};
use super::models::check_model;
use super::sse::{self, RenderChunks, UsageMode};
use super::state::AppState;
use crate::chat::model::ServedModel;
use crate::chat::output::{Delta, ToolCallDelta, Update};
use crate::chat::prompt::{Prepared, PromptContext, PromptError, prepare_chat};
use crate::openai::chat::{
    AssistantMessage, ChatChoice, ChatCompletion, ChatCompletionRequest, ChatLogprobs,
};
use crate::openai::generation::{FinishReason, GenerationFields, Usage};
use crate::openai::stream::{ChatChunkChoice, ChatCompletionChunk, ChatDelta, ChunkUsage};
use crate::openai::tool::{CalledFunction, FunctionChunk, MessageToolCall, ToolCallChunk};
use crate::text::TokenId;

const OBJECT: &str = "chat.completion";
const CHUNK_OBJECT: &str = "chat.completion.chunk";
const ASSISTANT: &str = "assistant";
/// All tiers cost the same here, and this is what clients expect of those.
const SERVICE_TIER: &str = "default";
const FUNCTION: &str = "function";

type Body = GenerationBody<ChatCompletionRequest>;

pub(super) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    check_model(&body.request.model, &state, &caller)?;
    let head = ResponseHead::new("chatcmpl", &body.request.model);
    let mut ignored = body.ignored.clone();
    let is_strict = body.fields.strict_params;
    let is_stream = body.fields.stream == Some(true);
    let (prepared, renderer) = prepare(&state, head, body).await??;
    ignored.splice(0..0, prepared.ignored.iter().map(ToString::to_string));
    refuse_ignored(&ignored, is_strict)?;
    let ignored = ignored_header(&ignored);
    let generation = Generation::submit(&state, &caller, vec![prepared])?;
    let mut response = if is_stream {
        sse::response(generation, renderer, &state.limits).await?
    } else {
        Json(fold(generation, renderer).await?).into_response()
    };
    response.headers_mut().extend(ignored);
    Ok(response)
}

async fn prepare(
    state: &AppState,
    head: ResponseHead,
    body: Body,
) -> Result<Result<(Prepared, ChatRenderer), PromptError>, ApiError> {
    let (model, limits, random_seed) =
        (Arc::clone(&state.model), state.prompt_limits(), state.seed());
    // Tools come with a grammar, and compiling it may block.
    let has_tools = body.request.tools.is_some() || body.request.functions.is_some();
    let num_bytes =
        if has_tools { usize::MAX } else { preparation_bytes(&body.fields, body.num_bytes) };
    run_sized(num_bytes, state, move || {
        let context = PromptContext { model: &model, limits, id: &head.id, random_seed };
        let prepared = prepare_chat(&body.request, &body.fields, &context)?;
        let mut renderer = ChatRenderer::new(head, model, &body.fields, &prepared);
        if body.request.tools.is_none() && body.request.functions.is_some() {
            renderer.call_shape = CallShape::Function;
        }
        Ok((prepared, renderer))
    })
    .await
}

/// Turns updates into pieces of choices, from which chunks and whole answers are made.
pub(super) struct ChatRenderer {
    head: ResponseHead,
    model: Arc<ServedModel>,
    n: u32,
    prompt: Arc<[TokenId]>,
    echo: Option<String>,
    usage: UsageMode,
    has_logprobs: bool,
    has_token_ids: bool,
    num_prompt_logprobs: Option<usize>,
    service_tier: Option<&'static str>,
    call_shape: CallShape,
}

/// How calls look in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallShape {
    /// `tool_calls`, for requests with `tools`.
    Tool,
    /// The older `function_call`, for requests with `functions`.
    Function,
}

impl ChatRenderer {
    pub(super) fn new(
        head: ResponseHead,
        model: Arc<ServedModel>,
        fields: &GenerationFields,
        prepared: &Prepared,
    ) -> Self {
        let params = &prepared.request.params;
        Self {
            head,
            model,
            n: prepared.request.n,
            prompt: Arc::clone(&prepared.request.prompt),
            echo: prepared.echo.clone().filter(|text| !text.is_empty()),
            usage: UsageMode::of(fields),
            has_logprobs: params.logprobs.is_some(),
            has_token_ids: fields.return_token_ids == Some(true),
            num_prompt_logprobs: params.prompt_logprobs.map(|count| count as usize),
            service_tier: fields.service_tier.as_ref().map(|_| SERVICE_TIER),
            call_shape: CallShape::Tool,
        }
    }

    /// The pieces a choice begins with: its role, and what it echoes.
    fn first_pieces(&self, index: u32) -> Vec<ChatChunkChoice> {
        let role = ChatDelta {
            role: Some(ASSISTANT),
            content: Some(String::new()),
            ..ChatDelta::default()
        };
        let echo = self.echo.clone().map(content_delta);
        std::iter::once(role).chain(echo).map(|delta| bare_piece(index, delta)).collect()
    }

    /// A piece with the reasoning, one with the text, one with each part of a call and, by itself
    /// as clients expect it, one with the end.
    fn pieces(&self, mut delta: Delta) -> Vec<ChatChunkChoice> {
        let mut parts = Vec::new();
        if !delta.reasoning.is_empty() {
            let reasoning_content = Some(std::mem::take(&mut delta.reasoning));
            parts.push(ChatDelta { reasoning_content, ..ChatDelta::default() });
        }
        if !delta.text.is_empty() {
            parts.push(content_delta(std::mem::take(&mut delta.text)));
        }
        let calls = std::mem::take(&mut delta.tool_calls);
        parts.extend(calls.into_iter().map(|call| self.call_delta(call)));
        let mut pieces: Vec<_> =
            parts.into_iter().map(|part| self.token_piece(&mut delta, part)).collect();
        if let Some(finish) = delta.finish.take() {
            let mut piece = self.token_piece(&mut delta, ChatDelta::default());
            piece.finish_reason = Some(self.finish_reason(finish.reason));
            piece.stop_reason = finish.stop_reason;
            pieces.push(piece);
        }
        pieces
    }

    fn call_delta(&self, call: ToolCallDelta) -> ChatDelta {
        let ToolCallDelta { index, id, name, arguments } = call;
        let function = FunctionChunk { name, arguments };
        match self.call_shape {
            CallShape::Tool => {
                let kind = id.is_some().then_some(FUNCTION);
                let chunk = ToolCallChunk { index, id, kind, function };
                ChatDelta { tool_calls: Some(vec![chunk]), ..ChatDelta::default() }
            }
            CallShape::Function => {
                ChatDelta { function_call: Some(function), ..ChatDelta::default() }
            }
        }
    }

    fn finish_reason(&self, reason: FinishReason) -> FinishReason {
        match (reason, self.call_shape) {
            (FinishReason::ToolCalls, CallShape::Function) => FinishReason::FunctionCall,
            (reason, _) => reason,
        }
    }

    /// A piece that accounts for the delta's tokens, if no earlier piece did.
    fn token_piece(&self, delta: &mut Delta, content: ChatDelta) -> ChatChunkChoice {
        let tokens = std::mem::take(&mut delta.tokens);
        let mut piece = bare_piece(delta.choice, content);
        if !tokens.is_empty() {
            piece.logprobs = self.has_logprobs.then(|| self.model.chat_logprobs(&tokens));
            piece.token_ids = self.has_token_ids.then(|| tokens.iter().map(|t| t.id).collect());
        }
        piece
    }

    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: ChunkUsage) -> ChatCompletionChunk {
        ChatCompletionChunk {
            id: self.head.id.clone(),
            object: CHUNK_OBJECT,
            created: self.head.created,
            model: self.head.model.clone(),
            choices,
            usage,
            service_tier: self.service_tier,
            prompt_token_ids: None,
        }
    }

    fn prompt_usage(&self) -> Usage {
        let prompt_tokens = self.prompt.len();
        Usage { prompt_tokens, total_tokens: prompt_tokens, ..Usage::default() }
    }
}

fn content_delta(text: String) -> ChatDelta {
    ChatDelta { content: Some(text), ..ChatDelta::default() }
}

fn bare_piece(index: u32, delta: ChatDelta) -> ChatChunkChoice {
    ChatChunkChoice {
        index,
        delta,
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
    }
}

impl RenderChunks for ChatRenderer {
    type Chunk = ChatCompletionChunk;

    fn begin(&mut self) -> Vec<ChatCompletionChunk> {
        let usage = self.usage.in_chunk(self.prompt_usage());
        let pieces = (0..self.n).flat_map(|index| self.first_pieces(index));
        let mut chunks: Vec<_> = pieces.map(|piece| self.chunk(vec![piece], usage)).collect();
        if let Some(first) = chunks.first_mut().filter(|_| self.has_token_ids) {
            first.prompt_token_ids = Some(self.prompt.to_vec());
        }
        chunks
    }

    fn update(&mut self, _: usize, update: Update, usage: Usage) -> Vec<ChatCompletionChunk> {
        let Update::Delta(delta) = update else { return Vec::new() };
        let usage = self.usage.in_chunk(usage);
        self.pieces(delta).into_iter().map(|piece| self.chunk(vec![piece], usage)).collect()
    }

    fn end(&mut self, usage: Usage) -> Vec<ChatCompletionChunk> {
        match self.usage {
            UsageMode::Off => Vec::new(),
            UsageMode::Final | UsageMode::Continuous => {
                vec![self.chunk(Vec::new(), ChunkUsage::Known(usage))]
            }
        }
    }
}

/// The whole answer: all pieces, joined.
pub(super) async fn fold(
    mut generation: Generation,
    renderer: ChatRenderer,
) -> Result<ChatCompletion, ApiError> {
    let mut choices: Vec<ChatChoice> = (0..renderer.n).map(empty_choice).collect();
    for index in 0..renderer.n {
        for piece in renderer.first_pieces(index) {
            append(&mut choices[index as usize], piece);
        }
    }
    let mut prompt_logprobs = None;
    while let Some(item) = generation.next().await {
        match item?.1 {
            Update::Started { prompt_logprobs: entries, .. } => {
                prompt_logprobs = renderer
                    .num_prompt_logprobs
                    .map(|num_top| renderer.model.prompt_logprobs(&entries, num_top));
            }
            Update::Delta(delta) => {
                for piece in renderer.pieces(delta) {
                    append(&mut choices[piece.index as usize], piece);
                }
            }
        }
    }
    for choice in &mut choices {
        drop_empty_content(&mut choice.message);
    }
    Ok(ChatCompletion {
        id: renderer.head.id,
        object: OBJECT,
        created: renderer.head.created,
        model: renderer.head.model,
        choices,
        usage: generation.usage(),
        service_tier: renderer.service_tier,
        prompt_logprobs,
        prompt_token_ids: renderer.has_token_ids.then(|| renderer.prompt.to_vec()),
    })
}

fn empty_choice(index: u32) -> ChatChoice {
    ChatChoice {
        index,
        message: AssistantMessage {
            role: ASSISTANT,
            content: None,
            refusal: None,
            reasoning_content: None,
            tool_calls: None,
            function_call: None,
        },
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
    }
}

fn append_message(message: &mut AssistantMessage, delta: ChatDelta) {
    if let Some(text) = delta.content {
        message.content.get_or_insert_default().push_str(&text);
    }
    if let Some(text) = delta.reasoning_content {
        message.reasoning_content.get_or_insert_default().push_str(&text);
    }
    for chunk in delta.tool_calls.into_iter().flatten() {
        let calls = message.tool_calls.get_or_insert_default();
        if let Some(id) = chunk.id {
            calls.push(MessageToolCall { id, kind: FUNCTION, function: CalledFunction::default() });
        }
        if let Some(call) = calls.get_mut(chunk.index as usize) {
            append_function(&mut call.function, &chunk.function);
        }
    }
    if let Some(chunk) = delta.function_call {
        append_function(message.function_call.get_or_insert_default(), &chunk);
    }
}

fn append_function(function: &mut CalledFunction, chunk: &FunctionChunk) {
    function.name.push_str(chunk.name.as_deref().unwrap_or_default());
    function.arguments.push_str(&chunk.arguments);
}

/// Clients expect null, not an empty text, beside calls.
fn drop_empty_content(message: &mut AssistantMessage) {
    let has_call = message.tool_calls.is_some() || message.function_call.is_some();
    if has_call && message.content.as_deref() == Some("") {
        message.content = None;
    }
}

fn append(choice: &mut ChatChoice, piece: ChatChunkChoice) {
    append_message(&mut choice.message, piece.delta);
    if let Some(logprobs) = piece.logprobs {
        let all = choice.logprobs.get_or_insert_with(ChatLogprobs::default);
        all.content.extend(logprobs.content);
    }
    if let Some(ids) = piece.token_ids {
        choice.token_ids.get_or_insert_with(Vec::new).extend(ids);
    }
    choice.finish_reason = choice.finish_reason.or(piece.finish_reason);
    choice.stop_reason = choice.stop_reason.take().or(piece.stop_reason);
}
