//! What is too large for a message: blobs of the object store, each a name and the chunks that it stands for.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::object_store::{DeleteErrorKind, GetErrorKind, ObjectInfo};
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use futures_util::TryStreamExt as _;
use tokio::io::AsyncReadExt as _;

use super::sessions::HISTORIES;
use super::{Engine, EngineError};

/// Largest blob that is read back, bytes.
const MAX_BLOB_BYTES: u64 = 64 << 20;
/// Longest time between two pieces of one that is read.
const SILENCE: Duration = Duration::from_secs(5);
/// Longest time for writing one.
const MAX_PUT: Duration = Duration::from_secs(300);

impl Engine {
    /// Writes a blob. Its name comes last: chunks of one that was broken off are found by [`Self::remove_strays`].
    pub async fn put_blob(&self, name: &str, mut bytes: &[u8]) -> Result<(), EngineError> {
        tokio::time::timeout(MAX_PUT, self.blobs.put(name, &mut bytes))
            .await
            .map_err(EngineError::unavailable)?
            .map(|_| ())
            .map_err(EngineError::unavailable)
    }

    /// Reads a blob.
    pub async fn blob(&self, name: &str) -> Result<Option<Vec<u8>>, EngineError> {
        let object = match self.blobs.get(name).await {
            Ok(object) => object,
            Err(error) if error.kind() == GetErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(EngineError::unavailable(error)),
        };
        let mut bytes = Vec::new();
        let mut object = object.take(MAX_BLOB_BYTES);
        // Of one that is removed meanwhile the rest never comes.
        while tokio::time::timeout(SILENCE, object.read_buf(&mut bytes))
            .await
            .map_err(EngineError::unavailable)?
            .map_err(EngineError::unavailable)?
            > 0
        {}
        Ok(Some(bytes))
    }

    /// Removes a blob, if it is there.
    pub async fn remove_blob(&self, name: &str) -> Result<(), EngineError> {
        match self.blobs.delete(name).await {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == DeleteErrorKind::NotFound => Ok(()),
            Err(error) => Err(EngineError::unavailable(error)),
        }
    }

    /// Removes chunks that no name stands for, and histories of no session, that were in `before`, what an earlier call
    /// gave: longer ago than writing a blob and its record takes. Gives those that are left.
    pub async fn remove_strays(
        &self,
        before: &BTreeSet<String>,
    ) -> Result<BTreeSet<String>, EngineError> {
        let prefix = format!("$O.{}_blobs", self.namespace);
        let stream = self
            .context
            .get_stream(format!("OBJ_{}_blobs", self.namespace))
            .await
            .map_err(EngineError::unavailable)?;
        // Chunks first: a name that is written meanwhile is seen.
        let mut strays = subjects(&stream, &format!("{prefix}.C.>")).await?;
        let (mut histories, mut forgotten) = (BTreeSet::new(), Vec::new());
        for name in subjects(&stream, &format!("{prefix}.M.>")).await? {
            // One by one from the leader, rather than as a list that may break off: what is missing here is removed.
            let message = match stream.get_last_raw_message_by_subject(&name).await {
                Ok(message) => message,
                // Another replica was faster.
                Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => continue,
                Err(error) => return Err(EngineError::unavailable(error)),
            };
            let info: ObjectInfo = serde_json::from_slice(&message.payload)
                .map_err(|error| EngineError::Corrupt(error.to_string()))?;
            if !info.deleted {
                strays.remove(&format!("{prefix}.C.{}", info.nuid));
                if info.name.starts_with(HISTORIES) {
                    histories.insert(info.name);
                }
            } else if info.name.starts_with(HISTORIES) {
                // Names of histories are used once, and what is left of one that was removed would stay for ever.
                forgotten.push((name, message.sequence));
            }
        }
        for (name, sequence) in forgotten {
            let until = sequence.saturating_add(1);
            let purged = stream.purge().filter(name).sequence(until).await;
            purged.map_err(EngineError::unavailable)?;
        }
        strays.extend(self.unclaimed(histories).await?);
        let (old, new): (Vec<_>, Vec<_>) = strays.into_iter().partition(|s| before.contains(s));
        for stray in &old {
            if stray.starts_with(HISTORIES) {
                self.remove_blob(stray).await?;
                continue;
            }
            stream
                .purge()
                .filter(stray)
                .await
                .map_err(EngineError::unavailable)?;
        }
        if !old.is_empty() {
            tracing::info!(
                blobs = old.len(),
                "what was left of broken-off and replaced uploads is removed"
            );
        }
        Ok(new.into_iter().collect())
    }
}

async fn subjects(stream: &Stream, filter: &str) -> Result<BTreeSet<String>, EngineError> {
    stream
        .info_with_subjects(filter)
        .await
        .map_err(EngineError::unavailable)?
        .map_ok(|(subject, _)| subject)
        .try_collect()
        .await
        .map_err(EngineError::unavailable)
}
