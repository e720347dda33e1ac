//! Answers that are ready before the request has arrived: a refusal (401, 413, 429) needs no more of the body.
//!
//! A server that then closes the connection makes the sender see a broken pipe instead of the answer (RFC 9112,
//! section 9.6). So the rest is read and thrown away first, within limits.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::sync::oneshot;

/// Most that is read for nothing, bytes: the largest body that any path takes, and some more.
const MAX_BYTES: usize = 48 << 20;
/// Longest time for it.
const MAX_TIME: Duration = Duration::from_secs(5);

/// Lets the sender finish before the answer ends its connection.
pub(super) async fn linger(request: Request, next: Next) -> Response {
    // Who waits for a "100 Continue" has sent nothing yet, and would be asked for it by the first read.
    if request.body().is_end_stream() || request.headers().contains_key(header::EXPECT) {
        return next.run(request).await;
    }
    let (give, mut take) = oneshot::channel();
    let request = request.map(|body| {
        Body::new(Lent {
            body,
            back: Some(give),
        })
    });
    let response = next.run(request).await;
    if let Ok(rest) = take.try_recv() {
        // A sender that is too slow or sends too much sees its connection end.
        let _ = tokio::time::timeout(MAX_TIME, discard(rest)).await;
    }
    response
}

async fn discard(mut body: Body) {
    let mut read = 0_usize;
    while let Some(Ok(frame)) = body.frame().await {
        read = read.saturating_add(frame.data_ref().map_or(0, Bytes::len));
        if read > MAX_BYTES {
            return;
        }
    }
}

/// A body that goes back when whoever has it drops it unread.
struct Lent {
    body: Body,
    back: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.back = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(back) = self.back.take()
            && !self.body.is_end_stream()
        {
            let _ = back.send(std::mem::take(&mut self.body));
        }
    }
}
