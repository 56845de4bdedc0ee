//! What can be typed behind `serve`. Each flag is an environment variable and a key of the config
//! file too; declaring it here is all it takes.

mod access;
mod lora;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{ArgAction, Args};

use access::{AccessFlags, TlsFlags};
use lora::LoraFlags;

use crate::config::{
    self, Alias, BareCalls, ByteSize, Config, ConfigError, DEFAULT_MODEL, DeviceChoice,
    DraftSource, EmbeddingPooling, EngineOptions, Execution, HostedNames, HttpConfig, KvCacheDtype,
    LoadFormat, LogConfig, LogFormat, LogLevel, ModelConfig, PrefixCaching, Price,
    RopeScalingChoice, Settings, Source, Speculative, UsageConfig,
};
use crate::weights::quantize::{Quantization, UnknownQuantization};

const AFTER_HELP: &str = "\
Each option can also be set by the environment variable shown beside it, or by the key of the same
name in the file given with --config. A flag wins over the environment, that over the file.

Examples:
  Serve the default model with little memory:
    qwen-server serve --max-num-seqs 16 --kv-cache-memory 512MiB

  Serve other machines, and let in only who has a key:
    qwen-server key add ann --file keys.toml
    qwen-server serve --host 0.0.0.0 --api-keys keys.toml

  Serve a file under a name that existing clients send:
    qwen-server serve --model ./qwen2.5-7b-instruct-q4_k_m.gguf --served-model-name gpt-4o-mini";

/// The arguments of `serve`.
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    lora: LoraFlags,
    #[command(flatten)]
    http: HttpFlags,
    #[command(flatten)]
    access: AccessFlags,
    #[command(flatten)]
    tls: TlsFlags,
    #[command(flatten)]
    engine: EngineFlags,
    #[command(flatten)]
    memory: MemoryFlags,
    #[command(flatten)]
    log: LogFlags,
    #[command(flatten)]
    usage: UsageFlags,

    /// Read settings from this TOML file
    ///
    /// Its keys are the options of this command without the dashes, for example
    /// `max-num-seqs = 16`. Unknown keys are errors.
    #[arg(long, env = "QWEN_SERVER_CONFIG", value_name = "FILE", help_heading = "Configuration")]
    pub config: Option<PathBuf>,

    /// Print every setting with what set it, as a config file, and exit
    #[arg(long, help_heading = "Configuration")]
    pub print_config: bool,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model")]
struct ModelFlags {
    /// Model to serve: a name of the catalogue, a GGUF file, a directory or a hub id
    ///
    /// `qwen-server models` lists the catalogue. A model that is not on this machine is downloaded
    /// first.
    #[arg(long, env = "QWEN_SERVER_MODEL", default_value = DEFAULT_MODEL)]
    model: String,

    /// Where weights come from: the model's files, or nowhere
    ///
    /// `dummy` measures a model of the catalogue, such as `qwen2.5-72b-instruct:q4_k_m`, without
    /// downloading it: its weights are random, and so are its answers.
    #[arg(long, env = "QWEN_SERVER_LOAD_FORMAT", value_name = "FORMAT")]
    #[arg(value_enum, default_value_t = LoadFormat::Auto)]
    load_format: LoadFormat,

    /// Quantise weights that are floats as they are loaded: q4_k, q8_0, ...
    ///
    /// For GGUF files and directories with weights in BF16, F16, F32 or FP8: q2_k, q3_k, q4_0, q4_1,
    /// q4_k, q5_0, q5_1, q5_k, q6_k, q8_0 or fp8. Less memory and faster answers for less exact ones.
    /// `qwen-server quantize` does it once and keeps a file.
    #[arg(long, env = "QWEN_SERVER_QUANTIZATION", value_name = "TYPE")]
    #[arg(value_parser = quantization_name)]
    quantization: Option<String>,

    /// Name that clients know the model by, instead of its own [repeatable]
    ///
    /// Responses carry the first one.
    #[arg(long, env = "QWEN_SERVER_SERVED_MODEL_NAME", value_name = "NAME")]
    #[arg(action = ArgAction::Append, value_delimiter = ',')]
    served_model_name: Vec<String>,

    /// Further name the model answers to [repeatable]
    #[arg(long, env = "QWEN_SERVER_MODEL_ALIAS", value_name = "NAME")]
    #[arg(action = ArgAction::Append, value_delimiter = ',')]
    model_alias: Vec<String>,

    /// Name, with `*` for any text, and the model it stands for [repeatable]
    ///
    /// Answers carry the name that was asked for, and the header `x-served-model` the model that
    /// served. In the config file these are the entries of the table `[aliases]`.
    #[arg(long, env = "QWEN_SERVER_ALIAS", value_name = "NAME=MODEL")]
    #[arg(action = ArgAction::Append, value_delimiter = ',')]
    alias: Vec<Alias>,

    /// Answer to the names of DashScope's hosted text models, such as qwen-plus
    #[arg(long, env = "QWEN_SERVER_DASHSCOPE_NAMES", value_name = "BOOL")]
    #[arg(default_value_t = true, default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(overrides_with = "no_dashscope_names")]
    dashscope_names: bool,

    /// Answer only to names that were given to this server
    #[arg(long, overrides_with = "dashscope_names")]
    no_dashscope_names: bool,

    /// Longest sequence in tokens, prompt and answer together [default: the model's own limit]
    #[arg(long, env = "QWEN_SERVER_MAX_MODEL_LEN", value_name = "TOKENS")]
    #[arg(value_parser = at_least_one(1 << 24))]
    max_model_len: Option<usize>,

    /// Make positions beyond the trained ones usable: auto, none, yarn or yarn:factor=4,original=32768
    ///
    /// `auto` does what the model's file says; `yarn` what the catalogue or the file knows of the
    /// model. The JSON of `rope_scaling` in a config.json works too. Requests that cannot become
    /// longer than the trained context are computed as without; give them max_tokens.
    #[arg(long, env = "QWEN_SERVER_ROPE_SCALING", value_name = "SCALING", default_value = "auto")]
    rope_scaling: RopeScalingChoice,

    /// What the vectors of /v1/embeddings are made of: the mean over all tokens, or the last token
    ///
    /// The mean suits models that were trained to generate. Models trained for embeddings say
    /// which one they need.
    #[arg(long, env = "QWEN_SERVER_EMBEDDING_POOLING", value_name = "POOLING")]
    #[arg(value_enum, default_value_t = EmbeddingPooling::Mean)]
    embedding_pooling: EmbeddingPooling,

    /// Take an answer that is nothing but the JSON of a valid tool call for that call
    ///
    /// Small models and those for code often leave out the tags that mark a call.
    #[arg(long, env = "QWEN_SERVER_BARE_TOOL_CALLS", value_name = "BOOL")]
    #[arg(default_value_t = true, default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(overrides_with = "no_bare_tool_calls")]
    bare_tool_calls: bool,

    /// Take for tool calls only what the model marks as such
    #[arg(long, overrides_with = "bare_tool_calls")]
    no_bare_tool_calls: bool,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Network")]
struct HttpFlags {
    /// Address to listen on; 0.0.0.0 accepts clients from other machines, which then need keys
    #[arg(long, env = "QWEN_SERVER_HOST", default_value = "127.0.0.1")]
    host: String,

    /// Port to listen on; 0 takes a free one
    #[arg(long, env = "QWEN_SERVER_PORT", default_value_t = 8000)]
    port: u16,

    /// Refuse request bodies larger than this
    #[arg(long, env = "QWEN_SERVER_MAX_BODY_SIZE", value_name = "SIZE", default_value = "8MiB")]
    max_body_size: ByteSize,

    /// Connections that are served at once; further ones wait to be accepted
    #[arg(long, env = "QWEN_SERVER_MAX_CONNECTIONS", value_name = "N")]
    #[arg(default_value_t = 4096, value_parser = at_least_one(1 << 20))]
    max_connections: usize,

    /// Drop a client that leaves its answer unread for this many seconds
    ///
    /// Its request is taken back from the model.
    #[arg(long, env = "QWEN_SERVER_WRITE_TIMEOUT", value_name = "SECONDS")]
    #[arg(default_value_t = 60)]
    #[arg(value_parser = RangedU64ValueParser::<u64>::new().range(1..=86_400))]
    write_timeout: u64,

    /// After SIGTERM or Ctrl-C, let running requests finish for at most this many seconds
    #[arg(long, env = "QWEN_SERVER_SHUTDOWN_TIMEOUT", value_name = "SECONDS")]
    #[arg(default_value_t = 30)]
    #[arg(value_parser = RangedU64ValueParser::<u64>::new().range(0..=86_400))]
    shutdown_timeout: u64,

    /// End requests that take longer than this many seconds with 504 [default: no limit]
    ///
    /// A client may set a shorter time for its request with the header `x-request-timeout`.
    #[arg(long, env = "QWEN_SERVER_REQUEST_TIMEOUT", value_name = "SECONDS")]
    #[arg(value_parser = RangedU64ValueParser::<u64>::new().range(1..=86_400))]
    request_timeout: Option<u64>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Computing")]
struct EngineFlags {
    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, env = "QWEN_SERVER_DEVICE", default_value = "auto")]
    device: DeviceChoice,

    /// Threads that compute [default: as many as the machine has cores]
    #[arg(long, env = "QWEN_SERVER_THREADS", value_name = "N", value_parser = at_least_one(1024))]
    threads: Option<usize>,

    /// Sequences that run at once; further requests wait [on a GPU: 256]
    #[arg(long, env = "QWEN_SERVER_MAX_NUM_SEQS", value_name = "N")]
    #[arg(default_value_t = 64, value_parser = at_least_one(8192))]
    max_num_seqs: usize,

    /// Tokens computed per step [on a GPU: 4096]
    ///
    /// Prompts longer than this are computed in pieces. A larger value reads prompts a little
    /// faster, a smaller one keeps running answers more even.
    #[arg(long, env = "QWEN_SERVER_MAX_NUM_BATCHED_TOKENS", value_name = "TOKENS")]
    #[arg(default_value_t = 256, value_parser = at_least_one(1 << 20))]
    max_num_batched_tokens: usize,

    /// Of those, tokens of prompts while answers are being generated [on a GPU: 1024]
    ///
    /// Keeps running answers even while a long prompt is read.
    #[arg(long, env = "QWEN_SERVER_MAX_PREFILL_TOKENS_WHILE_DECODING", value_name = "TOKENS")]
    #[arg(default_value_t = 96, value_parser = at_least_one(1 << 20))]
    max_prefill_tokens_while_decoding: usize,

    /// Launch every kernel of a GPU by itself and wait for every step
    ///
    /// Otherwise decode steps are recorded as CUDA graphs, and the next one is launched behind the
    /// one under way. Slower; for finding faults.
    #[arg(long, env = "QWEN_SERVER_ENFORCE_EAGER", value_name = "BOOL")]
    #[arg(default_value_t = false, default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    enforce_eager: bool,

    /// Guess the next tokens and verify several of them in one step: `ngram`, or a draft model
    ///
    /// `ngram` looks up what followed the last tokens earlier in the prompt and the answer, which
    /// suits answers that repeat their prompt, such as edited code. A draft model is a smaller one with
    /// the same tokenizer, given like `--model`. Answers are the same as without; only as many tokens
    /// are guessed as pay. [default: off]
    #[arg(long, env = "QWEN_SERVER_SPECULATIVE", value_name = "ngram|MODEL")]
    speculative: Option<DraftSource>,

    /// Tokens that are guessed at once, at most
    #[arg(long, env = "QWEN_SERVER_NUM_SPECULATIVE_TOKENS", value_name = "N")]
    #[arg(default_value_t = 8, value_parser = at_least_one(16))]
    num_speculative_tokens: usize,

    /// Requests that may wait; further ones are answered with status 429
    #[arg(long, env = "QWEN_SERVER_MAX_QUEUE", value_name = "N")]
    #[arg(default_value_t = 1024, value_parser = at_least_one(1 << 20))]
    max_queue: usize,

    /// Prompt tokens that may wait in the queue; further requests get 429 at once
    ///
    /// One prompt of any length may always wait.
    #[arg(long, env = "QWEN_SERVER_MAX_QUEUE_TOKENS", value_name = "TOKENS")]
    #[arg(default_value_t = 1 << 20, value_parser = at_least_one(1 << 40))]
    max_queue_tokens: usize,

    /// Keep the time between two tokens of an answer below this many milliseconds
    ///
    /// Prompts that are read meanwhile get as many tokens of a step as this allows. A target below
    /// what a step takes without any prompt cannot be kept.
    #[arg(long, env = "QWEN_SERVER_TARGET_ITL_MS", value_name = "MS")]
    #[arg(value_parser = RangedU64ValueParser::<u64>::new().range(1..=60_000))]
    target_itl_ms: Option<u64>,

    /// Keep the time to the first token of an answer below this many milliseconds
    ///
    /// A prompt that has waited half as long gets all of a step, unless there is a target for the
    /// time between tokens; a request whose turn would come too late gets 429 at once.
    #[arg(long, env = "QWEN_SERVER_TARGET_TTFT_MS", value_name = "MS")]
    #[arg(value_parser = RangedU64ValueParser::<u64>::new().range(1..=3_600_000))]
    target_ttft_ms: Option<u64>,

    /// Makes sampling repeatable for requests without a seed of their own, if they come in the
    /// same order [default: differs from start to start]
    #[arg(long, env = "QWEN_SERVER_SEED", value_name = "N")]
    #[arg(value_parser = RangedU64ValueParser::<u64>::new().range(0..=i64::MAX as u64))]
    seed: Option<u64>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "KV cache")]
struct MemoryFlags {
    /// Memory for keys and values of all sequences, such as 512MiB or 4GiB [default: decided from
    /// what is free]
    #[arg(long, env = "QWEN_SERVER_KV_CACHE_MEMORY", value_name = "SIZE")]
    kv_cache_memory: Option<ByteSize>,

    /// The part of a GPU's memory that the server may take, from 0.05 to 1
    ///
    /// What the weights and the largest step leave of it becomes KV cache.
    #[arg(long, env = "QWEN_SERVER_GPU_MEMORY_UTILIZATION", value_name = "PART")]
    #[arg(default_value_t = 0.9, value_parser = part_of_a_whole)]
    gpu_memory_utilization: f64,

    /// How keys and values are stored
    ///
    /// Types of 8 bits hold about twice the tokens in the same memory and cost answers a little.
    /// Keys of Qwen2.5 have channels that are far larger than the others: `fp8` rounds each number
    /// by itself, `q8_0` rounds the small ones by the largest of 32. Measure before relying on
    /// either.
    #[arg(long, env = "QWEN_SERVER_KV_CACHE_DTYPE", value_name = "DTYPE")]
    #[arg(value_enum, default_value_t = KvCacheDtype::F16)]
    kv_cache_dtype: KvCacheDtype,

    /// Tokens per block of the cache, a power of two
    #[arg(long, env = "QWEN_SERVER_BLOCK_SIZE", value_name = "TOKENS")]
    #[arg(default_value_t = 16, value_parser = at_least_one(256))]
    block_size: usize,

    /// Share the cache between requests that begin alike
    #[arg(long, env = "QWEN_SERVER_ENABLE_PREFIX_CACHING", value_name = "BOOL")]
    #[arg(default_value_t = true, default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(overrides_with = "no_enable_prefix_caching")]
    enable_prefix_caching: bool,

    /// Compute every prompt from its first token
    #[arg(long, overrides_with = "enable_prefix_caching")]
    no_enable_prefix_caching: bool,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Logging")]
struct LogFlags {
    /// Least important lines to write; prompts and answers are never logged
    #[arg(long, env = "QWEN_SERVER_LOG_LEVEL", value_name = "LEVEL")]
    #[arg(value_enum, default_value_t = LogLevel::Info)]
    log_level: LogLevel,

    /// Lines for people, or one JSON object a line
    #[arg(long, env = "QWEN_SERVER_LOG_FORMAT", value_name = "FORMAT")]
    #[arg(value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// What `serve` counts, and how both it and `usage` tell what that costs.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Usage")]
pub(super) struct UsageFlags {
    /// Count requests and tokens per key, model and hour in this SQLite file
    ///
    /// It is made if it is not there. `qwen-server usage` and `/admin/usage` tell what it says.
    #[arg(long, alias = "ledger", env = "QWEN_SERVER_USAGE_LEDGER", value_name = "FILE")]
    pub(super) usage_ledger: Option<PathBuf>,

    /// What a million tokens of a model cost: prompt, answer, and cached parts of prompts [repeatable]
    ///
    /// `*` stands for every model without a price of its own. Prices are applied when usage is
    /// reported, never stored. In the config file these are the entries of the table `[prices]`; in
    /// the environment they are separated by semicolons.
    #[arg(long, env = "QWEN_SERVER_PRICE", value_name = "MODEL=IN,OUT[,CACHED]")]
    #[arg(action = ArgAction::Append, value_delimiter = ';')]
    pub(super) price: Vec<Price>,

    /// Name of the currency of all prices
    #[arg(long, env = "QWEN_SERVER_CURRENCY", value_name = "NAME", default_value = "USD")]
    pub(super) currency: String,
}

impl ServeArgs {
    /// What the arguments mean. `settings` are the same arguments with their sources.
    ///
    /// # Errors
    /// If values do not go together.
    pub fn into_config(self, mut settings: Settings) -> Result<Config, ConfigError> {
        let Self { model, lora, http, access, tls, mut engine, memory, log, usage, .. } = self;
        engine.fit_step_to_sequences(&mut settings);
        let num_threads = engine.threads.and_then(NonZeroUsize::new);
        let num_threads = num_threads.unwrap_or_else(config::available_threads);
        let seed = engine.seed.unwrap_or_else(config::arbitrary_seed);
        settings.decide("threads", num_threads);
        settings.decide("seed", seed);
        let shares_prefixes = memory.enable_prefix_caching && !memory.no_enable_prefix_caching;
        let config = Config {
            model: model.into_config(),
            lora: lora.into_config(),
            http: HttpConfig {
                host: http.host,
                port: http.port,
                max_body_size: http.max_body_size,
                max_connections: http.max_connections,
                write_timeout: Duration::from_secs(http.write_timeout),
                tls: tls.into_config()?,
                shutdown_timeout: Duration::from_secs(http.shutdown_timeout),
                request_timeout: http.request_timeout.map(Duration::from_secs),
            },
            access: access.into_config()?,
            engine: EngineOptions {
                device: engine.device,
                num_threads,
                max_num_seqs: engine.max_num_seqs,
                max_num_batched_tokens: engine.max_num_batched_tokens,
                max_prefill_tokens_while_decoding: engine.max_prefill_tokens_while_decoding,
                max_queue: engine.max_queue,
                max_queue_tokens: engine.max_queue_tokens,
                speculative: engine.speculative.map(|source| Speculative {
                    source,
                    num_tokens: engine.num_speculative_tokens,
                }),
                target_itl: engine.target_itl_ms.map(Duration::from_millis),
                target_ttft: engine.target_ttft_ms.map(Duration::from_millis),
                block_size: memory.block_size,
                kv_cache_memory: memory.kv_cache_memory,
                gpu_memory_utilization: memory.gpu_memory_utilization,
                execution: if engine.enforce_eager {
                    Execution::Eager
                } else {
                    Execution::Recorded
                },
                kv_cache_dtype: memory.kv_cache_dtype,
                prefix_caching: if shares_prefixes {
                    PrefixCaching::Enabled
                } else {
                    PrefixCaching::Disabled
                },
                seed,
            },
            log: LogConfig { level: log.log_level, format: log.log_format },
            usage: usage.into_config(),
            settings,
        };
        config.check()
    }
}

impl UsageFlags {
    fn into_config(self) -> UsageConfig {
        let Self { usage_ledger, price, currency } = self;
        UsageConfig { ledger: usage_ledger, prices: price, currency }
    }
}

fn quantization_name(name: &str) -> Result<String, UnknownQuantization> {
    name.parse::<Quantization>().map(|quantization| quantization.to_string())
}

impl ModelFlags {
    fn into_config(self) -> ModelConfig {
        ModelConfig {
            model: self.model,
            served_model_names: self.served_model_name,
            model_aliases: self.model_alias,
            aliases: self.alias,
            hosted_names: if self.dashscope_names && !self.no_dashscope_names {
                HostedNames::Answered
            } else {
                HostedNames::Unknown
            },
            load_format: self.load_format,
            quantization: self.quantization,
            max_model_len: self.max_model_len.and_then(NonZeroUsize::new),
            rope_scaling: self.rope_scaling,
            embedding_pooling: self.embedding_pooling,
            bare_tool_calls: if self.bare_tool_calls && !self.no_bare_tool_calls {
                BareCalls::Accepted
            } else {
                BareCalls::Text
            },
        }
    }
}

impl EngineFlags {
    /// Every running sequence needs a token of each step. Whoever set only one of the two limits
    /// has not asked for the default of the other.
    fn fit_step_to_sequences(&mut self, settings: &mut Settings) {
        const SEQS: &str = "max-num-seqs";
        const TOKENS: &str = "max-num-batched-tokens";
        if self.max_num_seqs <= self.max_num_batched_tokens {
            return;
        }
        match (settings.source(SEQS), settings.source(TOKENS)) {
            (_, Source::Default) => {
                self.max_num_batched_tokens = self.max_num_seqs;
                settings.adjust(TOKENS, self.max_num_seqs);
            }
            (Source::Default, _) => {
                self.max_num_seqs = self.max_num_batched_tokens;
                settings.adjust(SEQS, self.max_num_batched_tokens);
            }
            // Set both: left to the check, which names them.
            _ => {}
        }
    }
}

fn part_of_a_whole(text: &str) -> Result<f64, String> {
    let part = text.parse::<f64>().map_err(|_| "expected a number".to_owned())?;
    if (0.05..=1.0).contains(&part) { Ok(part) } else { Err("expected 0.05 to 1".to_owned()) }
}

fn at_least_one(max: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=max)
}
