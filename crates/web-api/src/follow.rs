//! Followers of feeds: however many follow one feed at this replica, it is read from NATS once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use api_types::RunId;
use futures_util::StreamExt as _;
use tokio::sync::{OnceCell, broadcast, watch};
use tokio::task::AbortHandle;

use crate::engine::{Engine, EngineError, FeedKind, Position};

/// Pieces kept for followers that are slower; who is slower still reads them from NATS.
const BEHIND: usize = 256;

type Key = (FeedKind, RunId);

struct Tail {
    pieces: broadcast::Sender<Arc<Position>>,
    ended: watch::Sender<bool>,
    reader: OnceCell<AbortHandle>,
}

impl Drop for Tail {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.get() {
            reader.abort();
        }
    }
}

/// All feeds that are followed here.
#[derive(Clone)]
pub struct Hub {
    engine: Engine,
    tails: Arc<Mutex<HashMap<Key, Weak<Tail>>>>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hub")
    }
}

/// What a follower is woken by.
#[derive(Clone, Debug)]
pub enum Wake {
    /// A piece came.
    Piece(Arc<Position>),
    /// Pieces were missed: read them from NATS.
    Behind,
    /// The run is done, or may be.
    Ended,
}

/// One follower.
pub struct Follower {
    pieces: broadcast::Receiver<Arc<Position>>,
    ended: watch::Receiver<bool>,
    // Keeps the reader going.
    _tail: Arc<Tail>,
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Follower")
    }
}

impl Follower {
    /// The next thing that happens. May be dropped.
    pub async fn next(&mut self) -> Wake {
        tokio::select! {
            // Pieces first: the end is told after all of them.
            biased;
            piece = self.pieces.recv() => match piece {
                Ok(piece) => Wake::Piece(piece),
                Err(broadcast::error::RecvError::Lagged(_)) => Wake::Behind,
                Err(broadcast::error::RecvError::Closed) => Wake::Ended,
            },
            _ = self.ended.changed() => Wake::Ended,
        }
    }
}

impl Hub {
    /// Nobody follows yet.
    pub fn new(engine: Engine) -> Self {
        Self {
            engine,
            tails: Arc::default(),
        }
    }

    fn tail(&self, key: Key) -> Arc<Tail> {
        let mut tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tail) = tails.get(&key).and_then(Weak::upgrade) {
            return tail;
        }
        tails.retain(|_, tail| tail.strong_count() > 0);
        let tail = Arc::new(Tail {
            pieces: broadcast::Sender::new(BEHIND),
            ended: watch::Sender::new(false),
            reader: OnceCell::new(),
        });
        tails.insert(key, Arc::downgrade(&tail));
        tail
    }

    /// Follows a feed. What is written from now on wakes the follower; what was written before it reads itself.
    pub async fn follow(&self, kind: FeedKind, run: RunId) -> Result<Follower, EngineError> {
        let tail = self.tail((kind, run));
        let (pieces, ended) = (tail.pieces.subscribe(), tail.ended.subscribe());
        tail.reader
            .get_or_try_init(|| self.start(kind, run, &tail.pieces))
            .await?;
        Ok(Follower {
            pieces,
            ended,
            _tail: tail,
        })
    }

    async fn start(
        &self,
        kind: FeedKind,
        run: RunId,
        pieces: &broadcast::Sender<Arc<Position>>,
    ) -> Result<AbortHandle, EngineError> {
        let mut messages = self.engine.new_pieces(kind, run).await?;
        let (engine, pieces) = (self.engine.clone(), pieces.clone());
        let reader = tokio::spawn(async move {
            let mut last = 0;
            loop {
                while let Some(Ok(message)) = messages.next().await {
                    let Some(piece) = Engine::read_piece(&message) else {
                        continue;
                    };
                    last = piece.sequence;
                    let _ = pieces.send(Arc::new(piece));
                }
                // The consumer is gone with its server: another one, and what came meanwhile.
                messages = loop {
                    tokio::time::sleep(crate::engine::PATIENCE / 50).await;
                    if let Ok(messages) = engine.new_pieces(kind, run).await {
                        break messages;
                    }
                };
                // All of it, or a follower's place would move past what is missing.
                loop {
                    match engine.piece(kind, run, last.saturating_add(1)).await {
                        Ok(Some(piece)) => {
                            last = piece.sequence;
                            let _ = pieces.send(Arc::new(piece));
                        }
                        Ok(None) => break,
                        Err(_) => tokio::time::sleep(crate::engine::PATIENCE / 50).await,
                    }
                }
            }
        });
        Ok(reader.abort_handle())
    }

    /// The run is done: its followers see the last pieces and go.
    pub fn ended(&self, run: RunId) {
        let tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        for kind in [
            FeedKind::Events,
            FeedKind::Output,
            FeedKind::System,
            FeedKind::Metrics,
            FeedKind::Network,
        ] {
            if let Some(tail) = tails.get(&(kind, run)).and_then(Weak::upgrade) {
                tail.ended.send_replace(true);
            }
        }
    }
}
