//! How a request wants its tokens drawn. Pure data, checked once when it is built.

use std::num::NonZeroU32;

use crate::text::TokenId;

/// Most tokens one request may bias.
pub const MAX_LOGIT_BIAS: usize = 1024;

/// Most alternatives reported beside a token.
pub const MAX_LOGPROBS: u32 = 20;

/// Temperatures below this are greedy: dividing by them only loses precision.
const MIN_TEMPERATURE: f64 = 1e-5;

/// The sampling parameters of one request, already validated: nothing later re-checks them.
///
/// Field names and meanings are those of vLLM's `SamplingParams`. Build one with
/// [`SamplingParams::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; zero means greedy. In `0.0..=2.0`.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this share. In `(0.0, 1.0]`.
    pub top_p: f32,
    /// Keep this many of the most likely tokens; `None` keeps all.
    pub top_k: Option<NonZeroU32>,
    /// Drop tokens less likely than this share of the most likely one. In `0.0..=1.0`.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of every token seen (CTRL paper). Positive.
    pub repetition_penalty: f32,
    /// Subtracted once from every token generated so far. In `-2.0..=2.0`.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence from every token generated so far. In `-2.0..=2.0`.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens, in `-100.0..=100.0`. Sorted, without duplicates.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the counter-based generator: same seed, same position, same draw.
    pub seed: u64,
    /// Report the log-probability of each sampled token and this many of the most likely ones.
    pub logprobs: Option<u32>,
    /// The same for every token of the prompt after the first.
    pub prompt_logprobs: Option<u32>,
    /// Stop tokens cannot be drawn before this many tokens were generated.
    pub min_tokens: usize,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
            min_tokens: 0,
        }
    }
}

impl SamplingParams {
    /// Checks what a client asked for and fills in what it left out: first from the model's
    /// generation config, then with the neutral values.
    ///
    /// The generation config recommends how to *sample*. A request for greedy decoding (temperature
    /// zero) asks for the model's most likely tokens and gets them: penalties apply to it only if
    /// it names them itself.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn validate(
        options: SamplingOptions,
        defaults: &GenerationDefaults,
        vocab_size: usize,
    ) -> Result<Self, InvalidParam> {
        let number = |given: Option<f64>, default: Option<f64>, neutral| {
            given.or(default).unwrap_or(neutral)
        };
        let temperature = number(options.temperature, defaults.temperature, 1.0);
        let greedy = GenerationDefaults::default();
        let defaults = if temperature < MIN_TEMPERATURE { &greedy } else { defaults };
        let top_p = number(options.top_p, defaults.top_p, 1.0);
        let repetition = number(options.repetition_penalty, defaults.repetition_penalty, 1.0);
        let min_p = number(options.min_p, defaults.min_p, 0.0);
        let presence = number(options.presence_penalty, defaults.presence_penalty, 0.0);
        let frequency = number(options.frequency_penalty, defaults.frequency_penalty, 0.0);
        let temperature = within("temperature", temperature, 0.0, 2.0)?;
        Ok(Self {
            temperature: if temperature < MIN_TEMPERATURE { 0.0 } else { temperature as f32 },
            top_p: positive_within("top_p", top_p, 1.0)? as f32,
            top_k: top_k(options.top_k.or(defaults.top_k), vocab_size)?,
            min_p: within("min_p", min_p, 0.0, 1.0)? as f32,
            repetition_penalty: positive_within("repetition_penalty", repetition, 2.0)? as f32,
            presence_penalty: within("presence_penalty", presence, -2.0, 2.0)? as f32,
            frequency_penalty: within("frequency_penalty", frequency, -2.0, 2.0)? as f32,
            logit_bias: logit_bias(options.logit_bias, vocab_size)?,
            // The bits are what counts; negative seeds are as good as others.
            seed: options.seed.unwrap_or(0) as u64,
            logprobs: num_top("logprobs", options.logprobs)?,
            prompt_logprobs: num_top("prompt_logprobs", options.prompt_logprobs)?,
            min_tokens: min_tokens(options.min_tokens)?,
        })
    }

    /// Whether drawing needs to know which tokens the sequence holds.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// What a client sent, unchecked; absent fields take the model's defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOptions {
    /// See [`SamplingParams::temperature`].
    pub temperature: Option<f64>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f64>,
    /// See [`SamplingParams::top_k`]; `-1` and `0` keep all tokens.
    pub top_k: Option<i64>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f64>,
    /// See [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f64>,
    /// See [`SamplingParams::presence_penalty`].
    pub presence_penalty: Option<f64>,
    /// See [`SamplingParams::frequency_penalty`].
    pub frequency_penalty: Option<f64>,
    /// Token ids as the wire has them, decimal strings, and what to add to their logits.
    pub logit_bias: Vec<(String, f64)>,
    /// See [`SamplingParams::seed`]. Two requests with the same seed draw alike, so a server gives
    /// requests without one a seed each: consecutive numbers do, the generator mixes them.
    pub seed: Option<i64>,
    /// See [`SamplingParams::logprobs`]: chat's `top_logprobs`, or completion's `logprobs`.
    pub logprobs: Option<i64>,
    /// See [`SamplingParams::prompt_logprobs`].
    pub prompt_logprobs: Option<i64>,
    /// See [`SamplingParams::min_tokens`].
    pub min_tokens: Option<i64>,
}

/// What the model's generation config recommends for requests that do not say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// See [`SamplingParams::temperature`].
    pub temperature: Option<f64>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f64>,
    /// See [`SamplingOptions::top_k`].
    pub top_k: Option<i64>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f64>,
    /// See [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f64>,
    /// See [`SamplingParams::presence_penalty`].
    pub presence_penalty: Option<f64>,
    /// See [`SamplingParams::frequency_penalty`].
    pub frequency_penalty: Option<f64>,
}

/// A field of a request is out of range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct InvalidParam {
    /// The field's name on the wire.
    pub param: &'static str,
    /// What is wrong with it, for the client.
    pub message: String,
}

impl InvalidParam {
    fn new(param: &'static str, expected: &str, found: impl std::fmt::Display) -> Self {
        Self { param, message: format!("`{param}` must be {expected}, but is {found}") }
    }
}

fn within(param: &'static str, value: f64, min: f64, max: f64) -> Result<f64, InvalidParam> {
    // NaN is in no range.
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    Err(InvalidParam::new(param, &format!("between {min} and {max}"), value))
}

fn positive_within(param: &'static str, value: f64, max: f64) -> Result<f64, InvalidParam> {
    // A positive number too small for f32 would become zero, which the range excludes.
    if (f64::from(f32::MIN_POSITIVE)..=max).contains(&value) {
        return Ok(value);
    }
    Err(InvalidParam::new(param, &format!("greater than 0 and at most {max}"), value))
}

fn top_k(value: Option<i64>, vocab_size: usize) -> Result<Option<NonZeroU32>, InvalidParam> {
    match value {
        None | Some(-1 | 0) => Ok(None),
        Some(k) if k < -1 => {
            Err(InvalidParam::new("top_k", "positive, or -1 or 0 to keep every token", k))
        }
        Some(k) if vocab_size as i64 <= k => Ok(None),
        Some(k) => Ok(NonZeroU32::new(k as u32)),
    }
}

fn logit_bias(
    entries: Vec<(String, f64)>,
    vocab_size: usize,
) -> Result<Vec<(TokenId, f32)>, InvalidParam> {
    const PARAM: &str = "logit_bias";
    if MAX_LOGIT_BIAS < entries.len() {
        let expected = format!("at most {MAX_LOGIT_BIAS} tokens");
        return Err(InvalidParam::new(PARAM, &expected, entries.len()));
    }
    let mut biases = Vec::with_capacity(entries.len());
    for (key, bias) in entries {
        let token = key.parse::<TokenId>().ok().filter(|&id| (id as usize) < vocab_size);
        let Some(token) = token else {
            let key: String = key.chars().take(32).collect();
            let expected = format!("keyed by token ids below {vocab_size}");
            return Err(InvalidParam::new(PARAM, &expected, format_args!("keyed by `{key}`")));
        };
        if !(-100.0..=100.0).contains(&bias) {
            let found = format_args!("{bias} for token {token}");
            return Err(InvalidParam::new(PARAM, "between -100 and 100", found));
        }
        biases.push((token, bias as f32));
    }
    biases.sort_by_key(|&(token, _)| token);
    if let Some(pair) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let found = format_args!("repeated for token {}", pair[0].0);
        return Err(InvalidParam::new(PARAM, "given once per token", found));
    }
    Ok(biases)
}

fn num_top(param: &'static str, value: Option<i64>) -> Result<Option<u32>, InvalidParam> {
    match value {
        None => Ok(None),
        Some(num) if (0..=i64::from(MAX_LOGPROBS)).contains(&num) => Ok(Some(num as u32)),
        Some(num) => Err(InvalidParam::new(param, &format!("between 0 and {MAX_LOGPROBS}"), num)),
    }
}

fn min_tokens(value: Option<i64>) -> Result<usize, InvalidParam> {
    let value = value.unwrap_or(0);
    usize::try_from(value).map_err(|_| InvalidParam::new("min_tokens", "at least 0", value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB_SIZE: usize = 100;

    fn validate(options: SamplingOptions) -> Result<SamplingParams, InvalidParam> {
        SamplingParams::validate(options, &GenerationDefaults::default(), VOCAB_SIZE)
    }

    #[test]
    fn nothing_given_is_neutral() {
        assert_eq!(validate(SamplingOptions::default()).unwrap(), SamplingParams::default());
    }

    #[test]
    fn request_wins_over_the_models_defaults() {
        let defaults = GenerationDefaults {
            temperature: Some(0.7),
            top_p: Some(0.8),
            top_k: Some(20),
            repetition_penalty: Some(1.1),
            ..GenerationDefaults::default()
        };
        let options =
            SamplingOptions { top_p: Some(0.5), top_k: Some(-1), ..SamplingOptions::default() };
        let params = SamplingParams::validate(options, &defaults, VOCAB_SIZE).unwrap();
        assert_eq!(params.temperature, 0.7);
        assert_eq!(params.top_p, 0.5);
        assert_eq!(params.top_k, None);
        assert_eq!(params.repetition_penalty, 1.1);
        assert!(params.needs_history());
    }

    /// Each case is outside exactly one range; the error must name that field.
    #[test]
    fn out_of_range_names_the_field() {
        type Set = fn(&mut SamplingOptions, f64);
        let floats: [(&str, Set, &[f64]); 6] = [
            ("temperature", |o, v| o.temperature = Some(v), &[-0.1, 2.1]),
            ("top_p", |o, v| o.top_p = Some(v), &[0.0, -1.0, 1.01, 1e-300]),
            ("min_p", |o, v| o.min_p = Some(v), &[-0.1, 1.1]),
            ("repetition_penalty", |o, v| o.repetition_penalty = Some(v), &[0.0, -1.0, 2.1]),
            ("presence_penalty", |o, v| o.presence_penalty = Some(v), &[-2.1, 2.1]),
            ("frequency_penalty", |o, v| o.frequency_penalty = Some(v), &[-2.1, 2.1]),
        ];
        for (param, set, values) in floats {
            let never = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300];
            for &value in values.iter().chain(&never) {
                let mut options = SamplingOptions::default();
                set(&mut options, value);
                let error = validate(options).unwrap_err();
                assert_eq!(error.param, param, "{value}");
                assert!(error.message.contains(param), "{}", error.message);
            }
        }
    }

    #[test]
    fn integers_out_of_range_name_the_field() {
        type Set = fn(&mut SamplingOptions);
        let cases: [(&str, Set); 6] = [
            ("top_k", |o| o.top_k = Some(-2)),
            ("logprobs", |o| o.logprobs = Some(21)),
            ("logprobs", |o| o.logprobs = Some(-1)),
            ("prompt_logprobs", |o| o.prompt_logprobs = Some(i64::MAX)),
            ("min_tokens", |o| o.min_tokens = Some(-1)),
            ("top_k", |o| o.top_k = Some(i64::MIN)),
        ];
        for (param, set) in cases {
            let mut options = SamplingOptions::default();
            set(&mut options);
            assert_eq!(validate(options).unwrap_err().param, param);
        }
    }

    #[test]
    fn top_k_of_the_whole_vocabulary_is_off() {
        for (given, expected) in [(1, Some(1)), (99, Some(99)), (100, None), (i64::MAX, None)] {
            let options = SamplingOptions { top_k: Some(given), ..SamplingOptions::default() };
            assert_eq!(validate(options).unwrap().top_k.map(NonZeroU32::get), expected);
        }
    }

    #[test]
    fn tiny_temperature_is_greedy() {
        let options = SamplingOptions { temperature: Some(1e-6), ..SamplingOptions::default() };
        assert_eq!(validate(options).unwrap().temperature, 0.0);
    }

    #[test]
    fn logit_bias_is_sorted_and_checked() {
        let bias = |entries: &[(&str, f64)]| {
            let logit_bias = entries.iter().map(|&(key, bias)| (key.to_owned(), bias)).collect();
            validate(SamplingOptions { logit_bias, ..SamplingOptions::default() })
        };
        let params = bias(&[("7", 100.0), ("3", -100.0)]).unwrap();
        assert_eq!(params.logit_bias, [(3, -100.0), (7, 100.0)]);
        let bad: [&[(&str, f64)]; 7] = [
            &[("100", 1.0)],
            &[("-1", 1.0)],
            &[("x", 1.0)],
            &[("1", 100.5)],
            &[("1", f64::NAN)],
            &[("1", 1.0), ("01", 2.0)],
            &[("99999999999999999999", 1.0)],
        ];
        for entries in bad {
            assert_eq!(bias(entries).unwrap_err().param, "logit_bias");
        }
        let many: Vec<(String, f64)> = (0..=MAX_LOGIT_BIAS).map(|i| (i.to_string(), 0.0)).collect();
        let options = SamplingOptions { logit_bias: many, ..SamplingOptions::default() };
        let error =
            SamplingParams::validate(options, &GenerationDefaults::default(), 5000).unwrap_err();
        assert_eq!(error.message, "`logit_bias` must be at most 1024 tokens, but is 1025");
    }
}
