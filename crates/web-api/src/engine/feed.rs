//! Feeds: what a run says while it runs, each piece taken exactly once.
//!
//! A feed is one subject of the stream. Each message holds a piece from one position to another, of one claim, and says
//! so in headers. It is written only where the last message of its subject is the one that the writer knows: so a piece
//! that is sent twice, to whatever replica and however late, is found to be there, and nothing is ever out of order.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use api_types::{Epoch, RunId};
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use async_nats::jetstream::{consumer, context::PublishError};
use async_nats::{HeaderMap, header};
use bytes::Bytes;

use super::{Engine, EngineError, PATIENCE, PAUSE};

const EPOCH: &str = "Vm0-Epoch";
const START: &str = "Vm0-Start";
const END: &str = "Vm0-End";
const TOTAL: &str = "Vm0-Total";
/// Most bytes of one feed of one claim. A guest writes them, so they must end somewhere.
const MAX_FEED_BYTES: u64 = 256 << 20;
/// Tails remembered; more are forgotten all at once and read again.
const MAX_TAILS: usize = 50_000;

/// Which feed of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FeedKind {
    /// Events of the agent CLI; positions are sequence numbers.
    Events,
    /// What the guest agent printed; positions are bytes.
    Output,
    /// The system log, as the guest agent uploads it; positions are bytes.
    System,
    /// Samples of the guest; positions are numbers of samples.
    Metrics,
    /// The network log; positions are bytes.
    Network,
    /// Inputs for the agent; positions are numbers.
    Input,
}

impl FeedKind {
    /// Its part of the subject.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Output => "output",
            Self::System => "system",
            Self::Metrics => "metrics",
            Self::Network => "network",
            Self::Input => "input",
        }
    }
}

/// A piece: text by bytes, or a list by items.
#[derive(Clone, Debug)]
pub enum Chunk {
    /// UTF-8.
    Text(String),
    /// Each the JSON of one item.
    Items(Vec<Box<serde_json::value::RawValue>>),
}

/// JSON as it came.
pub fn body_json(
    value: &impl serde::Serialize,
) -> Result<Box<serde_json::value::RawValue>, EngineError> {
    serde_json::value::to_raw_value(value).map_err(|error| EngineError::Corrupt(error.to_string()))
}

impl Chunk {
    fn len(&self) -> u64 {
        let len = match self {
            Self::Text(text) => text.len(),
            Self::Items(items) => items.len(),
        };
        u64::try_from(len).unwrap_or(u64::MAX)
    }

    /// Without its first part; `None` where that would cut a character.
    fn after(&self, skip: u64) -> Option<Bytes> {
        let skip = usize::try_from(skip).ok()?;
        match self {
            Self::Text(text) => text
                .get(skip..)
                .map(|t| Bytes::copy_from_slice(t.as_bytes())),
            Self::Items(items) => serde_json::to_vec(items.get(skip..)?).ok().map(Bytes::from),
        }
    }
}

/// What came of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It is there, now or already; this is the position after all that is there.
    Next(u64),
    /// Something before it is missing, or it overlaps what is there within a character.
    Gap(u64),
    /// A later claim writes this feed.
    Fenced,
    /// The feed is as large as it may become.
    Full,
}

/// A piece as it was stored.
#[derive(Clone, Debug)]
pub struct Position {
    /// Its place in the stream.
    pub sequence: u64,
    /// Of which claim.
    pub epoch: Epoch,
    /// Where it begins.
    pub start: u64,
    /// The piece: text, or a JSON array.
    pub body: Bytes,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tail {
    sequence: u64,
    epoch: Epoch,
    end: u64,
    total: u64,
}

/// Last messages of feeds that this replica wrote to. No truth: a wrong one is found out by the write.
#[derive(Clone, Debug, Default)]
pub(super) struct Tails(Arc<Mutex<HashMap<(FeedKind, RunId), Tail>>>);

impl Tails {
    fn get(&self, key: (FeedKind, RunId)) -> Option<Tail> {
        let tails = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tails.get(&key).copied()
    }

    fn set(&self, key: (FeedKind, RunId), tail: Option<Tail>) {
        let mut tails = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match tail {
            Some(tail) => {
                if tails.len() >= MAX_TAILS {
                    tails.clear();
                }
                tails.insert(key, tail);
            }
            None => drop(tails.remove(&key)),
        }
    }
}

fn number(headers: &HeaderMap, name: &str) -> u64 {
    headers
        .get(name)
        .and_then(|value| value.as_str().parse().ok())
        .unwrap_or(0)
}

fn position(message: StreamMessage) -> Position {
    Position {
        sequence: message.sequence,
        epoch: number(&message.headers, EPOCH),
        start: number(&message.headers, START),
        body: message.payload,
    }
}

impl Engine {
    fn feed_subject(&self, kind: FeedKind, run: RunId) -> String {
        format!("{}.feed.{}.{run}", self.namespace, kind.as_str())
    }

    async fn tail(&self, kind: FeedKind, run: RunId) -> Result<Tail, EngineError> {
        if let Some(tail) = self.tails.get((kind, run)) {
            return Ok(tail);
        }
        let subject = self.feed_subject(kind, run);
        match self.feed.get_last_raw_message_by_subject(&subject).await {
            Ok(message) => Ok(Tail {
                sequence: message.sequence,
                epoch: number(&message.headers, EPOCH),
                end: number(&message.headers, END),
                total: number(&message.headers, TOTAL),
            }),
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => {
                Ok(Tail::default())
            }
            Err(error) => Err(EngineError::unavailable(error)),
        }
    }

    /// Appends a piece that begins at `start`.
    pub async fn append(
        &self,
        kind: FeedKind,
        run: RunId,
        epoch: Epoch,
        start: u64,
        chunk: &Chunk,
    ) -> Result<Appended, EngineError> {
        self.append_after(kind, run, epoch, Some(start), 0, chunk)
            .await
    }

    /// Appends an input: behind `start` others, or behind all. It has had `floor` at least, also where none of them is kept
    /// any more. Inputs are the run's and not a claim's: they are all of epoch 0.
    pub async fn append_input(
        &self,
        run: RunId,
        start: Option<u64>,
        floor: u64,
        text: &str,
    ) -> Result<Appended, EngineError> {
        let chunk = Chunk::Items(vec![body_json(&text)?]);
        self.append_after(FeedKind::Input, run, 0, start, floor, &chunk)
            .await
    }

    async fn append_after(
        &self,
        kind: FeedKind,
        run: RunId,
        epoch: Epoch,
        start: Option<u64>,
        floor: u64,
        chunk: &Chunk,
    ) -> Result<Appended, EngineError> {
        let begin = Instant::now();
        loop {
            match self
                .append_once(kind, run, epoch, start, floor, chunk)
                .await
            {
                Ok(Some(appended)) => return Ok(appended),
                Ok(None) => {}
                // It may be there all the same; reading the tail finds out. Only a piece that does not say where it
                // begins would be there twice then.
                Err(error) if start.is_none() || begin.elapsed() >= PATIENCE => return Err(error),
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
            self.tails.set((kind, run), None);
            if begin.elapsed() >= PATIENCE {
                return Err(EngineError::Unavailable(
                    "others write the same feed all the time".to_owned(),
                ));
            }
        }
    }

    /// `None`: somebody else wrote first.
    async fn append_once(
        &self,
        kind: FeedKind,
        run: RunId,
        epoch: Epoch,
        start: Option<u64>,
        floor: u64,
        chunk: &Chunk,
    ) -> Result<Option<Appended>, EngineError> {
        let cached = self.tails.get((kind, run)).is_some();
        let tail = self.tail(kind, run).await?;
        let have = if tail.epoch == epoch { tail.end } else { 0 };
        let have = have.max(floor);
        let start = start.unwrap_or(have);
        let end = start.saturating_add(chunk.len());
        let judged = if tail.epoch > epoch {
            Some(Appended::Fenced)
        } else if end <= have {
            Some(Appended::Next(have))
        } else if start > have {
            Some(Appended::Gap(have))
        } else {
            None
        };
        match judged {
            // What is remembered may be behind; nothing is refused on it.
            Some(Appended::Fenced | Appended::Gap(_)) if cached => return Ok(None),
            // Nor taken for one that is there: the run may have been removed and made anew.
            Some(Appended::Next(_)) if cached && chunk.len() > 0 => return Ok(None),
            Some(appended) => return Ok(Some(appended)),
            None => {}
        }
        let Some(body) = chunk.after(have.saturating_sub(start)) else {
            return Ok(Some(Appended::Gap(have)));
        };
        let before = if tail.epoch == epoch { tail.total } else { 0 };
        let total = before.saturating_add(u64::try_from(body.len()).unwrap_or(u64::MAX));
        if total > MAX_FEED_BYTES {
            return Ok(Some(Appended::Full));
        }
        let mut headers = HeaderMap::new();
        headers.insert(EPOCH, epoch.to_string());
        headers.insert(START, have.to_string());
        headers.insert(END, end.to_string());
        headers.insert(TOTAL, total.to_string());
        headers.insert(
            header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE,
            tail.sequence.to_string(),
        );
        let subject = self.feed_subject(kind, run);
        let sent = self
            .context
            .publish_with_headers(subject, headers, body)
            .await
            .map_err(EngineError::unavailable)?;
        match sent.await {
            Ok(ack) => {
                let tail = Tail {
                    sequence: ack.sequence,
                    epoch,
                    end,
                    total,
                };
                self.tails.set((kind, run), Some(tail));
                Ok(Some(Appended::Next(end)))
            }
            Err(error) if wrong_last(&error) => Ok(None),
            Err(error) => Err(EngineError::unavailable(error)),
        }
    }

    /// The first piece of a feed at or after a place in the stream.
    pub async fn piece(
        &self,
        kind: FeedKind,
        run: RunId,
        from: u64,
    ) -> Result<Option<Position>, EngineError> {
        let subject = self.feed_subject(kind, run);
        // At the leader: one that lags would leave a hole in what a follower sees.
        let found = self
            .feed
            .raw_message_builder()
            .sequence(from.max(1))
            .next_by_subject(subject)
            .send()
            .await;
        match found {
            Ok(message) => Ok(Some(position(message))),
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(EngineError::unavailable(error)),
        }
    }

    /// Pieces of a feed from now on, as they come.
    pub async fn new_pieces(
        &self,
        kind: FeedKind,
        run: RunId,
    ) -> Result<consumer::pull::Ordered, EngineError> {
        let config = consumer::pull::OrderedConfig {
            filter_subject: self.feed_subject(kind, run),
            deliver_policy: consumer::DeliverPolicy::New,
            ..consumer::pull::OrderedConfig::default()
        };
        let consumer = self
            .feed
            .create_consumer(config)
            .await
            .map_err(EngineError::unavailable)?;
        consumer.messages().await.map_err(EngineError::unavailable)
    }

    /// Reads a message of [`Engine::new_pieces`].
    pub fn read_piece(message: &async_nats::jetstream::Message) -> Option<Position> {
        let info = message.info().ok()?;
        let empty = HeaderMap::new();
        let headers = message.headers.as_ref().unwrap_or(&empty);
        Some(Position {
            sequence: info.stream_sequence,
            epoch: number(headers, EPOCH),
            start: number(headers, START),
            body: message.payload.clone(),
        })
    }

    /// Removes what a run said.
    pub async fn remove_feeds(&self, run: RunId) -> Result<(), EngineError> {
        let subject = format!("{}.feed.*.{run}", self.namespace);
        self.feed
            .purge()
            .filter(subject)
            .await
            .map(|_| ())
            .map_err(EngineError::unavailable)
    }
}

fn wrong_last(error: &PublishError) -> bool {
    error.kind() == PublishErrorKind::WrongLastSequence
}
