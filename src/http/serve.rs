//! Accepts connections until told to stop, then lets what runs finish.

use std::future::Future;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::router::router;
use super::state::AppState;

/// How long clients may take to read the end of their answers after the engine has stopped.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves until `shutdown` resolves and running requests have finished, or the drain timeout has
/// passed.
///
/// While draining, connections are still accepted, so that probes learn "not ready" and clients
/// get a 503 they can retry elsewhere rather than a refused connection.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    // Tokens are small packets that must not wait for each other.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let (begin, began) = tokio::sync::oneshot::channel();
    let drained = {
        let state = state.clone();
        async move {
            shutdown.await;
            tracing::info!("shutting down: finishing running requests");
            // The receiver only goes away together with the server.
            let _ = begin.send(());
            drain(&state).await;
        }
    };
    let server = axum::serve(listener, router(state.clone())).with_graceful_shutdown(drained);
    let deadline = async {
        if began.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(state.limits.drain_timeout + FLUSH_TIMEOUT).await;
    };
    tokio::select! {
        result = server => result,
        () = deadline => {
            tracing::warn!("gave up on clients that do not read their answers");
            Ok(())
        }
    }
}

/// Closes the door, then waits until the engine has finished what it accepted.
async fn drain(state: &AppState) {
    state.is_draining.store(true, Ordering::Release);
    state.engine.drain();
    if timeout(state.limits.drain_timeout, state.engine.stopped()).await.is_err() {
        tracing::warn!("shutdown took too long: aborting what still runs");
        state.engine.abort_all();
        state.engine.stopped().await;
    }
}
