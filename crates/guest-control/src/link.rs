//! One end of the stream: frames in, frames out, driven by polling so that a message and its answer take no hop
//! between tasks.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{Decoder, Encoder, LengthDelimitedCodec};
use tokio_util::io::{poll_read_buf, poll_write_buf};

use crate::wire::{self, WireError};

/// How much is gathered for one write. Bounds how long a control frame waits behind data already handed over.
const WRITE_BATCH: usize = 64 * 1024;
/// Room offered to one read.
const READ_BATCH: usize = 64 * 1024;

/// Why no more frames come.
#[derive(Debug)]
pub(crate) enum LinkError {
    /// End of file, in a frame or between two, or an error of the stream.
    Gone,
    /// Bytes that are not the protocol.
    Wire(WireError),
}

/// A stream with its decoder and encoder.
#[derive(Debug)]
pub(crate) struct Link<S> {
    io: S,
    codec: LengthDelimitedCodec,
    incoming: BytesMut,
    outgoing: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    pub(crate) fn new(io: S) -> Self {
        Self {
            io,
            codec: wire::codec(),
            incoming: BytesMut::new(),
            outgoing: BytesMut::new(),
        }
    }

    /// Next frame.
    pub(crate) fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<BytesMut, LinkError>> {
        loop {
            match self.codec.decode(&mut self.incoming) {
                Ok(Some(frame)) => return Poll::Ready(Ok(frame)),
                Ok(None) => {}
                Err(_) => return Poll::Ready(Err(LinkError::Wire(WireError::FrameTooLong))),
            }
            self.incoming.reserve(READ_BATCH);
            match ready!(poll_read_buf(
                Pin::new(&mut self.io),
                cx,
                &mut self.incoming
            )) {
                Ok(0) => return Poll::Ready(Err(LinkError::Gone)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Poll::Ready(Err(LinkError::Gone)),
            }
        }
    }

    /// Sends what `next` yields until it has nothing more (`Ready`) or the stream is full (`Pending`).
    pub(crate) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        mut next: impl FnMut() -> Option<Bytes>,
    ) -> Poll<Result<(), LinkError>> {
        loop {
            while self.outgoing.len() < WRITE_BATCH {
                let Some(frame) = next() else { break };
                if self.codec.encode(frame, &mut self.outgoing).is_err() {
                    return Poll::Ready(Err(LinkError::Wire(WireError::FrameTooLong)));
                }
            }
            if !self.outgoing.has_remaining() {
                return Pin::new(&mut self.io)
                    .poll_flush(cx)
                    .map_err(|_| LinkError::Gone);
            }
            match ready!(poll_write_buf(
                Pin::new(&mut self.io),
                cx,
                &mut self.outgoing
            )) {
                Ok(0) | Err(_) => return Poll::Ready(Err(LinkError::Gone)),
                Ok(_) => {}
            }
        }
    }

    /// Waits for the next frame.
    pub(crate) async fn recv(&mut self) -> Result<BytesMut, LinkError> {
        std::future::poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// Sends one frame and flushes.
    pub(crate) async fn send(&mut self, frame: Bytes) -> Result<(), LinkError> {
        let mut frame = Some(frame);
        std::future::poll_fn(|cx| self.poll_send(cx, || frame.take())).await
    }

    /// Whether bytes have arrived that nobody has decoded yet.
    pub(crate) fn has_unread(&self) -> bool {
        !self.incoming.is_empty()
    }
}
