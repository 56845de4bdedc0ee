//! `serve`: joins weights, engine and HTTP, and waits for a signal to stop.

mod access;
mod adapters;
pub(super) mod device;
mod draft;
mod dummy;
mod plan;
mod served_model;

use std::future::Future;
use std::io::{self, IsTerminal, stderr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::net::{TcpListener, TcpSocket, lookup_host};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::{Hinted, hub_from_environment};
use crate::cli::progress::DownloadProgress;
use crate::config::{
    ByteSize, Config, DraftSource, EngineOptions, KvCacheDtype, LoadFormat, LogConfig, LogFormat,
    LogLevel, PrefixCaching, RopeScalingChoice, Speculative, UsageConfig, Yarn, trace_environment,
};
use crate::device::Device;
use crate::device::memory::keep_freed_memory;
use crate::device::reserve::{RESERVE_BYTES, hold_reserve, is_memory_short};
use crate::engine::{EngineConfig, EngineHandle, Health, spawn};
use crate::http::{
    AppState, HttpLimits, Listeners, PrefixSharing, Reload, reload_when_changed, serve,
};
use crate::ledger::Ledger;
use crate::ledger::money::PriceList;
use crate::ops::kv_cache::KvDtype;
use crate::runner::load::{LoadOptions, PlannedModel};
use crate::runner::{DraftedRunner, ModelRunner};
use crate::scheduler::{Drafter, SpeculationConfig};
use crate::telemetry::{logging, metrics, traces};
use crate::weights::catalogue::Entry;
use crate::weights::checkpoint::Checkpoint;
use crate::weights::resolve::{ResolvedModel, resolve};

/// Connections that wait to be accepted; the system may allow fewer. A burst of more waits a second
/// before it is tried again.
const BACKLOG: u32 = 4096;
/// How long work that cannot be interrupted may hold up the end.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than any process lives.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// Threads that speak HTTP. They only move bytes; the cores belong to the model.
const HTTP_THREADS: usize = 2;

/// Serves until SIGTERM or Ctrl-C, or until the engine dies.
///
/// # Errors
/// If the model cannot be found, read or fitted into memory, the address is taken, or the engine
/// dies.
pub fn run(config: &Config) -> Result<()> {
    install_logging(config.log);
    let environment = trace_environment();
    let _traces = traces::install(environment.is_on, environment.service_name.as_deref())
        .map_err(anyhow::Error::msg)?;
    let server = Server::start(config)?;
    let stop = server.runtime.block_on(async { stop_signal() })?;
    server.serve(stop)
}

/// A server whose engine is loading.
struct Server {
    runtime: Runtime,
    listeners: Listeners,
    /// SIGHUP, which from the beginning ends nothing.
    hangup: Signal,
    state: AppState,
    engine: EngineHandle,
    engine_thread: JoinHandle<()>,
    ledger: Option<Ledger>,
}

impl Server {
    fn start(config: &Config) -> Result<Self> {
        let opened = device::open(config.engine.device)?;
        let config = &match &opened.device {
            Device::Cpu => config.clone(),
            Device::Gpu(_) => config.clone().fit_to_gpu(),
        };
        keep_freed_memory();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(HTTP_THREADS)
            .thread_keep_alive(FOREVER)
            .enable_all()
            .build()
            .context("cannot start the HTTP threads")?;
        // One thread for work that blocks is always there; when memory is short none can be started.
        runtime.block_on(runtime.spawn_blocking(|| ())).context("cannot start a thread")?;
        let listeners = runtime.block_on(listen(config))?;
        let hangup = runtime.block_on(async { signal(SignalKind::hangup()) })?;
        let keys = access::key_ring(&config.access)?;
        let ledger = config.usage.ledger.as_deref().map(open_ledger).transpose()?;

        let (resolved, planned) = find_model(config, opened.device.clone())?;
        let planned = Arc::new(planned);
        let names = config.model.names(&resolved.name);
        eprintln!("{}", plan::describe(config, &resolved, &planned, (&names, &opened)));

        metrics::install(&names[0]);
        // Before the weights: what is wrong with an adapter should be known soon.
        let answers_to = served_model::names(&config.model, &resolved)?;
        let adapters = adapters::load(config, &planned, &answers_to)?;
        adapters.observe();
        let engine_config = engine_config(&config.engine, &planned);
        // The tokenizer is built while the weights are packed.
        let to_load = Arc::clone(&planned);
        let (engine, engine_thread) =
            spawn(engine_config, move || load(&to_load).map_err(|error| format!("{error:#}")));
        let served = served_model::build(&config.model, &resolved, &planned, answers_to)?;
        let mut state = AppState::new(engine.clone(), served, http_limits(config));
        state.adapters = Arc::new(adapters);
        state.keys = keys;
        state.allowed_hosts = access::allowed_hosts(config);
        state.cors_origins = config.access.cors_origins.clone().into();
        if config.access.isolate_prefix_cache {
            state.prefix_sharing = PrefixSharing::WithinKey;
        }
        state.is_memory_short = is_memory_short;
        state.ledger.clone_from(&ledger);
        state.prices = Arc::new(price_list(&config.usage));
        state.next_seed.store(config.engine.seed, Ordering::Relaxed);
        Ok(Self { runtime, listeners, hangup, state, engine, engine_thread, ledger })
    }

    /// Answers requests until `stop` resolves and what runs has finished.
    fn serve(self, stop: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let Self { runtime, listeners, hangup, state, engine, engine_thread, ledger } = self;
        let reloading = runtime.spawn(reload_when_changed(reloads(&listeners, &state), hangup));
        let served = runtime.block_on(serve_until_stopped(listeners, state, engine, stop));
        reloading.abort();
        // An engine that hangs in a step is left behind; the end of the process ends it too.
        let patience = Instant::now() + SHUTDOWN_TIMEOUT;
        while !engine_thread.is_finished() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
        let joined = if engine_thread.is_finished() { engine_thread.join() } else { Ok(()) };
        // Whatever still runs ends here, and is counted.
        runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
        if let Some(ledger) = ledger {
            ledger.close();
        }
        served?;
        joined.map_err(|_| anyhow::anyhow!("the engine thread panicked; see the log above"))
    }
}

/// A server inside another command's process. Dropping it stops it.
pub(super) struct LocalServer {
    /// Where it listens.
    pub(super) url: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl LocalServer {
    /// Starts and waits until the model is loaded.
    pub(super) fn start(config: &Config) -> Result<Self> {
        let server = Server::start(config)?;
        let url = format!("http://{}", server.listeners.clients.local_addr()?);
        let ready = server.runtime.block_on(server.engine.ready());
        ready.map_err(anyhow::Error::msg).context("cannot load the model")?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            server.serve(async {
                let _ = stopped.await;
            })
        });
        Ok(Self { url, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn http_limits(config: &Config) -> HttpLimits {
    HttpLimits {
        max_connections: config.http.max_connections,
        write_timeout: config.http.write_timeout,
        max_body_bytes: usize::try_from(config.http.max_body_size.bytes()).unwrap_or(usize::MAX),
        drain_timeout: config.http.shutdown_timeout,
        request_timeout: config.http.request_timeout,
        ..HttpLimits::default()
    }
}

fn install_logging(config: LogConfig) {
    use tracing_subscriber::filter::LevelFilter;
    let level = match config.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let format = match config.format {
        LogFormat::Text => logging::LineFormat::Text,
        LogFormat::Json => logging::LineFormat::Json,
    };
    logging::install(level, format);
}

fn open_ledger(path: &Path) -> Result<Ledger> {
    Ledger::open(path).map_err(|error| {
        let hint = "name a file that this user may write with `--usage-ledger`, or leave it out";
        let message = format!("{:#}", anyhow::Error::from(error));
        Hinted { message, hint: hint.to_owned() }.into()
    })
}

fn price_list(config: &UsageConfig) -> PriceList {
    PriceList { currency: config.currency.clone(), prices: config.prices.clone() }
}

/// Finds the model's files, or makes up a model.
fn find_model(config: &Config, device: Device) -> Result<(ResolvedModel, PlannedModel)> {
    let mut options = load_options(config, device);
    let name = &config.model.model;
    if config.model.load_format == LoadFormat::Dummy {
        if config.model.quantization.is_some() {
            let message = "`--quantization` has nothing to quantise with `--load-format dummy`";
            let hint = "pass a name with the quantisation, such as `qwen2.5-7b-instruct:q8_0`";
            return Err(Hinted { message: message.to_owned(), hint: hint.to_owned() }.into());
        }
        if let Some(Speculative { source: DraftSource::Model(_), .. }) = config.engine.speculative {
            let message = "a draft model has nothing to guess with `--load-format dummy`";
            let hint = "pass `--speculative ngram`, or leave it out";
            return Err(Hinted { message: message.to_owned(), hint: hint.to_owned() }.into());
        }
        return dummy::make_up(name, options);
    }
    let resolved = resolve(name, &hub_from_environment()?, &mut DownloadProgress::new())?;
    options.rope_scaling = rope_scaling(options.rope_scaling, resolved.entry.as_ref());
    let checkpoint = open(&resolved.path, config.model.quantization.as_deref())?;
    let draft = match config.engine.speculative.as_ref().map(|speculative| &speculative.source) {
        Some(DraftSource::Model(name)) => Some(draft::open(name)?),
        _ => None,
    };
    let planned = PlannedModel::plan_with_draft(checkpoint, draft, options)
        .with_context(|| format!("cannot load `{}`", resolved.path.display()))?;
    Ok((resolved, planned))
}

/// What the catalogue knows of a model's YaRN, where the user wants it and left the rest open. It is
/// what the release's model card says; its GGUF files do not have it.
fn rope_scaling(choice: RopeScalingChoice, entry: Option<&Entry>) -> RopeScalingChoice {
    let known = entry.and_then(|entry| Some((entry, entry.model.yarn.as_ref()?)));
    match (choice, known) {
        (RopeScalingChoice::Yarn, Some((entry, yarn))) => RopeScalingChoice::YarnWith(Yarn {
            factor: yarn.factor,
            original: Some(entry.model.context_length as usize),
            beta_fast: None,
            beta_slow: None,
            attention_factor: None,
        }),
        _ => choice,
    }
}

fn open(path: &Path, quantization: Option<&str>) -> Result<Checkpoint> {
    let open = || {
        let checkpoint = Checkpoint::open(path)?;
        let Some(quantization) = quantization else { return Ok(checkpoint) };
        anyhow::Ok(checkpoint.quantized(quantization.parse()?)?)
    };
    open().with_context(|| format!("cannot load `{}`", path.display()))
}

/// Takes the addresses first: what is wrong with them should be known before a model is loaded.
async fn listen(config: &Config) -> Result<Listeners> {
    let (http, access) = (&config.http, &config.access);
    let clients = bind(&http.host, http.port, "port").await?;
    access::refuse_strangers(&access.admission, clients.local_addr()?)?;
    let operators = match &access.admin_address {
        None => None,
        Some(address) => {
            let listener = bind(&address.host, address.port, "admin-address").await?;
            access::refuse_strangers(&access.admission, listener.local_addr()?)?;
            Some(listener)
        }
    };
    Ok(Listeners { clients, operators, tls: access::tls(http)? })
}

async fn bind(host: &str, port: u16, flag: &str) -> Result<TcpListener> {
    listen_on(host, port).await.map_err(|error| {
        let hint = format!("pass another `--{flag}`, or stop what listens on {port}");
        let message = format!("cannot listen on {host}:{port}: {error}");
        Hinted { message, hint }.into()
    })
}

/// Listens on the first address of `host` that can be had.
async fn listen_on(host: &str, port: u16) -> io::Result<TcpListener> {
    let mut error = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
    for address in lookup_host((host, port)).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A server that restarts does not wait for its former connections to be forgotten.
        socket.set_reuseaddr(true)?;
        match socket.bind(address).and_then(|()| socket.listen(BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(reason) => error = reason,
        }
    }
    Err(error)
}

fn load_options(config: &Config, device: Device) -> LoadOptions {
    let engine = &config.engine;
    LoadOptions {
        device,
        gpu_memory_utilization: engine.gpu_memory_utilization,
        execution: engine.execution,
        kv_cache_bytes: engine.kv_cache_memory.map(ByteSize::bytes),
        kv_cache_dtype: match engine.kv_cache_dtype {
            KvCacheDtype::F16 => KvDtype::F16,
            KvCacheDtype::Bf16 => KvDtype::Bf16,
            KvCacheDtype::F32 => KvDtype::F32,
            KvCacheDtype::Fp8 => KvDtype::Fp8,
            KvCacheDtype::Q8_0 => KvDtype::Q8_0,
        },
        max_model_len: config.model.max_model_len.map(usize::from),
        rope_scaling: config.model.rope_scaling,
        block_size: engine.block_size,
        max_num_seqs: engine.max_num_seqs,
        max_num_batched_tokens: engine.max_num_batched_tokens,
        num_threads: engine.num_threads.get(),
        adapters: (config.lora.num_reserved(), config.lora.max_rank),
    }
}

fn engine_config(options: &EngineOptions, planned: &PlannedModel) -> EngineConfig {
    EngineConfig {
        max_num_seqs: options.max_num_seqs,
        max_num_batched_tokens: options.max_num_batched_tokens.max(2),
        max_prefill_tokens_while_decoding: options.max_prefill_tokens_while_decoding,
        block_size: options.block_size,
        num_blocks: planned.plan.num_blocks,
        max_model_len: planned.plan.max_model_len,
        stretched_beyond: planned.config.stretched_beyond(),
        speculation: options.speculative.as_ref().map(speculation),
        max_queue: options.max_queue,
        max_queue_tokens: options.max_queue_tokens,
        target_itl: options.target_itl,
        target_ttft: options.target_ttft,
        vocab_size: planned.config.vocab_size,
        prefix_caching: options.prefix_caching == PrefixCaching::Enabled,
        ..EngineConfig::default()
    }
}

fn speculation(options: &Speculative) -> SpeculationConfig {
    SpeculationConfig {
        drafter: match options.source {
            DraftSource::PromptLookup => Drafter::PromptLookup,
            DraftSource::Model(_) => Drafter::Model,
        },
        max_drafts: options.num_tokens,
    }
}

/// Loads the weights with a progress bar where someone watches.
fn load(planned: &PlannedModel) -> Result<DraftedRunner<ModelRunner>> {
    let num_layers = planned.config.num_hidden_layers as u64;
    let bar = if stderr().is_terminal() {
        let style = ProgressStyle::with_template("loading [{bar:40}] layer {pos}/{len} {eta}")?;
        ProgressBar::new(num_layers).with_style(style)
    } else {
        ProgressBar::hidden()
    };
    let started = std::time::Instant::now();
    let runner = planned.load(|layer| bar.set_position(layer as u64))?;
    bar.finish_and_clear();
    tracing::info!(seconds = started.elapsed().as_secs_f64(), "model loaded");
    Ok(runner)
}

/// Whatever may change while the server runs.
fn reloads(listeners: &Listeners, state: &AppState) -> Vec<Reload> {
    let keys = state.keys.iter().map(Reload::keys);
    keys.chain(listeners.tls.iter().map(Reload::certificates)).collect()
}

async fn serve_until_stopped(
    listeners: Listeners,
    state: AppState,
    engine: EngineHandle,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    let address = listeners.clients.local_addr()?;
    let scheme = if listeners.tls.is_some() { "https" } else { "http" };
    let server = tokio::spawn(serve(listeners, state, stop));
    engine.ready().await.map_err(anyhow::Error::msg).context("cannot load the model")?;
    if !hold_reserve(RESERVE_BYTES) {
        tracing::warn!("there is no memory to set aside: requests are refused until there is");
    }
    tracing::info!("ready on {scheme}://{address}");
    server.await.context("the HTTP server panicked")??;
    match engine.health() {
        Health::Dead { reason } => Err(anyhow::anyhow!("the engine died: {reason}")),
        _ => Ok(()),
    }
}

/// Resolves on SIGTERM or Ctrl-C; a second signal ends the process at once.
fn stop_signal() -> Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (first, heard) = oneshot::channel();
    tokio::spawn(async move {
        let mut first = Some(first);
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            match first.take() {
                Some(first) => {
                    let _ = first.send(());
                }
                None => std::process::exit(130),
            }
        }
    });
    Ok(async {
        let _ = heard.await;
    })
}
