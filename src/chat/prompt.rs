//! The door: checks a request, renders and encodes its prompt, and builds what the engine runs.
//!
//! Nothing after this re-checks a request. **Invariant:** a prompt is never shortened; one that
//! does not fit is refused with the numbers.

use std::fmt::Display;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::chat::answer::AnswerFormat;
use crate::chat::constraint::{self, Asked};
use crate::chat::encoding::{encode, split_prompts};
use crate::chat::fim::{FillIn, fill_in};
use crate::chat::messages::{is_partial, template_messages};
use crate::chat::model::{Reasoning, ServedModel};
use crate::chat::options::{
    check_refused, num_candidates, num_choices, priority, refuse_best_of, sampling_options,
    stop_sequences, stop_strings, stop_token_ids, top_count,
};
use crate::chat::output::{OutputOptions, RequestOutput};
use crate::chat::pinning;
use crate::chat::reasoning::{self, ReasoningStart};
use crate::chat::template::RenderOptions;
use crate::chat::thinking::{PRESERVE, Thinking};
use crate::chat::tool_call::{BareToolCalls, ToolReading};
use crate::chat::tool_grammar;
use crate::chat::tools::{self, ToolUse};
use crate::engine::request::{
    InvalidParam, Pin, Priority, Request, SamplingOptions, SamplingParams, StopConditions,
    ThinkingBudget,
};
use crate::grammar::Grammar;
use crate::openai::chat::ChatCompletionRequest;
use crate::openai::completion::CompletionRequest;
use crate::openai::generation::GenerationFields;
use crate::openai::message::{ChatMessage, Content, Role};
use crate::text::{SpecialTokens, StopSequences, StopStrings, TokenId};

/// `max_tokens` of a completion that does not say, by OpenAI's schema.
const DEFAULT_COMPLETION_TOKENS: usize = 16;

/// Most log-probabilities in one answer, whoever asks for how many tokens, choices and likely
/// tokens beside the chosen: each takes some hundred bytes until the answer is sent.
const MAX_LOGPROBS: usize = 2_000_000;

/// What a request may ask for.
#[derive(Clone, Copy, Debug)]
pub struct PromptLimits {
    /// Prompt and generated tokens together.
    pub max_model_len: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Choices per prompt.
    pub max_choices: u32,
    /// Prompts per request.
    pub max_prompts: usize,
    /// Choices of all prompts together: more could never run or wait at a time.
    pub max_sequences: usize,
}

/// What preparing needs to know beside the request.
pub struct PromptContext<'a> {
    /// The model asked.
    pub model: &'a ServedModel,
    /// What is allowed.
    pub limits: PromptLimits,
    /// Identifies the request.
    pub id: &'a str,
    /// The seed of a request that has none.
    pub random_seed: u64,
}

/// A request ready for the engine.
pub struct Prepared {
    /// What the engine runs.
    pub request: Request,
    /// What its events are fed to.
    pub output: RequestOutput,
    /// Text that every choice begins with, when `echo` was asked for.
    pub echo: Option<String>,
    /// Known fields that have no effect on this model.
    pub ignored: Vec<&'static str>,
}

impl Prepared {
    /// Keeps beginnings of the prompt in the cache for a while.
    fn pin(&mut self, pins: Vec<Pin>) {
        if !pins.is_empty() {
            self.request.pins = pins.into();
            self.output.expect_pins();
        }
    }
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// A field has a value that cannot be used.
    #[error("{message}")]
    Invalid {
        /// The field.
        param: String,
        /// What is wrong with it, a sentence of its own.
        message: String,
    },
    /// Prompt and completion exceed the context.
    #[error("{message}")]
    TooLong {
        /// The field that asks for too much.
        param: &'static str,
        /// The numbers.
        message: String,
    },
    /// Too many grammars are being compiled.
    #[error("the server is busy compiling grammars")]
    Busy,
    /// The prompt could not be encoded.
    #[error("cannot encode the prompt: {0}")]
    Encode(String),
}

impl PromptError {
    /// A field has a value that cannot be used; `flaw` is said of it.
    pub fn invalid(param: impl Into<String>, flaw: impl Display) -> Self {
        let param = param.into();
        let message = format!("`{param}`: {flaw}");
        Self::Invalid { param, message }
    }

    /// The same of a field below `parent`.
    #[must_use]
    pub(super) fn within(self, parent: &str) -> Self {
        let Self::Invalid { param, message } = self else { return self };
        let path = format!("{parent}.{param}");
        let message = match message.strip_prefix(&format!("`{param}`")) {
            Some(flaw) => format!("`{path}`{flaw}"),
            None => message,
        };
        Self::Invalid { param: path, message }
    }
}

impl From<InvalidParam> for PromptError {
    fn from(error: InvalidParam) -> Self {
        Self::Invalid { param: error.param.to_owned(), message: error.message }
    }
}

/// Prepares a chat completion.
pub fn prepare_chat(
    request: &ChatCompletionRequest,
    fields: &GenerationFields,
    context: &PromptContext<'_>,
) -> Result<Prepared, PromptError> {
    check_refused(fields)?;
    refuse_best_of(fields)?;
    if request.modalities.iter().flatten().any(|modality| modality != "text") {
        return Err(PromptError::invalid("modalities", "only `text` is supported"));
    }
    let logprobs = chat_logprobs(request)?;
    let (max_tokens, max_tokens_param) = match (request.max_completion_tokens, request.max_tokens) {
        (Some(count), _) => (Some(count), "max_completion_tokens"),
        (None, count) => (count, "max_tokens"),
    };
    if max_tokens == Some(0) {
        return Err(PromptError::invalid(max_tokens_param, "must be at least 1, got 0"));
    }
    let is_partial = is_partial(&request.messages)?.then_some(true);
    let mut options = render_options(
        request.add_generation_prompt,
        request.continue_final_message.or(is_partial),
        request.chat_template_kwargs.as_ref(),
    )?;
    let mut thinking = Thinking::read(request, context.model.conventions.reasoning)?;
    let template = context.model.template.as_ref();
    if thinking.preserves == Some(true) && !template.is_some_and(|one| one.reads(PRESERVE)) {
        thinking.ignored.push(PRESERVE);
    }
    thinking.add_to(&mut options.extra);
    let mut settings = Settings::new(fields, logprobs, context)?;
    let tools = ToolUse::read(request)?;
    let definitions = tools.as_ref().map(|tools| &tools.definitions);
    let render = |messages: &[ChatMessage], tools: Option<&Value>| {
        render(messages, tools, &options, context.model)
    };
    let mut text = render(&request.messages, definitions)?;
    if thinking.is_off() && ReasoningStart::after_prompt(&text) == ReasoningStart::Inside {
        // The template opens a thought whatever it is told.
        text.push_str(reasoning::END);
    }
    settings.answer = answer_format(&text, tools.as_ref(), fields, context);
    settings.constrain_calls(tools.as_ref(), context)?;
    settings.thinking = thinking.limit(settings.answer.reasoning, &context.model.tokenizer)?;
    let prompt = encode(&text, "messages", context)?;
    let pins = pinning::pins(request, definitions, (&text, &prompt), context.model, render)?;
    let demand = Demand { max_tokens, default: usize::MAX, param: max_tokens_param };
    let mut prepared = settings.prepare(prompt, &demand, ("messages", 0), context)?;
    settings.check_logprobs(std::slice::from_ref(&prepared), fields, 1)?;
    prepared.pin(pins);
    prepared.ignored = thinking.ignored;
    if fields.echo == Some(true) {
        prepared.echo = last_assistant_text(&request.messages);
    }
    Ok(prepared)
}

/// How the answer to a rendered conversation is read.
fn answer_format(
    prompt: &str,
    tools: Option<&ToolUse>,
    fields: &GenerationFields,
    context: &PromptContext<'_>,
) -> AnswerFormat {
    let conventions = context.model.conventions;
    // An answer that was asked to be JSON is not a call because it looks like one.
    let is_free = !constraint::is_asked_for(fields);
    let tools = tools.map(|tools| {
        Arc::new(ToolReading {
            format: conventions.tool_calls,
            tools: Arc::clone(&tools.callable),
            bare: if is_free { conventions.bare_tool_calls } else { BareToolCalls::Text },
            demand: tools.demand,
            max_calls: tools.max_calls,
            id_seed: context.id.into(),
        })
    });
    let reasoning = match conventions.reasoning {
        Reasoning::No => None,
        Reasoning::InTags => Some(ReasoningStart::after_prompt(prompt)),
    };
    AnswerFormat { reasoning, tools }
}

/// Prepares a completion: one engine request per prompt.
pub fn prepare_completion(
    request: &CompletionRequest,
    fields: &GenerationFields,
    context: &PromptContext<'_>,
) -> Result<Vec<Prepared>, PromptError> {
    check_refused(fields)?;
    let fill_in = fill_in(request.suffix.as_deref(), fields, context)?;
    let logprobs = top_count("logprobs", request.logprobs)?;
    let mut settings = Settings::new(fields, logprobs, context)?;
    let echo = fields.echo == Some(true);
    if echo && logprobs.is_some() {
        settings.params.prompt_logprobs = settings.params.prompt_logprobs.max(logprobs);
    }
    settings.n = num_candidates(fields, settings.n)?;
    if fields.n.unwrap_or(1) < i64::from(settings.n) {
        // Candidates are ranked by the log-probability of their tokens.
        settings.params.logprobs.get_or_insert(0);
    }
    settings.stop_at(fill_in.as_ref().map_or(&[], FillIn::ends), fields);
    let prompts = split_prompts(&request.prompt, fill_in.as_ref(), context)?;
    let num_sequences = prompts.len() * settings.n as usize;
    if context.limits.max_sequences < num_sequences {
        return Err(PromptError::invalid(
            "prompt",
            format!(
                "asks for {num_sequences} choices in all, more than the {} this server can queue",
                context.limits.max_sequences
            ),
        ));
    }
    let demand = Demand {
        max_tokens: request.max_tokens,
        default: DEFAULT_COMPLETION_TOKENS,
        param: "max_tokens",
    };
    let prepared: Result<Vec<Prepared>, PromptError> = prompts
        .into_iter()
        .enumerate()
        .map(|(index, (tokens, text))| {
            let echo = echo.then(|| text.unwrap_or_else(|| context.model.decode_all(&tokens)));
            let mut prepared = settings.prepare(tokens, &demand, ("prompt", index), context)?;
            prepared.echo = echo;
            Ok(prepared)
        })
        .collect();
    let prepared = prepared?;
    settings.check_logprobs(&prepared, fields, settings.n as usize)?;
    Ok(prepared)
}

/// Renders a conversation with the model's template.
pub fn render(
    messages: &[ChatMessage],
    tools: Option<&Value>,
    options: &RenderOptions,
    model: &ServedModel,
) -> Result<String, PromptError> {
    let template = model.template.as_ref().ok_or_else(|| {
        PromptError::invalid("messages", "this model has no chat template: use /v1/completions")
    })?;
    let messages = template_messages(messages)?;
    template
        .render(&messages, tools, options)
        .map_err(|error| PromptError::invalid("messages", format!("the chat template: {error}")))
}

/// How to render, from the fields of a request.
pub fn render_options(
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    kwargs: Option<&Map<String, Value>>,
) -> Result<RenderOptions, PromptError> {
    let continue_final_message = continue_final_message.unwrap_or(false);
    if continue_final_message && add_generation_prompt == Some(true) {
        return Err(PromptError::invalid(
            "continue_final_message",
            "cannot be combined with `add_generation_prompt`",
        ));
    }
    Ok(RenderOptions {
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        extra: kwargs.cloned().unwrap_or_default(),
    })
}

fn chat_logprobs(request: &ChatCompletionRequest) -> Result<Option<u32>, PromptError> {
    let top = top_count("top_logprobs", request.top_logprobs)?;
    match (request.logprobs, top) {
        (Some(true), top) => Ok(Some(top.unwrap_or(0))),
        (_, None | Some(0)) => Ok(None),
        (_, Some(_)) => Err(PromptError::invalid("top_logprobs", "needs `logprobs` to be true")),
    }
}

fn last_assistant_text(messages: &[ChatMessage]) -> Option<String> {
    let last = messages.last().filter(|message| message.role == Role::Assistant)?;
    match last.content.as_ref()? {
        Content::Text(text) => Some(text.clone()),
        Content::Parts(_) => None,
    }
}

/// How many tokens a request wants, and which field says so.
pub(super) struct Demand {
    pub(super) max_tokens: Option<u64>,
    pub(super) default: usize,
    pub(super) param: &'static str,
}

impl Demand {
    /// The number of tokens to generate, or why it does not fit behind the prompt.
    fn resolve(
        &self,
        num_prompt_tokens: usize,
        prompt_param: &'static str,
        max_model_len: usize,
    ) -> Result<usize, PromptError> {
        let intro = format!("This model's maximum context length is {max_model_len} tokens.");
        let needs_room = self.max_tokens != Some(0);
        if max_model_len < num_prompt_tokens + usize::from(needs_room) {
            return Err(PromptError::TooLong {
                param: prompt_param,
                message: format!(
                    "{intro} However, your {prompt_param} resulted in {num_prompt_tokens} tokens. \
                     Please reduce the length of the {prompt_param}."
                ),
            });
        }
        let left = max_model_len - num_prompt_tokens;
        match self.max_tokens {
            None => Ok(self.default.min(left)),
            Some(count) if count <= left as u64 => Ok(count as usize),
            Some(count) => Err(PromptError::TooLong {
                param: self.param,
                message: format!(
                    "{intro} However, you requested {} tokens ({num_prompt_tokens} in the \
                     {prompt_param}, {count} in the completion). Please reduce the length of the \
                     {prompt_param} or `{}`.",
                    (num_prompt_tokens as u64).saturating_add(count),
                    self.param,
                ),
            }),
        }
    }
}

/// What all prompts of a request share.
pub(super) struct Settings {
    params: SamplingParams,
    has_own_seed: bool,
    n: u32,
    stop: Arc<StopStrings>,
    stop_sequences: Arc<StopSequences>,
    num_own_stop_tokens: usize,
    stop_tokens: Arc<[TokenId]>,
    include_stop: bool,
    special_tokens: SpecialTokens,
    cache_salt: Option<Arc<str>>,
    answer: AnswerFormat,
    /// What the answer must look like, and its grammar.
    asked: Option<Asked>,
    grammar: Option<Arc<Grammar>>,
    thinking: Option<ThinkingBudget>,
    priority: Priority,
}

impl Settings {
    pub(super) fn new(
        fields: &GenerationFields,
        logprobs: Option<u32>,
        context: &PromptContext<'_>,
    ) -> Result<Self, PromptError> {
        let model = context.model;
        let prompt_logprobs = top_count("prompt_logprobs", fields.prompt_logprobs)?;
        if prompt_logprobs.is_some() && fields.stream == Some(true) {
            return Err(PromptError::invalid(
                "prompt_logprobs",
                "is not available when `stream` is true",
            ));
        }
        let n = num_choices(fields, &context.limits)?;
        let include_stop = fields.include_stop_str_in_output.unwrap_or(false);
        let stop = Arc::new(StopStrings::new(stop_strings(fields)?, include_stop));
        let sequences = stop_sequences(fields, &context.limits)?;
        let mut stop_tokens = stop_token_ids(fields, &context.limits)?;
        let num_own_stop_tokens = stop_tokens.len();
        if fields.ignore_eos != Some(true) {
            let is_new = |id: &&TokenId| !stop_tokens.contains(*id);
            let new: Vec<_> = model.eos_token_ids.iter().filter(is_new).copied().collect();
            stop_tokens.extend(new);
        }
        let options = SamplingOptions {
            logprobs: logprobs.map(i64::from),
            prompt_logprobs: prompt_logprobs.map(i64::from),
            ..sampling_options(fields, context.random_seed)
        };
        let asked = constraint::constraint(fields)?;
        let compile = |asked: &Asked| constraint::compile(&asked.constraint, &asked.param, model);
        let grammar = asked.as_ref().map(compile).transpose()?;
        let params =
            SamplingParams::validate(options, &model.sampling_defaults, context.limits.vocab_size)?;
        Ok(Self {
            params,
            has_own_seed: fields.seed.is_some(),
            n,
            stop,
            stop_sequences: Arc::new(StopSequences::new(sequences, include_stop)),
            num_own_stop_tokens,
            stop_tokens: stop_tokens.into(),
            include_stop,
            special_tokens: match fields.skip_special_tokens {
                Some(false) => SpecialTokens::Keep,
                _ => SpecialTokens::Skip,
            },
            cache_salt: fields.cache_salt.as_deref().map(Arc::from),
            answer: AnswerFormat::default(),
            asked,
            grammar,
            thinking: None,
            priority: priority(fields.priority, fields.service_tier.as_deref())?,
        })
    }

    /// Ends choices at these tokens too, unless ends are to be ignored.
    pub(super) fn stop_at(&mut self, tokens: &[TokenId], fields: &GenerationFields) {
        if tokens.is_empty() || fields.ignore_eos == Some(true) {
            return;
        }
        let is_new = |id: &&TokenId| !self.stop_tokens.contains(*id);
        let new = tokens.iter().filter(is_new);
        self.stop_tokens = self.stop_tokens.iter().chain(new).copied().collect();
    }

    /// Adds what the tools ask of the output. Calls that must come win over a format for the
    /// answer. Calls that may come are an alternative to an answer in JSON; any other format
    /// wins over them.
    fn constrain_calls(
        &mut self,
        tools: Option<&ToolUse>,
        context: &PromptContext<'_>,
    ) -> Result<(), PromptError> {
        let reasoning = self.answer.reasoning;
        if let Some(grammar) = self.grammar.take_if(|_| reasoning.is_some()) {
            let trigger = tool_grammar::behind_thought(reasoning, context.model);
            self.grammar = Some(
                trigger.map_or(Arc::clone(&grammar), |trigger| Arc::new(grammar.after(trigger))),
            );
        }
        let Some(tools) = tools else { return Ok(()) };
        let schema = self.asked.as_ref().map(|asked| asked.constraint.schema());
        let answer = match schema {
            Some(None) if tools.demand == tools::Demand::MayCall => return Ok(()),
            schema => schema.flatten(),
        };
        let grammar = tool_grammar::grammar(tools, answer.as_ref(), reasoning, context.model)?;
        self.grammar = grammar.or(self.grammar.take());
        Ok(())
    }

    /// Prompts of a request without a seed draw differently, even if they are the same.
    fn params_of(&self, index: usize) -> SamplingParams {
        let mut params = self.params.clone();
        if !self.has_own_seed {
            params.seed = params.seed.wrapping_add(index as u64);
        }
        params
    }

    /// Refuses to collect more log-probabilities than an answer should have. Those of generated
    /// tokens do not add up in a stream; those of a prompt are repeated `num_copies` times.
    pub(super) fn check_logprobs(
        &self,
        prepared: &[Prepared],
        fields: &GenerationFields,
        num_copies: usize,
    ) -> Result<(), PromptError> {
        let count = |num_tokens: usize, num_copies: usize, top: Option<u32>| {
            let per_token = top.map_or(0, |top| top as usize + 1);
            num_tokens.saturating_mul(num_copies).saturating_mul(per_token)
        };
        let prompt_tokens = prepared.iter().map(|one| one.request.prompt.len()).sum();
        let in_prompts = count(prompt_tokens, num_copies, self.params.prompt_logprobs);
        let is_stream = fields.stream == Some(true);
        let generated_tokens = prepared.iter().map(|one| one.request.stop.max_tokens).sum();
        let generated = count(generated_tokens, self.n as usize, self.params.logprobs);
        let num = in_prompts.saturating_add(if is_stream { 0 } else { generated });
        if num <= MAX_LOGPROBS {
            return Ok(());
        }
        let is_for_prompt = generated < in_prompts && fields.prompt_logprobs.is_some();
        let is_ranked = fields.n.unwrap_or(1) < i64::from(self.n);
        let param = match (is_for_prompt, is_ranked) {
            (true, _) => "prompt_logprobs",
            (false, true) => "best_of",
            (false, false) => "logprobs",
        };
        Err(PromptError::invalid(
            param,
            format!(
                "up to {num} log-probabilities in all, more than {MAX_LOGPROBS}: ask for fewer \
                 likely tokens, or lower `n`, `max_tokens` or the length of the prompt"
            ),
        ))
    }

    /// `origin` is the field the prompt came from and its place in it.
    pub(super) fn prepare(
        &self,
        prompt: Vec<TokenId>,
        demand: &Demand,
        (prompt_param, index): (&'static str, usize),
        context: &PromptContext<'_>,
    ) -> Result<Prepared, PromptError> {
        let max_tokens =
            demand.resolve(prompt.len(), prompt_param, context.limits.max_model_len)?;
        if max_tokens < self.params.min_tokens {
            return Err(PromptError::invalid(
                "min_tokens",
                format!("must be at most `max_tokens`, which is {max_tokens} here"),
            ));
        }
        let num_prompt_logprobs =
            if self.params.prompt_logprobs.is_some() { prompt.len() - 1 } else { 0 };
        let output = OutputOptions {
            n: self.n,
            stop: Arc::clone(&self.stop),
            stop_sequences: Arc::clone(&self.stop_sequences),
            include_stop_in_output: self.include_stop,
            special_tokens: self.special_tokens,
            stop_token_ids: Arc::clone(&self.stop_tokens),
            num_own_stop_tokens: self.num_own_stop_tokens,
            min_tokens: self.params.min_tokens,
            num_prompt_logprobs,
            answer: self.answer.clone(),
        };
        let request = Request {
            id: format!("{}-{index}", context.id).into(),
            prompt: prompt.into(),
            params: Arc::new(self.params_of(index)),
            stop: StopConditions { max_tokens, stop_token_ids: Arc::clone(&self.stop_tokens) },
            n: self.n,
            grammar: self.grammar.clone(),
            thinking: self.thinking.clone(),
            cache_salt: self.cache_salt.clone(),
            priority: self.priority,
            pins: Arc::new([]),
            fairness_id: None,
            deadline: None,
            pooling: None,
            adapter: None,
        };
        let output = RequestOutput::new(&context.model.tokenizer, output);
        Ok(Prepared { request, output, echo: None, ignored: Vec::new() })
    }
}
