//! Accepts connections until told to stop, then lets what runs finish.

use std::future::Future;
use std::io;

use axum::serve::ListenerExt;
use tokio::net::TcpListener;

use super::router::router;
use super::state::AppState;

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
            state.lifecycle.begin_drain();
            state.engine.drain();
            // The receiver only goes away together with the server.
            let _ = begin.send(());
            state.engine.stopped().await;
        }
    };
    let server = axum::serve(listener, router(state.clone())).with_graceful_shutdown(drained);
    let deadline = async {
        if began.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(state.limits.drain_timeout).await;
    };
    tokio::select! {
        result = server => result,
        () = deadline => {
            tracing::warn!("shutdown took too long: aborting what still runs");
            Ok(())
        }
    }
}
