//! From the bytes and headers of a native request to wire types.
//!
//! A body is `model`, `input` and `parameters`. The latter two are read as bodies of their own, so
//! that what holds for fields elsewhere holds for theirs: limits, names in errors, names of those
//! without effect.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::HeaderMap;
use axum::http::header::ACCEPT;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::chat::dashscope::is_ignored_parameter;
use crate::http::body::Body;
use crate::http::error::ApiError;
use crate::http::extract::{Permit, Strictness, read, refuse_ignored};
use crate::http::generation::run_sized;
use crate::http::state::AppState;

const SSE: &str = "x-dashscope-sse";
const DATA_INSPECTION: &str = "X-DashScope-DataInspection";

/// Headers that ask for what only the hosted service does, and what to do instead.
const HOSTED: [(&str, &str); 3] = [
    (
        "X-DashScope-Async",
        "there are no asynchronous tasks here: leave the header away and read the answer, or \
         stream it",
    ),
    (
        "X-DashScope-EncryptionKey",
        "bodies are not encrypted here: leave the header away and put TLS before this server",
    ),
    (
        "X-DashScope-Plugin",
        "plugins run on the hosted platform: leave the header away and offer what they do as tools",
    ),
];

/// A request with an input of type `I`, and parameters that are read as `P` and as `F`.
pub(in crate::http) struct NativeBody<I, P, F = Strictness> {
    pub(super) model: String,
    pub(super) input: I,
    pub(super) parameters: P,
    pub(super) fields: F,
    /// Names of fields and headers that have no effect.
    pub(super) ignored: Vec<String>,
    pub(super) strict: Option<bool>,
    /// Whether the answer is to be streamed: headers say so, and nothing else.
    pub(super) is_stream: bool,
    pub(super) num_bytes: usize,
    _permit: Permit,
}

#[derive(Deserialize)]
struct Envelope {
    model: Option<String>,
    input: Option<Box<RawValue>>,
    parameters: Option<Box<RawValue>>,
}

impl<I, P, F> FromRequest<AppState> for NativeBody<I, P, F>
where
    I: DeserializeOwned + Send + 'static,
    P: DeserializeOwned + Send + 'static,
    F: DeserializeOwned + Send + 'static,
{
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let headers = Headers::check(request.headers())?;
        let (bytes, permit) = read(request, state).await?;
        run_sized(bytes.len(), state, move || Self::decode(&bytes, headers, permit)).await?
    }
}

impl<I: DeserializeOwned, P: DeserializeOwned, F: DeserializeOwned> NativeBody<I, P, F> {
    fn decode(bytes: &Bytes, headers: Headers, permit: Permit) -> Result<Self, ApiError> {
        let mut outer = Body::scan(bytes)?;
        let Envelope { model, input, parameters } = outer.read()?;
        let model = model.filter(|model| !model.is_empty()).ok_or(ApiError::Empty("model"))?;
        let input = input.filter(|input| input.get() != "null").ok_or(ApiError::Empty("input"))?;
        let mut ignored = headers.ignored;
        ignored.extend(without_effect(&outer, "")?);

        let read_input = || {
            let mut body = Body::scan(input.get().as_bytes())?;
            let input: I = body.read()?;
            Ok((input, without_effect(&body, "input.")?))
        };
        let (input, more_ignored) = read_input().map_err(|error| below("input", error))?;
        ignored.extend(more_ignored);

        let parameters = parameters.as_deref().map(RawValue::get).filter(|text| *text != "null");
        let read_parameters = || {
            let mut body = Body::scan(parameters.unwrap_or("{}").as_bytes())?;
            let parameters: P = body.read()?;
            let fields: F = body.read()?;
            let Strictness { strict_params } = body.read()?;
            Ok((parameters, fields, strict_params, without_effect(&body, "parameters.")?))
        };
        let read = read_parameters().map_err(|error| below("parameters", error));
        let (parameters, fields, strict, more_ignored) = read?;
        ignored.extend(more_ignored);
        refuse_ignored(&ignored, strict)?;
        let (is_stream, num_bytes) = (headers.is_stream, bytes.len());
        Ok(Self {
            model,
            input,
            parameters,
            fields,
            ignored,
            strict,
            is_stream,
            num_bytes,
            _permit: permit,
        })
    }
}

/// Fields that no type read so far knows; an error if one of them must have an effect.
fn without_effect(body: &Body<'_>, parent: &str) -> Result<Vec<String>, ApiError> {
    let mut names = Vec::new();
    for field in body.unknown() {
        if is_ignored_parameter(&field.name, field.is_null, field.is_neutral)? {
            names.push(format!("{parent}{}", field.name));
        }
    }
    Ok(names)
}

/// The error, said of a field below `parent`.
fn below(parent: &str, error: ApiError) -> ApiError {
    let ApiError::Invalid { message, param } = error else { return error };
    let (param, message) = match param {
        None => (parent.to_owned(), format!("`{parent}`: {message}")),
        Some(param) => {
            let path = format!("{parent}.{param}");
            let message = match message.strip_prefix(&format!("`{param}`")) {
                Some(flaw) => format!("`{path}`{flaw}"),
                None => message,
            };
            (path, message)
        }
    };
    ApiError::Invalid { message, param: Some(param) }
}

/// What the headers of a request say.
struct Headers {
    is_stream: bool,
    ignored: Vec<String>,
}

impl Headers {
    fn check(headers: &HeaderMap) -> Result<Self, ApiError> {
        let value = |name: &str| {
            let value = headers.get(name).and_then(|value| value.to_str().ok());
            value.map(str::trim).filter(|value| !is_off(value))
        };
        if let Some((name, advice)) = HOSTED.iter().find(|(name, _)| value(name).is_some()) {
            let message = format!("`{name}`: {advice}");
            return Err(ApiError::Invalid { message, param: Some((*name).to_owned()) });
        }
        let accepts = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let is_stream = value(SSE).is_some()
            || accepts.into_iter().any(|value| value.contains("text/event-stream"));
        // Nothing is inspected here, so nothing is ever withheld.
        let ignored = value(DATA_INSPECTION).map(|_| DATA_INSPECTION.to_owned());
        Ok(Self { is_stream, ignored: ignored.into_iter().collect() })
    }
}

/// Whether the value of a header asks for nothing.
fn is_off(value: &str) -> bool {
    ["", "disable", "false", "null", "{}", "[]"].iter().any(|off| off.eq_ignore_ascii_case(value))
}
