//! A request for a message as the chat request it amounts to.

use serde_json::{Map, Value, json};

use super::blocks::Conversation;
use crate::anthropic::{InputRole, MessagesRequest};
use crate::chat::converted::{Converted, refuse_foreign};
use crate::chat::fields::Fields;
use crate::chat::prompt::PromptError;
use crate::openai::chat::ChatCompletionRequest;
use crate::openai::generation::{GenerationFields, Stop};

/// Fields of chats and what Anthropic calls them.
const RENAMED: [(&str, &str); 9] = [
    ("parameters", "input_schema"),
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
    ("tool_choice.function.name", "tool_choice.name"),
    ("stop", "stop_sequences"),
    ("thinking_budget", "thinking.budget_tokens"),
    ("enable_thinking", "thinking"),
    ("reasoning_effort", "output_config.effort"),
    ("max_completion_tokens", "max_tokens"),
];

/// Converts a request.
///
/// # Errors
/// If a field cannot be honoured; the error names it.
pub fn convert(
    request: &MessagesRequest,
    fields: &GenerationFields,
) -> Result<Converted, PromptError> {
    refuse_foreign(fields)?;
    if request.messages.is_empty() {
        return Err(PromptError::invalid("messages", "must hold at least one message"));
    }
    let mut conversation = Conversation::default();
    if let Some(system) = &request.system {
        conversation.push_system(system)?;
    }
    for (index, message) in request.messages.iter().enumerate() {
        conversation.push_message(index, message)?;
    }
    if let Some(control) = &request.cache_control
        && let Some(last) = conversation.messages.last_mut()
    {
        last.cache_control = Some(control.clone());
    }
    let mut fields = fields.clone();
    if let Some(sequences) = &request.stop_sequences {
        if fields.stop.is_some() {
            return Err(PromptError::invalid("stop", "cannot be combined with `stop_sequences`"));
        }
        fields.stop = Some(Stop::Many(sequences.clone()));
    }
    fields.service_tier = match fields.service_tier.as_deref() {
        Some("standard_only") => None,
        None | Some("auto") => fields.service_tier,
        Some(_) => {
            return Err(PromptError::invalid("service_tier", "expected `auto` or `standard_only`"));
        }
    };
    let mut chat = ChatCompletionRequest {
        model: request.model.clone(),
        messages: conversation.messages,
        max_tokens: request.max_tokens,
        tools: request.tools.as_deref().map(tools).transpose()?,
        // An answer that the client began is continued.
        continue_final_message: request
            .messages
            .last()
            .is_some_and(|last| last.role == InputRole::Assistant)
            .then_some(true),
        ..ChatCompletionRequest::default()
    };
    set_tool_choice(&mut chat, request.tool_choice.as_ref())?;
    set_thinking(&mut chat, request.thinking.as_ref())?;
    set_output(&mut chat, &mut fields, request.output_config.as_ref())?;
    Ok(Converted {
        chat,
        fields,
        ignored: Vec::new(),
        origins: conversation.origins,
        renamed: &RENAMED,
    })
}

fn tools(tools: &[Value]) -> Result<Vec<Value>, PromptError> {
    let convert = |(index, tool): (usize, &Value)| {
        let fields = Fields::of(tool, format!("tools[{index}]"))?;
        if let Some(kind) = fields.text("type")?.filter(|kind| *kind != "custom") {
            let flaw = format!("`{kind}` is not supported: only tools of the client are");
            return Err(fields.invalid("type", flaw));
        }
        let mut function = Map::new();
        function.insert("name".into(), fields.require("name")?.clone());
        if let Some(description) = fields.get("description") {
            function.insert("description".into(), description.clone());
        }
        function.insert("parameters".into(), fields.require("input_schema")?.clone());
        if let Some(strict) = fields.get("strict") {
            function.insert("strict".into(), strict.clone());
        }
        let mut tool = json!({"type": "function", "function": function});
        if let Some(control) = fields.get("cache_control") {
            tool["cache_control"] = control.clone();
        }
        Ok(tool)
    };
    tools.iter().enumerate().map(convert).collect()
}

fn set_tool_choice(
    chat: &mut ChatCompletionRequest,
    choice: Option<&Map<String, Value>>,
) -> Result<(), PromptError> {
    let Some(choice) = choice else { return Ok(()) };
    let fields = Fields::new(choice, "tool_choice");
    chat.tool_choice = Some(match fields.require_text("type")? {
        "auto" => "auto".into(),
        "any" => "required".into(),
        "none" => "none".into(),
        "tool" => {
            let name = fields.require_text("name")?;
            json!({"type": "function", "function": {"name": name}})
        }
        _ => return Err(fields.invalid("type", "expected `auto`, `any`, `tool` or `none`")),
    });
    chat.parallel_tool_calls =
        fields.flag("disable_parallel_tool_use")?.map(|is_disabled| !is_disabled);
    Ok(())
}

fn set_thinking(
    chat: &mut ChatCompletionRequest,
    thinking: Option<&Map<String, Value>>,
) -> Result<(), PromptError> {
    let Some(thinking) = thinking else { return Ok(()) };
    let fields = Fields::new(thinking, "thinking");
    match fields.require_text("type")? {
        "disabled" => chat.enable_thinking = Some(false),
        "adaptive" => chat.enable_thinking = Some(true),
        "enabled" => {
            let budget = fields.require("budget_tokens")?.as_u64().filter(|budget| 0 < *budget);
            let Some(budget) = budget else {
                return Err(fields.invalid("budget_tokens", "must be a number of at least 1"));
            };
            if chat.max_tokens.is_some_and(|max_tokens| max_tokens <= budget) {
                return Err(fields.invalid("budget_tokens", "must be less than `max_tokens`"));
            }
            chat.enable_thinking = Some(true);
            chat.thinking_budget = Some(i64::try_from(budget).unwrap_or(i64::MAX));
        }
        _ => {
            return Err(fields.invalid("type", "expected `enabled`, `disabled` or `adaptive`"));
        }
    }
    Ok(())
}

fn set_output(
    chat: &mut ChatCompletionRequest,
    fields: &mut GenerationFields,
    config: Option<&Map<String, Value>>,
) -> Result<(), PromptError> {
    let Some(config) = config else { return Ok(()) };
    let config = Fields::new(config, "output_config");
    chat.reasoning_effort = config.text("effort")?.map(str::to_owned);
    let Some(format) = config.get("format") else { return Ok(()) };
    let format = Fields::of(format, "output_config.format")?;
    if format.require_text("type")? != "json_schema" {
        return Err(format.invalid("type", "expected `json_schema`"));
    }
    let schema = format.require("schema")?;
    if fields.response_format.is_some() {
        let flaw = "cannot be combined with `output_config.format`";
        return Err(PromptError::invalid("response_format", flaw));
    }
    fields.response_format =
        Some(json!({"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}));
    Ok(())
}
