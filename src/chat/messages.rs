//! Turns the wire's messages and tools into the plain JSON that chat templates read.

use serde_json::{Map, Value, json};

use crate::chat::prompt::PromptError;
use crate::openai::message::{ChatMessage, Content, FunctionCall, Role};

/// Most values in the arguments of all tool calls that came as text: a tree of JSON takes up to a
/// hundred times the memory of its text.
const MAX_ARGUMENT_VALUES: usize = 200_000;

/// The messages as a template sees them: parts flattened to text, roles of the model's vocabulary,
/// tool-call arguments as objects.
pub fn template_messages(messages: &[ChatMessage]) -> Result<Value, PromptError> {
    if messages.is_empty() {
        return Err(PromptError::invalid("messages", "must hold at least one message"));
    }
    let calls = messages.iter().flat_map(|message| message.tool_calls.iter().flatten());
    let functions = calls.map(|call| &call.function);
    let functions = functions.chain(messages.iter().filter_map(|m| m.function_call.as_ref()));
    let num_values: usize = functions.map(max_argument_values).sum();
    if MAX_ARGUMENT_VALUES < num_values {
        return Err(PromptError::invalid(
            "messages",
            format!("the arguments of the tool calls hold more than {MAX_ARGUMENT_VALUES} values"),
        ));
    }
    let rendered: Result<Vec<Value>, _> = messages
        .iter()
        .enumerate()
        .map(|(index, message)| template_message(index, message))
        .collect();
    rendered.map(Value::Array)
}

/// Whether the last message is the beginning of the answer, as `partial` says.
pub fn is_partial(messages: &[ChatMessage]) -> Result<bool, PromptError> {
    let marked = messages.iter().rposition(|message| message.partial == Some(true));
    let Some(index) = marked else { return Ok(false) };
    let flaw = if index + 1 < messages.len() {
        "only the last message can be continued"
    } else if messages[index].role != Role::Assistant {
        "only a message of the assistant can be continued"
    } else {
        return Ok(true);
    };
    Err(PromptError::invalid(format!("messages[{index}].partial"), flaw))
}

/// At most how many values parsing the arguments would yield, without doing so.
fn max_argument_values(call: &FunctionCall) -> usize {
    let Some(Value::String(text)) = &call.arguments else { return 0 };
    text.bytes().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count()
}

fn template_message(index: usize, message: &ChatMessage) -> Result<Value, PromptError> {
    let mut out = Map::new();
    let role = match message.role {
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool | Role::Function => "tool",
    };
    out.insert("role".into(), role.into());
    if message.content.is_none() && message.role != Role::Assistant {
        let param = format!("messages[{index}].content");
        return Err(PromptError::invalid(
            param,
            format!("is missing in a message of role `{role}`"),
        ));
    }
    out.insert("content".into(), flatten_content(index, message.content.as_ref())?.into());
    let optional = [
        ("name", &message.name),
        ("tool_call_id", &message.tool_call_id),
        ("reasoning_content", &message.reasoning_content),
    ];
    for (key, value) in optional {
        if let Some(value) = value {
            out.insert(key.into(), value.as_str().into());
        }
    }
    if message.role == Role::Assistant {
        let calls = template_tool_calls(message);
        if !calls.is_empty() {
            out.insert("tool_calls".into(), calls.into());
        }
    }
    Ok(Value::Object(out))
}

/// Text of the content; several text parts are joined by newlines.
fn flatten_content(index: usize, content: Option<&Content>) -> Result<String, PromptError> {
    let parts = match content {
        None => return Ok(String::new()),
        Some(Content::Text(text)) => return Ok(text.clone()),
        Some(Content::Parts(parts)) => parts,
    };
    let texts: Result<Vec<&str>, PromptError> = parts
        .iter()
        .enumerate()
        .map(|(part_index, part)| {
            part_text(part).map_err(|message| {
                PromptError::invalid(format!("messages[{index}].content[{part_index}]"), message)
            })
        })
        .collect();
    Ok(texts?.join("\n"))
}

fn part_text(part: &Value) -> Result<&str, String> {
    if let Value::String(text) = part {
        return Ok(text);
    }
    let kind = part.get("type").and_then(Value::as_str);
    let key = match kind {
        Some("text" | "input_text" | "output_text") => "text",
        Some("refusal") => "refusal",
        Some(other) => {
            return Err(format!(
                "content parts of type `{other}` are not supported: this model reads only text"
            ));
        }
        None => return Err("expected a content part with a string `type`".into()),
    };
    part.get(key)
        .and_then(Value::as_str)
        .ok_or_else(|| format!("a part of this type needs a string `{key}`"))
}

fn template_tool_calls(message: &ChatMessage) -> Vec<Value> {
    let calls = message.tool_calls.iter().flatten();
    let mut out: Vec<Value> = calls
        .map(|call| {
            let mut value = json!({"type": "function", "function": template_call(&call.function)});
            if let Some(id) = &call.id {
                value["id"] = id.as_str().into();
            }
            value
        })
        .collect();
    if let Some(call) = &message.function_call {
        out.push(json!({"type": "function", "function": template_call(call)}));
    }
    out
}

/// Templates print arguments as JSON, so a string that holds an object becomes the object.
fn template_call(call: &FunctionCall) -> Value {
    let arguments = match &call.arguments {
        None | Some(Value::Null) => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(object @ Value::Object(_)) => object,
            _ => text.as_str().into(),
        },
        Some(other) => other.clone(),
    };
    json!({"name": call.name, "arguments": arguments})
}
