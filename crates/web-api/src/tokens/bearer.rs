//! API keys of clients and operators and tokens of runners: `vm0_key_<id>_<secret>`, `vm0_operator_…`, `vm0_runner_…`.
//!
//! The secret is 32 random bytes, so one SHA-256 is all that is needed at rest: a slow hash protects what people could
//! guess, and nobody guesses 256 bits.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use api_types::{GroupName, UnixMillis};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::keyring::KeyringError;
use crate::engine::{Bucket, EngineError};

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BearerKind {
    /// A client: makes runs and looks at them.
    Client,
    /// A client that may also set its groups' policies, which clients cannot lift.
    Operator,
    /// A runner: takes and answers runs.
    Runner,
}

impl BearerKind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Client => "vm0_key_",
            Self::Operator => "vm0_operator_",
            Self::Runner => "vm0_runner_",
        }
    }
}

/// What NATS holds of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BearerRecord {
    /// What for.
    pub kind: BearerKind,
    /// For people: whose it is.
    pub name: String,
    /// Its groups.
    pub groups: BTreeSet<GroupName>,
    /// SHA-256 of the whole token, hex.
    pub hash: String,
    /// When it was made.
    pub created_at: UnixMillis,
}

/// A token that was recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bearer {
    /// Its id.
    pub id: String,
    /// What for.
    pub kind: BearerKind,
    /// Its groups.
    pub groups: Arc<BTreeSet<GroupName>>,
}

/// A new token (shown once), its id and what is kept of it.
pub fn new_bearer(
    kind: BearerKind,
    name: &str,
    groups: BTreeSet<GroupName>,
    now: UnixMillis,
) -> Result<(String, String, BearerRecord), KeyringError> {
    let mut bytes = [0_u8; 40];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| KeyringError::Crypto)?;
    let (id, secret) = bytes.split_at(8);
    let id = hex::encode(id);
    let token = format!("{}{id}_{}", kind.prefix(), hex::encode(secret));
    let record = BearerRecord {
        kind,
        name: name.to_owned(),
        groups,
        hash: hash(&token),
        created_at: now,
    };
    Ok((token, id, record))
}

fn hash(token: &str) -> String {
    hex::encode(Sha256::digest(token.as_bytes()))
}

fn id_of(token: &str) -> Option<(BearerKind, &str)> {
    let kinds = [BearerKind::Client, BearerKind::Operator, BearerKind::Runner];
    let (kind, rest) = kinds
        .into_iter()
        .find_map(|kind| Some((kind, token.strip_prefix(kind.prefix())?)))?;
    let (id, secret) = rest.split_once('_')?;
    let hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (id.len() == 16 && secret.len() == 64 && hex(id) && hex(secret)).then_some((kind, id))
}

/// All tokens, as this replica has heard of them. A token that is revoked is gone from here as soon as NATS says so.
#[derive(Clone, Debug)]
pub struct Bearers {
    bucket: Bucket,
    known: Arc<RwLock<HashMap<String, Arc<BearerRecord>>>>,
}

impl Bearers {
    /// Knows none yet.
    pub fn new(bucket: Bucket) -> Self {
        Self {
            bucket,
            known: Arc::default(),
        }
    }

    /// Takes note of a change in the bucket; `None`: it was removed.
    pub fn note(&self, id: &str, value: Option<&[u8]>) {
        let record = value.and_then(|value| serde_json::from_slice(value).ok());
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        match record {
            Some(record) => drop(known.insert(id.to_owned(), Arc::new(record))),
            None => drop(known.remove(id)),
        }
    }

    /// Only these are there: what was removed while nobody watched is removed here too.
    pub fn retain(&self, ids: &BTreeSet<String>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|id, _| ids.contains(id));
    }

    /// Recognises a token.
    pub async fn recognise(&self, token: &str) -> Result<Option<Bearer>, EngineError> {
        let Some((kind, id)) = id_of(token) else {
            return Ok(None);
        };
        let known = {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            known.get(id).cloned()
        };
        let record = match known {
            Some(record) => record,
            // Made a moment ago, maybe.
            None => match self.bucket.get(id).await? {
                Some(found) => Arc::new(
                    serde_json::from_slice::<BearerRecord>(&found.value)
                        .map_err(|error| EngineError::Corrupt(error.to_string()))?,
                ),
                None => return Ok(None),
            },
        };
        // Comparing hashes tells nothing about the token, however long it takes.
        if record.kind != kind || record.hash != hash(token) {
            return Ok(None);
        }
        Ok(Some(Bearer {
            id: id.to_owned(),
            kind,
            groups: Arc::new(record.groups.clone()),
        }))
    }

    /// Whether a token that was recognised under this id has not been revoked since; also where that cannot be found out.
    pub async fn stands(&self, id: &str) -> bool {
        let is_known = || {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            known.contains_key(id)
        };
        is_known() || !matches!(self.bucket.get(id).await, Ok(None))
    }

    /// Keeps a new one.
    pub async fn add(&self, id: &str, record: &BearerRecord) -> Result<(), EngineError> {
        let value =
            serde_json::to_vec(record).map_err(|error| EngineError::Corrupt(error.to_string()))?;
        self.bucket.put(id, Bytes::from(value)).await?;
        Ok(())
    }

    /// Removes one.
    pub async fn revoke(&self, id: &str) -> Result<bool, EngineError> {
        let there = self.bucket.get(id).await?.is_some();
        if there {
            self.bucket.remove_for_all_to_hear(id).await?;
        }
        Ok(there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_token_has_an_id_and_only_its_hash_is_kept() {
        let (token, id, record) =
            new_bearer(BearerKind::Runner, "metal-1", BTreeSet::new(), 1).unwrap();
        assert_eq!(id_of(&token), Some((BearerKind::Runner, id.as_str())));
        let kept = serde_json::to_string(&record).unwrap();
        assert!(!kept.contains(token.rsplit('_').next().unwrap()));
        let other = token.replace("vm0_runner_", "vm0_key_");
        assert_ne!(
            record.hash,
            hash(&other),
            "of another kind it is another token"
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_fall(text in "(vm0_key_|vm0_operator_|vm0_runner_|)\\PC{0,100}") {
            let _ = id_of(&text);
        }
    }
}
