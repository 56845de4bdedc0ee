//! Prefixes that a client asks to keep in the cache: where its marks are in the prompt.
//!
//! Marks are `cache_control` of Anthropic and DashScope, and `prompt_cache_breakpoint` with
//! `prompt_cache_options` of OpenAI. They sit in messages and tools, and a template may do anything
//! with those; so a mark's place is found by changing the text there, or by adding a tool behind it,
//! and looking where the rendered prompt begins to differ.

use std::time::Duration;

use serde_json::{Value, json};

use crate::chat::model::ServedModel;
use crate::chat::prompt::PromptError;
use crate::engine::request::Pin;
use crate::openai::chat::{ChatCompletionRequest, PromptCacheOptions};
use crate::openai::message::{ChatMessage, Content};
use crate::text::TokenId;

/// As many marks as OpenAI, Anthropic and DashScope allow.
const MAX_MARKS: usize = 4;
/// How long a prefix is kept that `cache_control` marks.
const DEFAULT_TTL: Duration = Duration::from_secs(5 * 60);
/// How long a prefix is kept that `prompt_cache_breakpoint` or `prompt_cache_options` mark.
const DEFAULT_OPTIONS_TTL: Duration = Duration::from_secs(30 * 60);
/// Longest time a prefix is kept.
const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    place: Place,
    ttl: Duration,
}

/// What a mark is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Tool(usize),
    Message(usize),
    Part { message: usize, part: usize },
}

/// What to keep of the prompt, which was rendered to a text and encoded to tokens. `tools` are the
/// definitions that it shows.
pub(super) fn pins(
    request: &ChatCompletionRequest,
    tools: Option<&Value>,
    (text, tokens): (&str, &[TokenId]),
    model: &ServedModel,
    render: impl Fn(&[ChatMessage], Option<&Value>) -> Result<String, PromptError>,
) -> Result<Vec<Pin>, PromptError> {
    let marks = marks(request)?;
    let mut pins = Vec::new();
    for mark in marks {
        let changed = match mark.place {
            Place::Tool(index) => match tools {
                Some(tools) => render(&request.messages, Some(&with_other_tool(tools, index)))?,
                // They were not to be shown.
                None => continue,
            },
            Place::Message(message) => render(&with_mark(&request.messages, message, None), tools)?,
            Place::Part { message, part } => {
                render(&with_mark(&request.messages, message, Some(part)), tools)?
            }
        };
        let num_bytes = common_prefix(text, &changed);
        // A template that leaves the marked text out has no place for the mark.
        if num_bytes < text.len() || num_bytes < changed.len() {
            let num_tokens = tokens_within(tokens, num_bytes, model);
            pins.push(Pin { num_tokens, ttl: mark.ttl });
        }
    }
    Ok(pins)
}

fn marks(request: &ChatCompletionRequest) -> Result<Vec<Mark>, PromptError> {
    let options = request.prompt_cache_options.as_ref();
    let options_ttl = options_ttl(options)?;
    let mut marks = Vec::new();
    for (index, tool) in request.tools.iter().flatten().enumerate() {
        let at = format!("tools[{index}]");
        let own = cache_control_ttl(tool.get("cache_control"), &at)?;
        let function = tool.get("function").and_then(|function| function.get("cache_control"));
        let ttl = own.max(cache_control_ttl(function, &format!("{at}.function"))?);
        marks.extend(ttl.map(|ttl| Mark { place: Place::Tool(index), ttl }));
    }
    for (message, content) in request.messages.iter().enumerate() {
        let at = format!("messages[{message}]");
        if let Some(Content::Parts(parts)) = &content.content {
            for (part, value) in parts.iter().enumerate() {
                let ttl = part_ttl(value, &format!("{at}.content[{part}]"), options_ttl)?;
                marks.extend(ttl.map(|ttl| Mark { place: Place::Part { message, part }, ttl }));
            }
        }
        let ttl = cache_control_ttl(content.cache_control.as_ref(), &at)?;
        marks.extend(ttl.map(|ttl| Mark { place: Place::Message(message), ttl }));
    }
    if MAX_MARKS < marks.len() {
        let is_in_tools = matches!(marks[MAX_MARKS].place, Place::Tool(_));
        return Err(PromptError::invalid(
            if is_in_tools { "tools" } else { "messages" },
            format!("at most {MAX_MARKS} marks can be kept in the cache, got {}", marks.len()),
        ));
    }
    if is_implicit(options)?
        && let Some(last) = request.messages.len().checked_sub(1)
    {
        marks.push(Mark { place: Place::Message(last), ttl: options_ttl });
    }
    Ok(marks)
}

/// Whether the newest message is marked without a mark.
fn is_implicit(options: Option<&PromptCacheOptions>) -> Result<bool, PromptError> {
    let Some(options) = options else { return Ok(false) };
    match options.mode.as_deref() {
        None | Some("implicit") => Ok(true),
        Some("explicit") => Ok(false),
        Some(other) => Err(PromptError::invalid(
            "prompt_cache_options.mode",
            format!("must be `implicit` or `explicit`, got `{other}`"),
        )),
    }
}

fn options_ttl(options: Option<&PromptCacheOptions>) -> Result<Duration, PromptError> {
    let ttl = options.and_then(|options| options.ttl.as_deref());
    ttl.map_or(Ok(DEFAULT_OPTIONS_TTL), |ttl| parse_ttl(ttl, "prompt_cache_options.ttl"))
}

fn part_ttl(
    part: &Value,
    at: &str,
    options_ttl: Duration,
) -> Result<Option<Duration>, PromptError> {
    let by_control = cache_control_ttl(part.get("cache_control"), at)?;
    let breakpoint = part.get("prompt_cache_breakpoint").filter(|value| !value.is_null());
    let Some(breakpoint) = breakpoint else { return Ok(by_control) };
    match breakpoint.as_object().map(|fields| fields.get("mode").map(Value::as_str)) {
        Some(None | Some(Some("explicit"))) => Ok(by_control.max(Some(options_ttl))),
        _ => Err(PromptError::invalid(
            format!("{at}.prompt_cache_breakpoint"),
            "expected an object whose `mode` is `explicit`",
        )),
    }
}

fn cache_control_ttl(control: Option<&Value>, at: &str) -> Result<Option<Duration>, PromptError> {
    let Some(control) = control.filter(|control| !control.is_null()) else { return Ok(None) };
    if control.get("type").and_then(Value::as_str) != Some("ephemeral") {
        return Err(PromptError::invalid(
            format!("{at}.cache_control.type"),
            "must be `ephemeral`",
        ));
    }
    let param = format!("{at}.cache_control.ttl");
    match control.get("ttl") {
        None | Some(Value::Null) => Ok(Some(DEFAULT_TTL)),
        Some(Value::String(ttl)) => parse_ttl(ttl, &param).map(Some),
        Some(_) => Err(PromptError::invalid(param, "expected a string such as `5m`")),
    }
}

/// A time such as `30s`, `5m` or `1h`.
fn parse_ttl(ttl: &str, param: &str) -> Result<Duration, PromptError> {
    let unit = match ttl.as_bytes().last() {
        Some(b's') => Some(1),
        Some(b'm') => Some(60),
        Some(b'h') => Some(3600),
        _ => None,
    };
    let number = unit.and_then(|_| ttl[..ttl.len() - 1].parse::<u32>().ok());
    let time = unit
        .zip(number)
        .map(|(unit, number)| Duration::from_secs(u64::from(number).saturating_mul(unit)));
    time.filter(|time| !time.is_zero() && *time <= MAX_TTL).ok_or_else(|| {
        PromptError::invalid(
            param,
            format!("must be a time such as `5m` or `1h`, at most `24h`, got `{ttl}`"),
        )
    })
}

/// The definitions with another one behind the marked one.
fn with_other_tool(tools: &Value, index: usize) -> Value {
    let mut tools = tools.as_array().cloned().unwrap_or_default();
    let mut name = String::new();
    append_other(&mut name);
    let parameters = json!({"type": "object", "properties": {}});
    let function = json!({"name": name, "description": "", "parameters": parameters});
    let at = tools.len().min(index + 1);
    tools.insert(at, json!({"type": "function", "function": function}));
    tools.into()
}

/// The messages with other text behind the mark.
fn with_mark(messages: &[ChatMessage], message: usize, part: Option<usize>) -> Vec<ChatMessage> {
    let mut messages = messages.to_vec();
    match (&mut messages[message].content, part) {
        (Some(Content::Text(text)), _) => append_other(text),
        (Some(Content::Parts(parts)), part) => {
            let index = part.unwrap_or(parts.len().saturating_sub(1));
            match parts.get_mut(index) {
                Some(Value::String(text)) => append_other(text),
                Some(Value::Object(fields)) => {
                    for key in ["text", "refusal"] {
                        if let Some(Value::String(text)) = fields.get_mut(key) {
                            append_other(text);
                        }
                    }
                }
                _ => {}
            }
        }
        (None, _) => {}
    }
    messages
}

/// Text that no prompt has twice in a row by chance, and no template strips or escapes.
fn append_other(text: &mut String) {
    text.push_str("\u{10fff0}x");
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count()
}

/// How many tokens are whole within the first bytes.
fn tokens_within(tokens: &[TokenId], num_bytes: usize, model: &ServedModel) -> usize {
    let mut end = 0;
    let ends = tokens.iter().map(|id| {
        end += model.tokenizer.token_bytes(*id).map_or(0, <[u8]>::len);
        end
    });
    ends.take_while(|end| *end <= num_bytes).count()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request(body: Value) -> ChatCompletionRequest {
        serde_json::from_value(body).expect("a request")
    }

    fn marks_of(body: Value) -> Result<Vec<(usize, Option<usize>, u64)>, String> {
        let marks = marks(&request(body)).map_err(|error| error.to_string())?;
        let place = |mark: &Mark| match mark.place {
            Place::Tool(tool) => (100 + tool, None, mark.ttl.as_secs()),
            Place::Message(message) => (message, None, mark.ttl.as_secs()),
            Place::Part { message, part } => (message, Some(part), mark.ttl.as_secs()),
        };
        Ok(marks.iter().map(place).collect())
    }

    #[test]
    fn marks_are_found_where_clients_put_them() {
        let body = json!({"model": "m", "messages": [
            {"role": "system", "content": [
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "b", "prompt_cache_breakpoint": {"mode": "explicit"}},
            ]},
            {"role": "user", "content": "c", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ]});
        let expected = vec![(0, Some(0), 300), (0, Some(1), 1800), (1, None, 3600)];
        assert_eq!(marks_of(body.clone()), Ok(expected.clone()));
        let mut implicit = body;
        implicit["prompt_cache_options"] = json!({"ttl": "10s"});
        let expected = vec![(0, Some(0), 300), (0, Some(1), 10), (1, None, 3600), (1, None, 10)];
        assert_eq!(marks_of(implicit.clone()), Ok(expected.clone()));
        implicit["prompt_cache_options"] = json!({"mode": "explicit"});
        assert_eq!(marks_of(implicit).map(|marks| marks.len()), Ok(3));
        assert_eq!(marks_of(json!({"model": "m", "messages": []})), Ok(Vec::new()));
        let control = json!({"type": "ephemeral"});
        let body = json!({"model": "m", "messages": [], "tools": [
            {"function": {"name": "a"}},
            {"function": {"name": "b", "cache_control": control}},
            {"function": {"name": "c"}, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ]});
        assert_eq!(marks_of(body), Ok(vec![(101, None, 300), (102, None, 3600)]));
        let tool = json!({"function": {"name": "a"}, "cache_control": control});
        let error = marks_of(json!({"model": "m", "messages": [], "tools": vec![tool; 5]}));
        assert!(error.expect_err("too many").starts_with("`tools`"));
    }

    #[test]
    fn what_is_not_a_mark_is_refused_by_name() {
        let with = |control: Value| {
            let part = json!({"type": "text", "text": "a", "cache_control": control});
            json!({"model": "m", "messages": [{"role": "user", "content": [part]}]})
        };
        for (control, param) in [
            (json!({"type": "persistent"}), "type"),
            (json!({}), "type"),
            (json!("ephemeral"), "type"),
            (json!({"type": "ephemeral", "ttl": "5"}), "ttl"),
            (json!({"type": "ephemeral", "ttl": "0m"}), "ttl"),
            (json!({"type": "ephemeral", "ttl": "25h"}), "ttl"),
            (json!({"type": "ephemeral", "ttl": 5}), "ttl"),
        ] {
            let error = marks_of(with(control)).expect_err("refused");
            let expected = format!("`messages[0].content[0].cache_control.{param}`");
            assert!(error.starts_with(&expected), "{error}");
        }
        let part = json!({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}});
        let parts = vec![part; 5];
        let body = json!({"model": "m", "messages": [{"role": "user", "content": parts}]});
        assert!(marks_of(body).is_err());
    }
}
