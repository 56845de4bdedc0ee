//! What the server was told to do, decided once: every value of [`Config`] is checked, and says
//! whether a flag, the environment, a file or the default set it.
//!
//! The flags themselves, which name the environment variables and the keys of the file too, are
//! declared in `cli::args`. **Invariant:** nothing else in the program reads the environment.

pub mod access;
pub mod aliases;
pub mod byte_size;
pub mod device;
pub mod file;
pub mod hub_env;
pub mod lora;
pub mod price;
pub mod rope_scaling;
pub mod settings;
pub mod speculative;
pub mod trace_env;

use std::hash::{BuildHasher, Hasher};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

pub use access::{AccessConfig, Address, Admission, SecretText, TlsConfig};
pub use aliases::{Alias, DASHSCOPE_NAMES, NamePattern};
pub use byte_size::ByteSize;
pub use device::DeviceChoice;
pub use file::ConfigFile;
pub use lora::{LoraConfig, LoraModule, LoraModules};
pub use price::{Micros, Price};
pub use rope_scaling::{RopeScalingChoice, Yarn};
pub use settings::{Setting, Settings, Source};
pub use speculative::{DraftSource, Speculative};
pub use trace_env::trace_environment;

/// The model served when none is named.
pub const DEFAULT_MODEL: &str = "qwen2.5-coder-0.5b-instruct";

/// The least memory a KV cache is given: less cannot hold one block of the smallest model.
const MIN_KV_CACHE_MEMORY: ByteSize = ByteSize::mib(1);

/// The least body a useful request fits in.
const MIN_BODY_SIZE: ByteSize = ByteSize::kib(1);

/// Everything `serve` needs to know, apart from what the model file says.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which model, and what clients call it.
    pub model: ModelConfig,
    /// The adapters beside it.
    pub lora: LoraConfig,
    /// How clients reach the server.
    pub http: HttpConfig,
    /// Who may use it.
    pub access: AccessConfig,
    /// How much runs at once, and on what.
    pub engine: EngineOptions,
    /// What is written to standard error.
    pub log: LogConfig,
    /// Where usage is counted, and what it costs.
    pub usage: UsageConfig,
    /// Where each value came from, in the order of the help text.
    pub settings: Settings,
}

/// Which model is served under which names.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// A name of the catalogue, a GGUF file, a directory or a hub id.
    pub model: String,
    /// Names that replace the model's own; responses carry the first. Empty keeps the model's own.
    pub served_model_names: Vec<String>,
    /// Further names the model answers to.
    pub model_aliases: Vec<String>,
    /// Names, some with `*`, and the model each stands for.
    pub aliases: Vec<Alias>,
    /// Whether the model answers to the names of DashScope's text models.
    pub hosted_names: HostedNames,
    /// Where its weights come from.
    pub load_format: LoadFormat,
    /// The name of the type that weights of floats are quantised to as they are loaded.
    pub quantization: Option<String>,
    /// The longest sequence, if shorter than the model allows.
    pub max_model_len: Option<NonZeroUsize>,
    /// How positions beyond the trained ones are made usable.
    pub rope_scaling: RopeScalingChoice,
    /// What embeddings are made of.
    pub embedding_pooling: EmbeddingPooling,
    /// What an answer is that consists of a tool call without its tags.
    pub bare_tool_calls: BareCalls,
}

impl ModelConfig {
    /// Every name the model answers to, the one for responses first. `own_name` is what the model
    /// is called when no name was given.
    pub fn names(&self, own_name: &str) -> Vec<String> {
        let mut names = self.served_model_names.clone();
        if names.is_empty() {
            names.push(own_name.to_owned());
        }
        for alias in &self.model_aliases {
            if !names.contains(alias) {
                names.push(alias.clone());
            }
        }
        names
    }
}

/// How clients reach the server.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Address or name to listen on.
    pub host: String,
    /// Port to listen on; zero takes a free one.
    pub port: u16,
    /// Larger request bodies are refused.
    pub max_body_size: ByteSize,
    /// Connections that are served at once; further ones wait to be accepted.
    pub max_connections: usize,
    /// How long a client may leave its answer unread.
    pub write_timeout: Duration,
    /// What encrypts connections, if anything does.
    pub tls: Option<TlsConfig>,
    /// How long running requests may take to finish after a signal to stop.
    pub shutdown_timeout: Duration,
    /// How long a request may take in all.
    pub request_timeout: Option<Duration>,
}

/// How much runs at once, and on what.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Where the model runs.
    pub device: DeviceChoice,
    /// Threads that compute.
    pub num_threads: NonZeroUsize,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Tokens computed per step, prompts and answers together.
    pub max_num_batched_tokens: usize,
    /// How many of them may belong to prompts while answers are being generated.
    pub max_prefill_tokens_while_decoding: usize,
    /// Present when the next tokens are guessed.
    pub speculative: Option<Speculative>,
    /// Requests that may wait before further ones are refused.
    pub max_queue: usize,
    /// Prompt tokens that may wait.
    pub max_queue_tokens: usize,
    /// How long the time between two tokens should be at most.
    pub target_itl: Option<Duration>,
    /// How long the time to the first token should be at most.
    pub target_ttft: Option<Duration>,
    /// Tokens per block of the KV cache.
    pub block_size: usize,
    /// Memory for the KV cache; decided from what is free if absent.
    pub kv_cache_memory: Option<ByteSize>,
    /// The part of a GPU's memory that the server may take.
    pub gpu_memory_utilization: f64,
    /// How a GPU is told what to do.
    pub execution: Execution,
    /// How keys and values are stored.
    pub kv_cache_dtype: KvCacheDtype,
    /// Whether requests share the blocks of equal prefixes.
    pub prefix_caching: PrefixCaching,
    /// Where the seeds of requests that bring none start.
    pub seed: u64,
}

/// What is written to standard error.
#[derive(Clone, Copy, Debug)]
pub struct LogConfig {
    /// The least important lines still written.
    pub level: LogLevel,
    /// How lines look.
    pub format: LogFormat,
}

/// Where usage is counted, and what it costs.
#[derive(Clone, Debug)]
pub struct UsageConfig {
    /// The file; nothing is counted if absent.
    pub ledger: Option<PathBuf>,
    /// What models cost.
    pub prices: Vec<Price>,
    /// The name of the currency of all prices.
    pub currency: String,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LoadFormat {
    /// From the model's files.
    Auto,
    /// They are random, for measurements without files.
    Dummy,
}

/// What embeddings are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum EmbeddingPooling {
    /// The mean over the final hidden states of all tokens.
    Mean,
    /// The final hidden state of the last token.
    Last,
}

/// Whether a model answers to the names of DashScope's text models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostedNames {
    /// It does.
    Answered,
    /// They are unknown.
    Unknown,
}

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum KvCacheDtype {
    /// Half precision.
    F16,
    /// Half the bytes of `f32` with all of its range.
    Bf16,
    /// Single precision.
    F32,
    /// Floats of 8 bits, e4m3, with 3 bits of mantissa: half the memory of f16; saturates at 448.
    Fp8,
    /// Integers of 8 bits with a scale for every 32, on the CPU: 34 bytes instead of 64.
    #[value(name = "q8_0")]
    Q8_0,
}

/// How a GPU is told what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execution {
    /// Decode steps are recorded once and replayed, and the next one is launched behind the one
    /// under way.
    Recorded,
    /// Every kernel is launched by itself, and every step is waited for.
    Eager,
}

/// Whether requests share the blocks of equal prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixCaching {
    /// They do.
    Enabled,
    /// Every request computes its whole prompt.
    Disabled,
}

/// What an answer is that consists of a tool call without its tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BareCalls {
    /// The call.
    Accepted,
    /// Text.
    Text,
}

/// The least important log lines still written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogLevel {
    /// Only what went wrong.
    Error,
    /// Also what looks wrong.
    Warn,
    /// Also one line per request and event of the server's life.
    Info,
    /// Also what helps to find a fault.
    Debug,
    /// Also every step of the engine.
    Trace,
}

impl LogLevel {
    /// The level's name as `tracing` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or not readable.
    #[error("cannot read config file `{path}`")]
    Read {
        /// The file.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("config file `{path}`, line {line}: {message}")]
    Syntax {
        /// The file.
        path: String,
        /// The line, counted from one.
        line: usize,
        /// What the parser stumbled over.
        message: String,
    },
    /// The file sets something that does not exist.
    #[error("config file `{path}`: unknown key `{key}`; {suggestion}")]
    UnknownKey {
        /// The file.
        path: String,
        /// The key.
        key: String,
        /// The nearest keys that exist.
        suggestion: String,
    },
    /// The file sets a key twice, in different spellings.
    #[error("config file `{path}`: key `{key}` is set twice")]
    RepeatedKey {
        /// The file.
        path: String,
        /// The key.
        key: String,
    },
    /// A value of the file has the wrong type.
    #[error("config file `{path}`: `{key}` must be {expected}, but is {found}")]
    WrongType {
        /// The file.
        path: String,
        /// The key.
        key: String,
        /// The type it must have.
        expected: &'static str,
        /// The type it has.
        found: &'static str,
    },
    /// A value of the file is refused by the flag of the same name.
    #[error("config file `{path}`: {message}")]
    BadValue {
        /// The file.
        path: String,
        /// What the flag says about it.
        message: String,
    },
    /// A value does not go with the others.
    #[error("`--{key}` {message}")]
    OutOfBounds {
        /// The flag.
        key: &'static str,
        /// What is wrong with it.
        message: String,
    },
}

impl Config {
    /// Puts in place of defaults what suits a GPU: it computes thousands of tokens in the time that
    /// a processor needs for a few.
    #[must_use]
    pub fn fit_to_gpu(mut self) -> Self {
        let Self { engine, settings, .. } = &mut self;
        for (key, value, default) in [
            ("max-num-seqs", &mut engine.max_num_seqs, 256),
            ("max-num-batched-tokens", &mut engine.max_num_batched_tokens, 4096),
            (
                "max-prefill-tokens-while-decoding",
                &mut engine.max_prefill_tokens_while_decoding,
                1024,
            ),
        ] {
            if settings.source(key) == Source::Default {
                *value = default;
                settings.adjust(key, default);
            }
        }
        // One of the two may have been set to what does not go with the other's default.
        if engine.max_num_batched_tokens < engine.max_num_seqs {
            match settings.source("max-num-seqs") {
                Source::Default => engine.max_num_seqs = engine.max_num_batched_tokens,
                _ => engine.max_num_batched_tokens = engine.max_num_seqs,
            }
        }
        self
    }

    /// Checks what no single flag can check of itself.
    ///
    /// # Errors
    /// Names the first flag whose value does not go with the others.
    pub fn check(self) -> Result<Self, ConfigError> {
        let engine = &self.engine;
        let refuse = |key, message: String| Err(ConfigError::OutOfBounds { key, message });
        if !engine.block_size.is_power_of_two() {
            let message = format!("must be a power of two, but is {}", engine.block_size);
            return refuse("block-size", message);
        }
        if engine.max_num_batched_tokens < engine.max_num_seqs {
            let message = format!(
                "must be at least `--max-num-seqs` ({}), but is {}",
                engine.max_num_seqs, engine.max_num_batched_tokens
            );
            return refuse("max-num-batched-tokens", message);
        }
        if let Some(memory) = engine.kv_cache_memory.filter(|size| *size < MIN_KV_CACHE_MEMORY) {
            let message = format!("must be at least {MIN_KV_CACHE_MEMORY}, but is {memory}");
            return refuse("kv-cache-memory", message);
        }
        if self.http.max_body_size < MIN_BODY_SIZE {
            let message =
                format!("must be at least {MIN_BODY_SIZE}, but is {}", self.http.max_body_size);
            return refuse("max-body-size", message);
        }
        let names = &self.model;
        for (key, values) in [
            ("model", std::slice::from_ref(&names.model)),
            ("served-model-name", names.served_model_names.as_slice()),
            ("model-alias", names.model_aliases.as_slice()),
            ("host", std::slice::from_ref(&self.http.host)),
        ] {
            if values.iter().any(|value| value.trim().is_empty()) {
                return refuse(key, "must not be empty".to_owned());
            }
        }
        let lora = &self.lora;
        if lora.max_loras < lora.modules.len() {
            let message = format!(
                "must be at least the {} adapters of `--lora-modules`, but is {}",
                lora.modules.len(),
                lora.max_loras
            );
            return refuse("max-loras", message);
        }
        Ok(self)
    }
}

/// Where files go that nobody needs for long.
pub fn temporary_folder() -> PathBuf {
    std::env::temp_dir()
}

/// The file of the program that runs.
pub fn own_program() -> std::io::Result<PathBuf> {
    std::env::current_exe()
}

/// As many threads as the machine lets this process run at once.
pub fn available_threads() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// A number that differs from start to start; small enough for JSON and TOML.
pub fn arbitrary_seed() -> u64 {
    std::hash::RandomState::new().build_hasher().finish() >> 11
}

/// Takes the variable `name` away from the flag `id` if a cluster put it there: for a service named
/// `qwen-server`, Kubernetes sets `QWEN_SERVER_PORT` to an address like `tcp://10.0.0.1:8000` in
/// every container beside it.
pub fn ignore_injected_port(command: clap::Command, id: &str, name: &str) -> clap::Command {
    let injected = std::env::var(name).is_ok_and(|value| value.starts_with("tcp://"));
    if !injected {
        return command;
    }
    command.mut_arg(id, |arg| arg.env(clap::builder::Resettable::Reset))
}
