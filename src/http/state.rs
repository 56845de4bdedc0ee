//! What every handler can reach.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::HeaderValue;

use super::adapters::Adapters;
use super::key_ring::KeyRing;
use super::response_store::{ResponseStore, StoreLimits};
use crate::chat::model::ServedModel;
use crate::chat::prompt::PromptLimits;
use crate::engine::EngineHandle;
use crate::ledger::Ledger;
use crate::ledger::money::PriceList;

/// Bounds on what clients may ask of the HTTP side.
#[derive(Clone, Debug)]
pub struct HttpLimits {
    /// Longest request body in bytes.
    pub max_body_bytes: usize,
    /// Bodies above this are encoded on the blocking pool, so that they hold up nobody else.
    pub max_inline_body_bytes: usize,
    /// Most choices (`n`) per prompt.
    pub max_choices: u32,
    /// Most prompts per completion request.
    pub max_prompts: usize,
    /// Pause after which a silent stream gets a comment.
    pub keep_alive: Duration,
    /// How long running requests may take to finish once shutdown begins.
    pub drain_timeout: Duration,
    /// How long a connection may go without a whole request head, between requests too.
    pub header_timeout: Duration,
    /// How long a request may take from its head to the end of its answer, if anyone minds.
    pub request_timeout: Option<Duration>,
    /// How long the body of a request may take to arrive.
    pub body_timeout: Duration,
    /// How long a client may take to agree on how a connection is encrypted.
    pub handshake_timeout: Duration,
    /// How long a client may leave its answer unread before it is dropped.
    pub write_timeout: Duration,
    /// Headers of a request, at most.
    pub max_headers: usize,
    /// Bytes of a request's line and headers, at most. The body has its own bound.
    pub max_head_bytes: usize,
    /// Connections that are served at once; further ones wait to be accepted.
    pub max_connections: usize,
    /// Most responses that are kept for later requests; the oldest go first.
    pub max_stored_responses: usize,
    /// Most bytes of them all.
    pub max_stored_bytes: usize,
    /// How long a response is kept.
    pub stored_response_lifetime: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            max_inline_body_bytes: 16 << 10,
            max_choices: 16,
            max_prompts: 256,
            keep_alive: Duration::from_secs(15),
            drain_timeout: Duration::from_secs(30),
            // Longer than proxies keep idle connections, usually 60 seconds: the side that reuses
            // a connection should be the one that closes it.
            header_timeout: Duration::from_secs(75),
            request_timeout: None,
            body_timeout: Duration::from_secs(30),
            handshake_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(60),
            max_headers: 100,
            max_head_bytes: 64 << 10,
            max_connections: 4096,
            max_stored_responses: 4096,
            max_stored_bytes: 128 << 20,
            stored_response_lifetime: Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// Between whom the prefix cache is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrefixSharing {
    /// All clients: one may learn from the time of an answer that another sent the same beginning.
    #[default]
    BetweenAll,
    /// The requests of one key.
    WithinKey,
}

/// Where operators ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdminRoutes {
    /// At the address that clients use.
    #[default]
    Beside,
    /// At an address of their own.
    Apart,
}

/// What every handler can reach. Cheap to clone.
#[derive(Clone)]
pub struct AppState {
    /// The engine.
    pub engine: EngineHandle,
    /// The text side of the model.
    pub model: Arc<ServedModel>,
    /// What requests can name beside it.
    pub adapters: Arc<Adapters>,
    /// Bounds.
    pub limits: Arc<HttpLimits>,
    /// When the model was made available, in seconds since the epoch.
    pub created: u64,
    /// Who may come in; nobody is asked if absent.
    pub keys: Option<Arc<KeyRing>>,
    /// Names by which this machine alone may be asked for, in lower case, beside its own: `localhost`
    /// and addresses.
    pub allowed_hosts: Arc<[String]>,
    /// Whether other names are refused.
    pub(super) checks_hosts: bool,
    /// Origins whose pages may call from a browser.
    pub cors_origins: Arc<[HeaderValue]>,
    /// Between whom the prefix cache is shared.
    pub prefix_sharing: PrefixSharing,
    /// Where operators ask.
    pub admin_routes: AdminRoutes,
    /// Whether this machine gives the process no more memory, so that nothing should be begun.
    pub is_memory_short: fn() -> bool,
    /// The next seed for a request that has none.
    pub next_seed: Arc<AtomicU64>,
    /// Where usage is counted, if it is.
    pub ledger: Option<Ledger>,
    /// What usage costs.
    pub prices: Arc<PriceList>,
    /// Responses that later requests may refer to.
    pub(super) responses: Arc<ResponseStore>,
    /// Whether shutdown has begun.
    pub(super) is_draining: Arc<AtomicBool>,
}

impl AppState {
    /// State of a server whose requests go to `engine`, which may still be loading.
    pub fn new(engine: EngineHandle, model: ServedModel, limits: HttpLimits) -> Self {
        let responses = ResponseStore::new(StoreLimits {
            max_responses: limits.max_stored_responses,
            max_bytes: limits.max_stored_bytes,
            lifetime: limits.stored_response_lifetime,
        });
        Self {
            engine,
            responses: Arc::new(responses),
            model: Arc::new(model),
            adapters: Arc::default(),
            limits: Arc::new(limits),
            is_draining: Arc::default(),
            ledger: None,
            prices: Arc::default(),
            keys: None,
            allowed_hosts: Arc::default(),
            checks_hosts: false,
            cors_origins: Arc::default(),
            prefix_sharing: PrefixSharing::default(),
            admin_routes: AdminRoutes::default(),
            created: unix_seconds(),
            is_memory_short: || false,
            next_seed: Arc::default(),
        }
    }

    /// The seed for a request that has none.
    pub(super) fn seed(&self) -> u64 {
        self.next_seed.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn prompt_limits(&self) -> PromptLimits {
        let engine = self.engine.limits();
        PromptLimits {
            max_model_len: engine.max_model_len,
            vocab_size: engine.vocab_size,
            max_choices: self.limits.max_choices,
            max_prompts: self.limits.max_prompts,
            max_sequences: engine.max_num_seqs + engine.max_queue,
        }
    }
}

/// The wire's `created`.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
