//! A request for a response as the chat request it amounts to.

use serde_json::{Map, Value, json};

use super::items::Conversation;
use crate::chat::converted::{Converted, message, refuse_foreign};
use crate::chat::fields::Fields;
use crate::chat::options::top_count;
use crate::chat::prompt::{Prepared, PromptError};
use crate::openai::chat::{ChatCompletionRequest, ReasoningOptions};
use crate::openai::generation::GenerationFields;
use crate::openai::message::{Content, Role};
use crate::openai::responses::{Input, RequestEcho, ResponsesRequest};

const WITH_LOGPROBS: &str = "message.output_text.logprobs";
/// What may be included of things that answers here do not have, or have anyway.
const WITHOUT_EFFECT: [&str; 7] = [
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
];
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY_CHARS: usize = 64;
const MAX_METADATA_VALUE_CHARS: usize = 512;

/// Fields of chats and what responses call them.
const RENAMED: [(&str, &str); 10] = [
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("tool_choice.function.name", "tool_choice.name"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("messages", "input"),
    ("logprobs", "top_logprobs"),
    ("reasoning_effort", "reasoning.effort"),
    ("enable_thinking", "enable_thinking"),
    ("prompt", "input"),
];

/// Converts a request that follows on the items of `previous` responses.
///
/// # Errors
/// If a field cannot be honoured; the error names it.
pub fn convert(
    request: &ResponsesRequest,
    fields: &GenerationFields,
    previous: &[Value],
) -> Result<Converted, PromptError> {
    refuse_unsupported(request, fields)?;
    let mut conversation = Conversation::default();
    if let Some(instructions) = &request.instructions {
        let content = Content::Text(instructions.clone());
        conversation.push(message(Role::System, Some(content)), "instructions");
    }
    for item in previous {
        conversation.push_item(item, "previous_response_id")?;
    }
    match &request.input {
        None => return Err(PromptError::invalid("input", "is missing")),
        Some(Input::Text(text)) => {
            let content = Content::Text(text.clone());
            conversation.push(message(Role::User, Some(content)), "input");
        }
        Some(Input::Items(items)) => {
            for (index, item) in items.iter().enumerate() {
                conversation.push_item(item, &format!("input[{index}]"))?;
            }
        }
    }
    let mut ignored = Vec::new();
    let reasoning = reasoning(request.reasoning.as_ref(), &mut ignored)?;
    let mut fields = fields.clone();
    fields.response_format = text_format(request.text.as_ref(), &mut ignored)?;
    if request.max_tool_calls.is_some() {
        ignored.push("max_tool_calls".to_owned());
    }
    let chat = ChatCompletionRequest {
        model: request.model.clone(),
        messages: conversation.messages,
        max_completion_tokens: request.max_output_tokens,
        logprobs: wants_logprobs(request)?.then_some(true),
        top_logprobs: request.top_logprobs,
        tools: request.tools.as_deref().map(tools).transpose()?,
        tool_choice: request.tool_choice.as_ref().map(tool_choice).transpose()?,
        parallel_tool_calls: request.parallel_tool_calls,
        chat_template_kwargs: request.chat_template_kwargs.clone(),
        enable_thinking: request.enable_thinking,
        thinking_budget: request.thinking_budget,
        reasoning,
        prompt_cache_options: request.prompt_cache_options.clone(),
        ..ChatCompletionRequest::default()
    };
    Ok(Converted { chat, fields, ignored, origins: conversation.origins, renamed: &RENAMED })
}

fn refuse_unsupported(
    request: &ResponsesRequest,
    fields: &GenerationFields,
) -> Result<(), PromptError> {
    refuse_foreign(fields)?;
    let unsupported = [
        ("background", request.background == Some(true), "answers are made while you wait"),
        ("conversation", request.conversation.is_some(), "use `previous_response_id`"),
        ("prompt", request.prompt.is_some(), "there are no stored prompts: use `instructions`"),
        ("response_format", fields.response_format.is_some(), "use `text.format`"),
    ];
    if let Some((name, _, advice)) = unsupported.into_iter().find(|(_, is_given, _)| *is_given) {
        return Err(PromptError::invalid(name, format!("is not supported here: {advice}")));
    }
    match request.truncation.as_deref() {
        None | Some("disabled") => {}
        Some("auto") => {
            let flaw = "`auto` is not supported: a prompt is never cut";
            return Err(PromptError::invalid("truncation", flaw));
        }
        Some(_) => return Err(PromptError::invalid("truncation", "expected `disabled`")),
    }
    if request.max_tool_calls.is_some_and(|count| count < 1) {
        return Err(PromptError::invalid("max_tool_calls", "must be at least 1"));
    }
    check_metadata(request.metadata.as_ref())
}

fn check_metadata(metadata: Option<&Map<String, Value>>) -> Result<(), PromptError> {
    let Some(metadata) = metadata else { return Ok(()) };
    if MAX_METADATA < metadata.len() {
        let flaw = format!("must hold at most {MAX_METADATA} pairs, got {}", metadata.len());
        return Err(PromptError::invalid("metadata", flaw));
    }
    for (key, value) in metadata {
        if MAX_METADATA_KEY_CHARS < key.chars().count() {
            let flaw = format!("keys must have at most {MAX_METADATA_KEY_CHARS} characters");
            return Err(PromptError::invalid("metadata", flaw));
        }
        let text = value.as_str();
        if text.is_none_or(|text| MAX_METADATA_VALUE_CHARS < text.chars().count()) {
            let flaw = format!("must be a string of at most {MAX_METADATA_VALUE_CHARS} characters");
            return Err(PromptError::invalid(format!("metadata.{key}"), flaw));
        }
    }
    Ok(())
}

fn wants_logprobs(request: &ResponsesRequest) -> Result<bool, PromptError> {
    top_count("top_logprobs", request.top_logprobs)?;
    let mut is_included = false;
    for (index, name) in request.include.iter().flatten().enumerate() {
        if name == WITH_LOGPROBS {
            is_included = true;
        } else if !WITHOUT_EFFECT.contains(&name.as_str()) {
            let flaw = "is nothing that can be included";
            return Err(PromptError::invalid(format!("include[{index}]"), flaw));
        }
    }
    Ok(is_included || request.top_logprobs.is_some_and(|count| 0 < count))
}

fn reasoning(
    reasoning: Option<&Map<String, Value>>,
    ignored: &mut Vec<String>,
) -> Result<Option<ReasoningOptions>, PromptError> {
    let Some(reasoning) = reasoning else { return Ok(None) };
    let fields = Fields::new(reasoning, "reasoning");
    for name in ["summary", "generate_summary"] {
        if fields.text(name)?.is_some() {
            ignored.push(fields.path_of(name));
        }
    }
    let effort = fields.text("effort")?.map(str::to_owned);
    Ok(effort.map(|effort| ReasoningOptions { effort: Some(effort) }))
}

fn text_format(
    text: Option<&Map<String, Value>>,
    ignored: &mut Vec<String>,
) -> Result<Option<Value>, PromptError> {
    let Some(text) = text else { return Ok(None) };
    let text = Fields::new(text, "text");
    match text.text("verbosity")? {
        None | Some("medium") => {}
        Some("low" | "high") => ignored.push("text.verbosity".to_owned()),
        Some(_) => return Err(text.invalid("verbosity", "expected `low`, `medium` or `high`")),
    }
    let Some(format) = text.get("format") else { return Ok(None) };
    let format = Fields::of(format, "text.format")?;
    let kind = format.require_text("type")?;
    if kind != "json_schema" {
        return Ok(text.get("format").cloned());
    }
    let mut schema = Map::new();
    for (name, value) in text.get("format").and_then(Value::as_object).into_iter().flatten() {
        if name != "type" {
            schema.insert(name.clone(), value.clone());
        }
    }
    Ok(Some(json!({"type": kind, "json_schema": schema})))
}

fn tools(tools: &[Value]) -> Result<Vec<Value>, PromptError> {
    let convert = |(index, tool): (usize, &Value)| {
        let fields = Fields::of(tool, format!("tools[{index}]"))?;
        let kind = fields.require_text("type")?;
        if kind != "function" {
            let flaw = format!("`{kind}` is not supported: only tools of type `function` are");
            return Err(fields.invalid("type", flaw));
        }
        let mut function = tool.clone();
        if let Value::Object(function) = &mut function {
            function.shift_remove("type");
        }
        Ok(json!({"type": kind, "function": function}))
    };
    tools.iter().enumerate().map(convert).collect()
}

fn tool_choice(choice: &Value) -> Result<Value, PromptError> {
    if !choice.is_object() {
        return Ok(choice.clone());
    }
    let fields = Fields::of(choice, "tool_choice")?;
    match fields.require_text("type")? {
        "function" => {
            let name = fields.require_text("name")?;
            Ok(json!({"type": "function", "function": {"name": name}}))
        }
        "allowed_tools" => Ok(choice.clone()),
        other => {
            let flaw = format!("`{other}` is not supported: use `function` or `allowed_tools`");
            Err(fields.invalid("type", flaw))
        }
    }
}

/// A tool with the members that clients expect of every one, and the values that were in effect.
fn described_tool(tool: &Value) -> Value {
    let mut tool = tool.clone();
    if let Value::Object(fields) = &mut tool {
        fields.entry("parameters").or_insert(Value::Null);
        fields.entry("strict").or_insert(Value::Bool(false));
    }
    tool
}

/// What the response repeats of the request.
pub fn echo(request: &ResponsesRequest, prepared: &Prepared) -> RequestEcho {
    let params = &prepared.request.params;
    let mut text = request.text.clone().unwrap_or_default();
    text.entry("format").or_insert_with(|| json!({"type": "text"}));
    let mut reasoning =
        Map::from_iter([("effort".to_owned(), Value::Null), ("summary".to_owned(), Value::Null)]);
    reasoning.extend(request.reasoning.clone().unwrap_or_default());
    RequestEcho {
        background: false,
        instructions: request.instructions.clone(),
        max_output_tokens: request.max_output_tokens,
        max_tool_calls: request.max_tool_calls,
        metadata: request.metadata.clone().unwrap_or_default(),
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        previous_response_id: request.previous_response_id.clone(),
        prompt_cache_key: request.prompt_cache_key.clone(),
        reasoning: reasoning.into(),
        safety_identifier: request.safety_identifier.clone(),
        service_tier: "default",
        store: request.store.unwrap_or(true),
        temperature: params.temperature,
        text: text.into(),
        tool_choice: request.tool_choice.clone().unwrap_or_else(|| "auto".into()),
        tools: request.tools.iter().flatten().map(described_tool).collect(),
        top_logprobs: request.top_logprobs.unwrap_or(0),
        top_p: params.top_p,
        truncation: "disabled",
        user: request.user.clone(),
    }
}
