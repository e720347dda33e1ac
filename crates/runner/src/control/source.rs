//! A byte source that tells "the sender finished" from "the sender went away".

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::oneshot::Receiver;

/// Reads from `inner`; its end is an end only if completion was announced, otherwise it is an error.
#[derive(Debug)]
pub(crate) struct Whole<R> {
    inner: R,
    completed: Receiver<()>,
}

impl<R> Whole<R> {
    /// `completed` is sent to before `inner`'s other end is closed.
    pub(crate) fn new(inner: R, completed: Receiver<()>) -> Self {
        Self { inner, completed }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Whole<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let wanted = buffer.remaining() > 0;
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        if wanted && buffer.filled().len() == before && self.completed.try_recv().is_err() {
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        Poll::Ready(Ok(()))
    }
}
