//! A request of another protocol as the chat request it amounts to.
//!
//! There is one way to prepare a request. **Invariant:** what it finds wrong is said of the field
//! that the client sent, not of the field that this became.

use crate::chat::prompt::{Prepared, PromptContext, PromptError, prepare_chat};
use crate::openai::chat::ChatCompletionRequest;
use crate::openai::generation::GenerationFields;
use crate::openai::message::{ChatMessage, Content, Role};

/// A chat request, and where its parts came from.
pub struct Converted {
    /// What to generate for.
    pub chat: ChatCompletionRequest,
    /// How to.
    pub fields: GenerationFields,
    /// Fields of the original that have no effect.
    pub ignored: Vec<String>,
    /// One for each of the chat's messages.
    pub(super) origins: Vec<Origin>,
    /// Names of fields, ours and the client's, the longer before their beginnings.
    pub(super) renamed: &'static [(&'static str, &'static str)],
    /// What the client has all other fields below. Tools then look as they do in chats.
    pub(super) parent: Option<&'static str>,
}

/// Where a message came from.
#[derive(Clone, Debug, Default)]
pub(super) struct Origin {
    pub(super) path: String,
    /// Where the parts of its content came from, if not from there.
    pub(super) parts: Vec<String>,
}

impl Origin {
    pub(super) fn at(path: impl Into<String>) -> Self {
        Self { path: path.into(), parts: Vec::new() }
    }
}

impl Converted {
    /// Prepares the request.
    pub fn prepare(&self, context: &PromptContext<'_>) -> Result<Prepared, PromptError> {
        prepare_chat(&self.chat, &self.fields, context).map_err(|error| self.renamed_error(error))
    }

    /// Names of all fields without effect: those of the original, and those of the chat.
    pub fn all_ignored(&self, prepared: &Prepared) -> Vec<String> {
        let mut names = self.ignored.clone();
        for name in &prepared.ignored {
            let name = self.client_name(name);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// The error, said of the client's field.
    pub(super) fn renamed_error(&self, error: PromptError) -> PromptError {
        match error {
            PromptError::Invalid { param, message } => {
                let name = self.client_name(&param);
                let message = match message.strip_prefix(&format!("`{param}`")) {
                    Some(flaw) => format!("`{name}`{flaw}"),
                    None => message,
                };
                PromptError::Invalid { param: name, message }
            }
            PromptError::TooLong { param, message } => {
                let exact = self.renamed.iter().find(|(ours, _)| *ours == param);
                let message = ["messages", "max_completion_tokens"].into_iter().fold(
                    message,
                    |message, ours| match self.renamed.iter().find(|(known, _)| *known == ours) {
                        Some((_, theirs)) => message.replace(ours, theirs),
                        None => message,
                    },
                );
                let theirs = exact.map_or(param, |(_, theirs)| theirs);
                let message = message.replace(&format!("`{param}`"), &format!("`{theirs}`"));
                PromptError::TooLong { param: theirs, message }
            }
            error => error,
        }
    }

    fn client_name(&self, param: &str) -> String {
        if let Some(name) = self.message_name(param) {
            return name;
        }
        // Definitions of tools are a level deeper in chats.
        let tool = param.strip_prefix("tools[").filter(|_| self.parent.is_none());
        if let Some((index, field)) = tool.and_then(|rest| rest.split_once("].function")) {
            let field = field.strip_prefix(".parameters").map_or_else(
                || field.to_owned(),
                |rest| format!(".{}{rest}", self.parameters_name()),
            );
            return format!("tools[{index}]{field}");
        }
        for (ours, theirs) in self.renamed {
            if let Some(rest) = param.strip_prefix(ours)
                && (rest.is_empty() || rest.starts_with(['.', '[']))
            {
                return format!("{theirs}{rest}");
            }
        }
        match self.parent {
            Some(parent) => format!("{parent}.{param}"),
            None => param.to_owned(),
        }
    }

    fn parameters_name(&self) -> &'static str {
        let own = self.renamed.iter().find(|(ours, _)| *ours == "parameters");
        own.map_or("parameters", |(_, theirs)| theirs)
    }

    fn message_name(&self, param: &str) -> Option<String> {
        let (index, rest) = param.strip_prefix("messages[")?.split_once(']')?;
        let origin = self.origins.get(index.parse::<usize>().ok()?)?;
        let part = rest.strip_prefix(".content[").and_then(|rest| rest.split_once(']'));
        if let Some((part, rest)) = part
            && let Some(path) = part.parse().ok().and_then(|part: usize| origin.parts.get(part))
        {
            return Some(format!("{path}{rest}"));
        }
        Some(format!("{}{rest}", origin.path))
    }
}

/// A message with nothing but a role and content.
pub(super) fn message(role: Role, content: Option<Content>) -> ChatMessage {
    ChatMessage {
        role,
        content,
        name: None,
        tool_calls: None,
        tool_call_id: None,
        function_call: None,
        reasoning_content: None,
        partial: None,
        cache_control: None,
    }
}

/// Refuses fields of chats and completions that another protocol has no answer for.
pub(super) fn refuse_foreign(fields: &GenerationFields) -> Result<(), PromptError> {
    let foreign = [
        ("n", fields.n.is_some_and(|n| n != 1)),
        ("best_of", fields.best_of.is_some_and(|best_of| best_of != 1)),
        ("echo", fields.echo == Some(true)),
        ("prompt_logprobs", fields.prompt_logprobs.is_some()),
        ("return_token_ids", fields.return_token_ids == Some(true)),
    ];
    match foreign.into_iter().find(|(_, is_given)| *is_given) {
        None => Ok(()),
        Some((name, _)) => {
            Err(PromptError::invalid(name, "is not supported here: use /v1/chat/completions"))
        }
    }
}
