//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::caller::Caller;
use super::error::ApiError;
use super::extract::{GenerationBody, ignored_header};
use super::generation::{Generation, ResponseHead, preparation_bytes, run_sized};
use super::models::check_model;
use super::sse::{self, RenderChunks, UsageMode};
use super::state::AppState;
use crate::chat::best_of::Scores;
use crate::chat::logprobs::{CompletionLogprobsWriter, append_completion_logprobs};
use crate::chat::model::ServedModel;
use crate::chat::output::{Delta, Update};
use crate::chat::prompt::{Prepared, PromptContext, PromptError, prepare_completion};
use crate::engine::event::TokenLogprobs;
use crate::openai::completion::{
    Completion, CompletionChoice, CompletionLogprobs, CompletionRequest,
};
use crate::openai::generation::{PromptLogprobs, Usage};
use crate::openai::stream::{ChunkUsage, CompletionChunk};
use crate::text::TokenId;

const OBJECT: &str = "text_completion";

type Body = GenerationBody<CompletionRequest>;

pub(super) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    check_model(&body.request.model, &state, &caller)?;
    let head = ResponseHead::new("cmpl", &body.request.model);
    let ignored = ignored_header(&body.ignored);
    let is_stream = body.fields.stream == Some(true);
    let (prepared, renderer) = prepare(&state, head, body).await??;
    let generation = Generation::submit(&state, &caller, prepared)?;
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
) -> Result<Result<(Vec<Prepared>, CompletionRenderer), PromptError>, ApiError> {
    let (model, limits, random_seed) =
        (Arc::clone(&state.model), state.prompt_limits(), state.seed());
    run_sized(preparation_bytes(&body.fields, body.num_bytes), state, move || {
        let context = PromptContext { model: &model, limits, id: &head.id, random_seed };
        let prepared = prepare_completion(&body.request, &body.fields, &context)?;
        let renderer = CompletionRenderer::new(head, model, &body, &prepared);
        Ok((prepared, renderer))
    })
    .await
}

/// Turns updates into pieces of choices, from which chunks and whole answers are made.
struct CompletionRenderer {
    head: ResponseHead,
    model: Arc<ServedModel>,
    prompts: Vec<PromptFacts>,
    choices: Vec<ChoiceState>,
    usage: UsageMode,
    has_logprobs: bool,
    has_token_ids: bool,
    num_prompt_logprobs: Option<usize>,
    /// How many choices of each prompt the answer keeps.
    num_kept: u32,
}

struct PromptFacts {
    tokens: Arc<[TokenId]>,
    echo: Option<String>,
    n: u32,
    first_index: u32,
}

/// What a choice still owes, and how far its offsets are.
#[derive(Clone)]
struct ChoiceState {
    writer: CompletionLogprobsWriter,
    prompt_token_ids: Option<Vec<u32>>,
    prompt_logprobs: Option<PromptLogprobs>,
}

impl CompletionRenderer {
    fn new(
        head: ResponseHead,
        model: Arc<ServedModel>,
        body: &Body,
        prepared: &[Prepared],
    ) -> Self {
        let mut prompts = Vec::new();
        let mut choices = Vec::new();
        let has_token_ids = body.fields.return_token_ids == Some(true);
        let num_logprobs = body.request.logprobs.map(|count| count as usize);
        for Prepared { request, echo, .. } in prepared {
            prompts.push(PromptFacts {
                tokens: Arc::clone(&request.prompt),
                echo: echo.clone(),
                n: request.n,
                first_index: choices.len() as u32,
            });
            let prompt_token_ids = has_token_ids.then(|| request.prompt.to_vec());
            let state = ChoiceState {
                writer: CompletionLogprobsWriter::new(num_logprobs.unwrap_or(0)),
                prompt_token_ids,
                prompt_logprobs: None,
            };
            choices.extend(std::iter::repeat_n(state, request.n as usize));
        }
        Self {
            head,
            model,
            prompts,
            choices,
            usage: UsageMode::of(&body.fields),
            has_logprobs: num_logprobs.is_some(),
            has_token_ids,
            num_prompt_logprobs: body.fields.prompt_logprobs.map(|count| count as usize),
            num_kept: body.fields.n.unwrap_or(1) as u32,
        }
    }

    fn pieces(&mut self, prompt: usize, update: Update) -> Vec<CompletionChoice> {
        match update {
            Update::Started { prompt_logprobs, .. } => self.first_pieces(prompt, &prompt_logprobs),
            Update::Delta(delta) => vec![self.delta_piece(prompt, delta)],
        }
    }

    /// The echoed prompt, for every choice.
    fn first_pieces(&mut self, prompt: usize, entries: &[TokenLogprobs]) -> Vec<CompletionChoice> {
        let facts = &self.prompts[prompt];
        let (first, last) = (facts.first_index, facts.first_index + facts.n);
        let in_vllm_shape =
            self.num_prompt_logprobs.map(|num_top| self.model.prompt_logprobs(entries, num_top));
        for state in &mut self.choices[first as usize..last as usize] {
            state.prompt_logprobs.clone_from(&in_vllm_shape);
        }
        let Some(text) = facts.echo.clone() else { return Vec::new() };
        // Choices echo alike, so one of them writes for all.
        let mut writer = self.choices[first as usize].writer.clone();
        let logprobs =
            self.has_logprobs.then(|| writer.prompt(&self.model, &facts.tokens, entries));
        (first..last)
            .map(|index| {
                self.choices[index as usize].writer = writer.clone();
                let mut piece = self.bare_piece(index, text.clone());
                piece.logprobs.clone_from(&logprobs);
                piece
            })
            .collect()
    }

    fn delta_piece(&mut self, prompt: usize, delta: Delta) -> CompletionChoice {
        let index = self.prompts[prompt].first_index + delta.choice;
        let mut piece = self.bare_piece(index, delta.text);
        let writer = &mut self.choices[index as usize].writer;
        piece.logprobs = self.has_logprobs.then(|| writer.tokens(&self.model, &delta.tokens));
        piece.token_ids = self.has_token_ids.then(|| delta.tokens.iter().map(|t| t.id).collect());
        if let Some(finish) = delta.finish {
            piece.finish_reason = Some(finish.reason);
            piece.stop_reason = finish.stop_reason;
        }
        piece
    }

    /// A piece with what the choice owes from its prompt; only its first piece has any.
    fn bare_piece(&mut self, index: u32, text: String) -> CompletionChoice {
        let state = &mut self.choices[index as usize];
        CompletionChoice {
            index,
            text,
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            prompt_logprobs: state.prompt_logprobs.take(),
            prompt_token_ids: state.prompt_token_ids.take(),
            token_ids: None,
        }
    }

    /// The best candidates of each prompt, if there are more than the client wants to see.
    fn keep_best(&self, all: Vec<CompletionChoice>, scores: &Scores) -> Vec<CompletionChoice> {
        if self.prompts.iter().all(|facts| facts.n == self.num_kept) {
            return all;
        }
        let best = |facts: &PromptFacts| {
            let first = facts.first_index as usize;
            scores.best(first..first + facts.n as usize, self.num_kept as usize)
        };
        let kept = self.prompts.iter().flat_map(best);
        (0..)
            .zip(kept)
            .map(|(index, kept)| CompletionChoice { index, ..all[kept].clone() })
            .collect()
    }

    fn chunk(&self, choices: Vec<CompletionChoice>, usage: ChunkUsage) -> CompletionChunk {
        CompletionChunk {
            id: self.head.id.clone(),
            object: OBJECT,
            created: self.head.created,
            model: self.head.model.clone(),
            choices,
            usage,
        }
    }
}

impl RenderChunks for CompletionRenderer {
    type Chunk = CompletionChunk;

    fn begin(&mut self) -> Vec<CompletionChunk> {
        Vec::new()
    }

    fn update(&mut self, prompt: usize, update: Update, usage: Usage) -> Vec<CompletionChunk> {
        let usage = self.usage.in_chunk(usage);
        let pieces = self.pieces(prompt, update);
        pieces.into_iter().map(|piece| self.chunk(vec![piece], usage)).collect()
    }

    fn end(&mut self, usage: Usage) -> Vec<CompletionChunk> {
        match self.usage {
            UsageMode::Off => Vec::new(),
            UsageMode::Final | UsageMode::Continuous => {
                vec![self.chunk(Vec::new(), ChunkUsage::Known(usage))]
            }
        }
    }
}

/// The whole answer: all pieces, joined.
async fn fold(
    mut generation: Generation,
    mut renderer: CompletionRenderer,
) -> Result<Completion, ApiError> {
    let mut choices: Vec<CompletionChoice> =
        (0..renderer.choices.len() as u32).map(empty_choice).collect();
    let mut scores = Scores::new(choices.len());
    while let Some(item) = generation.next().await {
        let (prompt, update) = item?;
        if let Update::Delta(delta) = &update {
            let index = renderer.prompts[prompt].first_index + delta.choice;
            scores.add(index as usize, &delta.tokens);
        }
        for piece in renderer.pieces(prompt, update) {
            append(&mut choices[piece.index as usize], piece);
        }
    }
    let choices = renderer.keep_best(choices, &scores);
    Ok(Completion {
        id: renderer.head.id,
        object: OBJECT,
        created: renderer.head.created,
        model: renderer.head.model,
        choices,
        usage: generation.usage(),
    })
}

fn empty_choice(index: u32) -> CompletionChoice {
    CompletionChoice {
        index,
        text: String::new(),
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        prompt_logprobs: None,
        prompt_token_ids: None,
        token_ids: None,
    }
}

fn append(choice: &mut CompletionChoice, piece: CompletionChoice) {
    choice.text.push_str(&piece.text);
    if let Some(logprobs) = piece.logprobs {
        let all = choice.logprobs.get_or_insert_with(CompletionLogprobs::default);
        append_completion_logprobs(all, logprobs);
    }
    if let Some(ids) = piece.token_ids {
        choice.token_ids.get_or_insert_with(Vec::new).extend(ids);
    }
    choice.finish_reason = choice.finish_reason.or(piece.finish_reason);
    choice.stop_reason = choice.stop_reason.take().or(piece.stop_reason);
    choice.prompt_logprobs = choice.prompt_logprobs.take().or(piece.prompt_logprobs);
    choice.prompt_token_ids = choice.prompt_token_ids.take().or(piece.prompt_token_ids);
}
