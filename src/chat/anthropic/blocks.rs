//! Messages made of content blocks become messages of a chat.

use serde_json::{Value, json};

use crate::anthropic::{InputContent, InputMessage, InputRole};
use crate::chat::converted::{Origin, message};
use crate::chat::fields::Fields;
use crate::chat::prompt::PromptError;
use crate::openai::message::{ChatMessage, Content, FunctionCall, Role, ToolCall};

/// Messages under construction.
#[derive(Default)]
pub(super) struct Conversation {
    pub(super) messages: Vec<ChatMessage>,
    pub(super) origins: Vec<Origin>,
}

/// Text parts and where they came from.
#[derive(Default)]
struct Parts {
    values: Vec<Value>,
    paths: Vec<String>,
}

impl Parts {
    fn push(&mut self, block: &Fields<'_>) -> Result<(), PromptError> {
        let mut part = json!({"type": "text", "text": block.require_text("text")?});
        if let Some(control) = block.get("cache_control") {
            part["cache_control"] = control.clone();
        }
        self.values.push(part);
        self.paths.push(block.path().to_owned());
        Ok(())
    }
}

impl Conversation {
    fn push(&mut self, mut message: ChatMessage, path: &str, parts: Parts) {
        if !parts.values.is_empty() {
            message.content = Some(Content::Parts(parts.values));
        }
        self.messages.push(message);
        self.origins.push(Origin { parts: parts.paths, ..Origin::at(path) });
    }

    /// Appends the system prompt.
    pub(super) fn push_system(&mut self, content: &InputContent) -> Result<(), PromptError> {
        let next = |content| message(Role::System, content);
        match content {
            InputContent::Text(text) => {
                let content = Some(Content::Text(text.clone()));
                self.push(next(content), "system", Parts::default());
            }
            InputContent::Blocks(blocks) => {
                let mut parts = Parts::default();
                for (index, block) in blocks.iter().enumerate() {
                    let block = Fields::of(block, format!("system[{index}]"))?;
                    match block.require_text("type")? {
                        "text" => parts.push(&block)?,
                        other => return Err(unsupported(&block, other)),
                    }
                }
                if !parts.values.is_empty() {
                    self.push(next(None), "system", parts);
                }
            }
        }
        Ok(())
    }

    /// Appends the message with this index.
    pub(super) fn push_message(
        &mut self,
        index: usize,
        input: &InputMessage,
    ) -> Result<(), PromptError> {
        let path = format!("messages[{index}]");
        let role = match input.role {
            InputRole::User => Role::User,
            InputRole::Assistant => Role::Assistant,
        };
        let blocks = match &input.content {
            InputContent::Text(text) => {
                let content = Some(Content::Text(text.clone()));
                self.push(message(role, content), &path, Parts::default());
                return Ok(());
            }
            InputContent::Blocks(blocks) => blocks,
        };
        if blocks.is_empty() {
            let flaw = "must hold at least one block";
            return Err(PromptError::invalid(format!("{path}.content"), flaw));
        }
        let blocks: Result<Vec<Fields<'_>>, PromptError> = blocks
            .iter()
            .enumerate()
            .map(|(block, value)| Fields::of(value, format!("{path}.content[{block}]")))
            .collect();
        match input.role {
            InputRole::User => self.push_user(&path, &blocks?),
            InputRole::Assistant => self.push_assistant(&path, &blocks?),
        }
    }

    /// Results of tools are messages of their own in chats.
    fn push_user(&mut self, path: &str, blocks: &[Fields<'_>]) -> Result<(), PromptError> {
        let mut parts = Parts::default();
        for block in blocks {
            match block.require_text("type")? {
                "text" => parts.push(block)?,
                "tool_result" => {
                    if !parts.values.is_empty() {
                        let parts = std::mem::take(&mut parts);
                        self.push(message(Role::User, None), path, parts);
                    }
                    self.push_result(block)?;
                }
                other => return Err(unsupported(block, other)),
            }
        }
        if !parts.values.is_empty() {
            self.push(message(Role::User, None), path, parts);
        }
        Ok(())
    }

    fn push_result(&mut self, block: &Fields<'_>) -> Result<(), PromptError> {
        let id = block.require_text("tool_use_id")?.to_owned();
        block.flag("is_error")?;
        let mut parts = Parts::default();
        let mut next = message(Role::Tool, Some(Content::Text(String::new())));
        match block.get("content") {
            None => {}
            Some(Value::String(text)) => next.content = Some(Content::Text(text.clone())),
            Some(Value::Array(inner)) => {
                for (index, value) in inner.iter().enumerate() {
                    let part = Fields::of(value, format!("{}.content[{index}]", block.path()))?;
                    match part.require_text("type")? {
                        "text" => parts.push(&part)?,
                        other => return Err(unsupported(&part, other)),
                    }
                }
            }
            Some(_) => return Err(block.invalid("content", "expected a string or a list")),
        }
        next.tool_call_id = Some(id);
        next.cache_control = block.get("cache_control").cloned();
        self.push(next, block.path(), parts);
        Ok(())
    }

    fn push_assistant(&mut self, path: &str, blocks: &[Fields<'_>]) -> Result<(), PromptError> {
        let mut parts = Parts::default();
        let mut next = message(Role::Assistant, None);
        for block in blocks {
            match block.require_text("type")? {
                "text" => parts.push(block)?,
                "thinking" => next
                    .reasoning_content
                    .get_or_insert_default()
                    .push_str(block.require_text("thinking")?),
                // Nobody here could read it.
                "redacted_thinking" => {}
                "tool_use" => {
                    let input = block.require("input")?;
                    if !input.is_object() {
                        return Err(block.invalid("input", "expected an object"));
                    }
                    next.tool_calls.get_or_insert_default().push(ToolCall {
                        id: Some(block.require_text("id")?.to_owned()),
                        function: FunctionCall {
                            name: block.require_text("name")?.to_owned(),
                            arguments: Some(input.clone()),
                        },
                    });
                    if let Some(control) = block.get("cache_control") {
                        next.cache_control = Some(control.clone());
                    }
                }
                other => return Err(unsupported(block, other)),
            }
        }
        self.push(next, path, parts);
        Ok(())
    }
}

fn unsupported(block: &Fields<'_>, kind: &str) -> PromptError {
    block.invalid("type", format!("blocks of type `{kind}` are not supported here"))
}
