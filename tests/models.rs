//! Goal: the model computes what Hugging Face computes, and what it computes for a sequence never
//! depends on how the engine came to run it.
//!
//! Method: tiny random checkpoints under `models/tiny` with logits and greedy tokens by Hugging
//! Face transformers in float32; and four equalities, compared bit for bit through the whole
//! engine: batch = single, chunked = whole, cached = fresh, preempted = undisturbed.
#![allow(clippy::unwrap_used, reason = "a test may fail anywhere")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt;
use qwen_server::config::{Execution, RopeScalingChoice};
use qwen_server::device::Device;
use qwen_server::device::gpu::Gpu;
use qwen_server::engine::event::{Event, FinishReason, TokenLogprobs};
use qwen_server::engine::handle::EngineHandle;
use qwen_server::engine::request::{Adapter, Pooling, Priority, Request, StopConditions};
use qwen_server::engine::thread::{EngineConfig, spawn};
use qwen_server::grammar::{Constraint, GrammarCompiler};
use qwen_server::ops::kv_cache::KvDtype;
use qwen_server::runner::load::{LoadOptions, PlannedModel};
use qwen_server::sampling::SamplingParams;
use qwen_server::scheduler::{Drafter, SpeculationConfig};
use qwen_server::text::{SpecialTokens, Tokenizer, TokenizerSpec};
use qwen_server::weights::checkpoint::Checkpoint;
use qwen_server::weights::gguf::Gguf;
use serde::Deserialize;

#[path = "models/architectures.rs"]
mod architectures;
#[path = "models/dummy.rs"]
mod dummy;
#[path = "models/gpu.rs"]
mod gpu;
#[path = "models/kv_cache.rs"]
mod kv_cache;
#[path = "models/long_context.rs"]
mod long_context;
#[path = "models/lora.rs"]
mod lora;
#[path = "models/lora_on_gpu.rs"]
mod lora_on_gpu;
#[path = "models/repositories.rs"]
mod repositories;
#[path = "models/speculation.rs"]
mod speculation;

#[derive(Clone, Copy)]
struct Setup {
    block_size: usize,
    kv_cache_bytes: u64,
    max_num_batched_tokens: usize,
    num_threads: usize,
    kv_cache_dtype: KvDtype,
    place: Place,
}

/// Where a model runs.
#[derive(Clone, Copy)]
enum Place {
    Cpu,
    /// A card, or else the emulation, if the build has one of them.
    Gpu(Execution),
}

impl Place {
    fn device(self) -> Device {
        match self {
            Self::Cpu => Device::Cpu,
            Self::Gpu(_) => Device::Gpu(Gpu::for_tests().expect("the caller looked")),
        }
    }

    fn execution(self) -> Execution {
        match self {
            Self::Cpu => Execution::Eager,
            Self::Gpu(execution) => execution,
        }
    }
}

const ROOMY: Setup = Setup {
    block_size: 16,
    kv_cache_bytes: 8 << 20,
    max_num_batched_tokens: 512,
    num_threads: 1,
    kv_cache_dtype: KvDtype::F16,
    place: Place::Cpu,
};

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny").join(name)
}

fn start(model: &Path, setup: Setup) -> EngineHandle {
    start_planned(&PlannedModel::open(model, load_options(setup)).unwrap(), setup)
}

fn load_options(setup: Setup) -> LoadOptions {
    LoadOptions {
        device: setup.place.device(),
        gpu_memory_utilization: 0.9,
        execution: setup.place.execution(),
        kv_cache_bytes: Some(setup.kv_cache_bytes),
        kv_cache_dtype: setup.kv_cache_dtype,
        max_model_len: None,
        rope_scaling: RopeScalingChoice::Auto,
        block_size: setup.block_size,
        max_num_seqs: 16,
        max_num_batched_tokens: setup.max_num_batched_tokens,
        num_threads: setup.num_threads,
        adapters: (0, 16),
    }
}

fn start_planned(planned: &PlannedModel, setup: Setup) -> EngineHandle {
    start_speculating(planned, setup, None)
}

fn start_speculating(
    planned: &PlannedModel,
    setup: Setup,
    speculation: Option<SpeculationConfig>,
) -> EngineHandle {
    let config = EngineConfig {
        max_num_batched_tokens: setup.max_num_batched_tokens,
        max_num_seqs: 16,
        block_size: setup.block_size,
        num_blocks: planned.plan.num_blocks,
        max_model_len: planned.plan.max_model_len,
        stretched_beyond: planned.config.stretched_beyond(),
        vocab_size: planned.config.vocab_size,
        speculation,
        ..EngineConfig::default()
    };
    let runner = planned.load(|_| {}).unwrap();
    let mut runner = Some(runner);
    spawn(config, move || runner.take().ok_or_else(|| "no other runner".to_owned())).0
}

fn request(prompt: &[u32], max_tokens: usize, params: SamplingParams) -> Request {
    Request {
        id: Arc::from("test"),
        prompt: Arc::from(prompt),
        params: Arc::new(params),
        stop: StopConditions { max_tokens, stop_token_ids: Arc::new([]) },
        n: 1,
        grammar: None,
        thinking: None,
        cache_salt: None,
        priority: Priority::default(),
        fairness_id: None,
        deadline: None,
        pins: Arc::new([]),
        pooling: None,
        adapter: None,
    }
}

/// What a request said: tokens and the bits of all their log-probabilities.
#[derive(Debug, PartialEq)]
struct Said {
    tokens: Vec<u32>,
    logprob_bits: Vec<u32>,
    num_cached_tokens: usize,
}

async fn run(engine: &EngineHandle, request: Request) -> Said {
    let mut events = engine.generate(request).unwrap();
    let mut said = Said { tokens: Vec::new(), logprob_bits: Vec::new(), num_cached_tokens: 0 };
    while let Some(event) = events.next().await {
        match event {
            Event::Started { num_cached_tokens } => said.num_cached_tokens = num_cached_tokens,
            Event::Token { token, .. } => {
                said.tokens.push(token.id);
                let logprobs = token.logprobs.expect("log-probabilities were asked for");
                said.logprob_bits.extend(logprobs.top.iter().map(|(_, logprob)| logprob.to_bits()));
            }
            Event::Finished { .. } | Event::PromptLogprobs(_) => {}
            Event::Pinned { .. } | Event::Pooled(_) => panic!("nobody asked"),
            Event::Expired => panic!("it has no deadline"),
            Event::Failed(why) => panic!("{why}"),
        }
    }
    said
}

/// Sampled, so that every draw must repeat too.
fn sampled(index: usize) -> SamplingParams {
    SamplingParams { seed: index as u64, logprobs: Some(5), ..SamplingParams::default() }
}

/// Prompts of awkward lengths; every second one shares a prefix with its predecessor.
fn prompts() -> Vec<Vec<u32>> {
    let lengths = [1, 15, 16, 17, 40, 61, 97, 33];
    let prompt = |(index, &len): (usize, &usize)| -> Vec<u32> {
        (0..len as u32).map(|i| (i * 31 + index as u32 / 2 * 7) % 250).collect()
    };
    lengths.iter().enumerate().map(prompt).collect()
}

async fn alone(model: &Path, index: usize, prompt: &[u32]) -> Said {
    run(&start(model, ROOMY), request(prompt, 24, sampled(index))).await
}

async fn together(engine: &EngineHandle) -> Vec<Said> {
    let prompts = prompts();
    let runs = prompts.iter().enumerate().map(|(i, p)| run(engine, request(p, 24, sampled(i))));
    futures_util::future::join_all(runs).await
}

fn assert_same(context: &str, index: usize, ours: &Said, expected: &Said) {
    assert_eq!(ours.tokens, expected.tokens, "{context}: tokens of prompt {index}");
    assert_eq!(ours.logprob_bits, expected.logprob_bits, "{context}: bits of prompt {index}");
}

const EQUALITY_MODELS: [&str; 6] = [
    "mixed.gguf",
    "k-quants.gguf",
    "f32-untied.gguf",
    "qwen3-q8_0.gguf",
    "qwen2moe-f16.gguf",
    "qwen3moe-mixed.gguf",
];

#[tokio::test]
async fn company_chunks_threads_and_preemption_change_no_bit() {
    for model in EQUALITY_MODELS.into_iter().chain(["hf-sliding"]).map(tiny) {
        let mut expected = Vec::new();
        for (index, prompt) in prompts().iter().enumerate() {
            expected.push(alone(&model, index, prompt).await);
        }
        let bytes_per_block = block_bytes(&model, 4);
        let setups = [
            ("batched", ROOMY),
            ("chunked", Setup { max_num_batched_tokens: 7, ..ROOMY }),
            ("threads", Setup { num_threads: 3, ..ROOMY }),
            // Room for the longest sequence and little else: preemption is certain.
            ("preempted", Setup { block_size: 4, kv_cache_bytes: 36 * bytes_per_block, ..ROOMY }),
        ];
        for (context, setup) in setups {
            let engine = start(&model, setup);
            for (index, said) in together(&engine).await.iter().enumerate() {
                assert_same(context, index, said, &expected[index]);
            }
            if context == "preempted" {
                assert!(0 < engine.stats().num_preemptions, "the setup preempts nothing");
            }
        }
    }
}

/// The bits of a prompt's embedding.
async fn embed(engine: &EngineHandle, prompt: &[u32], pooling: Pooling) -> Vec<u32> {
    let asked = Request { pooling: Some(pooling), ..request(prompt, 0, SamplingParams::default()) };
    let mut events = engine.generate(asked).unwrap();
    let mut embedding = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Pooled(values) => embedding.extend(values.iter().map(|value| value.to_bits())),
            Event::Failed(why) => panic!("{why}"),
            _ => {}
        }
    }
    assert!(!embedding.is_empty());
    embedding
}

async fn embed_together(engine: &EngineHandle, pooling: Pooling) -> Vec<Vec<u32>> {
    let prompts = prompts();
    let embedded =
        futures_util::future::join_all(prompts.iter().map(|p| embed(engine, p, pooling)));
    tokio::join!(embedded, together(engine)).0
}

#[tokio::test]
async fn company_chunks_threads_and_preemption_change_no_bit_of_an_embedding() {
    for model in EQUALITY_MODELS.map(tiny) {
        let bytes_per_block = block_bytes(&model, 4);
        let setups = [
            ROOMY,
            Setup { max_num_batched_tokens: 7, ..ROOMY },
            Setup { num_threads: 3, ..ROOMY },
            Setup { block_size: 4, kv_cache_bytes: 36 * bytes_per_block, ..ROOMY },
        ];
        for pooling in [Pooling::Mean, Pooling::Last] {
            let mut expected = Vec::new();
            for prompt in prompts() {
                expected.push(embed(&start(&model, ROOMY), &prompt, pooling).await);
            }
            for setup in setups {
                let engine = start(&model, setup);
                assert_eq!(embed_together(&engine, pooling).await, expected);
                // Once more, with everything in the cache.
                assert_eq!(embed_together(&engine, pooling).await, expected);
            }
        }
    }
}

/// Goal: an embedding is made of Hugging Face's hidden states. Method: logits are a matrix times
/// them, so the matrix times their mean must be the mean of Hugging Face's logits.
#[tokio::test]
async fn embeddings_are_of_hugging_face_hidden_states() {
    let name = "f32-untied";
    let golden = std::fs::read_to_string(tiny(&format!("{name}.json"))).unwrap();
    let golden: Golden = serde_json::from_str(&golden).unwrap();
    let checkpoint = Checkpoint::open(&tiny(&format!("{name}.gguf"))).unwrap();
    let setup = Setup { kv_cache_dtype: KvDtype::F32, ..ROOMY };
    let engine = start(&tiny(&format!("{name}.gguf")), setup);
    for prompt in &golden.prompts {
        // Of long prompts the file has only the last token's logits.
        let is_whole = prompt.logits.len() == prompt.prompt_ids.len();
        let poolings =
            if is_whole { &[Pooling::Mean, Pooling::Last][..] } else { &[Pooling::Last] };
        for &pooling in poolings {
            let embedding = embed(&engine, &prompt.prompt_ids, pooling).await;
            let embedding: Vec<f32> = embedding.into_iter().map(f32::from_bits).collect();
            let rows = match pooling {
                Pooling::Mean => prompt.logits.as_slice(),
                Pooling::Last => &prompt.logits[prompt.logits.len() - 1..],
            };
            let num_tokens = prompt.logits[0].len();
            let head = checkpoint.matrix("lm_head.weight", num_tokens, embedding.len()).unwrap();
            let head: &[f32] = bytemuck::cast_slice(head.bytes.as_ref());
            for (token, weights) in head.chunks_exact(embedding.len()).enumerate() {
                let products =
                    weights.iter().zip(&embedding).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let ours: f64 = products.sum();
                let theirs = rows.iter().map(|row| row[token]).sum::<f64>() / rows.len() as f64;
                assert!((ours - theirs).abs() < 1e-3, "{ours} {theirs}");
            }
        }
    }
}

fn block_bytes(model: &Path, block_size: usize) -> u64 {
    let options = LoadOptions {
        device: Device::Cpu,
        gpu_memory_utilization: 0.9,
        execution: Execution::Eager,
        kv_cache_bytes: Some(1 << 20),
        kv_cache_dtype: KvDtype::F16,
        max_model_len: None,
        rope_scaling: RopeScalingChoice::Auto,
        block_size,
        max_num_seqs: 1,
        max_num_batched_tokens: 1,
        num_threads: 1,
        adapters: (0, 16),
    };
    PlannedModel::open(model, options).unwrap().plan.block_bytes
}

#[tokio::test]
async fn a_cached_prefix_changes_no_bit() {
    for model in EQUALITY_MODELS.map(tiny) {
        let engine = start(&model, ROOMY);
        let prompt = &prompts()[6];
        let fresh = run(&engine, request(prompt, 24, sampled(6))).await;
        let cached = run(&engine, request(prompt, 24, sampled(6))).await;
        assert_eq!(fresh.num_cached_tokens, 0);
        assert_eq!(cached.num_cached_tokens, 96, "six full blocks of a 97-token prompt");
        assert_same("cached", 6, &cached, &fresh);
    }
}

/// The vocabulary of the tiny models: bytes, ten merges and Qwen's added tokens.
fn tokenizer(model: &Path) -> Arc<Tokenizer> {
    let gguf = Gguf::open(model).unwrap();
    let metadata = gguf.metadata();
    let spec = TokenizerSpec {
        tokens: metadata.strings("tokenizer.ggml.tokens").unwrap(),
        merges: metadata.strings("tokenizer.ggml.merges").unwrap(),
        token_types: metadata.i32s("tokenizer.ggml.token_type").unwrap(),
        pre: metadata.str("tokenizer.ggml.pre").unwrap().to_owned(),
    };
    Arc::new(Tokenizer::from_spec(spec).unwrap())
}

/// The tokens of each choice, once all have ended by themselves.
async fn choices(engine: &EngineHandle, request: Request) -> Vec<Vec<u32>> {
    let mut choices = vec![Vec::new(); request.n as usize];
    let mut events = engine.generate(request).unwrap();
    while let Some(event) = events.next().await {
        match event {
            Event::Token { choice, token } => choices[choice as usize].push(token.id),
            Event::Finished { reason, .. } => assert_eq!(reason, FinishReason::Stop),
            Event::Failed(why) => panic!("{why}"),
            _ => {}
        }
    }
    choices
}

/// Goal: no draw leaves a grammar, on real logits as hot as they get, beside others and after
/// preemptions. A random model has no idea of JSON, so nothing here is valid by chance.
#[tokio::test]
async fn hot_choices_keep_to_their_grammar() {
    let model = tiny("mixed.gguf");
    let tokenizer = tokenizer(&model);
    let end = tokenizer.id_of("<|im_end|>").unwrap();
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": -7, "maximum": 1000},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
            "kind": {"enum": ["é", "ab", "abc"]},
        },
        "required": ["id", "tags", "kind"],
        "additionalProperties": false,
    });
    let compiler = GrammarCompiler::new(Arc::clone(&tokenizer), &[end]);
    let grammar = compiler.compile(&Constraint::Json(schema)).unwrap();
    let block_bytes = block_bytes(&model, 4);
    let tight = Setup { block_size: 4, kv_cache_bytes: 110 * block_bytes, ..ROOMY };
    let mut expected = Vec::new();
    for setup in [ROOMY, tight] {
        let engine = start(&model, setup);
        let asked = (0..4).map(|index| {
            let mut params = sampled(index);
            (params.temperature, params.logprobs) = (2.0, None);
            let stop = StopConditions { max_tokens: 400, stop_token_ids: Arc::new([end]) };
            let grammar = Some(Arc::clone(&grammar));
            let plain = request(&prompts()[index], 0, params);
            choices(&engine, Request { n: 4, stop, grammar, ..plain })
        });
        let free = request(&prompts()[5], 24, sampled(5));
        let (outputs, free) =
            tokio::join!(futures_util::future::join_all(asked), run(&engine, free));
        assert_same("beside grammars", 5, &free, &alone(&model, 5, &prompts()[5]).await);
        for tokens in outputs.iter().flatten() {
            let text = tokenizer.decode(tokens, SpecialTokens::Skip);
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert!((-7.0..=1000.0).contains(&value["id"].as_f64().unwrap()), "{text}");
            let tags = value["tags"].as_array().unwrap();
            assert!(tags.len() <= 3, "{text}");
            assert!(tags.iter().all(|tag| tag.as_str().unwrap().chars().count() <= 6), "{text}");
            assert!(["é", "ab", "abc"].contains(&value["kind"].as_str().unwrap()), "{text}");
            assert_eq!(value.as_object().unwrap().len(), 3, "{text}");
        }
        let num_preemptions = engine.stats().num_preemptions;
        assert_eq!(0 < num_preemptions, !expected.is_empty(), "{num_preemptions} preemptions");
        if expected.is_empty() {
            expected = outputs;
        } else {
            assert_eq!(outputs, expected, "preempted = undisturbed");
        }
    }
}

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<GoldenPrompt>,
}

#[derive(Deserialize)]
struct GoldenPrompt {
    prompt_ids: Vec<u32>,
    logits: Vec<Vec<f64>>,
    prompt_logprobs: Vec<f64>,
    greedy_ids: Vec<u32>,
    greedy_margins: Vec<f64>,
}

/// How far from float32 a checkpoint may be: what its weights' type costs, no more.
#[derive(Clone, Copy)]
struct Tolerance {
    /// Of one log-probability.
    max: f64,
    /// Of the average log-probability.
    mean: f64,
    /// The most likely token must agree where the best two logits are further apart than this.
    margin: f64,
}

const DENSE: Tolerance = Tolerance { max: 2e-4, mean: 5e-5, margin: 1e-3 };
/// Activations are quantised to eight bits beside quantised weights. A random narrow network has
/// logits spread over ten and no redundancy, so that costs it about ten times what it costs a
/// trained one; the bound for trained weights is held on the real model.
const QUANTISED: Tolerance = Tolerance { max: 1.0, mean: 0.12, margin: 0.4 };
/// Weights, too, were quantised to eight bits, after the golden was made.
const REQUANTISED: Tolerance = Tolerance { max: 3.0, mean: 0.25, margin: 1.0 };
/// The same to floats of eight bits, which have half as many of precision.
const REQUANTISED_TO_FP8: Tolerance = Tolerance { max: 3.0, mean: 0.3, margin: 1.2 };
/// Weights were rounded to half precision when they were loaded.
const ROUNDED: Tolerance = Tolerance { max: 2e-2, mean: 2e-3, margin: 2e-2 };
/// Where a router's second and third choice are close, quantisation may swap them: of 216 tokens it
/// does so for five, and transformers with activations of eight bits errs by 1.5 there, by 0.3
/// elsewhere.
const QUANTISED_EXPERTS: Tolerance = Tolerance { max: 1.7, mean: 0.1, margin: 1.0 };
/// The same where a token goes to two of five: one of them is nearly half of what it gets.
const QUANTISED_PAIRS: Tolerance = Tolerance { max: 4.0, mean: 0.1, margin: 1.0 };
/// The checkpoint with these has logits half as far spread.
const K_QUANTS: Tolerance = Tolerance { max: 0.15, mean: 0.03, margin: 0.1 };
/// Of the 96 greedy tokens of a checkpoint, at least as many must be clear enough to compare.
const MIN_CLEAR_TOKENS: usize = 12;

#[tokio::test]
async fn hugging_face_computes_the_same() {
    let checkpoints = [
        ("f32-untied", DENSE),
        ("f32-tied", DENSE),
        ("f16", DENSE),
        ("bf16", DENSE),
        ("q8_0", QUANTISED),
        ("q8_0-hd128", QUANTISED),
        ("q4_0", QUANTISED),
        ("q4_0-gqa7", QUANTISED),
        ("q4_1", QUANTISED),
        ("q5_0", QUANTISED),
        ("q5_1", QUANTISED),
        ("mixed", QUANTISED),
        ("k-quants", K_QUANTS),
        ("qwen3-f16", DENSE),
        ("qwen3-q8_0", QUANTISED),
        ("qwen2moe-f16", DENSE),
        ("qwen3moe-f16", DENSE),
        ("qwen3moe-mixed", QUANTISED_EXPERTS),
        ("yarn", DENSE),
    ];
    let setup = Setup { kv_cache_dtype: KvDtype::F32, ..ROOMY };
    for (name, tolerance) in checkpoints {
        compare_with_golden(&format!("{name}.gguf"), tolerance, setup).await;
    }
}

#[tokio::test]
async fn hugging_face_computes_the_same_from_its_own_repositories() {
    let repositories = [
        ("hf-f32", DENSE),
        ("hf-f16", DENSE),
        ("hf-bf16", DENSE),
        ("hf-sharded", DENSE),
        ("hf-qwen3", DENSE),
        ("hf-qwen2moe", DENSE),
        ("hf-qwen3moe", DENSE),
        ("hf-sliding", DENSE),
        ("hf-sliding-hd64", DENSE),
        ("hf-yarn", DENSE),
        ("hf-narrow", DENSE),
        ("gptq-int4", QUANTISED),
        ("gptq-int4-act-order", QUANTISED),
        ("gptq-int4-asym", QUANTISED),
        ("gptq-int4-v2", QUANTISED),
        ("gptq-int8", QUANTISED),
        ("gptq-int8-asym", ROUNDED),
        ("awq", QUANTISED),
        ("gptq-int4-qwen2moe", QUANTISED_PAIRS),
        ("gptq-int4-qwen3moe", QUANTISED_PAIRS),
        ("awq-qwen3moe", QUANTISED_PAIRS),
        ("fp8-block", DENSE),
        ("fp8-block-qwen3moe", DENSE),
        ("fp8-tensor", DENSE),
        ("fp8-channel", DENSE),
    ];
    let setup = Setup { kv_cache_dtype: KvDtype::F32, ..ROOMY };
    for (name, tolerance) in repositories {
        compare_with_golden(name, tolerance, setup).await;
    }
}

async fn compare_with_golden(name: &str, tolerance: Tolerance, setup: Setup) {
    compare_engine(&start(&tiny(name), setup), name.trim_end_matches(".gguf"), tolerance).await;
}

/// Compares what an engine computes with a golden.
async fn compare_engine(engine: &EngineHandle, name: &str, tolerance: Tolerance) {
    compare_adapted((engine, None), name, tolerance).await;
}

/// An engine, and the adapter that it is asked for.
type Asked<'a> = (&'a EngineHandle, Option<&'a Adapter>);

async fn compare_adapted(asked: Asked<'_>, name: &str, tolerance: Tolerance) {
    let golden = std::fs::read_to_string(tiny(&format!("{name}.json"))).unwrap();
    let golden: Golden = serde_json::from_str(&golden).unwrap();
    let mut errors = Vec::new();
    for prompt in &golden.prompts {
        errors.extend(errors_of(asked, prompt).await);
    }
    let max = errors.iter().copied().fold(0.0, f64::max);
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    println!("{name:12} {} log-probabilities: mean error {mean:.1e}, max {max:.1e}", errors.len());
    assert!(max <= tolerance.max && mean <= tolerance.mean, "{name}: max {max}, mean {mean}");
    let mut num_clear = 0;
    for prompt in &golden.prompts {
        num_clear += compare_greedy(asked, prompt, tolerance.margin).await;
    }
    assert!(MIN_CLEAR_TOKENS <= num_clear, "{name}: only {num_clear} tokens were compared");
}

/// The errors of the prompt's log-probabilities and of the first generated token's alternatives.
async fn errors_of(asked: Asked<'_>, golden: &GoldenPrompt) -> Vec<f64> {
    let (prompt_logprobs, first) = score(asked, &golden.prompt_ids, 1).await;
    assert_eq!(prompt_logprobs.len(), golden.prompt_logprobs.len());
    let mut errors: Vec<f64> = prompt_logprobs
        .iter()
        .zip(&golden.prompt_logprobs)
        .map(|(ours, theirs)| (f64::from(ours.logprob) - theirs).abs())
        .collect();
    let last = log_softmax(golden.logits.last().unwrap());
    for &(token, logprob) in &first[0].top {
        errors.push((f64::from(logprob) - last[token as usize]).abs());
    }
    errors
}

/// Lets the model read prompt and greedy answer, and compares its favourite at every step whose
/// margin leaves no doubt. Returns how many there were.
async fn compare_greedy(asked: Asked<'_>, golden: &GoldenPrompt, margin: f64) -> usize {
    let tokens = [golden.prompt_ids.as_slice(), &golden.greedy_ids].concat();
    let (scored, _) = score(asked, &tokens, 0).await;
    let steps = scored[golden.prompt_ids.len() - 1..].iter().zip(&golden.greedy_margins);
    let mut num_clear = 0;
    for ((ours, found), expected) in steps.zip(&golden.greedy_ids) {
        if margin < *found {
            assert_eq!(ours.top[0].0, *expected, "the most likely token");
            num_clear += 1;
        }
    }
    num_clear
}

/// Log-probabilities of a text's tokens after the first, and of `max_tokens` greedy ones after it.
async fn score(
    (engine, adapter): Asked<'_>,
    tokens: &[u32],
    max_tokens: usize,
) -> (Vec<TokenLogprobs>, Vec<TokenLogprobs>) {
    let params = SamplingParams {
        temperature: 0.0,
        logprobs: Some(20),
        prompt_logprobs: Some(1),
        ..SamplingParams::default()
    };
    let request = Request { adapter: adapter.cloned(), ..request(tokens, max_tokens, params) };
    let mut events = engine.generate(request).unwrap();
    let (mut given, mut generated) = (Vec::new(), Vec::new());
    while let Some(event) = events.next().await {
        match event {
            Event::PromptLogprobs(entries) => given.extend(entries),
            Event::Token { token, .. } => generated.push(token.logprobs.unwrap()),
            Event::Started { .. } | Event::Finished { .. } => {}
            Event::Pinned { .. } | Event::Pooled(_) => panic!("nobody asked"),
            Event::Expired => panic!("it has no deadline"),
            Event::Failed(why) => panic!("{why}"),
        }
    }
    (given, generated)
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + logits.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln();
    logits.iter().map(|logit| logit - log_sum).collect()
}
