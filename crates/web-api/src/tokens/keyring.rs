//! Signing and encryption keys: made by whatever replica needs one first, wrapped by the master key, shared in NATS.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use api_types::UnixMillis;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::master::{MasterKeys, open, random_key, seal};
use crate::clock::Clock;
use crate::engine::{Bucket, EngineError, Swap};

/// A key is used for new tokens and secrets for so long; then the next one is made. Old ones stay good for what they made.
const ROTATION_MILLIS: u64 = 24 * 3600 * 1000;

/// How much longer a key may be in use than its time: replicas' clocks differ, and a request takes a while.
const MARGIN_MILLIS: u64 = 3600 * 1000;

/// Id of the one key that tells requests from one another. It lasts: run ids that follow from idempotency keys follow from
/// it, too, so it is wrapped by the master key rather than being it, which may be replaced.
const IDENTITY_KID: &str = "0000000000000000";

/// Why a key cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum KeyringError {
    /// The storage.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Wrapped by another master key, or damaged.
    #[error(
        "key {0} cannot be unwrapped: the master key is not the one that wrapped it. Hint: give every replica \
         the same master key file, and while it is being replaced the other one by --other-master-key"
    )]
    Foreign(String),
    /// No randomness, or no memory.
    #[error("cryptography failed")]
    Crypto,
    /// A secret that does not open.
    #[error("what is encrypted cannot be opened: it was changed, or belongs to another run")]
    Sealed,
}

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Guests' tokens.
    Sign,
    /// Secrets.
    Data,
    /// Fingerprints of requests.
    Identity,
}

impl Purpose {
    fn as_str(self) -> &'static str {
        match self {
            Self::Sign => "sign",
            Self::Data => "data",
            Self::Identity => "identity",
        }
    }
}

/// Something encrypted, at rest in NATS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// By which key.
    pub kid: String,
    /// Nonce, ciphertext and tag, base64.
    pub data: String,
}

/// When a key that was made then is used for something new for the last time, at the latest.
fn last_use(created_at: UnixMillis) -> UnixMillis {
    created_at
        .saturating_add(ROTATION_MILLIS)
        .saturating_add(MARGIN_MILLIS)
}

/// What NATS holds of a key.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) created_at: UnixMillis,
    /// Nonce, ciphertext and tag, base64.
    pub(super) wrapped: String,
}

impl Record {
    pub(super) fn read(value: &[u8]) -> Result<Self, EngineError> {
        serde_json::from_slice(value).map_err(|error| EngineError::Corrupt(error.to_string()))
    }

    pub(super) fn bytes(&self) -> Result<Bytes, EngineError> {
        serde_json::to_vec(self)
            .map(Bytes::from)
            .map_err(|error| EngineError::Corrupt(error.to_string()))
    }
}

/// A key, unwrapped.
#[derive(Clone)]
pub(super) struct Key {
    pub(super) kid: String,
    created_at: UnixMillis,
    pub(super) bytes: Arc<Zeroizing<Vec<u8>>>,
}

/// All keys that this replica knows.
#[derive(Clone)]
pub struct Keyring {
    bucket: Bucket,
    masters: MasterKeys,
    clock: Clock,
    known: Arc<RwLock<HashMap<String, Key>>>,
    identity: Arc<Zeroizing<Vec<u8>>>,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keyring")
    }
}

impl Keyring {
    /// Proves the master key against the keys that are there: a replica with another one does not start.
    pub async fn open(
        bucket: Bucket,
        masters: MasterKeys,
        clock: Clock,
    ) -> Result<Self, KeyringError> {
        use futures_util::StreamExt as _;
        let mut keyring = Self {
            bucket,
            masters,
            clock,
            known: Arc::default(),
            identity: Arc::default(),
        };
        if keyring.bucket.messages().await? > 0 {
            let mut watch = keyring.bucket.watch().await?;
            while let Some(change) = watch.next().await {
                let change = change.map_err(|error| EngineError::Unavailable(error.to_string()))?;
                if crate::engine::holds_value(change.operation) {
                    keyring.learn(&change.key, &change.value)?;
                }
                if change.delta == 0 {
                    break;
                }
            }
        }
        keyring.current(Purpose::Sign).await?;
        keyring.current(Purpose::Data).await?;
        keyring.identity = keyring.identity_key().await?;
        Ok(keyring)
    }

    fn learn(&self, name: &str, value: &[u8]) -> Result<Key, KeyringError> {
        let record = Record::read(value)?;
        let bytes = STANDARD
            .decode(&record.wrapped)
            .ok()
            .and_then(|wrapped| self.masters.unwrap(name, &wrapped))
            .ok_or_else(|| KeyringError::Foreign(name.to_owned()))?;
        let key = Key {
            kid: name.rsplit('.').next().unwrap_or_default().to_owned(),
            created_at: record.created_at,
            bytes: Arc::new(bytes),
        };
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.insert(name.to_owned(), key.clone());
        Ok(key)
    }

    /// The newest key for a purpose; a new one, where that is too old.
    pub(super) async fn current(&self, purpose: Purpose) -> Result<Key, KeyringError> {
        let prefix = format!("{}.", purpose.as_str());
        let newest = {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            known
                .iter()
                .filter(|(name, _)| name.starts_with(&prefix))
                .max_by_key(|(_, key)| key.created_at)
                .map(|(_, key)| key.clone())
        };
        let now = self.clock.now();
        match newest {
            Some(key) if now.saturating_sub(key.created_at) < ROTATION_MILLIS => Ok(key),
            _ => self.make(purpose, now).await,
        }
    }

    /// The key of fingerprints, which all replicas share for good.
    async fn identity_key(&self) -> Result<Arc<Zeroizing<Vec<u8>>>, KeyringError> {
        let known = self.by_id(Purpose::Identity, IDENTITY_KID);
        if let Some(key) = known.await? {
            return Ok(key.bytes);
        }
        self.make_named(Purpose::Identity, IDENTITY_KID, self.clock.now())
            .await
            .map(|key| key.bytes)
    }

    async fn make(&self, purpose: Purpose, now: UnixMillis) -> Result<Key, KeyringError> {
        let mut kid = [0_u8; 8];
        aws_lc_rs::rand::fill(&mut kid).map_err(|_| KeyringError::Crypto)?;
        self.make_named(purpose, &hex::encode(kid), now).await
    }

    /// Makes a key, or learns the one that somebody else has just made under that name.
    async fn make_named(
        &self,
        purpose: Purpose,
        kid: &str,
        now: UnixMillis,
    ) -> Result<Key, KeyringError> {
        let bytes = random_key().map_err(|()| KeyringError::Crypto)?;
        let name = format!("{}.{kid}", purpose.as_str());
        let wrapped = self
            .masters
            .wrap(&name, &bytes[..])
            .ok_or(KeyringError::Crypto)?;
        let record = Record {
            created_at: now,
            wrapped: STANDARD.encode(wrapped),
        };
        let value = record.bytes()?;
        match self.bucket.create(&name, value.clone()).await? {
            Swap::Done(_) => self.learn(&name, &value),
            Swap::Conflict => self.by_id(purpose, kid).await?.ok_or(KeyringError::Crypto),
        }
    }

    /// A key by its id, also one that another replica has just made.
    pub(super) async fn by_id(
        &self,
        purpose: Purpose,
        kid: &str,
    ) -> Result<Option<Key>, KeyringError> {
        // What is no id of ours does not cost a question.
        if kid.len() != 16 || !kid.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(None);
        }
        let name = format!("{}.{kid}", purpose.as_str());
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(key) = known.get(&name) {
                return Ok(Some(key.clone()));
            }
        }
        match self.bucket.get(&name).await? {
            Some(found) => self.learn(&name, &found.value).map(Some),
            None => Ok(None),
        }
    }

    /// Removes the keys that nothing needs which was made at `since` or later, here and in NATS, and says how many. The
    /// newest key for each purpose stays, whatever this replica's clock says.
    pub async fn remove_unused(&self, since: UnixMillis) -> Result<usize, KeyringError> {
        let mut listed = HashMap::new();
        let list = |found: &async_nats::jetstream::kv::Entry| {
            listed.insert(found.key.clone(), Record::read(&found.value)?.created_at);
            Ok(())
        };
        self.bucket.scan(list).await?;
        let mut old = Vec::new();
        for purpose in [Purpose::Sign, Purpose::Data] {
            let prefix = format!("{}.", purpose.as_str());
            let mut keys: Vec<(UnixMillis, &String)> = listed
                .iter()
                .filter(|(name, _)| name.starts_with(&prefix))
                .map(|(name, created_at)| (*created_at, name))
                .collect();
            keys.sort_unstable();
            keys.pop();
            old.extend(
                keys.into_iter()
                    .filter(|(created_at, _)| last_use(*created_at) <= since)
                    .map(|(_, name)| name.clone()),
            );
        }
        for name in &old {
            self.bucket.remove(name).await?;
        }
        // Also what another replica has removed.
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|name, key| {
            let there = listed.contains_key(name) && !old.contains(name);
            there || last_use(key.created_at) > since
        });
        Ok(old.len())
    }

    /// A fingerprint, the same by every replica and under every master key.
    pub fn fingerprint(&self, context: &str, message: &[u8]) -> String {
        super::master::fingerprint(&self.identity, context, message)
    }

    /// Encrypts something that belongs to `context`.
    pub async fn seal(&self, context: &str, plain: &[u8]) -> Result<Sealed, KeyringError> {
        let key = self.current(Purpose::Data).await?;
        let data = seal(&key.bytes, context.as_bytes(), plain).ok_or(KeyringError::Crypto)?;
        Ok(Sealed {
            kid: key.kid,
            data: STANDARD.encode(data),
        })
    }

    /// Decrypts it.
    pub async fn open_sealed(
        &self,
        context: &str,
        sealed: &Sealed,
    ) -> Result<Zeroizing<Vec<u8>>, KeyringError> {
        let key = self
            .by_id(Purpose::Data, &sealed.kid)
            .await?
            .ok_or(KeyringError::Sealed)?;
        STANDARD
            .decode(&sealed.data)
            .ok()
            .and_then(|data| open(&key.bytes, context.as_bytes(), &data))
            .ok_or(KeyringError::Sealed)
    }
}
