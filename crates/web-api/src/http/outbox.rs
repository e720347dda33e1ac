//! The sending half of a WebSocket, with a task of its own: who does not read holds nobody else up, and has only so much
//! waiting.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{Message, Utf8Bytes, WebSocket};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

/// Most bytes that wait for one who does not read.
const MAX_WAITING: usize = 8 << 20;
/// What a message costs beside its bytes.
const OVERHEAD: usize = 128;
/// The last of it has so long to be read.
const FAREWELL: Duration = Duration::from_secs(30);

/// Why something is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsent {
    /// Too much waits.
    Full,
    /// The connection is gone.
    Gone,
}

type Waiting = (Message, Option<OwnedSemaphorePermit>);

pub(super) struct Outbox {
    queue: mpsc::UnboundedSender<Waiting>,
    room: Arc<Semaphore>,
    writer: JoinHandle<()>,
}

impl Outbox {
    pub(super) fn new(mut sink: SplitSink<WebSocket, Message>) -> Self {
        let (queue, mut waiting) = mpsc::unbounded_channel::<Waiting>();
        let writer = tokio::spawn(async move {
            while let Some((message, _room)) = waiting.recv().await {
                if sink.send(message).await.is_err() {
                    return;
                }
            }
            let _ = sink.close().await;
        });
        Self {
            queue,
            room: Arc::new(Semaphore::new(MAX_WAITING)),
            writer,
        }
    }

    pub(super) fn say(&self, text: Utf8Bytes) -> Result<(), Unsent> {
        self.queue(Message::Text(text))
    }

    /// What has to be said even where too much waits.
    pub(super) fn say_anyway(&self, text: Utf8Bytes) -> Result<(), Unsent> {
        let queued = self.queue.send((Message::Text(text), None));
        queued.map_err(|_| Unsent::Gone)
    }

    pub(super) fn ping(&self) -> Result<(), Unsent> {
        self.queue(Message::Ping(axum::body::Bytes::new()))
    }

    fn queue(&self, message: Message) -> Result<(), Unsent> {
        let bytes = match &message {
            Message::Text(text) => text.len(),
            _ => 0,
        };
        let cost = u32::try_from(bytes.saturating_add(OVERHEAD)).map_err(|_| Unsent::Full)?;
        let room = Arc::clone(&self.room).try_acquire_many_owned(cost);
        let room = room.map_err(|_| Unsent::Full)?;
        let queued = self.queue.send((message, Some(room)));
        queued.map_err(|_| Unsent::Gone)
    }

    /// Ends the connection when all is sent that waits, and at last this. What still comes is read: a connection that is
    /// closed over unread bytes is reset, and takes what was sent along.
    pub(super) async fn close(
        mut self,
        last: Option<Utf8Bytes>,
        socket: &mut SplitStream<WebSocket>,
    ) {
        if let Some(text) = last {
            let _ = self.say_anyway(text);
        }
        // Nothing more comes.
        self.queue = mpsc::unbounded_channel().0;
        let read = async { while let Some(Ok(_)) = socket.next().await {} };
        let both = futures_util::future::join(&mut self.writer, read);
        let _ = tokio::time::timeout(FAREWELL, both).await;
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.writer.abort();
    }
}
