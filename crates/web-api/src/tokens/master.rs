//! The master key: a file that every replica is given. It wraps all other keys.

use std::io::Read as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::hmac;
use zeroize::Zeroizing;

/// Bytes of every key: AES-256 and HMAC-SHA-256.
pub(super) const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 12;

/// Why there is no master key.
#[derive(Debug, thiserror::Error)]
pub enum MasterKeyError {
    /// The file.
    #[error("the master key file {path} cannot be used: {why}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// The key. Wiped when dropped, never printed.
#[derive(Clone)]
pub struct MasterKey(Zeroizing<[u8; KEY_BYTES]>);

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey")
    }
}

impl MasterKey {
    /// Reads the file: 64 hex digits, readable by nobody but its owner and group.
    pub fn read(path: &Path) -> Result<Self, MasterKeyError> {
        let fail = |why: String| MasterKeyError::File {
            path: path.to_owned(),
            why,
        };
        let mut file = std::fs::File::open(path).map_err(|error| {
            fail(format!(
                "{error}. Hint: `vm0-api master-key --out {}` makes one; every replica needs the same",
                path.display()
            ))
        })?;
        let meta = file.metadata().map_err(|error| fail(error.to_string()))?;
        if meta.permissions().mode() & 0o007 != 0 {
            return Err(fail(format!(
                "everybody may read it. Hint: chmod 600 {}",
                path.display()
            )));
        }
        let mut text = Zeroizing::new(String::with_capacity(256));
        file.by_ref()
            .take(200)
            .read_to_string(&mut text)
            .map_err(|error| fail(error.to_string()))?;
        let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
        hex::decode_to_slice(text.trim(), &mut key[..])
            .map_err(|_| fail("it must hold 64 hex digits and nothing else".to_owned()))?;
        Ok(Self(key))
    }

    /// Makes a new file, where none is.
    pub fn write_new(path: &Path) -> Result<(), MasterKeyError> {
        use std::io::Write as _;
        let fail = |why: String| MasterKeyError::File {
            path: path.to_owned(),
            why,
        };
        let key = random_key().map_err(|()| fail("there is no randomness".to_owned()))?;
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| fail(error.to_string()))?;
        let text = Zeroizing::new(format!(
            "{}\n",
            Zeroizing::new(hex::encode(&key[..])).as_str()
        ));
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(|error| fail(error.to_string()))
    }

    pub(super) fn wrap(&self, purpose: &str, key: &[u8]) -> Option<Vec<u8>> {
        seal(&self.0[..], purpose.as_bytes(), key)
    }

    pub(super) fn unwrap(&self, purpose: &str, wrapped: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        open(&self.0[..], purpose.as_bytes(), wrapped)
    }
}

/// The master keys that a replica was given: one wraps new keys, and what any of them wrapped is understood.
#[derive(Clone, Debug)]
pub struct MasterKeys {
    first: MasterKey,
    others: Vec<MasterKey>,
}

impl From<MasterKey> for MasterKeys {
    fn from(first: MasterKey) -> Self {
        Self::new(first, Vec::new())
    }
}

impl MasterKeys {
    /// `first` wraps.
    pub fn new(first: MasterKey, others: Vec<MasterKey>) -> Self {
        Self { first, others }
    }

    pub(super) fn wrap(&self, purpose: &str, key: &[u8]) -> Option<Vec<u8>> {
        self.first.wrap(purpose, key)
    }

    pub(super) fn unwrap(&self, purpose: &str, wrapped: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        std::iter::once(&self.first)
            .chain(&self.others)
            .find_map(|master| master.unwrap(purpose, wrapped))
    }
}

/// A fingerprint that nobody can guess the message from, even if it has few possible contents.
pub(super) fn fingerprint(key: &[u8], context: &str, message: &[u8]) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let mut signing = hmac::Context::with_key(&key);
    signing.update(context.as_bytes());
    signing.update(&[0]);
    signing.update(message);
    hex::encode(signing.sign())
}

/// A new key.
pub(super) fn random_key() -> Result<Zeroizing<[u8; KEY_BYTES]>, ()> {
    let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
    aws_lc_rs::rand::fill(&mut key[..]).map_err(|_| ())?;
    Ok(key)
}

/// AES-256-GCM under a random nonce, which stands first; `context` is authenticated with it.
pub(super) fn seal(key: &[u8], context: &[u8], plain: &[u8]) -> Option<Vec<u8>> {
    let key = RandomizedNonceKey::new(&AES_256_GCM, key).ok()?;
    let mut buffer = plain.to_vec();
    let nonce = key
        .seal_in_place_append_tag(Aad::from(context), &mut buffer)
        .ok()?;
    let mut sealed = nonce.as_ref().to_vec();
    sealed.append(&mut buffer);
    Some(sealed)
}

/// Undoes [`seal`].
pub(super) fn open(key: &[u8], context: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let key = RandomizedNonceKey::new(&AES_256_GCM, key).ok()?;
    let (nonce, body) = sealed.split_at_checked(NONCE_BYTES)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
    let mut buffer = Zeroizing::new(body.to_vec());
    let length = key
        .open_in_place(nonce, Aad::from(context), &mut buffer[..])
        .ok()?
        .len();
    buffer.truncate(length);
    Some(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_with_its_key_and_context_only() {
        let (a, b) = (random_key().unwrap(), random_key().unwrap());
        let sealed = seal(&a[..], b"run 1", b"hunter22").unwrap();
        assert!(!sealed.windows(8).any(|window| window == b"hunter22"));
        assert_eq!(
            open(&a[..], b"run 1", &sealed).unwrap().as_slice(),
            b"hunter22"
        );
        assert!(open(&b[..], b"run 1", &sealed).is_none());
        assert!(open(&a[..], b"run 2", &sealed).is_none());
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(open(&a[..], b"run 1", &changed).is_none(), "byte {at}");
        }
        assert!(open(&a[..], b"run 1", b"short").is_none());
    }

    #[test]
    fn a_master_key_comes_from_a_private_file_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        assert!(
            MasterKey::read(&path)
                .unwrap_err()
                .to_string()
                .contains("vm0-api master-key")
        );
        MasterKey::write_new(&path).unwrap();
        assert!(MasterKey::write_new(&path).is_err(), "never over another");
        MasterKey::read(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(
            MasterKey::read(&path)
                .unwrap_err()
                .to_string()
                .contains("chmod 600")
        );
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "short").unwrap();
        assert!(
            MasterKey::read(&path)
                .unwrap_err()
                .to_string()
                .contains("64 hex digits")
        );
    }
}
