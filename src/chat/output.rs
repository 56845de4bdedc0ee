//! Turns what the engine reports about a request into deltas of text, reasoning and calls.
//!
//! Pure: events in, updates out. Streams and whole answers are built from the same updates, so
//! they cannot disagree. **Invariant:** text that could be the beginning of a stop string or
//! sequence, and half characters, are held back, and with them the tokens they came from.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::chat::answer::{AnswerFormat, AnswerReader, Pieces};
use crate::engine::event::{Event, FinishReason as EngineFinish, SampledToken, TokenLogprobs};
use crate::openai::generation::{FinishReason, StopReason};
use crate::text::{
    IncrementalDetokenizer, SequenceMatcher, SequenceOutcome, SpecialTokens, StopMatcher,
    StopSequences, StopStrings, TokenId, Tokenizer,
};

/// How a request wants its output.
#[derive(Clone, Debug)]
pub struct OutputOptions {
    /// How many choices.
    pub n: u32,
    /// Text that ends a choice.
    pub stop: Arc<StopStrings>,
    /// Tokens that end a choice when they come in this order.
    pub stop_sequences: Arc<StopSequences>,
    /// Whether a stop string or token stays in the text.
    pub include_stop_in_output: bool,
    /// Whether special tokens leave text.
    pub special_tokens: SpecialTokens,
    /// All tokens that end a choice.
    pub stop_token_ids: Arc<[TokenId]>,
    /// How many of `stop_token_ids`, from the front, are the client's own: these are reported.
    pub num_own_stop_tokens: usize,
    /// Stop strings are not looked for before this many tokens.
    pub min_tokens: usize,
    /// How many log-probabilities of prompt tokens will come.
    pub num_prompt_logprobs: usize,
    /// What the text is read as.
    pub answer: AnswerFormat,
}

/// What a reader of the output learns, in order. `Started` comes first, once.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// The request runs, and everything about its prompt is known.
    Started {
        /// Prompt tokens found in the prefix cache.
        num_cached_tokens: usize,
        /// Prompt tokens newly kept in the cache, when the request asked to keep some.
        num_pinned_tokens: Option<usize>,
        /// One entry per prompt token after the first, when they were asked for.
        prompt_logprobs: Vec<TokenLogprobs>,
    },
    /// A piece of a choice.
    Delta(Delta),
}

/// A piece of a choice: text, the tokens it came from, and at the end the reason.
#[derive(Clone, Debug, PartialEq)]
pub struct Delta {
    /// Which of the `n` choices.
    pub choice: u32,
    /// Text to append to the content.
    pub text: String,
    /// Text to append to the reasoning, which comes before the content.
    pub reasoning: String,
    /// Parts of tool calls, in order.
    pub tool_calls: Vec<ToolCallDelta>,
    /// How many of `tokens` belong to the reasoning.
    pub num_reasoning_tokens: usize,
    /// The tokens since the last delta.
    pub tokens: Vec<SampledToken>,
    /// Present on the choice's last delta.
    pub finish: Option<Finish>,
}

/// A part of a tool call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCallDelta {
    /// Which of the choice's calls.
    pub index: u32,
    /// Present on the first part of an index only, where `arguments` is empty.
    pub id: Option<String>,
    /// The function, beside the id.
    pub name: Option<String>,
    /// Source text to append to the arguments. They are JSON only when the call is whole: no
    /// beginning of them parses.
    pub arguments: String,
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// OpenAI's reason.
    pub reason: FinishReason,
    /// The stop string or the client's stop token, if one of them did it.
    pub stop_reason: Option<StopReason>,
}

/// Why a request has no (further) output.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutputError {
    /// Its client has waited as long as it wanted to.
    #[error("the request's time is over")]
    Expired,
    /// The server shuts down.
    #[error("the request was aborted because the server is shutting down")]
    Aborted,
    /// The engine could not compute it.
    #[error("the engine failed: {0}")]
    Failed(String),
}

/// The output side of one request: one state machine per choice.
pub struct RequestOutput {
    options: OutputOptions,
    choices: Vec<Choice>,
    num_cached_tokens: usize,
    awaits_pins: bool,
    num_pinned_tokens: Option<usize>,
    prompt_logprobs: Vec<TokenLogprobs>,
    has_run: bool,
    is_started: bool,
    early: Vec<Delta>,
    updates: VecDeque<Update>,
}

impl RequestOutput {
    /// Output of a request that has not run yet.
    pub fn new(tokenizer: &Arc<Tokenizer>, options: OutputOptions) -> Self {
        let choices = (0..options.n).map(|index| Choice::new(index, tokenizer, &options)).collect();
        Self {
            options,
            choices,
            num_cached_tokens: 0,
            awaits_pins: false,
            num_pinned_tokens: None,
            prompt_logprobs: Vec::new(),
            has_run: false,
            is_started: false,
            early: Vec::new(),
            updates: VecDeque::new(),
        }
    }

    /// The request has pins, so it will be told what became of them.
    pub(super) fn expect_pins(&mut self) {
        self.awaits_pins = true;
    }

    /// Takes in an event. Returns the choice to cancel, if its text just hit a stop string.
    pub fn push(&mut self, event: Event) -> Result<Option<u32>, OutputError> {
        let mut cancel = None;
        match event {
            Event::Started { num_cached_tokens } => {
                self.num_cached_tokens = num_cached_tokens;
                self.has_run = true;
            }
            Event::PromptLogprobs(entries) => self.prompt_logprobs.extend(entries),
            Event::Pinned { num_tokens } => {
                self.num_pinned_tokens = Some(num_tokens);
                self.awaits_pins = false;
            }
            // Only embeddings are pooled, and they have no text.
            Event::Pooled(_) => {}
            Event::Token { choice, token } => {
                let state = &mut self.choices[choice as usize];
                if !state.is_finished {
                    let delta = state.push(token, &self.options);
                    cancel = state.is_finished.then_some(choice);
                    self.deliver(delta);
                }
            }
            Event::Finished { choice, reason } => self.finish_choice(choice, reason)?,
            Event::Expired => return Err(OutputError::Expired),
            Event::Failed(reason) => return Err(OutputError::Failed(reason)),
        }
        let has_prompt = self.options.num_prompt_logprobs <= self.prompt_logprobs.len();
        if self.has_run && has_prompt && !self.awaits_pins {
            self.start();
        }
        Ok(cancel)
    }

    fn finish_choice(&mut self, choice: u32, reason: EngineFinish) -> Result<(), OutputError> {
        let state = &mut self.choices[choice as usize];
        if state.is_finished {
            return Ok(());
        }
        let reason = match reason {
            EngineFinish::Stop => FinishReason::Stop,
            EngineFinish::Length => FinishReason::Length,
            EngineFinish::Abort => return Err(OutputError::Aborted),
            // `Failed` follows and says why.
            EngineFinish::Error => return Ok(()),
        };
        let delta = state.finish(reason, &self.options);
        self.deliver(Some(delta));
        if self.is_finished() {
            self.start();
        }
        Ok(())
    }

    /// The next update, if there is one already.
    pub fn next_update(&mut self) -> Option<Update> {
        self.updates.pop_front()
    }

    /// Whether every choice has ended.
    pub fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.is_finished)
    }

    /// Deltas wait until the prompt's log-probabilities are complete: with `n > 1` other choices
    /// may be ahead of the first one, which delivers these.
    fn deliver(&mut self, delta: Option<Delta>) {
        let Some(delta) = delta else { return };
        if self.is_started {
            self.updates.push_back(Update::Delta(delta));
        } else {
            self.early.push(delta);
        }
    }

    fn start(&mut self) {
        if self.is_started {
            return;
        }
        self.is_started = true;
        self.updates.push_back(Update::Started {
            num_cached_tokens: self.num_cached_tokens,
            num_pinned_tokens: self.num_pinned_tokens,
            prompt_logprobs: std::mem::take(&mut self.prompt_logprobs),
        });
        self.updates.extend(self.early.drain(..).map(Update::Delta));
    }
}

/// One choice: tokens to text to text without stop strings.
struct Choice {
    index: u32,
    detokenizer: IncrementalDetokenizer,
    sequences: SequenceMatcher,
    matcher: StopMatcher,
    reader: AnswerReader,
    pieces: Pieces,
    tokens: Vec<SampledToken>,
    num_tokens: usize,
    num_reasoning_tokens: usize,
    stop_reason: Option<StopReason>,
    is_finished: bool,
}

impl Choice {
    fn new(index: u32, tokenizer: &Arc<Tokenizer>, options: &OutputOptions) -> Self {
        Self {
            index,
            detokenizer: IncrementalDetokenizer::new(Arc::clone(tokenizer), options.special_tokens),
            sequences: SequenceMatcher::new(Arc::clone(&options.stop_sequences)),
            matcher: StopMatcher::new(Arc::clone(&options.stop)),
            reader: AnswerReader::new(&options.answer, index),
            pieces: Pieces::default(),
            tokens: Vec::new(),
            num_tokens: 0,
            num_reasoning_tokens: 0,
            stop_reason: None,
            is_finished: false,
        }
    }

    fn push(&mut self, token: SampledToken, options: &OutputOptions) -> Option<Delta> {
        let id = token.id;
        self.tokens.push(token);
        self.num_tokens += 1;
        self.num_reasoning_tokens += usize::from(self.reader.is_reasoning());
        if let Some(index) = options.stop_token_ids.iter().position(|stop| *stop == id) {
            if index < options.num_own_stop_tokens {
                self.stop_reason = Some(StopReason::TokenId(id));
            }
            if !options.include_stop_in_output {
                return None;
            }
        }
        let outcome = if self.num_tokens <= options.min_tokens {
            SequenceOutcome { released: vec![id], is_stopped: false }
        } else {
            self.sequences.push(id)
        };
        if self.take_tokens(&outcome.released, options) {
            return Some(self.end(FinishReason::Stop));
        }
        if outcome.is_stopped {
            return Some(self.finish(FinishReason::Stop, options));
        }
        if self.pieces.is_empty() { None } else { Some(self.take_delta(None)) }
    }

    /// Decodes tokens; whether the choice ends with one of them.
    fn take_tokens(&mut self, ids: &[TokenId], options: &OutputOptions) -> bool {
        ids.iter().any(|id| {
            let piece = self.detokenizer.push(*id);
            self.take_text(&piece, options) || self.reader.is_complete()
        })
    }

    fn finish(&mut self, reason: FinishReason, options: &OutputOptions) -> Delta {
        let held = self.sequences.finish();
        if self.take_tokens(&held, options) {
            return self.end(FinishReason::Stop);
        }
        let rest = self.detokenizer.finish();
        if self.take_text(&rest, options) {
            return self.end(FinishReason::Stop);
        }
        let held = self.matcher.finish();
        self.reader.push(&held, &mut self.pieces);
        self.end(reason)
    }

    /// Appends what is safe to send; whether a stop string was hit.
    fn take_text(&mut self, piece: &str, options: &OutputOptions) -> bool {
        if piece.is_empty() {
            return false;
        }
        if self.num_tokens <= options.min_tokens {
            self.reader.push(piece, &mut self.pieces);
            return false;
        }
        let outcome = self.matcher.push(piece);
        self.reader.push(&outcome.text, &mut self.pieces);
        if let Some(index) = outcome.stopped {
            self.stop_reason = Some(StopReason::String(options.stop.get(index).to_owned()));
        }
        outcome.stopped.is_some()
    }

    fn end(&mut self, reason: FinishReason) -> Delta {
        self.is_finished = true;
        self.reader.finish(&mut self.pieces);
        let stop_reason = self.stop_reason.take().filter(|_| reason == FinishReason::Stop);
        let reason = match reason {
            FinishReason::Stop if self.reader.has_whole_calls() => FinishReason::ToolCalls,
            reason => reason,
        };
        self.take_delta(Some(Finish { reason, stop_reason }))
    }

    fn take_delta(&mut self, finish: Option<Finish>) -> Delta {
        let Pieces { reasoning, content, tool_calls } = std::mem::take(&mut self.pieces);
        Delta {
            choice: self.index,
            text: content,
            reasoning,
            tool_calls,
            num_reasoning_tokens: std::mem::take(&mut self.num_reasoning_tokens),
            tokens: std::mem::take(&mut self.tokens),
            finish,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::tokenize::byte_level_char;
    use crate::text::TokenizerSpec;

    fn output(n: u32, stop: &[&str], num_prompt_logprobs: usize) -> RequestOutput {
        let tokens = (0..=u8::MAX).map(|byte| byte_level_char(byte).to_string()).collect();
        let spec = TokenizerSpec {
            tokens,
            merges: Vec::new(),
            token_types: vec![1; 256],
            pre: "qwen2".to_owned(),
        };
        let options = OutputOptions {
            n,
            stop: Arc::new(StopStrings::new(stop.iter().map(ToString::to_string).collect(), false)),
            stop_sequences: Arc::new(StopSequences::new(vec![vec![1, 2]], false)),
            include_stop_in_output: false,
            special_tokens: SpecialTokens::Skip,
            stop_token_ids: Arc::new([0]),
            num_own_stop_tokens: 0,
            min_tokens: 0,
            num_prompt_logprobs,
            answer: AnswerFormat::default(),
        };
        RequestOutput::new(&Arc::new(Tokenizer::from_spec(spec).unwrap()), options)
    }

    fn token(choice: u32, byte: u8) -> Event {
        let token = SampledToken { id: TokenId::from(byte), logprobs: None };
        Event::Token { choice, token }
    }

    /// Feeds events; returns the text of every update (`^` for the start, `$` for an end) and the
    /// choices that were to be cancelled.
    fn feed(output: &mut RequestOutput, events: Vec<Event>) -> (Vec<String>, Vec<u32>) {
        let cancelled: Vec<u32> =
            events.into_iter().filter_map(|event| output.push(event).unwrap()).collect();
        let updates = std::iter::from_fn(|| output.next_update());
        let shown = updates.map(|update| match update {
            Update::Started { prompt_logprobs, .. } => format!("^{}", prompt_logprobs.len()),
            Update::Delta(delta) => {
                let end = if delta.finish.is_some() { "$" } else { "" };
                format!("{}{}:{}{end}", delta.choice, delta.text, delta.tokens.len())
            }
        });
        (shown.collect(), cancelled)
    }

    const STARTED: Event = Event::Started { num_cached_tokens: 0 };

    fn finished(choice: u32, reason: EngineFinish) -> Event {
        Event::Finished { choice, reason }
    }

    #[test]
    fn deltas_of_other_choices_wait_for_the_log_probabilities_of_the_prompt() {
        let entry = || TokenLogprobs { token: 1, logprob: -1.0, top: Vec::new() };
        let mut output = output(2, &[], 2);
        let early = vec![STARTED, token(1, b'x'), Event::PromptLogprobs(vec![entry()])];
        assert_eq!(feed(&mut output, early).0, [""; 0]);
        let rest = vec![Event::PromptLogprobs(vec![entry()]), token(0, b'a')];
        assert_eq!(feed(&mut output, rest).0, ["^2", "1x:1", "0a:1"]);
    }

    #[test]
    fn a_stop_string_cancels_its_choice_and_silences_it() {
        let mut output = output(2, &["yz"], 0);
        let events = [STARTED, token(0, b'x'), token(0, b'y'), token(0, b'z'), token(0, b'!')];
        let (shown, cancelled) = feed(&mut output, events.into());
        assert_eq!(shown, ["^0", "0x:1", "0:2$"]);
        assert_eq!(cancelled, [0]);
        assert!(!output.is_finished());
        let rest = vec![
            finished(0, EngineFinish::Abort),
            token(1, b'y'),
            finished(1, EngineFinish::Length),
        ];
        assert_eq!(feed(&mut output, rest).0, ["1y:1$"]);
        assert!(output.is_finished());
    }

    #[test]
    fn a_stop_sequence_ends_its_choice_and_a_broken_one_is_text() {
        let mut output = output(2, &[], 0);
        let events = [STARTED, token(0, b'x'), token(0, 1), token(0, b'y'), token(0, 1)];
        assert_eq!(feed(&mut output, events.into()).0, ["^0", "0x:1", "0\u{1}y:2"]);
        let (shown, cancelled) = feed(&mut output, vec![token(0, 2), token(0, b'!')]);
        assert_eq!((shown, cancelled), (vec!["0:2$".to_owned()], vec![0]));
        let rest = vec![token(1, b'z'), token(1, 1), finished(1, EngineFinish::Length)];
        assert_eq!(feed(&mut output, rest).0, ["1z:1", "1\u{1}:1$"]);
    }

    #[test]
    fn half_a_character_and_a_stop_token_have_no_text_of_their_own() {
        let mut output = output(1, &[], 0);
        let events = [STARTED, token(0, 0xc3), token(0, 0xa9), token(0, 0xe4), token(0, 0)];
        assert_eq!(feed(&mut output, events.into()).0, ["^0", "0\u{e9}:2"]);
        let end = vec![finished(0, EngineFinish::Stop)];
        assert_eq!(feed(&mut output, end).0, ["0\u{fffd}:2$"]);
    }

    #[test]
    fn an_abort_and_a_failure_are_errors() {
        let mut aborted = output(1, &[], 0);
        let result = aborted.push(finished(0, EngineFinish::Abort));
        assert_eq!(result, Err(OutputError::Aborted));
        let mut failed = output(1, &[], 0);
        assert_eq!(failed.push(finished(0, EngineFinish::Error)), Ok(None));
        let result = failed.push(Event::Failed("why".to_owned()));
        assert_eq!(result, Err(OutputError::Failed("why".to_owned())));
    }
}
