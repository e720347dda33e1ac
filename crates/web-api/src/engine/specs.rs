//! What a run is to do: written once, read at each claim.

use std::collections::BTreeMap;

use api_types::{AgentType, RunId, SecretName};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Engine, EngineError};
use crate::run::{Entry, SpecAt};
use crate::tokens::Sealed;

/// Larger ones go to the object store: a NATS message has at most 1 MiB unless the server is told otherwise.
pub const MAX_INLINE_BYTES: usize = 512 << 10;

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

    /// What to name in its removal; `None`: it is not there, or among the blobs, which have no revision.
    pub(super) async fn spec_revision(&self, entry: &Entry) -> Result<Option<u64>, EngineError> {
        match entry.spec {
            SpecAt::Bucket => {
                let found = self.specs.get(&name(entry.run, &entry.fingerprint)).await?;
                Ok(found.map(|found| found.revision))
            }
            SpecAt::Objects => Ok(None),
        }
    }

    /// Removes it, unless it has been written again.
    pub(super) async fn remove_spec(
        &self,
        entry: &Entry,
        revision: Option<u64>,
    ) -> Result<(), EngineError> {
        let name = name(entry.run, &entry.fingerprint);
        match (entry.spec, revision) {
            (SpecAt::Bucket, None) => Ok(()),
            (SpecAt::Bucket, Some(revision)) => {
                self.specs.remove_at(&name, revision).await.map(|_| ())
            }
            (SpecAt::Objects, _) => self.remove_blob(&name).await,
        }
    }
}
