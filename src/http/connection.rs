//! A socket that hears its client leave even while nobody reads from it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Bytes read ahead of hyper, at most. Behind more than this, a client's leaving goes unnoticed.
const MAX_READ_AHEAD: usize = 16 << 10;

/// A connection for hyper, which stops reading while it holds bytes behind the request it answers,
/// be they a stray line end or the next request, and then learns nothing from its client any more.
/// This socket reads on, and fails the flush that ends each of hyper's turns when the client is
/// gone. hyper then drops the handler, and with it the generation.
pub(super) struct Connection {
    stream: TcpStream,
    ahead: Vec<u8>,
    has_ended: bool,
    /// Whether the flush has something to flush: an answer beats the news that the client left.
    has_written: bool,
}

impl Connection {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, ahead: Vec::new(), has_ended: false, has_written: false }
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

impl AsyncRead for Connection {
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

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.has_written = true;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.has_written = true;
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        let has_left = self.poll_ahead(context)?;
        if std::mem::take(&mut self.has_written) || !has_left {
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
