//! Items of a conversation become messages.

use serde_json::{Value, json};

use crate::chat::converted::{Origin, message};
use crate::chat::fields::Fields;
use crate::chat::prompt::PromptError;
use crate::openai::message::{ChatMessage, Content, FunctionCall, Role, ToolCall};
use crate::openai::responses::{Input, ResponsesRequest};

/// The items that a request adds to the conversation, each with a type and an id made of `suffix`.
pub fn own_items(request: &ResponsesRequest, suffix: &str) -> Vec<Value> {
    let mut items = match &request.input {
        None => Vec::new(),
        Some(Input::Items(items)) => items.clone(),
        Some(Input::Text(text)) => {
            let part = json!({"type": "input_text", "text": text});
            vec![json!({"type": "message", "role": "user", "content": [part]})]
        }
    };
    for (index, item) in items.iter_mut().enumerate() {
        let Value::Object(fields) = item else { continue };
        let kind = fields.get("type").and_then(Value::as_str).unwrap_or("message").to_owned();
        let prefix = match kind.as_str() {
            "message" => "msg",
            "function_call" => "fc",
            "function_call_output" => "fco",
            _ => "rs",
        };
        if let Some(Value::String(text)) = fields.get("content").filter(|_| kind == "message") {
            let is_output = fields.get("role").is_some_and(|role| role == "assistant");
            let part_type = if is_output { "output_text" } else { "input_text" };
            let part = json!({"type": part_type, "text": text});
            fields.insert("content".into(), json!([part]));
        }
        fields.entry("type").or_insert_with(|| kind.into());
        fields.entry("id").or_insert_with(|| format!("{prefix}_{suffix}i{index:03}").into());
    }
    items
}

/// Messages under construction.
#[derive(Default)]
pub(super) struct Conversation {
    pub(super) messages: Vec<ChatMessage>,
    pub(super) origins: Vec<Origin>,
    /// What the model thought before its next message.
    thought: Option<String>,
}

impl Conversation {
    pub(super) fn push(&mut self, message: ChatMessage, path: impl Into<String>) {
        self.messages.push(message);
        self.origins.push(Origin::at(path));
    }

    /// Appends an item of the input.
    pub(super) fn push_item(&mut self, item: &Value, path: &str) -> Result<(), PromptError> {
        let fields = Fields::of(item, path)?;
        match fields.text("type")?.unwrap_or("message") {
            "message" => self.push_message(&fields),
            "function_call" => self.push_call(&fields),
            "function_call_output" => self.push_result(&fields),
            "reasoning" => self.push_reasoning(&fields),
            other => Err(fields.invalid(
                "type",
                format!(
                    "items of type `{other}` are not supported: use `message`, `function_call`, \
                     `function_call_output` or `reasoning`"
                ),
            )),
        }
    }

    fn push_message(&mut self, fields: &Fields<'_>) -> Result<(), PromptError> {
        let role = match fields.require_text("role")? {
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "system" => Role::System,
            "developer" => Role::Developer,
            _ => {
                let flaw = "expected `user`, `assistant`, `system` or `developer`";
                return Err(fields.invalid("role", flaw));
            }
        };
        let content = content(fields, "content")?;
        let mut next = message(role, Some(content));
        if role == Role::Assistant {
            next.reasoning_content = self.thought.take();
        }
        self.push(next, fields.path());
        Ok(())
    }

    /// Calls belong to the assistant's message before them.
    fn push_call(&mut self, fields: &Fields<'_>) -> Result<(), PromptError> {
        let call = ToolCall {
            id: Some(fields.require_text("call_id")?.to_owned()),
            function: FunctionCall {
                name: fields.require_text("name")?.to_owned(),
                arguments: Some(fields.require_text("arguments")?.into()),
            },
        };
        let thought = self.thought.take();
        match self.messages.last_mut().filter(|last| last.role == Role::Assistant) {
            Some(last) if thought.is_none() => {
                last.tool_calls.get_or_insert_default().push(call);
            }
            _ => {
                let mut next = message(Role::Assistant, None);
                next.tool_calls = Some(vec![call]);
                next.reasoning_content = thought;
                self.push(next, fields.path());
            }
        }
        Ok(())
    }

    fn push_result(&mut self, fields: &Fields<'_>) -> Result<(), PromptError> {
        let id = fields.require_text("call_id")?.to_owned();
        let mut next = message(Role::Tool, Some(content(fields, "output")?));
        next.tool_call_id = Some(id);
        self.push(next, fields.path());
        Ok(())
    }

    fn push_reasoning(&mut self, fields: &Fields<'_>) -> Result<(), PromptError> {
        let mut thought = String::new();
        for name in ["content", "summary"] {
            for (index, part) in fields.list(name)?.unwrap_or_default().iter().enumerate() {
                let part = Fields::of(part, format!("{}.{name}[{index}]", fields.path()))?;
                let text = part.require_text("text")?;
                if name == "content" {
                    thought.push_str(text);
                }
            }
        }
        if !thought.is_empty() {
            self.thought.get_or_insert_default().push_str(&thought);
        }
        Ok(())
    }
}

/// Text, or parts that the template's side reads.
fn content(fields: &Fields<'_>, name: &str) -> Result<Content, PromptError> {
    match fields.require(name)? {
        Value::String(text) => Ok(Content::Text(text.clone())),
        Value::Array(parts) => {
            for (index, part) in parts.iter().enumerate() {
                check_part(part, &format!("{}.{name}[{index}]", fields.path()))?;
            }
            Ok(Content::Parts(parts.clone()))
        }
        _ => Err(fields.invalid(name, "expected a string or a list of parts")),
    }
}

fn check_part(part: &Value, path: &str) -> Result<(), PromptError> {
    let part = Fields::of(part, path)?;
    let key = match part.require_text("type")? {
        "input_text" | "output_text" | "text" => "text",
        "refusal" => "refusal",
        other => {
            let flaw = format!("`{other}` is not supported: this model reads only text");
            return Err(part.invalid("type", flaw));
        }
    };
    part.require_text(key).map(|_| ())
}
