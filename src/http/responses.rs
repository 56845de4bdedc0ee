//! `POST /v1/responses`, and what was stored of them.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use uuid::Uuid;

use super::caller::Caller;
use super::error::ApiError;
use super::extract::{GenerationBody, ignored_header, refuse_ignored};
use super::generation::{Generation, preparation_bytes, run_sized};
use super::models::check_model;
use super::response_store::{NewResponse, ResponseStore, StoredResponse};
use super::sse::{self, RenderChunks};
use super::state::{AppState, unix_seconds};
use crate::chat::output::Update;
use crate::chat::prompt::{Prepared, PromptContext, PromptError};
use crate::chat::responses::{ResponseHead, ResponseWriter, convert, echo, own_items};
use crate::openai::generation::Usage;
use crate::openai::responses::{
    DeletedResponse, InputItemList, InputTokens, ResponsesRequest, StreamEvent,
};

/// Items on a page that does not say how many it wants, and most of them.
const DEFAULT_PAGE: usize = 20;
const MAX_PAGE: usize = 100;

type StoredId = Result<Path<String>, PathRejection>;
type Body = GenerationBody<ResponsesRequest>;

pub(super) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    check_model(&body.request.model, &state, &caller)?;
    let is_stream = body.fields.stream == Some(true);
    let strict = body.fields.strict_params;
    let mut ignored = body.ignored.clone();
    let (prepared, renderer, more_ignored) = prepare(&state, &caller, body).await?;
    ignored.extend(more_ignored);
    refuse_ignored(&ignored, strict)?;
    let generation = Generation::submit(&state, &caller, vec![prepared])?;
    let mut response = if is_stream {
        sse::response(generation, renderer, &state.limits).await?
    } else {
        renderer.fold(generation).await?
    };
    response.headers_mut().extend(ignored_header(&ignored));
    Ok(response)
}

/// How many tokens the input of a response would have.
pub(super) async fn count_input(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    check_model(&body.request.model, &state, &caller)?;
    let mut ignored = body.ignored.clone();
    let strict = body.fields.strict_params;
    let (prepared, _, more_ignored) = prepare(&state, &caller, body).await?;
    ignored.extend(more_ignored);
    refuse_ignored(&ignored, strict)?;
    let input_tokens = prepared.request.prompt.len();
    let count = InputTokens { object: "response.input_tokens", input_tokens };
    let mut response = Json(count).into_response();
    response.headers_mut().extend(ignored_header(&ignored));
    Ok(response)
}

async fn prepare(
    state: &AppState,
    caller: &Caller,
    body: Body,
) -> Result<(Prepared, ResponseRenderer, Vec<String>), ApiError> {
    let previous = previous(&body.request, state, caller)?;
    let (model, limits, random_seed) =
        (Arc::clone(&state.model), state.prompt_limits(), state.seed());
    let (store, owner) = (Arc::clone(&state.responses), Arc::clone(&caller.client));
    let is_stored = body.request.store.unwrap_or(true);
    // Whatever may hold a grammar may block.
    let has_grammar = body.request.tools.is_some() || body.request.text.is_some();
    let previous_bytes = previous.as_ref().map_or(0, |previous| previous.num_bytes());
    let num_bytes = if has_grammar {
        usize::MAX
    } else {
        preparation_bytes(&body.fields, body.num_bytes).saturating_add(previous_bytes)
    };
    let prepared = run_sized(num_bytes, state, move || {
        let suffix = Uuid::now_v7().simple().to_string();
        let items = previous.as_ref().map(|previous| previous.items()).unwrap_or_default();
        let converted = convert(&body.request, &body.fields, &items)?;
        let context = PromptContext { model: &model, limits, id: &suffix, random_seed };
        let prepared = converted.prepare(&context)?;
        let ignored = converted.all_ignored(&prepared);
        let ticket = is_stored.then(|| Ticket {
            store,
            owner,
            previous,
            input: to_json(&own_items(&body.request, &suffix)),
        });
        let head =
            ResponseHead { suffix, created_at: unix_seconds(), model: body.request.model.clone() };
        let has_logprobs = prepared.request.params.logprobs.is_some();
        let writer = ResponseWriter::new(head, echo(&body.request, &prepared), model, has_logprobs);
        Ok::<_, PromptError>((prepared, ResponseRenderer { writer, ticket }, ignored))
    });
    Ok(prepared.await??)
}

fn previous(
    request: &ResponsesRequest,
    state: &AppState,
    caller: &Caller,
) -> Result<Option<Arc<StoredResponse>>, ApiError> {
    let Some(id) = &request.previous_response_id else { return Ok(None) };
    let previous =
        state.responses.get(id, &caller.client).ok_or(ApiError::PreviousNotFound(id.clone()))?;
    let max_bytes = state.limits.max_body_bytes;
    if max_bytes < previous.num_bytes() {
        let name = "previous_response_id";
        let message = format!("`{name}`: the conversation has more than {max_bytes} bytes");
        return Err(ApiError::Invalid { message, param: Some(name.to_owned()) });
    }
    Ok(Some(previous))
}

/// Where a response is stored when it is over.
struct Ticket {
    store: Arc<ResponseStore>,
    owner: Arc<str>,
    previous: Option<Arc<StoredResponse>>,
    /// The request's own items, as JSON.
    input: String,
}

struct ResponseRenderer {
    writer: ResponseWriter,
    ticket: Option<Ticket>,
}

impl ResponseRenderer {
    /// The whole answer: what the writer has when the events are left out.
    async fn fold(mut self, generation: Generation) -> Result<Response, ApiError> {
        let usage = sse::fold(&mut self, generation).await?;
        self.end(usage);
        Ok(Json(self.writer.into_response()).into_response())
    }

    fn store(&mut self) {
        let Some(ticket) = self.ticket.take() else { return };
        let response = self.writer.response();
        ticket.store.insert(NewResponse {
            id: &response.id,
            owner: ticket.owner,
            body: to_json(response),
            input: ticket.input,
            output: to_json(&response.output),
            previous: ticket.previous.as_deref(),
        });
    }
}

impl RenderChunks for ResponseRenderer {
    type Chunk = StreamEvent;

    fn begin(&mut self) -> Vec<StreamEvent> {
        self.writer.begin();
        self.writer.take_events()
    }

    fn update(&mut self, _: usize, update: Update, _: Usage) -> Vec<StreamEvent> {
        if let Update::Delta(delta) = update {
            self.writer.push(delta);
        }
        self.writer.take_events()
    }

    fn end(&mut self, usage: Usage) -> Vec<StreamEvent> {
        self.writer.end(&usage, unix_seconds());
        self.store();
        self.writer.take_events()
    }

    fn name(event: &StreamEvent) -> Option<&'static str> {
        Some(event.kind)
    }

    fn fail(&mut self, error: &ApiError, usage: Usage) -> Option<Vec<StreamEvent>> {
        self.writer.fail("server_error", error.body().error.message, &usage);
        self.store();
        Some(self.writer.take_events())
    }
}

pub(super) async fn retrieve(
    State(state): State<AppState>,
    caller: Caller,
    id: StoredId,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let id = known(id)?;
    if query_fields(query.as_deref()).get("stream").is_some_and(|stream| *stream == "true") {
        return Err(invalid("stream", "a stored response cannot be streamed"));
    }
    let stored = state.responses.get(&id, &caller.client).ok_or(ApiError::ResponseNotFound(id))?;
    Ok(([(CONTENT_TYPE, "application/json")], stored.body.clone()).into_response())
}

pub(super) async fn delete(
    State(state): State<AppState>,
    caller: Caller,
    id: StoredId,
) -> Result<Json<DeletedResponse>, ApiError> {
    let id = known(id)?;
    if !state.responses.remove(&id, &caller.client) {
        return Err(ApiError::ResponseNotFound(id));
    }
    Ok(Json(DeletedResponse { id, object: "response", deleted: true }))
}

/// Only what is made in the background can be cancelled by its id, and nothing is here: a client
/// that leaves a response's stream ends it.
pub(super) async fn cancel(
    State(state): State<AppState>,
    caller: Caller,
    id: StoredId,
) -> ApiError {
    match known(id) {
        Err(error) => error,
        Ok(id) if state.responses.get(&id, &caller.client).is_none() => {
            ApiError::ResponseNotFound(id)
        }
        Ok(_) => invalid("background", "only a response made in the background can be cancelled"),
    }
}

/// The conversation that led to a response, the newest item first unless asked otherwise.
pub(super) async fn input_items(
    State(state): State<AppState>,
    caller: Caller,
    id: StoredId,
    RawQuery(query): RawQuery,
) -> Result<Json<InputItemList>, ApiError> {
    let id = known(id)?;
    let query = query_fields(query.as_deref());
    let limit = match query.get("limit") {
        None => DEFAULT_PAGE,
        Some(limit) => match limit.parse::<usize>() {
            Ok(limit) if (1..=MAX_PAGE).contains(&limit) => limit,
            _ => return Err(invalid("limit", "must be between 1 and 100")),
        },
    };
    let stored = state.responses.get(&id, &caller.client).ok_or(ApiError::ResponseNotFound(id))?;
    let mut items = stored.input_items();
    match query.get("order").copied() {
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(_) => return Err(invalid("order", "expected `asc` or `desc`")),
    }
    if let Some(after) = query.get("after") {
        let at = items.iter().position(|item| item_id(item).as_deref() == Some(*after));
        let at = at.ok_or_else(|| invalid("after", "there is no such item"))?;
        items.drain(..=at);
    }
    let has_more = limit < items.len();
    items.truncate(limit);
    Ok(Json(InputItemList {
        object: "list",
        first_id: items.first().and_then(item_id),
        last_id: items.last().and_then(item_id),
        data: items,
        has_more,
    }))
}

fn known(id: StoredId) -> Result<String, ApiError> {
    let id = id.map(|Path(id)| id);
    id.map_err(|_| ApiError::ResponseNotFound("an id that is not UTF-8".into()))
}

fn item_id(item: &Value) -> Option<String> {
    item.get("id")?.as_str().map(str::to_owned)
}

/// Nothing that these paths understand needs escapes.
fn query_fields(query: Option<&str>) -> HashMap<&str, &str> {
    query.unwrap_or_default().split('&').filter_map(|field| field.split_once('=')).collect()
}

fn invalid(param: &str, flaw: &str) -> ApiError {
    ApiError::Invalid { message: format!("`{param}`: {flaw}"), param: Some(param.to_owned()) }
}

fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("wire types have string keys and cannot fail to serialise")
}
