//! What a run is to do: written once, read at each claim.

use std::collections::BTreeMap;

use api_types::{AgentType, RunId, SecretName};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;

use super::{Engine, EngineError};
use crate::run::{Entry, SpecAt};
use crate::tokens::Sealed;

/// Larger ones go to the object store: a NATS message has at most 1 MiB unless the server is told otherwise.
pub const MAX_INLINE_BYTES: usize = 512 << 10;
/// Largest blob that is read back, bytes.
const MAX_BLOB_BYTES: u64 = 64 << 20;

/// What never changes of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// What the agent is to do.
    pub prompt: String,
    /// Where it starts.
    pub working_dir: String,
    /// Which one.
    pub cli_agent_type: AgentType,
    /// Its environment.
    pub environment: BTreeMap<String, String>,
    /// Its limit, seconds.
    pub timeout_secs: Option<u64>,
    /// What it may reach, canonical.
    pub policy: Option<serde_json::Value>,
    /// Names of its secrets.
    pub secrets: Vec<SecretName>,
    /// The secrets, encrypted.
    pub sealed: Option<Sealed>,
}

/// Under a name of its own for each content: a request that comes late can never write over what a run is made of.
fn name(run: RunId, fingerprint: &str) -> String {
    format!("{run}.{fingerprint}")
}

impl Engine {
    /// Writes a specification.
    pub async fn put_spec(
        &self,
        run: RunId,
        fingerprint: &str,
        spec: &Spec,
    ) -> Result<SpecAt, EngineError> {
        let bytes =
            serde_json::to_vec(spec).map_err(|error| EngineError::Corrupt(error.to_string()))?;
        if bytes.len() <= MAX_INLINE_BYTES {
            self.specs
                .put(&name(run, fingerprint), Bytes::from(bytes))
                .await?;
            return Ok(SpecAt::Bucket);
        }
        self.put_blob(&name(run, fingerprint), &bytes).await?;
        Ok(SpecAt::Objects)
    }

    /// Reads it back.
    pub async fn spec(&self, entry: &Entry) -> Result<Spec, EngineError> {
        let name = name(entry.run, &entry.fingerprint);
        let bytes = match entry.spec {
            SpecAt::Bucket => self
                .specs
                .get(&name)
                .await?
                .map(|found| found.value.to_vec()),
            SpecAt::Objects => self.blob(&name).await?,
        };
        let bytes = bytes.ok_or_else(|| {
            EngineError::Corrupt(format!("the specification of {} is missing", entry.run))
        })?;
        serde_json::from_slice(&bytes).map_err(|error| EngineError::Corrupt(error.to_string()))
    }

    /// Removes it.
    pub async fn remove_spec(&self, entry: &Entry) -> Result<(), EngineError> {
        let name = name(entry.run, &entry.fingerprint);
        match entry.spec {
            SpecAt::Bucket => self.specs.remove(&name).await,
            SpecAt::Objects => self
                .blobs
                .delete(name)
                .await
                .map_err(EngineError::unavailable),
        }
    }

    /// Writes a blob.
    pub async fn put_blob(&self, name: &str, mut bytes: &[u8]) -> Result<(), EngineError> {
        self.blobs
            .put(name, &mut bytes)
            .await
            .map(|_| ())
            .map_err(EngineError::unavailable)
    }

    /// Reads a blob.
    pub async fn blob(&self, name: &str) -> Result<Option<Vec<u8>>, EngineError> {
        use async_nats::jetstream::object_store::GetErrorKind;
        let object = match self.blobs.get(name).await {
            Ok(object) => object,
            Err(error) if error.kind() == GetErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(EngineError::unavailable(error)),
        };
        let mut bytes = Vec::new();
        object
            .take(MAX_BLOB_BYTES)
            .read_to_end(&mut bytes)
            .await
            .map_err(EngineError::unavailable)?;
        Ok(Some(bytes))
    }
}
