//! From a constraint to a grammar, within bounds.
//!
//! Building runs on a thread of its own, for its deep stack and so that nobody waits longer than
//! the limit. A build that takes too long keeps its slot until its own limits end it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{ParserFactory, regex_to_lark};
use serde_json::Value;

use super::cache::GrammarCache;
use super::constraint::Constraint;
use super::ebnf;
use super::matcher::{Grammar, GrammarError, GrammarMatcher, plain};
use super::pattern::{ASCII_CLASSES, ends_with_escape};
use super::schema::{self, Flaw};
use super::vocabulary::Vocabulary;
use crate::device::thread_clock::ThreadClock;
use crate::telemetry::metrics::GrammarTimer;
use crate::text::{TokenBitmask, TokenId, Tokenizer};

/// Longest constraint as text. The largest published schemas have half of it.
const MAX_CONSTRAINT_BYTES: usize = 512 << 10;
/// Most texts to choose from.
const MAX_CHOICES: usize = 10_000;
/// How long a grammar may be computed.
const COMPILE_LIMIT: Duration = Duration::from_secs(5);
/// How long a request waits for its grammar where the machine has other things to do.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(30);
/// Looking at a thread's clock more often is of no use.
const MIN_WAIT: Duration = Duration::from_millis(5);
/// How many grammars are built at a time.
const MAX_BUILDS: usize = 2;
/// Schemas nest, and llguidance follows them by recursion. Only what is used becomes memory.
const BUILD_STACK_BYTES: usize = 256 << 20;
/// Sets of words, each within the one before, beside those llguidance has for JSON. Where a grammar
/// allows all of a set its tokens are allowed at once, not one by one.
const WORD_SLICES: [&str; 3] = ["[a-zA-Z0-9_ ,.]{1,20}", "[a-zA-Z ]{1,20}", "[a-z]{1,20}"];
/// Most states of one grammar's automaton, of 1 to 2 KB each.
pub(super) const MAX_LEXER_STATES: usize = 50_000;
/// Most symbols of a grammar.
const MAX_GRAMMAR_SIZE: usize = 200_000;
/// Most memory of a grammar that was just built.
const MAX_GRAMMAR_BYTES: usize = 64 << 20;

/// Why a constraint cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// It is wrong, impossible, unsupported or too large.
    #[error("{message}")]
    Invalid {
        /// The part of the constraint, as in `.properties.name`; empty for all of it.
        part: String,
        /// What is wrong with it.
        message: String,
    },
    /// The machine has other things to do, such as building other grammars.
    #[error("too busy to compile another grammar")]
    Busy,
}

impl CompileError {
    fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid { part: String::new(), message: message.into() }
    }
}

impl From<Flaw> for CompileError {
    fn from(flaw: Flaw) -> Self {
        Self::Invalid { part: flaw.part, message: flaw.message }
    }
}

/// Compiles constraints for one model, and remembers them. Cheap to clone.
#[derive(Clone)]
pub struct GrammarCompiler {
    shared: Arc<Shared>,
}

struct Shared {
    tokenizer: Arc<Tokenizer>,
    eos_token_ids: Vec<TokenId>,
    /// Takes memory and a moment to build, so it waits for the first constraint.
    factory: OnceLock<Result<Factory, String>>,
    cache: Mutex<GrammarCache>,
    num_builds: Mutex<usize>,
    build_ended: Condvar,
}

struct Factory {
    parsers: ParserFactory,
    without_eos: Arc<TokenBitmask>,
}

impl GrammarCompiler {
    /// A compiler for the vocabulary of `tokenizer`, whose outputs end with one of
    /// `eos_token_ids`.
    pub fn new(tokenizer: Arc<Tokenizer>, eos_token_ids: &[TokenId]) -> Self {
        let shared = Shared {
            tokenizer,
            eos_token_ids: eos_token_ids.to_vec(),
            factory: OnceLock::new(),
            cache: Mutex::default(),
            num_builds: Mutex::new(0),
            build_ended: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The grammar of a constraint. May block for seconds: never call it on an async worker.
    ///
    /// # Errors
    /// If it is not a constraint that can be followed to the letter, or takes too much to build.
    pub fn compile(&self, constraint: &Constraint) -> Result<Arc<Grammar>, CompileError> {
        if MAX_CONSTRAINT_BYTES < constraint.num_bytes() {
            return Err(CompileError::invalid(format!(
                "must have at most {MAX_CONSTRAINT_BYTES} bytes, got {}",
                constraint.num_bytes()
            )));
        }
        let key = constraint.key();
        if let Some(grammar) = self.shared.cache().get(&key) {
            return Ok(grammar);
        }
        let _timer = GrammarTimer::start();
        let source = source(constraint)?;
        let slot = Slot::take(&self.shared).ok_or(CompileError::Busy)?;
        // Whoever was first may have built the same while we waited.
        if let Some(grammar) = self.shared.cache().get(&key) {
            return Ok(grammar);
        }
        let grammar = build_aside(slot, source)?;
        self.shared.cache().insert(key, Arc::clone(&grammar));
        Ok(grammar)
    }

    #[cfg(test)]
    pub(super) fn num_cached(&self) -> usize {
        self.shared.cache().len()
    }
}

impl Shared {
    fn cache(&self) -> MutexGuard<'_, GrammarCache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn factory(&self) -> Result<&Factory, CompileError> {
        let factory = self.factory.get_or_init(|| {
            catch_unwind(AssertUnwindSafe(|| self.make_factory()))
                .unwrap_or_else(|_| Err("the vocabulary cannot be indexed".to_owned()))
        });
        factory.as_ref().map_err(CompileError::invalid)
    }

    fn make_factory(&self) -> Result<Factory, String> {
        if self.eos_token_ids.is_empty() {
            return Err("this model has no token that ends an output".to_owned());
        }
        let vocabulary = Vocabulary::new(Arc::clone(&self.tokenizer), &self.eos_token_ids);
        let environment: TokEnv = Arc::new(vocabulary);
        let abilities = InferenceCapabilities { ff_tokens: true, ..Default::default() };
        let mut slices = SlicedBiasComputer::general_slices();
        slices.extend(WORD_SLICES.map(str::to_owned));
        let mut parsers = ParserFactory::new(&environment, abilities, &slices)
            .map_err(|error| plain(&error.to_string()))?;
        parsers.quiet();
        *parsers.limits_mut() = ParserLimits {
            max_lexer_states: MAX_LEXER_STATES,
            max_grammar_size: MAX_GRAMMAR_SIZE,
            // Verbose errors would put what was said into the log.
            verbose_errors: false,
            ..ParserLimits::default()
        };
        let vocab_size = self.tokenizer.vocab_size();
        let without_eos = Arc::new(TokenBitmask::all_but(vocab_size, &self.eos_token_ids));
        Ok(Factory { parsers, without_eos })
    }

    fn build(&self, source: TopLevelGrammar) -> Result<Arc<Grammar>, CompileError> {
        let factory = self.factory()?;
        let parser = factory.parsers.create_parser(source);
        let parser = parser.map_err(|error| CompileError::invalid(reason(&error)))?;
        let grammar = Arc::new(Grammar::new(parser, Arc::clone(&factory.without_eos)));
        let (num_bytes, _) = grammar.size().ok_or_else(|| CompileError::invalid("is broken"))?;
        if MAX_GRAMMAR_BYTES < num_bytes {
            return Err(CompileError::invalid("is too complex: it takes too much memory"));
        }
        // The first step shows whether there is any output at all.
        let first = GrammarMatcher::new(Arc::clone(&grammar)).mask();
        first.map_err(|GrammarError(reason)| {
            CompileError::invalid(format!("no output can match it: {reason}"))
        })?;
        Ok(grammar)
    }
}

/// The right to build a grammar.
struct Slot {
    shared: Arc<Shared>,
}

impl Slot {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let num_builds = shared.num_builds.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut num_builds, waited) = shared
            .build_ended
            .wait_timeout_while(num_builds, COMPILE_LIMIT, |num| MAX_BUILDS <= *num)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        *num_builds += 1;
        drop(num_builds);
        Some(Self { shared: Arc::clone(shared) })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.shared.num_builds.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.shared.build_ended.notify_one();
    }
}

/// Builds on a thread with a deep stack, and gives up on it in time.
fn build_aside(slot: Slot, source: TopLevelGrammar) -> Result<Arc<Grammar>, CompileError> {
    if slot.shared.factory.get().is_none() {
        // What is made once for all of them is not held against the first.
        let shared = Arc::clone(&slot.shared);
        let make = move || shared.factory().map(drop);
        run_aside(make, (Duration::MAX, COMPILE_TIMEOUT))??;
    }
    run_aside(move || slot.shared.build(source), (COMPILE_LIMIT, COMPILE_TIMEOUT))?
}

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unfinished {
    /// It was computed for as long as it may be.
    TooLong,
    /// It had to wait for the processor for so long that nobody waits any more.
    NoTime,
    /// There is no thread, or it panicked.
    Broken,
}

impl From<Unfinished> for CompileError {
    fn from(reason: Unfinished) -> Self {
        match reason {
            Unfinished::TooLong => Self::invalid("takes too long to compile"),
            Unfinished::NoTime => Self::Busy,
            Unfinished::Broken => Self::invalid("cannot be compiled"),
        }
    }
}

/// Runs something on a thread with a deep stack, and gives up on it when it has computed for so long,
/// or when so much time has passed. The thread goes on until it is done.
fn run_aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
    (limit, timeout): (Duration, Duration),
) -> Result<T, Unfinished> {
    let (clock_sender, clock) = sync_channel(1);
    let (sender, receiver) = sync_channel(1);
    let run = move || {
        let _ = clock_sender.send(ThreadClock::of_this_thread());
        let done = work();
        // Nobody listens if it took too long.
        let _ = sender.send(done);
    };
    let builder = std::thread::Builder::new().name("grammar".to_owned());
    builder.stack_size(BUILD_STACK_BYTES).spawn(run).map_err(|_| Unfinished::Broken)?;
    let clock = clock.recv().map_err(|_| Unfinished::Broken)?;
    let mut waited = Duration::ZERO;
    let mut left = limit.min(timeout);
    loop {
        match receiver.recv_timeout(left) {
            Ok(done) => return Ok(done),
            Err(RecvTimeoutError::Disconnected) => return Err(Unfinished::Broken),
            Err(RecvTimeoutError::Timeout) => waited += left,
        }
        let computed = clock.map_or(waited, |clock| clock.elapsed().unwrap_or(limit));
        left = limit.saturating_sub(computed).min(timeout).max(MIN_WAIT);
        if limit <= computed {
            return receiver.try_recv().map_err(|_| Unfinished::TooLong);
        }
        if timeout <= waited {
            return Err(Unfinished::NoTime);
        }
    }
}

/// What llguidance is to compile.
fn source(constraint: &Constraint) -> Result<TopLevelGrammar, CompileError> {
    match constraint {
        Constraint::JsonObject => Ok(TopLevelGrammar::from_json_schema(schema::any_object())),
        Constraint::Json(schema) => Ok(TopLevelGrammar::from_json_schema(schema::prepare(schema)?)),
        Constraint::Regex(regex) => Ok(TopLevelGrammar::from_lark(regex_grammar(regex)?)),
        Constraint::Choice(choices) => Ok(TopLevelGrammar::from_lark(choice_grammar(choices)?)),
        Constraint::Grammar(grammar) if ebnf::is_ebnf(grammar) => {
            Ok(TopLevelGrammar::from_lark(ebnf::to_lark(grammar).map_err(CompileError::invalid)?))
        }
        Constraint::Grammar(grammar) => {
            check_lark(grammar)?;
            Ok(TopLevelGrammar::from_lark(grammar.clone()))
        }
        Constraint::Lark(grammar) => Ok(TopLevelGrammar::from_lark(grammar.clone())),
    }
}

/// Anchors at both ends are what is meant anyway.
fn regex_grammar(regex: &str) -> Result<String, CompileError> {
    let inner = regex.strip_prefix('^').unwrap_or(regex);
    let at_end = inner.strip_suffix('$').filter(|rest| !ends_with_escape(rest));
    let inner = at_end.unwrap_or(inner);
    if inner.is_empty() {
        return Err(CompileError::invalid("must not be empty"));
    }
    Ok(format!("start: /{}/", regex_to_lark(inner, ASCII_CLASSES)))
}

/// One terminal, so that choices that begin alike stay open together.
fn choice_grammar(choices: &[String]) -> Result<String, CompileError> {
    if choices.is_empty() || MAX_CHOICES < choices.len() {
        return Err(CompileError::invalid(format!(
            "must hold between 1 and {MAX_CHOICES} choices, got {}",
            choices.len()
        )));
    }
    if let Some(index) = choices.iter().position(String::is_empty) {
        let message = "must not be empty".to_owned();
        return Err(CompileError::Invalid { part: format!("[{index}]"), message });
    }
    let quoted: Vec<String> =
        choices.iter().map(|choice| Value::from(&**choice).to_string()).collect();
    Ok(format!("start: CHOICE\nCHOICE: {}", quoted.join(" | ")))
}

fn check_lark(grammar: &str) -> Result<(), CompileError> {
    let dense: String = grammar.chars().filter(|c| !c.is_whitespace()).collect();
    if dense.is_empty() {
        return Err(CompileError::invalid("must not be empty"));
    }
    if dense.contains("[temperature=") || dense.contains(",temperature=") {
        return Err(CompileError::invalid("rules cannot set a temperature"));
    }
    Ok(())
}

/// All that llguidance says, outermost first.
fn reason(error: &anyhow::Error) -> String {
    plain(&format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Goal: time that a busy machine takes is not held against a grammar, but time that the grammar
    /// takes is. Method: a thread that sleeps, one that computes, one that does either for too long.
    #[test]
    fn only_computing_counts() {
        let limits = (Duration::from_millis(40), Duration::from_secs(2));
        let sleep = |millis| move || std::thread::sleep(Duration::from_millis(millis));
        let aside = |work: Box<dyn FnOnce() + Send>| run_aside(work, limits);
        assert_eq!(aside(Box::new(|| ())), Ok(()));
        assert_eq!(
            aside(Box::new(|| std::panic::resume_unwind(Box::new(())))),
            Err(Unfinished::Broken)
        );
        if cfg!(target_os = "linux") {
            assert_eq!(aside(Box::new(sleep(100))), Ok(()));
            assert_eq!(aside(Box::new(sleep(4000))), Err(Unfinished::NoTime));
        }
        let is_over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&is_over);
        let compute = move || while !seen.load(Ordering::Relaxed) {};
        assert_eq!(aside(Box::new(compute)), Err(Unfinished::TooLong));
        is_over.store(true, Ordering::Relaxed);
    }
}
