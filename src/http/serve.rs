//! Accepts connections until told to stop, then lets what runs finish.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::router::router;
use super::state::AppState;
use crate::telemetry::metrics;

/// How long clients may take to read the end of their answers after the engine has stopped.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// How often collected samples are sorted into the buckets of their histograms.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
/// Pause after no connection could be accepted, most likely for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves until `shutdown` resolves and running requests have finished, or the drain timeout has
/// passed; or until the engine dies, so that a supervisor can start another.
///
/// While draining, connections are still accepted, so that probes learn "not ready" and clients
/// get a 503 they can retry elsewhere rather than a refused connection.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let seats = Arc::new(Semaphore::new(state.limits.max_connections));
    let routes = router(state.clone());
    let closing = CancellationToken::new();
    // Dropping it ends every connection that is left.
    let mut connections = JoinSet::new();
    let mut upkeep = interval(METRICS_UPKEEP);
    let mut drained = pin!(drained(&state, shutdown));
    loop {
        let (stream, seat) = tokio::select! {
            accepted = accept(&listener, &seats) => accepted,
            Some(_) = connections.join_next() => continue,
            _ = upkeep.tick() => {
                metrics::upkeep();
                continue;
            }
            () = &mut drained => break,
        };
        let (routes, closing) = (routes.clone(), closing.clone());
        let header_timeout = state.limits.header_timeout;
        connections.spawn(async move {
            converse(stream, routes, header_timeout, closing).await;
            drop(seat);
        });
    }
    drop(listener);
    closing.cancel();
    let all_ended = async { while connections.join_next().await.is_some() {} };
    // From here on, and not from the signal: an idle server must not wait for a client that does
    // not finish its request.
    if timeout(FLUSH_TIMEOUT, all_ended).await.is_err() {
        tracing::warn!("gave up on clients that do not read their answers");
    }
    Ok(())
}

/// The next connection and its seat. Without a seat, clients wait to be accepted.
async fn accept(
    listener: &TcpListener,
    seats: &Arc<Semaphore>,
) -> (TcpStream, OwnedSemaphorePermit) {
    let seat = Arc::clone(seats).acquire_owned().await.expect("nobody closes the semaphore");
    loop {
        match listener.accept().await {
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

/// Answers one connection's requests until it ends, or the running one has been answered.
async fn converse(
    stream: TcpStream,
    routes: Router,
    header_timeout: Duration,
    closing: CancellationToken,
) {
    let stream = TokioIo::new(Connection::new(stream));
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(header_timeout)
            .serve_connection(stream, TowerToHyperService::new(routes))
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
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
        state.engine.stopped().await;
    }
}
