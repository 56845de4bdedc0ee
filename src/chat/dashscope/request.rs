//! A native request as the chat request, or the text to continue, that it amounts to.

use serde_json::{Value, json};

use crate::chat::converted::{Converted, Origin, message, refuse_foreign};
use crate::chat::encoding::encode;
use crate::chat::messages::template_messages;
use crate::chat::model::Reasoning;
use crate::chat::options::top_count;
use crate::chat::prompt::{Demand, Prepared, PromptContext, PromptError, Settings};
use crate::dashscope::{Input, Parameters};
use crate::openai::chat::ChatCompletionRequest;
use crate::openai::generation::{GenerationFields, Stop};
use crate::openai::message::{ChatMessage, Content, Role};
use crate::text::TokenId;

/// From this on DashScope takes `top_k` for none.
const MAX_TOP_K: i64 = 100;

/// Our fields and where they are here, but for those below `parameters`.
const RENAMED: [(&str, &str); 4] = [
    ("messages", "input.messages"),
    ("max_completion_tokens", "parameters.max_completion_tokens"),
    ("max_tokens", "parameters.max_tokens"),
    ("prompt", "input.prompt"),
];
/// The same where the messages are made of a prompt.
const RENAMED_PROMPT: [(&str, &str); 4] = [
    ("messages", "input.prompt"),
    ("max_completion_tokens", "parameters.max_completion_tokens"),
    ("max_tokens", "parameters.max_tokens"),
    ("prompt", "input.prompt"),
];
const PARAMETERS: &str = "parameters";

/// Kinds of content that only models with eyes and ears take.
const MEDIA: [&str; 5] = ["image", "image_url", "audio", "video", "file"];

/// Which of the two ways to generate was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `text-generation`.
    Text,
    /// `multimodal-generation`, whose content is made of parts.
    Multimodal,
}

/// How an answer looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultFormat {
    /// One text.
    Text,
    /// Choices with messages.
    Message,
    /// Choices with messages whose content is made of parts.
    Parts,
}

/// A request ready for the engine, and how its answer looks.
pub struct PreparedAnswer {
    /// What to run.
    pub prepared: Prepared,
    /// Fields without effect.
    pub ignored: Vec<String>,
    /// How the answer looks.
    pub format: ResultFormat,
}

/// Prepares a generation.
///
/// # Errors
/// If a field cannot be honoured; the error names it.
pub fn prepare(
    endpoint: Endpoint,
    input: &Input,
    parameters: &Parameters,
    fields: &GenerationFields,
    context: &PromptContext<'_>,
) -> Result<PreparedAnswer, PromptError> {
    let (fields, mut ignored) = checked_fields(fields)?;
    let format = result_format(endpoint, parameters, &fields, context)?;
    if input.messages.is_some() && input.prompt.is_some() {
        let flaw = "cannot be combined with `input.messages`";
        return Err(PromptError::invalid("input.prompt", flaw));
    }
    if parameters.cache_control.is_some() {
        // Marks belong to content, where a prefix can end.
        ignored.push(below_parameters("cache_control"));
    }
    let prepared = if parameters.use_raw_prompt == Some(true) {
        prepare_raw(input, parameters, &fields, context)?
    } else {
        let (chat, origins) = chat_request(input, parameters)?;
        let renamed = if input.prompt.is_some() { &RENAMED_PROMPT } else { &RENAMED };
        let parent = Some(PARAMETERS);
        let converted = Converted { chat, fields, ignored: Vec::new(), origins, renamed, parent };
        let prepared = converted.prepare(context)?;
        ignored.extend(converted.all_ignored(&prepared));
        prepared
    };
    Ok(PreparedAnswer { prepared, ignored, format })
}

/// The tokens of what the client wrote, without a template, and each as text.
///
/// # Errors
/// If the input is neither a prompt nor messages with text.
pub fn tokenize(
    input: &Input,
    context: &PromptContext<'_>,
) -> Result<(Vec<TokenId>, Vec<String>), PromptError> {
    let texts = match (&input.messages, &input.prompt) {
        (Some(messages), None) => {
            let messages: Result<Vec<_>, _> =
                messages.iter().enumerate().map(|(index, one)| plain_message(index, one)).collect();
            let rendered = template_messages(&messages?).map_err(below_input)?;
            let content = |one: &Value| one["content"].as_str().unwrap_or_default().to_owned();
            rendered.as_array().into_iter().flatten().map(content).collect()
        }
        (None, Some(prompt)) => vec![prompt.clone()],
        (Some(_), Some(_)) => {
            let flaw = "cannot be combined with `input.messages`";
            return Err(PromptError::invalid("input.prompt", flaw));
        }
        (None, None) => return Err(nothing_to_read()),
    };
    let mut tokens = Vec::new();
    for text in texts.iter().filter(|text| !text.is_empty()) {
        tokens.extend(encode(text, "input", context)?);
    }
    let strings = tokens.iter().map(|id| context.model.token_text(*id)).collect();
    Ok((tokens, strings))
}

fn below_parameters(name: &str) -> String {
    format!("{PARAMETERS}.{name}")
}

fn below_input(error: PromptError) -> PromptError {
    error.within("input")
}

fn nothing_to_read() -> PromptError {
    PromptError::invalid("input", "either `prompt` or `messages` must be given")
}

/// The shared fields as the rest of the server knows them, and those without effect.
fn checked_fields(
    fields: &GenerationFields,
) -> Result<(GenerationFields, Vec<String>), PromptError> {
    // Several choices have a place in native answers.
    refuse_foreign(&GenerationFields { n: None, ..fields.clone() })
        .map_err(|error| error.within(PARAMETERS))?;
    let mut ignored = Vec::new();
    let mut fields = fields.clone();
    if fields.stream_options.take().is_some() {
        ignored.push(below_parameters("stream_options"));
    }
    fields.stop = match fields.stop {
        Some(Stop::Tokens(sequence)) => Some(Stop::TokenLists(vec![sequence])),
        stop => stop,
    };
    fields.top_k = fields.top_k.map(|top_k| if MAX_TOP_K < top_k { 0 } else { top_k });
    Ok((fields, ignored))
}

fn result_format(
    endpoint: Endpoint,
    parameters: &Parameters,
    fields: &GenerationFields,
    context: &PromptContext<'_>,
) -> Result<ResultFormat, PromptError> {
    // What a text has no place for.
    let needs_message = [
        ("tools", parameters.tools.as_ref().is_some_and(|tools| !tools.is_empty())),
        ("logprobs", parameters.logprobs == Some(true)),
        ("n", fields.n.is_some_and(|n| 1 < n)),
    ];
    let needs_message = needs_message.into_iter().find(|(_, is_given)| *is_given);
    match parameters.result_format.as_deref() {
        None | Some("text" | "message") if endpoint == Endpoint::Multimodal => {
            Ok(ResultFormat::Parts)
        }
        Some("message") => Ok(ResultFormat::Message),
        Some("text") => match needs_message {
            None => Ok(ResultFormat::Text),
            Some((name, _)) => {
                let flaw = format!("must be `message` with `{name}`: a text has no place for that");
                Err(PromptError::invalid(below_parameters("result_format"), flaw))
            }
        },
        Some(_) => {
            let param = below_parameters("result_format");
            Err(PromptError::invalid(param, "must be `text` or `message`"))
        }
        None if needs_message.is_some() => Ok(ResultFormat::Message),
        None => Ok(match context.model.conventions.reasoning {
            Reasoning::No => ResultFormat::Text,
            Reasoning::InTags => ResultFormat::Message,
        }),
    }
}

fn chat_request(
    input: &Input,
    parameters: &Parameters,
) -> Result<(ChatCompletionRequest, Vec<Origin>), PromptError> {
    let (messages, origins) = messages(input)?;
    let chat = ChatCompletionRequest {
        messages,
        max_completion_tokens: parameters.max_completion_tokens,
        max_tokens: parameters.max_tokens,
        logprobs: parameters.logprobs,
        // Sent beside `logprobs: false` too.
        top_logprobs: parameters.top_logprobs.filter(|_| parameters.logprobs != Some(false)),
        tools: parameters.tools.clone().filter(|tools| !tools.is_empty()),
        tool_choice: parameters.tool_choice.clone(),
        parallel_tool_calls: parameters.parallel_tool_calls,
        chat_template_kwargs: parameters.chat_template_kwargs.clone(),
        enable_thinking: parameters.enable_thinking,
        thinking_budget: parameters.thinking_budget,
        preserve_thinking: parameters.preserve_thinking,
        reasoning_effort: parameters.reasoning_effort.clone(),
        ..ChatCompletionRequest::default()
    };
    Ok((chat, origins))
}

fn messages(input: &Input) -> Result<(Vec<ChatMessage>, Vec<Origin>), PromptError> {
    if let Some(messages) = &input.messages {
        if input.history.is_some() {
            let flaw = "cannot be combined with `input.messages`";
            return Err(PromptError::invalid("input.history", flaw));
        }
        let messages: Result<Vec<_>, _> =
            messages.iter().enumerate().map(|(index, one)| plain_message(index, one)).collect();
        return Ok((messages?, Vec::new()));
    }
    let Some(prompt) = &input.prompt else { return Err(nothing_to_read()) };
    if prompt.is_empty() {
        return Err(PromptError::invalid("input.prompt", "must not be empty"));
    }
    let mut messages = Vec::new();
    let mut origins = Vec::new();
    let said = |role, text: &String| message(role, Some(Content::Text(text.clone())));
    for (index, turn) in input.history.iter().flatten().enumerate() {
        messages.push(said(Role::User, &turn.user));
        origins.push(Origin::at(format!("input.history[{index}].user")));
        messages.push(said(Role::Assistant, &turn.bot));
        origins.push(Origin::at(format!("input.history[{index}].bot")));
    }
    messages.push(said(Role::User, prompt));
    origins.push(Origin::at("input.prompt"));
    Ok((messages, origins))
}

/// The message with parts as chats have them: with a type.
fn plain_message(index: usize, given: &ChatMessage) -> Result<ChatMessage, PromptError> {
    let mut plain = given.clone();
    let Some(Content::Parts(parts)) = &mut plain.content else { return Ok(plain) };
    for (part_index, part) in parts.iter_mut().enumerate() {
        let Some(object) = part.as_object_mut() else { continue };
        if let Some(kind) = MEDIA.iter().find(|kind| object.contains_key(**kind)) {
            let param = format!("input.messages[{index}].content[{part_index}].{kind}");
            let flaw = "is not supported: this model reads only text, so describe it in words";
            return Err(PromptError::invalid(param, flaw));
        }
        if object.contains_key("text") && !object.contains_key("type") {
            object.insert("type".to_owned(), json!("text"));
        }
    }
    Ok(plain)
}

/// A prompt that is continued as it is.
fn prepare_raw(
    input: &Input,
    parameters: &Parameters,
    fields: &GenerationFields,
    context: &PromptContext<'_>,
) -> Result<Prepared, PromptError> {
    let param = below_parameters("use_raw_prompt");
    let Some(prompt) = input.prompt.as_deref().filter(|_| input.history.is_none()) else {
        let flaw = "needs `input.prompt`, without `input.history` and `input.messages`";
        return Err(PromptError::invalid(param, flaw));
    };
    if parameters.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
        let flaw = "leaves no place for tools: describe them in the prompt";
        return Err(PromptError::invalid(param, flaw));
    }
    let logprobs = match (parameters.logprobs, parameters.top_logprobs) {
        (Some(true), top) => Some(top.unwrap_or(0)),
        _ => None,
    };
    let prepare = || {
        let logprobs = top_count("top_logprobs", logprobs)?;
        let settings = Settings::new(fields, logprobs, context)?;
        let tokens = encode(prompt, "prompt", context)?;
        let (max_tokens, param) = match (parameters.max_completion_tokens, parameters.max_tokens) {
            (Some(count), _) => (Some(count), "max_completion_tokens"),
            (None, count) => (count, "max_tokens"),
        };
        if max_tokens == Some(0) {
            return Err(PromptError::invalid(param, "must be at least 1, got 0"));
        }
        let demand = Demand { max_tokens, default: usize::MAX, param };
        let prepared = settings.prepare(tokens, &demand, ("prompt", 0), context)?;
        settings.check_logprobs(std::slice::from_ref(&prepared), fields, 1)?;
        Ok(prepared)
    };
    let names = Converted {
        chat: ChatCompletionRequest::default(),
        fields: GenerationFields::default(),
        ignored: Vec::new(),
        origins: Vec::new(),
        renamed: &RENAMED_PROMPT,
        parent: Some(PARAMETERS),
    };
    prepare().map_err(|error| names.renamed_error(error))
}
