//! Reads the fields that all generating endpoints share: sampling, stopping, and what to refuse.

use crate::chat::prompt::{PromptError, PromptLimits};
use crate::engine::request::{Priority, SamplingOptions};
use crate::openai::generation::{GenerationFields, Stop};
use crate::text::TokenId;

/// As many most likely tokens as OpenAI allows to ask for.
const MAX_TOP_LOGPROBS: i64 = 20;
/// More stop strings than any client sends; every one costs time at each token.
const MAX_STOP_STRINGS: usize = 128;
/// Longest stop string in bytes: text as long as this may be held back.
const MAX_STOP_STRING_BYTES: usize = 4096;
/// Most bytes of all stop strings together: a request carries five times as many.
const MAX_STOP_BYTES: usize = 16 << 10;
/// Longest stop sequence in tokens: as many may be held back.
const MAX_STOP_SEQUENCE: usize = 128;
/// More stop tokens than any client sends; every token is compared with all of them.
const MAX_STOP_TOKEN_IDS: usize = 128;

/// As many candidates as OpenAI allows.
const MAX_BEST_OF: i64 = 20;

/// Fields that constrain or change the output in ways this version cannot honour. Ignoring them
/// would hand out something else than was asked for.
const REFUSED: [&str; 19] = [
    "allowed_token_ids",
    "truncate_prompt_tokens",
    "chat_template",
    "documents",
    "regex",
    "ebnf",
    "length_penalty",
    "stop_regex",
    "audio",
    "guided_whitespace_pattern",
    "enable_search",
    "structural_tag",
    "grammar",
    "json_schema",
    "use_beam_search",
    "logits_processors",
    "bad_words",
    "prompt_embeds",
    "mcp_servers",
];

/// Fields that ask for something by being there, whatever they hold.
const REFUSED_UNLESS_NULL: [&str; 1] = ["web_search_options"];

/// Fields that mean nothing to a self-hosted server, or ask for what it does anyway.
const WITHOUT_EFFECT: [&str; 8] = [
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "add_special_tokens",
    "request_id",
    "spaces_between_special_tokens",
];

/// Whether an unknown field deserves to be reported as ignored, or an error if ignoring it would
/// change the answer. `is_neutral` means that its value asks for nothing.
pub fn is_ignored(name: &str, is_null: bool, is_neutral: bool) -> Result<bool, PromptError> {
    let is_refused = REFUSED.contains(&name) || REFUSED_UNLESS_NULL.contains(&name);
    if !is_refused {
        return Ok(!is_null && !WITHOUT_EFFECT.contains(&name));
    }
    if is_null || is_neutral && REFUSED.contains(&name) {
        return Ok(false);
    }
    Err(PromptError::invalid(name, "is not supported by this version"))
}

/// Refuses what cannot be honoured of the fields that are known.
pub(super) fn check_refused(fields: &GenerationFields) -> Result<(), PromptError> {
    if fields.stream_options.is_some() && fields.stream != Some(true) {
        return Err(PromptError::invalid("stream_options", "needs `stream` to be true"));
    }
    if fields.cache_salt.as_deref() == Some("") {
        return Err(PromptError::invalid("cache_salt", "must not be empty"));
    }
    Ok(())
}

/// How urgent a request is: the number, or else the class.
pub(super) fn priority(
    number: Option<i64>,
    service_tier: Option<&str>,
) -> Result<Priority, PromptError> {
    let class = match service_tier {
        None | Some("auto" | "default") => Priority::default(),
        Some("flex") => Priority::FLEX,
        Some("fast" | "priority") => Priority::URGENT,
        Some(other) => {
            return Err(PromptError::invalid(
                "service_tier",
                format!("must be `auto`, `default`, `flex`, `fast` or `priority`, got `{other}`"),
            ));
        }
    };
    Ok(number.map_or(class, Priority::new))
}

/// How many choices to generate.
pub(super) fn num_choices(
    fields: &GenerationFields,
    limits: &PromptLimits,
) -> Result<u32, PromptError> {
    let n = fields.n.unwrap_or(1);
    if n < 1 || i64::from(limits.max_choices) < n {
        return Err(PromptError::invalid(
            "n",
            format!("must be between 1 and {}, got {n}", limits.max_choices),
        ));
    }
    Ok(n as u32)
}

/// How many candidates to generate for the `n` choices of a completion.
pub(super) fn num_candidates(fields: &GenerationFields, n: u32) -> Result<u32, PromptError> {
    let Some(best_of) = fields.best_of else { return Ok(n) };
    if best_of < i64::from(n) || MAX_BEST_OF < best_of {
        return Err(PromptError::invalid(
            "best_of",
            format!("must be between `n`, which is {n}, and {MAX_BEST_OF}, got {best_of}"),
        ));
    }
    if i64::from(n) < best_of && fields.stream == Some(true) {
        return Err(PromptError::invalid(
            "best_of",
            "cannot be greater than `n` when `stream` is true: the best are known at the end",
        ));
    }
    Ok(best_of as u32)
}

/// Chats have no `best_of`; one that asks for nothing is tolerated.
pub(super) fn refuse_best_of(fields: &GenerationFields) -> Result<(), PromptError> {
    if fields.best_of.is_some_and(|best_of| best_of != fields.n.unwrap_or(1)) {
        return Err(PromptError::invalid("best_of", "must equal `n` here: use /v1/completions"));
    }
    Ok(())
}

/// The stop strings, at least one byte each.
pub(super) fn stop_strings(fields: &GenerationFields) -> Result<Vec<String>, PromptError> {
    let strings = match &fields.stop {
        None | Some(Stop::TokenLists(_)) => Vec::new(),
        Some(Stop::Tokens(_)) => {
            let flaw = "a sequence of token ids belongs in a list of sequences; ids that end a \
                        choice each by itself are `stop_token_ids`";
            return Err(PromptError::invalid("stop", flaw));
        }
        Some(Stop::One(string)) => vec![string.clone()],
        Some(Stop::Many(strings)) => strings.clone(),
    };
    if MAX_STOP_STRINGS < strings.len() {
        return Err(PromptError::invalid(
            "stop",
            format!("must hold at most {MAX_STOP_STRINGS} strings, got {}", strings.len()),
        ));
    }
    if strings.iter().any(String::is_empty) {
        return Err(PromptError::invalid("stop", "must not hold an empty string"));
    }
    if strings.iter().any(|string| MAX_STOP_STRING_BYTES < string.len()) {
        return Err(PromptError::invalid(
            "stop",
            format!("must hold strings of at most {MAX_STOP_STRING_BYTES} bytes"),
        ));
    }
    let num_bytes: usize = strings.iter().map(String::len).sum();
    if MAX_STOP_BYTES < num_bytes {
        return Err(PromptError::invalid(
            "stop",
            format!("must hold at most {MAX_STOP_BYTES} bytes in all, got {num_bytes}"),
        ));
    }
    Ok(strings)
}

/// The stop sequences, at least one token each.
pub(super) fn stop_sequences(
    fields: &GenerationFields,
    limits: &PromptLimits,
) -> Result<Vec<Vec<TokenId>>, PromptError> {
    let Some(Stop::TokenLists(sequences)) = &fields.stop else { return Ok(Vec::new()) };
    if MAX_STOP_STRINGS < sequences.len() {
        let num = sequences.len();
        let flaw = format!("must hold at most {MAX_STOP_STRINGS} sequences, got {num}");
        return Err(PromptError::invalid("stop", flaw));
    }
    for (index, sequence) in sequences.iter().enumerate() {
        let param = format!("stop[{index}]");
        if sequence.is_empty() || MAX_STOP_SEQUENCE < sequence.len() {
            let num = sequence.len();
            let flaw = format!("must hold between 1 and {MAX_STOP_SEQUENCE} token ids, got {num}");
            return Err(PromptError::invalid(param, flaw));
        }
        check_token_ids(&param, sequence, limits)?;
    }
    Ok(sequences.clone())
}

/// The request's own stop tokens, each once.
pub(super) fn stop_token_ids(
    fields: &GenerationFields,
    limits: &PromptLimits,
) -> Result<Vec<TokenId>, PromptError> {
    let ids = fields.stop_token_ids.as_deref().unwrap_or_default();
    if MAX_STOP_TOKEN_IDS < ids.len() {
        return Err(PromptError::invalid(
            "stop_token_ids",
            format!("must hold at most {MAX_STOP_TOKEN_IDS} ids, got {}", ids.len()),
        ));
    }
    check_token_ids("stop_token_ids", ids, limits)?;
    let mut own = Vec::new();
    for id in ids {
        if !own.contains(id) {
            own.push(*id);
        }
    }
    Ok(own)
}

/// Every id must name a token of the vocabulary.
pub(super) fn check_token_ids(
    param: &str,
    ids: &[TokenId],
    limits: &PromptLimits,
) -> Result<(), PromptError> {
    match ids.iter().position(|id| limits.vocab_size <= *id as usize) {
        None => Ok(()),
        Some(index) => Err(PromptError::invalid(
            format!("{param}[{index}]"),
            format!(
                "token id {} is out of the vocabulary of {} tokens",
                ids[index], limits.vocab_size
            ),
        )),
    }
}

/// A count of most likely tokens, `0..=20`.
pub(super) fn top_count(param: &str, count: Option<i64>) -> Result<Option<u32>, PromptError> {
    match count {
        Some(count) if !(0..=MAX_TOP_LOGPROBS).contains(&count) => Err(PromptError::invalid(
            param,
            format!("must be between 0 and {MAX_TOP_LOGPROBS}, got {count}"),
        )),
        count => Ok(count.map(|count| count as u32)),
    }
}

/// The client's sampling fields, still unchecked. A request without a seed gets `random_seed`.
pub(super) fn sampling_options(fields: &GenerationFields, random_seed: u64) -> SamplingOptions {
    let logit_bias = fields.logit_bias.iter().flatten();
    SamplingOptions {
        temperature: fields.temperature,
        top_p: fields.top_p,
        top_k: fields.top_k,
        min_p: fields.min_p,
        repetition_penalty: fields.repetition_penalty,
        presence_penalty: fields.presence_penalty,
        frequency_penalty: fields.frequency_penalty,
        logit_bias: logit_bias.map(|(id, bias)| (id.clone(), *bias)).collect(),
        seed: Some(fields.seed.unwrap_or(random_seed as i64)),
        min_tokens: fields.min_tokens,
        ..SamplingOptions::default()
    }
}
