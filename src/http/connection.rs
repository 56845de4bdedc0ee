//! A socket that hears its client leave even while nobody reads from it, and that does not wait
//! for ever for one that does not read.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Bytes read ahead of hyper, at most. Behind more than this, a client's leaving goes unnoticed.
const MAX_READ_AHEAD: usize = 16 << 10;

/// A connection for hyper, which stops reading while it holds bytes behind the request it answers,
/// be they a stray line end or the next request, and then learns nothing from its client any more.
/// This socket reads on, and fails the flush that ends each of hyper's turns when the client is
/// gone. hyper then drops the handler, and with it the generation.
///
/// A write that makes no progress for too long fails too, with the same result.
pub(super) struct Connection<S> {
    stream: S,
    ahead: Vec<u8>,
    has_ended: bool,
    /// Whether the flush has something to flush: an answer beats the news that the client left.
    has_written: bool,
    patience: Patience,
}

/// How long a client may leave unread what was sent.
struct Patience {
    timeout: Duration,
    /// Runs while the client reads nothing.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Patience {
    /// Passes on how a write went; one that has waited too long has failed.
    fn watch<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.waiting = None;
            return written;
        }
        let timeout = self.timeout;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(waiting.as_mut().poll(context));
        tracing::debug!("gave up on a client that does not read its answer");
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> Connection<S> {
    pub(super) fn new(stream: S, write_timeout: Duration) -> Self {
        let patience = Patience { timeout: write_timeout, waiting: None };
        Self { stream, ahead: Vec::new(), has_ended: false, has_written: false, patience }
    }

    /// Reads what has arrived; true when nothing more will.
    fn poll_ahead(&mut self, context: &mut Context<'_>) -> io::Result<bool> {
        let mut piece = [0; 1024];
        while !self.has_ended && self.ahead.len() < MAX_READ_AHEAD {
            let mut buffer = ReadBuf::new(&mut piece);
            match Pin::new(&mut self.stream).poll_read(context, &mut buffer)? {
                Poll::Pending => break,
                Poll::Ready(()) => self.has_ended = buffer.filled().is_empty(),
            }
            self.ahead.extend_from_slice(buffer.filled());
        }
        Ok(self.has_ended)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() && !self.has_ended {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        let len = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead[..len]);
        self.ahead.drain(..len);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.has_written = true;
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.patience.watch(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.has_written = true;
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.patience.watch(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        ready!(self.patience.watch(flushed, context))?;
        let has_left = self.poll_ahead(context)?;
        if std::mem::take(&mut self.has_written) || !has_left {
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.stream).poll_shutdown(context);
        self.patience.watch(closed, context)
    }
}
