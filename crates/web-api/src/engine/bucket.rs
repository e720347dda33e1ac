//! A key-value bucket, read at its leader.
//!
//! The library's own `get` may be answered by a follower that lags: nothing may be refused on what such a one says. So
//! reading goes through `STREAM.MSG.GET`, which only the leader answers (NATS ADR-31 says so of the two kinds of reads).

use std::collections::HashSet;
use std::time::Duration;

use async_nats::jetstream::kv::{CreateErrorKind, Entry, Operation, Store, UpdateErrorKind, Watch};
use async_nats::jetstream::stream::{LastRawMessageErrorKind, State};
use async_nats::jetstream::{self, ErrorCode};
use bytes::Bytes;
use futures_util::StreamExt as _;

use super::EngineError;

/// How long a removed key is remembered as removed, so that who watches hears of it.
pub(super) const MARKER_TTL: Duration = Duration::from_secs(3600);

/// How long a scan waits for its next key: the last one may have gone just before.
const SCAN_SILENCE: Duration = Duration::from_secs(30);

/// What a key holds.
#[derive(Clone, Debug)]
pub struct Found {
    /// The value.
    pub value: Bytes,
    /// What to name in a compare-and-set.
    pub revision: u64,
}

/// The outcome of a compare-and-set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap {
    /// Written; the new revision.
    Done(u64),
    /// Somebody else wrote first.
    Conflict,
}

/// The bucket.
#[derive(Clone, Debug)]
pub struct Bucket {
    store: Store,
}

impl Bucket {
    pub(super) fn new(store: Store) -> Self {
        Self { store }
    }

    /// What the key holds, as the leader knows it.
    pub async fn get(&self, key: &str) -> Result<Option<Found>, EngineError> {
        let subject = format!("{}{key}", self.store.prefix);
        match self
            .store
            .stream
            .get_last_raw_message_by_subject(&subject)
            .await
        {
            Ok(message) => {
                let deleted = message
                    .headers
                    .get("KV-Operation")
                    .is_some_and(|operation| operation.as_str() != "PUT")
                    || message.headers.get("Nats-Marker-Reason").is_some();
                Ok((!deleted).then_some(Found {
                    value: message.payload,
                    revision: message.sequence,
                }))
            }
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(EngineError::unavailable(error)),
        }
    }

    /// Writes where nothing is.
    pub async fn create(&self, key: &str, value: Bytes) -> Result<Swap, EngineError> {
        match self.store.create(key, value).await {
            Ok(revision) => Ok(Swap::Done(revision)),
            Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(Swap::Conflict),
            Err(error) if is_under_way(&error) => Ok(Swap::Conflict),
            Err(error) => Err(EngineError::unavailable(error)),
        }
    }

    /// Writes where this revision is.
    pub async fn update(
        &self,
        key: &str,
        value: Bytes,
        revision: u64,
    ) -> Result<Swap, EngineError> {
        match self.store.update(key, value, revision).await {
            Ok(revision) => Ok(Swap::Done(revision)),
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(Swap::Conflict),
            Err(error) if is_under_way(&error) => Ok(Swap::Conflict),
            Err(error) => Err(EngineError::unavailable(error)),
        }
    }

    /// Writes whatever is there.
    pub async fn put(&self, key: &str, value: Bytes) -> Result<u64, EngineError> {
        self.store
            .put(key, value)
            .await
            .map_err(EngineError::unavailable)
    }

    /// Removes the key and what it held.
    pub async fn remove(&self, key: &str) -> Result<(), EngineError> {
        self.store
            .purge_with_ttl(key, MARKER_TTL)
            .await
            .map_err(EngineError::unavailable)
    }

    /// Removes the key and what it held, and has that remembered for good: whoever watches hears of it however long it
    /// was cut off.
    pub async fn remove_for_all_to_hear(&self, key: &str) -> Result<(), EngineError> {
        self.store
            .purge(key)
            .await
            .map_err(EngineError::unavailable)
    }

    /// Removes the key where this revision is; whether it was.
    pub async fn remove_at(&self, key: &str, revision: u64) -> Result<bool, EngineError> {
        let removed = self
            .store
            .purge_expect_revision_with_ttl(key, revision, MARKER_TTL);
        match removed.await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(false),
            Err(error) if is_under_way(&error) => Ok(false),
            Err(error) => Err(EngineError::unavailable(error)),
        }
    }

    /// All that is there, then all that changes.
    pub async fn watch(&self) -> Result<Watch, EngineError> {
        self.store
            .watch_with_history(">")
            .await
            .map_err(EngineError::unavailable)
    }

    /// Shows each key that holds a value to `each`, and ends with what was there when it began. Fails where keys would be
    /// left out by a server that lags: any of a cluster's may show them, and what is removed because of it is gone.
    pub async fn scan(
        &self,
        mut each: impl FnMut(&Entry) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let there = self.leaders_state().await?;
        // Where nothing is, nothing would come.
        if there.messages == 0 {
            return Ok(());
        }
        let (mut shown, mut newest) = (HashSet::new(), 0);
        let mut watch = self.watch().await?;
        loop {
            let change = tokio::time::timeout(SCAN_SILENCE, watch.next())
                .await
                .map_err(EngineError::unavailable)?
                .ok_or_else(|| EngineError::unavailable("the list of keys broke off"))?
                .map_err(EngineError::unavailable)?;
            if holds_value(change.operation) {
                each(&change)?;
            }
            let is_last = change.delta == 0;
            newest = newest.max(change.revision);
            shown.insert(change.key);
            if is_last {
                break;
            }
        }
        // Who has shown the newest has shown all; but the newest may be a mark that has expired. And who has shown as many as
        // there were lacks none of them; but a mark may have expired meanwhile.
        let shown = u64::try_from(shown.len()).unwrap_or(u64::MAX);
        if shown < there.subjects_count && newest < there.last_sequence {
            return Err(EngineError::unavailable(format_args!(
                "{shown} of {} keys were listed: the server that listed them lags",
                there.subjects_count
            )));
        }
        Ok(())
    }

    /// How it is by its leader. While there is none, any server may answer, also one that lags.
    async fn leaders_state(&self) -> Result<State, EngineError> {
        let info = self.store.stream.get_info().await;
        let info = info.map_err(EngineError::unavailable)?;
        if info.cluster.is_some_and(|cluster| cluster.leader.is_none()) {
            return Err(EngineError::unavailable("the bucket has no leader now"));
        }
        Ok(info.state)
    }

    /// How many keys hold a value or a mark of removal.
    pub async fn messages(&self) -> Result<u64, EngineError> {
        Ok(self.leaders_state().await?.messages)
    }
}

/// Whether it was refused because another write of the same key is under way in the cluster: the library knows only the
/// refusal for one that is done.
fn is_under_way(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let code = error.downcast_ref().map(jetstream::Error::error_code);
        if code == Some(ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT) {
            return true;
        }
        next = error.source();
    }
    false
}

/// Whether a watched change left a value.
pub fn holds_value(operation: Operation) -> bool {
    operation == Operation::Put
}
