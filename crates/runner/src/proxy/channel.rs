//! The socket to one proxy worker: numbered requests out, answers and log lines in.

use std::collections::HashMap;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::StreamExt;
use policy::wire::{FromProxy, MAX_MESSAGE, Request};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::codec::{FramedRead, LinesCodec};
use zeroize::Zeroizing;

use crate::sync::lock;

/// Why a request came to nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    /// The worker is gone, or was never there.
    #[error("the proxy has ended")]
    Closed,
    /// It said no.
    #[error("the proxy refused: {0}")]
    Refused(String),
    /// It cannot be asked.
    #[error("{0}")]
    Unsendable(String),
}

type Line = Zeroizing<Vec<u8>>;
type Waiting = HashMap<u64, oneshot::Sender<Result<(), String>>>;

/// Clones share the connection; it ends when the last is dropped, or the worker goes.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    next: AtomicU64,
    lines: mpsc::Sender<Line>,
    waiting: Arc<Mutex<Waiting>>,
    closed: watch::Receiver<bool>,
}

/// Requests that may wait to be written.
const QUEUE: usize = 64;

impl Channel {
    /// Starts to speak; `hear` gets what the worker says unasked.
    pub(crate) fn start(
        socket: StdUnixStream,
        hear: impl FnMut(FromProxy) + Send + 'static,
    ) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (read, write) = UnixStream::from_std(socket)?.into_split();
        let (lines, outbox) = mpsc::channel(QUEUE);
        let (closing, closed) = watch::channel(false);
        let waiting = Arc::new(Mutex::new(Waiting::new()));
        let answers = Arc::clone(&waiting);
        tokio::spawn(async move {
            tokio::select! {
                () = write_all(write, outbox) => {}
                () = read_all(read, &answers, hear) => {}
            }
            closing.send_replace(true);
            // Dropping the senders answers everybody who still waits.
            lock(&answers).clear();
        });
        Ok(Self {
            shared: Arc::new(Shared {
                next: AtomicU64::new(1),
                lines,
                waiting,
                closed,
            }),
        })
    }

    /// Asks, and waits for the answer.
    pub(crate) async fn ask(&self, request: &Request<'_>) -> Result<(), ChannelError> {
        let shared = &self.shared;
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        let line = request
            .to_line(id)
            .map_err(|error| ChannelError::Unsendable(error.to_string()))?;
        let (answer, answered) = oneshot::channel();
        lock(&shared.waiting).insert(id, answer);
        // An asker that stops waiting takes its number back; an answer that comes all the same is thrown away.
        let _forget = Forget(&shared.waiting, id);
        if *shared.closed.borrow() || shared.lines.send(line).await.is_err() {
            return Err(ChannelError::Closed);
        }
        match answered.await {
            Ok(outcome) => outcome.map_err(ChannelError::Refused),
            Err(_) => Err(ChannelError::Closed),
        }
    }

    /// Resolves when the worker is gone.
    pub(crate) async fn closed(&self) {
        let mut closed = self.shared.closed.clone();
        // A sender that is gone has said so.
        let _ = closed.wait_for(|closed| *closed).await;
    }
}

struct Forget<'a>(&'a Mutex<Waiting>, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.0).remove(&self.1);
    }
}

async fn write_all(mut socket: OwnedWriteHalf, mut outbox: mpsc::Receiver<Line>) {
    while let Some(line) = outbox.recv().await {
        if let Err(error) = socket.write_all(&line).await {
            tracing::warn!(%error, "the proxy cannot be written to");
            return;
        }
    }
}

async fn read_all(
    socket: OwnedReadHalf,
    waiting: &Mutex<Waiting>,
    mut hear: impl FnMut(FromProxy),
) {
    let mut lines = FramedRead::new(socket, LinesCodec::new_with_max_length(MAX_MESSAGE));
    while let Some(line) = lines.next().await {
        let message = line
            .map_err(|error| error.to_string())
            .and_then(|line| FromProxy::parse(line.as_bytes()).map_err(|e| e.to_string()));
        match message {
            Ok(FromProxy::Answer { id, outcome }) => {
                if let Some(answer) = lock(waiting).remove(&id) {
                    let _ = answer.send(outcome);
                }
            }
            Ok(unasked) => hear(unasked),
            // A proxy that does not keep to the protocol may have been taken over by what it handles.
            Err(error) => {
                tracing::error!(error, "the proxy broke its protocol and is ended");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::sync::mpsc::channel as std_channel;

    fn pair() -> (Channel, StdUnixStream, std::sync::mpsc::Receiver<FromProxy>) {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let (heard, hears) = std_channel();
        let channel = Channel::start(ours, move |message| heard.send(message).unwrap()).unwrap();
        (channel, theirs, hears)
    }

    #[tokio::test]
    async fn answers_find_their_askers_whatever_their_order() {
        let (channel, theirs, hears) = pair();
        let worker = tokio::task::spawn_blocking(move || {
            let mut requests = BufReader::new(theirs.try_clone().unwrap());
            let (mut first, mut second) = (String::new(), String::new());
            requests.read_line(&mut first).unwrap();
            requests.read_line(&mut second).unwrap();
            assert!(first.contains("\"id\":1") && second.contains("\"id\":2"));
            (&theirs)
                .write_all(b"{\"event\":\"listening\",\"port\":8080}\n{\"id\":2,\"error\":\"no.\"}\n{\"id\":1,\"ok\":true}\n")
                .unwrap();
            theirs
        });
        let (one, two) = tokio::join!(channel.ask(&Request::Ping), channel.ask(&Request::Ping));
        one.unwrap();
        assert!(matches!(two, Err(ChannelError::Refused(why)) if why == "no."));
        assert_eq!(hears.recv().unwrap(), FromProxy::Listening { port: 8080 });
        drop(worker.await.unwrap());
        channel.closed().await;
        let late = channel.ask(&Request::Ping).await;
        assert!(matches!(late, Err(ChannelError::Closed)));
    }

    #[tokio::test]
    async fn a_worker_that_dies_or_breaks_the_protocol_answers_everybody_who_waits() {
        for last_words in ["", "nonsense\n", "{\"id\":1,\"ok\":false}\n"] {
            let (channel, mut theirs, _hears) = pair();
            let worker = tokio::task::spawn_blocking(move || {
                let mut request = String::new();
                BufReader::new(theirs.try_clone().unwrap())
                    .read_line(&mut request)
                    .unwrap();
                theirs.write_all(last_words.as_bytes()).unwrap();
                theirs
            });
            let asked = tokio::spawn({
                let channel = channel.clone();
                async move { channel.ask(&Request::Ping).await }
            });
            let theirs = worker.await.unwrap();
            if last_words.is_empty() {
                drop(theirs);
            }
            assert!(matches!(asked.await.unwrap(), Err(ChannelError::Closed)));
        }
    }
}
