//! Accepts connections until told to stop, then lets what runs finish.

use std::future::{Future, pending};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::router::{admin_router, router};
use super::state::{AdminRoutes, AppState, HttpLimits};
use super::tls::Tls;
use crate::telemetry::metrics;

/// How long clients may take to read the end of their answers after the engine has stopped.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// How often collected samples are sorted into the buckets of their histograms.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
/// Pause after no connection could be accepted, most likely for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Connections of operators, who must get through when clients have taken all of theirs.
const MAX_ADMIN_CONNECTIONS: usize = 64;

/// Where the server listens.
pub struct Listeners {
    /// For clients.
    pub clients: TcpListener,
    /// For operators, if not at the same address. Whoever reaches an address of this machine alone
    /// needs no key.
    pub operators: Option<TcpListener>,
    /// What encrypts both.
    pub tls: Option<Arc<Tls>>,
}

impl From<TcpListener> for Listeners {
    fn from(clients: TcpListener) -> Self {
        Self { clients, operators: None, tls: None }
    }
}

/// A listener, and what it leads to.
struct Door {
    listener: TcpListener,
    seats: Arc<Semaphore>,
    routes: Router,
}

/// How connections are treated, whichever door they come through.
#[derive(Clone)]
struct Manners {
    tls: Option<Arc<Tls>>,
    limits: Arc<HttpLimits>,
    closing: CancellationToken,
}

/// Serves until `shutdown` resolves and running requests have finished, or the drain timeout has
/// passed; or until the engine dies, so that a supervisor can start another.
///
/// While draining, connections are still accepted, so that probes learn "not ready" and clients
/// get a 503 they can retry elsewhere rather than a refused connection.
pub async fn serve(
    listeners: impl Into<Listeners>,
    mut state: AppState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let Listeners { clients, operators, tls } = listeners.into();
    let operators = operators.map(|listener| operators_door(listener, &state)).transpose()?;
    if operators.is_some() {
        state.admin_routes = AdminRoutes::Apart;
    }
    state.checks_hosts = state.keys.is_none() && is_private(&clients)?;
    let seats = Arc::new(Semaphore::new(state.limits.max_connections));
    let clients = Door { listener: clients, seats, routes: router(state.clone()) };
    let closing = CancellationToken::new();
    let manners = Manners { tls, limits: Arc::clone(&state.limits), closing: closing.clone() };
    // Dropping it ends every connection that is left.
    let mut connections = JoinSet::new();
    let mut upkeep = interval(METRICS_UPKEEP);
    let mut drained = pin!(drained(&state, shutdown));
    loop {
        let ((stream, seat), routes) = tokio::select! {
            accepted = clients.accept() => (accepted, &clients.routes),
            Some(accepted) = accept_operator(operators.as_ref()) => accepted,
            Some(_) = connections.join_next() => continue,
            _ = upkeep.tick() => {
                metrics::upkeep();
                continue;
            }
            () = &mut drained => break,
        };
        let (routes, manners) = (routes.clone(), manners.clone());
        connections.spawn(async move {
            manners.greet(stream, routes).await;
            drop(seat);
        });
    }
    drop((clients, operators));
    closing.cancel();
    let all_ended = async { while connections.join_next().await.is_some() {} };
    // From here on, and not from the signal: an idle server must not wait for a client that does
    // not finish its request.
    if timeout(FLUSH_TIMEOUT, all_ended).await.is_err() {
        tracing::warn!("gave up on clients that do not read their answers");
    }
    Ok(())
}

fn operators_door(listener: TcpListener, state: &AppState) -> io::Result<Door> {
    let mut state = state.clone();
    if is_private(&listener)? {
        state.keys = None;
        state.checks_hosts = true;
    }
    let seats = Arc::new(Semaphore::new(MAX_ADMIN_CONNECTIONS));
    Ok(Door { listener, seats, routes: admin_router(state) })
}

/// Whether this machine alone reaches it.
fn is_private(listener: &TcpListener) -> io::Result<bool> {
    Ok(listener.local_addr()?.ip().to_canonical().is_loopback())
}

type Accepted = (TcpStream, OwnedSemaphorePermit);

async fn accept_operator(door: Option<&Door>) -> Option<(Accepted, &Router)> {
    match door {
        Some(door) => Some((door.accept().await, &door.routes)),
        None => pending().await,
    }
}

impl Door {
    /// The next connection and its seat. Without a seat, clients wait to be accepted.
    async fn accept(&self) -> Accepted {
        let seat = Arc::clone(&self.seats).acquire_owned().await;
        let seat = seat.expect("nobody closes the semaphore");
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    // Tokens are small packets that must not wait for each other.
                    let _ = stream.set_nodelay(true);
                    return (stream, seat);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

impl Manners {
    /// Encrypts a connection, if any are, and answers its requests.
    async fn greet(self, stream: TcpStream, routes: Router) {
        let Some(tls) = self.tls.clone() else { return self.converse(stream, routes).await };
        let shaken = tokio::select! {
            shaken = tls.accept(stream, self.limits.handshake_timeout) => shaken,
            () = self.closing.cancelled() => return,
        };
        match shaken {
            Ok(stream) => self.converse(stream, routes).await,
            Err(error) => tracing::debug!(%error, "a client could not shake hands"),
        }
    }

    /// Answers one connection's requests until it ends, or the running one has been answered.
    async fn converse(self, stream: impl AsyncRead + AsyncWrite + Unpin, routes: Router) {
        let stream = TokioIo::new(Connection::new(stream, self.limits.write_timeout));
        let mut connection = pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(self.limits.header_timeout)
                .max_headers(self.limits.max_headers)
                .max_buf_size(self.limits.max_head_bytes)
                .serve_connection(stream, TowerToHyperService::new(routes))
        );
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.closing.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection broke");
        }
    }
}

/// Waits for the end, however it comes, then until the engine has finished what it accepted.
async fn drained(state: &AppState, shutdown: impl Future<Output = ()>) {
    tokio::select! {
        () = shutdown => tracing::info!("shutting down: finishing running requests"),
        () = state.engine.stopped() => tracing::error!("shutting down: the engine has stopped"),
    }
    // Closes the door.
    state.is_draining.store(true, Ordering::Release);
    state.engine.drain();
    if timeout(state.limits.drain_timeout, state.engine.stopped()).await.is_err() {
        tracing::warn!("shutdown took too long: aborting what still runs");
        state.engine.abort_all();
        if timeout(FLUSH_TIMEOUT, state.engine.stopped()).await.is_err() {
            tracing::error!("the engine hangs in a step and is left behind");
        }
    }
}
