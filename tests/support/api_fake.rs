//! A server without a model: a byte-level tokenizer, a ChatML template, and a runner that says
//! what the prompt tells it to.
//!
//! A prompt that contains `say:TEXT;` is answered with `TEXT` and the end of the sequence, any
//! other with letters that depend on the choice, for ever, or on the seed if it says so. Behind
//! `then:nan;` logits are not finite after the text, and behind `then:error;` the step fails. The
//! runner reads the prompt back through the block table, so a misplaced block changes the answer. An
//! adapter is a text, with which every told answer ends; there are none unless a test makes some.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use qwen_server::access::{Digest, Key, KeyFile};
use qwen_server::chat::fim::FimTokens;
use qwen_server::chat::model::{Conventions, NamePattern, Reasoning, ServedModel};
use qwen_server::chat::template::{ChatTemplate, TemplateTokens};
use qwen_server::config::DASHSCOPE_NAMES;
use qwen_server::engine::request::{GenerationDefaults, Pooling};
use qwen_server::engine::{EngineConfig, spawn};
use qwen_server::grammar::GrammarCompiler;
use qwen_server::http::{AppState, HttpLimits, KeyRing, router};
use qwen_server::scheduler::step::{
    NonFiniteLogits, Runner, SampleError, SampleRequest, SampledToken, ScheduledSeq,
    SchedulerOutput, SeqOutput, TokenLogprobs, TokenMasks,
};
use qwen_server::text::tokenizer::TokenizerSpec;
use qwen_server::text::{TokenBitmask, TokenId, Tokenizer};
use serde_json::{Value, json};
use tower::ServiceExt;

/// What the default model is called.
pub(crate) const MODEL: &str = "fake-model";
/// `<|im_start|>`.
pub(crate) const IM_START: TokenId = 256;
/// `<|im_end|>`, which ends a sequence.
pub(crate) const IM_END: TokenId = 257;
/// `<|fim_prefix|>`, which like the others ends a middle.
pub(crate) const FIM_PREFIX: TokenId = 258;
/// Bytes and the seven special tokens; ids from here on are out of the vocabulary.
pub(crate) const VOCAB_SIZE: usize = 263;

const TEMPLATE: &str = "\
{%- if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}\
{%- for message in messages %}\
{{- '<|im_start|>' + message.role + '\\n' + message.content }}\
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}\
{{- '<|im_end|>\\n' }}\
{%- endfor %}\
{%- if fail %}{{ raise_exception('told to fail') }}{% endif %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\
{%- if open_thought %}{{ '<think>\\n' }}{% endif %}";

/// A server and what tests look at behind it.
pub(crate) struct FakeServer {
    pub(crate) state: AppState,
}

impl FakeServer {
    /// Sixteen sequences, 512 tokens each.
    pub(crate) fn start() -> Self {
        Self::with(&EngineConfig { max_model_len: 512, ..config() }, HttpLimits::default())
    }

    pub(crate) fn with(config: &EngineConfig, limits: HttpLimits) -> Self {
        let num_slots = config.num_blocks as usize * config.block_size;
        let block_size = config.block_size;
        let make_runner = move || Ok(FakeRunner { slots: vec![0; num_slots], block_size });
        let (engine, _thread) = spawn(config.clone(), make_runner);
        while !engine.is_ready() {
            std::thread::yield_now();
        }
        Self { state: AppState::new(engine, model(Conventions::default()), limits) }
    }

    /// The model thinks in tags, and its template opens a thought when it is told `open_thought`.
    pub(crate) fn thinking(config: &EngineConfig) -> Self {
        let server = Self::with(config, HttpLimits::default());
        let conventions = Conventions { reasoning: Reasoning::InTags, ..Conventions::default() };
        let engine = server.state.engine;
        Self { state: AppState::new(engine, model(conventions), HttpLimits::default()) }
    }

    /// Lets in only who has one of `keys`, which are entries of a key file. The secret of each is
    /// its name.
    pub(crate) fn with_keys(keys: &[(&str, &str)]) -> Self {
        let mut server = Self::start();
        server.state.keys = Some(Arc::new(KeyRing::new(parse_keys(keys))));
        server
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Body> {
        router(self.state.clone()).oneshot(request).await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_text(path, body.to_string()).await
    }

    pub(crate) async fn post_text(&self, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::post(path).header("content-type", "application/json");
        Answer::read(self.send(request.body(body.into()).unwrap()).await).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        Answer::read(self.send(Request::get(path).body(Body::empty()).unwrap()).await).await
    }

    /// Waits until this many sequences run.
    pub(crate) async fn wait_until_running(&self, num: usize) {
        for _ in 0..1000 {
            if self.state.engine.stats().num_running == num {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("not {num} running: {:?}", self.state.engine.stats());
    }

    /// Waits until no sequence runs and every block is free.
    pub(crate) async fn wait_until_idle(&self) {
        for _ in 0..1000 {
            let stats = self.state.engine.stats();
            let is_idle = stats.num_running == 0 && stats.num_waiting == 0;
            if is_idle && stats.num_free_blocks == stats.num_blocks {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("still busy after five seconds: {:?}", self.state.engine.stats());
    }
}

pub(crate) fn config() -> EngineConfig {
    EngineConfig { num_blocks: 1024, block_size: 16, vocab_size: VOCAB_SIZE, ..Default::default() }
}

/// The fake model; like it, a test may have one that thinks.
pub(crate) fn model(conventions: Conventions) -> ServedModel {
    let special = TemplateTokens { bos_token: None, eos_token: Some("<|im_end|>".into()) };
    let tokenizer = Arc::new(tokenizer());
    ServedModel {
        name: MODEL.into(),
        aliases: vec!["org/alias".into()],
        patterns: DASHSCOPE_NAMES.map(NamePattern::new).into(),
        root: "/models/fake".into(),
        grammars: GrammarCompiler::new(Arc::clone(&tokenizer), &[IM_END]),
        fim: FimTokens::find(&tokenizer),
        tokenizer,
        pooling: Pooling::Mean,
        embedding_size: 2,
        template: Some(ChatTemplate::new(TEMPLATE, special).unwrap()),
        eos_token_ids: vec![IM_END],
        sampling_defaults: GenerationDefaults::default(),
        conventions,
    }
}

/// One token per byte; token id and byte are the same number.
pub(crate) fn tokenizer() -> Tokenizer {
    let mut num_others = 0;
    let mut tokens: Vec<String> = (0..256u32)
        .map(|byte| {
            let is_printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
            let code = if is_printable { byte } else { 256 + num_others };
            num_others += u32::from(!is_printable);
            char::from_u32(code).unwrap().to_string()
        })
        .collect();
    let special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        "<think>",
        "</think>",
    ];
    tokens.extend(special.map(String::from));
    let token_type = |id| if id < 256 { 1 } else { 3 };
    // Tags around thoughts are text, as in real vocabularies.
    let token_types =
        (0..VOCAB_SIZE).map(|id| if id < VOCAB_SIZE - 2 { token_type(id) } else { 4 }).collect();
    let spec = TokenizerSpec { tokens, merges: Vec::new(), token_types, pre: "qwen2".into() };
    Tokenizer::from_spec(spec).unwrap()
}

/// The entries of a key file, each a name, which is its secret too, and further fields.
fn parse_keys(keys: &[(&str, &str)]) -> Vec<Key> {
    let entries = keys.iter().map(|(name, more)| {
        let digest = Digest::of(name.as_bytes());
        format!("[[key]]\nname = '{name}'\ndigest = '{digest}'\n{more}\n")
    });
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(entries.collect::<String>().as_bytes()).unwrap();
    KeyFile::read(file.path()).unwrap().into_keys()
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: axum::http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) async fn read(response: Response<Body>) -> Self {
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        Self { status: parts.status, headers: parts.headers, text }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }

    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        Some(self.headers.get(name)?.to_str().unwrap())
    }

    /// The error object, after checking that it has the shape that clients know.
    #[track_caller]
    pub(crate) fn error(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let body = self.json();
        let error = body["error"].as_object().unwrap_or_else(|| panic!("no error: {body}"));
        for key in ["message", "type", "param", "code"] {
            assert!(error.contains_key(key), "no `{key}` in {body}");
        }
        assert!(error["message"].is_string() && error["type"].is_string(), "{body}");
        assert!(self.headers.contains_key("x-request-id"));
        body["error"].clone()
    }

    /// The JSON of each event of a stream whose events have names, which are their types.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        let text = self.text.strip_suffix("\n\n").expect("events end with an empty line");
        let events = text.split("\n\n").filter(|event| !event.starts_with(':'));
        let events = events.map(|event| {
            let lines: Vec<&str> = event.lines().collect();
            let field = |name| lines.iter().find_map(|line| line.strip_prefix(name));
            let data: Value = serde_json::from_str(field("data: ").expect("data")).unwrap();
            assert_eq!(data["type"].as_str(), field("event: "), "{event}");
            data
        });
        events.collect()
    }

    /// The JSON of each event of a stream that ended well.
    #[track_caller]
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        let mut data: Vec<&str> = self
            .text
            .strip_suffix("\n\n")
            .expect("events end with an empty line")
            .split("\n\n")
            .filter(|event| !event.starts_with(':'))
            .map(|event| event.strip_prefix("data: ").expect("one `data` line per event"))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

/// A chat request whose answer is `text`.
pub(crate) fn chat(text: &str) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": format!("say:{text};")}]})
}

/// `base` with the fields of `more` set.
#[expect(clippy::needless_pass_by_value, reason = "callers pass a `json!` as it is")]
pub(crate) fn with(mut base: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

struct FakeRunner {
    /// The "cache": each slot remembers its token.
    slots: Vec<TokenId>,
    block_size: usize,
}

impl FakeRunner {
    fn prompt(&self, seq: &ScheduledSeq, num_output_tokens: usize) -> Vec<TokenId> {
        let positions = 0..seq.end() - num_output_tokens;
        positions.map(|pos| self.slots[seq.blocks.slot(pos, self.block_size)]).collect()
    }

    fn next_token(
        &self,
        seq: &ScheduledSeq,
        sample: &SampleRequest,
    ) -> Result<TokenId, SampleFault> {
        let done = sample.num_output_tokens;
        let prompt = self.prompt(seq, done);
        let find = |from: &[TokenId], what: &str| {
            let what: Vec<TokenId> = what.bytes().map(TokenId::from).collect();
            from.windows(what.len()).position(|window| window == what)
        };
        let script = find(&prompt, "say:").and_then(|start| {
            let rest = &prompt[start + 4..];
            Some(&rest[..find(rest, ";")?])
        });
        let token = match script {
            Some(tokens) if done < tokens.len() => tokens[done],
            Some(tokens) if done < tokens.len() + says(seq).len() => {
                TokenId::from(says(seq).as_bytes()[done - tokens.len()])
            }
            Some(_) if find(&prompt, "then:nan;").is_some() => return Err(SampleFault::Row),
            Some(_) if find(&prompt, "then:error;").is_some() => return Err(SampleFault::Step),
            Some(_) => IM_END,
            None if find(&prompt, "show the seed").is_some() => {
                TokenId::from(b'a') + (sample.params.seed % 26) as u32
            }
            None => TokenId::from(b'a') + (done as u32 + sample.choice) % 26,
        };
        Ok(if sample.forbidden.contains(&token) { TokenId::from(b'x') } else { token })
    }

    fn sampled(
        &self,
        seq: &ScheduledSeq,
        sample: &SampleRequest,
        mask: Option<&TokenBitmask>,
    ) -> Result<SampledToken, SampleFault> {
        let wanted = self.next_token(seq, sample)?;
        let ids = (wanted..VOCAB_SIZE as TokenId).chain(0..wanted);
        let id = ids.into_iter().find(|&id| mask.is_none_or(|mask| mask.allows(id)));
        let id = id.expect("something is allowed");
        let logprobs = sample.params.logprobs.map(|num_top| logprobs(id, num_top));
        Ok(SampledToken { id, logprobs })
    }
}

/// The text of a sequence's adapter.
fn says(seq: &ScheduledSeq) -> Arc<String> {
    seq.adapter.as_ref().map(|adapter| adapter.weights().unwrap()).unwrap_or_default()
}

/// What goes wrong because a prompt says so.
enum SampleFault {
    /// This sequence alone.
    Row,
    /// All of the step.
    Step,
}

impl Runner for FakeRunner {
    type Error = String;

    fn launch(&mut self, step: &SchedulerOutput) -> Result<(), String> {
        for seq in &step.scheduled {
            for (offset, token) in seq.tokens.iter().enumerate() {
                self.slots[seq.blocks.slot(seq.start + offset, self.block_size)] = *token;
            }
        }
        Ok(())
    }

    fn sample(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, String> {
        // A model takes its time; without it, long answers would end before a client can leave.
        #[allow(clippy::disallowed_methods, reason = "the engine thread is not a test")]
        std::thread::sleep(Duration::from_micros(200));
        let mut has_failed = false;
        let outputs = step.scheduled.iter().map(|seq| SeqOutput {
            sampled: seq.sample.as_ref().map(|sample| {
                self.sampled(seq, sample, masks.get(&seq.id)).map_err(|fault| {
                    has_failed |= matches!(fault, SampleFault::Step);
                    SampleError::from(NonFiniteLogits)
                })
            }),
            prompt_logprobs: seq
                .prompt_logprobs
                .iter()
                .flat_map(|wanted| {
                    wanted.targets.iter().map(|target| logprobs(*target, wanted.num_top))
                })
                .collect(),
            pooled: seq.pool.as_ref().map(|pool| {
                let mut sum = pool.sum.clone();
                sum.resize(2, 0.0);
                sum[0] +=
                    seq.tokens[pool.rows.clone()].iter().map(|&id| f64::from(id)).sum::<f64>();
                sum[1] += (pool.rows.len() * (1 + says(seq).len())) as f64;
                sum
            }),
            ..SeqOutput::default()
        });
        let outputs = outputs.collect();
        if has_failed { Err("the prompt asked for an error".to_owned()) } else { Ok(outputs) }
    }
}

fn logprobs(token: TokenId, num_top: u32) -> TokenLogprobs {
    let top = (0..num_top).map(|rank| ((token + rank) % 256, -0.5 - rank as f32)).collect();
    TokenLogprobs { token, logprob: -0.5, top }
}
