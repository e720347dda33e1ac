//! The newest checkpoint of each session: a record that names a blob with the history.
//!
//! Every checkpoint's blob has a name of its own. So whoever reads, replaces or removes one never meets another's bytes.

use std::collections::BTreeSet;
use std::time::Instant;

use api_types::{ClaimId, UnixMillis};
use async_nats::jetstream::kv::Entry;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Engine, EngineError, PATIENCE, PAUSE, Swap};

/// What names of histories begin with.
pub(super) const HISTORIES: &str = "session/";

/// Reads of a record whose blob was replaced in between.
const READS: usize = 5;

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The CLI's own id of the session.
    cli_session: String,
    /// Its history, in the object store.
    blob: String,
}

impl Record {
    fn read(value: &[u8]) -> Result<Self, EngineError> {
        serde_json::from_slice(value).map_err(|error| EngineError::Corrupt(error.to_string()))
    }
}

/// Where a session's agent goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The CLI's own id of the session.
    pub cli_session: String,
    /// What the CLI wrote of it.
    pub history: Vec<u8>,
}

impl Engine {
    /// Keeps a checkpoint as the session's newest.
    pub async fn keep_checkpoint(
        &self,
        key: &str,
        cli_session: String,
        history: &[u8],
    ) -> Result<(), EngineError> {
        let blob = format!("{HISTORIES}{key}/{}", ClaimId::random());
        let record = Record { cli_session, blob };
        let value =
            serde_json::to_vec(&record).map_err(|error| EngineError::Corrupt(error.to_string()))?;
        let value = Bytes::from(value);
        self.put_blob(&record.blob, history).await?;
        let begin = Instant::now();
        loop {
            let before = self.sessions.get(key).await?;
            let swap = match &before {
                Some(found) => {
                    let revision = found.revision;
                    self.sessions.update(key, value.clone(), revision).await?
                }
                None => self.sessions.create(key, value.clone()).await?,
            };
            if let Swap::Done(_) = swap {
                // What is not removed now is no record's, and goes with what broke off.
                if let Some(found) = before
                    && let Ok(old) = Record::read(&found.value)
                {
                    let _ = self.remove_blob(&old.blob).await;
                }
                return Ok(());
            }
            if begin.elapsed() >= PATIENCE {
                return Err(EngineError::unavailable(
                    "others write the same session all the time",
                ));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The session's newest checkpoint.
    pub async fn checkpoint(&self, key: &str) -> Result<Option<Checkpoint>, EngineError> {
        for _ in 0..READS {
            let Some(found) = self.sessions.get(key).await? else {
                return Ok(None);
            };
            let record = Record::read(&found.value)?;
            match self.blob(&record.blob).await {
                Ok(Some(history)) => {
                    return Ok(Some(Checkpoint {
                        cli_session: record.cli_session,
                        history,
                    }));
                }
                Ok(None) => {}
                Err(error) => {
                    // Unless it was removed under our hands.
                    let now = self.sessions.get(key).await?;
                    if now.is_some_and(|now| now.revision == found.revision) {
                        return Err(error);
                    }
                }
            }
        }
        Ok(None)
    }

    /// Which of these blobs are the history of no session.
    pub(super) async fn unclaimed(
        &self,
        mut blobs: BTreeSet<String>,
    ) -> Result<BTreeSet<String>, EngineError> {
        let look = |found: &Entry| {
            blobs.remove(&Record::read(&found.value)?.blob);
            Ok(())
        };
        self.sessions.scan(look).await?;
        Ok(blobs)
    }

    /// Removes sessions that have had no checkpoint since.
    pub async fn remove_sessions(&self, since: UnixMillis) -> Result<(), EngineError> {
        let mut old = Vec::new();
        let look = |found: &Entry| {
            let at = found.created.unix_timestamp_nanos() / 1_000_000;
            if at < i128::from(since) {
                // The blob of one that cannot be read is found to be nobody's.
                let blob = Record::read(&found.value).map(|record| record.blob);
                old.push((found.key.clone(), found.revision, blob.ok()));
            }
            Ok(())
        };
        self.sessions.scan(look).await?;
        for (key, revision, blob) in old {
            // One that has another checkpoint meanwhile stays.
            if self.sessions.remove_at(&key, revision).await?
                && let Some(blob) = blob
            {
                self.remove_blob(&blob).await?;
            }
        }
        Ok(())
    }
}
