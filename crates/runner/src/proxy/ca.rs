//! The host's certificate authority, with which the proxy speaks for the hosts that VMs call.
//!
//! It is made once for a home and lasts until somebody asks for another. The certificate is an input of every image: what runs
//! in a VM trusts it. The key is root's, unreadable for the home's owner; only the proxy is handed it, in sealed memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use host::fs::{Access, LockKind};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::home::{Home, HomeError, rel};
use crate::image::{ImageError, Steps, Tool, sha256};

/// The certificate, for everybody to read.
const CERTIFICATE: &str = "ca.pem";
/// Its key, root's.
const KEY: &str = "ca-key.pem";
/// Days it is valid. Somebody rotates it before that, or builds images from a new home.
const DAYS: &str = "3650";
/// Largest PEM file that is believed, bytes.
const MAX_PEM: u64 = 64 << 10;

/// The authority's public half.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Authority {
    certificate: String,
}

impl Authority {
    /// The home's authority; nothing where none was made yet.
    pub(crate) fn load(home: &Home) -> Result<Option<Self>, HomeError> {
        let dir = match home.dir().open_dir(rel::CA) {
            Err(error) if error.is_not_found() => return Ok(None),
            other => other?,
        };
        match dir.read_bounded(CERTIFICATE, MAX_PEM) {
            Ok(bytes) => Ok(String::from_utf8(bytes)
                .ok()
                .filter(|text| text.starts_with("-----BEGIN CERTIFICATE-----"))
                .map(|certificate| Self { certificate })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The home's authority, made if there is none. Needs root.
    pub(crate) async fn ensure(home: &Home, steps: &Steps) -> Result<Self, ImageError> {
        if let Some(authority) = Self::load(home)? {
            return Ok(authority);
        }
        Self::make(home, false, steps).await
    }

    /// Makes another authority in place of the one that is there. Images trust the one they were built with.
    pub(crate) async fn rotate(home: &Home, steps: &Steps) -> Result<Self, ImageError> {
        Self::make(home, true, steps).await
    }

    async fn make(home: &Home, replace: bool, steps: &Steps) -> Result<Self, ImageError> {
        if !rustix::process::geteuid().is_root() {
            return Err(ImageError::NoAuthority);
        }
        let dir = home.ensure_dir(rel::CA)?;
        let _lock = dir.lock("lock", LockKind::Exclusive, 0o600)?;
        // Whoever held the lock may just have made it.
        if !replace && let Some(authority) = Self::load(home)? {
            return Ok(authority);
        }
        steps.begin("making the proxy's certificate authority");
        let work = tempfile::Builder::new()
            .prefix("vm0-ca-")
            .tempdir()
            .map_err(ImageError::io("create", std::env::temp_dir()))?;
        let (key, certificate) = (work.path().join(KEY), work.path().join(CERTIFICATE));
        Tool::new("openssl")
            .args(["req", "-x509", "-nodes", "-batch", "-sha256", "-days", DAYS])
            // RSA, because an emulated guest checks its signatures ten times faster than those of elliptic curves.
            .args(["-newkey", "rsa:3072"])
            .args(["-subj", &subject()])
            .args(["-addext", "basicConstraints=critical,CA:TRUE,pathlen:0"])
            .args(["-addext", "keyUsage=critical,keyCertSign,cRLSign"])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate)
            .run("making the proxy's certificate authority", steps)
            .await?;
        let read =
            |path: &Path| std::fs::read(path).map_err(ImageError::io("read", path.to_owned()));
        // The key first: a certificate that is there has one.
        let (key, certificate) = (read(&key)?, read(&certificate)?);
        dir.write_atomic(KEY, 0o400, &key)?;
        dir.write_atomic(CERTIFICATE, 0o644, &certificate)?;
        steps.end();
        Self::load(home)?.ok_or_else(|| ImageError::Damaged {
            path: home.at(rel::CA).join(CERTIFICATE),
            reason: "openssl wrote no certificate".to_owned(),
        })
    }

    /// The certificate, PEM.
    pub(crate) fn certificate(&self) -> &str {
        &self.certificate
    }

    /// What identifies it among the inputs of an image.
    pub(crate) fn fingerprint(&self) -> String {
        sha256(self.certificate.as_bytes())
    }

    /// Key and certificate, as the proxy takes them, in memory that nobody can change any more. Needs root.
    pub(crate) fn for_proxy(home: &Home) -> Result<OwnedFd, ImageError> {
        let dir = home.dir().open_dir(rel::CA)?;
        let path = home.at(rel::CA).join(KEY);
        let io = |action| ImageError::io(action, path.clone());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("vm0-ca", flags)
            .map_err(|errno| io("make memory for")(errno.into()))?;
        let mut memory = File::from(memory);
        for name in [KEY, CERTIFICATE] {
            let mut text = zeroize::Zeroizing::new(Vec::new());
            dir.open_file(name, Access::Read)?
                .take(MAX_PEM)
                .read_to_end(&mut text)
                .and_then(|_| memory.write_all(&text))
                .map_err(io("read"))?;
        }
        memory
            .seek(SeekFrom::Start(0))
            .map_err(io("rewind the memory of"))?;
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&memory, seals)
            .map_err(|errno| io("seal the memory of")(errno.into()))?;
        Ok(memory.into())
    }
}

/// A name that tells two hosts' authorities apart where both ended up in one list.
fn subject() -> String {
    let mut id = [0_u8; 4];
    // Only a name: a host without entropy makes no keys either.
    let _ = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty());
    format!("/O=vm0 runner/CN=vm0 runner proxy {}", hex::encode(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[tokio::test]
    async fn it_is_made_once_its_key_is_closed_and_rotating_makes_another() {
        let temp = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&temp.path().join("home")).unwrap();
        assert_eq!(Authority::load(&home).unwrap(), None);
        if !rustix::process::geteuid().is_root() {
            let refused = Authority::ensure(&home, &Steps::new()).await;
            assert!(matches!(refused, Err(ImageError::NoAuthority)));
            return;
        }
        let first = Authority::ensure(&home, &Steps::new()).await.unwrap();
        assert_eq!(
            Authority::ensure(&home, &Steps::new()).await.unwrap(),
            first
        );
        let mode = |name: &str| {
            std::fs::metadata(home.at(rel::CA).join(name))
                .unwrap()
                .mode()
        };
        assert_eq!(
            (mode(KEY) & 0o777, mode(CERTIFICATE) & 0o777),
            (0o400, 0o644)
        );

        let mut pem = String::new();
        let memory = Authority::for_proxy(&home).unwrap();
        let mut memory = File::from(memory);
        memory.read_to_string(&mut pem).unwrap();
        assert!(pem.contains("PRIVATE KEY") && pem.contains(first.certificate()));
        memory.write_all(b"x").unwrap_err();

        let second = Authority::rotate(&home, &Steps::new()).await.unwrap();
        assert_ne!(first.fingerprint(), second.fingerprint());
    }
}
