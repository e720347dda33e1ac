//! What is in use is locked: shared by who uses an image or a snapshot, exclusively by who builds or removes it.

use std::time::Duration;

use host::fs::{Access, Lock, LockKind};

use super::Store;
use crate::image::ImageError;
use crate::image::progress::Steps;
use crate::image::staging::lock_name;
use crate::names::ImageHash;

/// Whoever may look into the home's directory of locks may take one: its owner and root.
const LOCK_MODE: u32 = 0o644;
/// How often a build that waits for another looks again.
pub(super) const LOCK_POLL: Duration = Duration::from_millis(200);
/// An image and a snapshot that nobody may remove, or build anew, while this lives.
#[derive(Debug)]
pub(crate) struct InUse {
    locks: [Lock; 2],
}

impl InUse {
    /// Notes that they are used now: what was used last is removed last.
    pub(crate) fn touch(&self) {
        for lock in &self.locks {
            // Somebody else's lock file: then its age is that of the build.
            let _ = rustix::fs::futimens(lock.file(), &NOW);
        }
    }
}

/// Sets the time of modification only.
pub(super) const NOW: rustix::fs::Timestamps = rustix::fs::Timestamps {
    last_access: rustix::fs::Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_OMIT,
    },
    last_modification: rustix::fs::Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_NOW,
    },
};

/// How long somebody who wants to use an image waits for one who looks whether it is used.
const HOLD_LIMIT: Duration = Duration::from_secs(2);
/// How often a build that waits for another makes sure that it is another build.
const USERS_SEEN: u32 = 10;

impl Store {
    /// Keeps others from removing, or building anew, a snapshot and its image.
    pub(crate) fn hold(
        &self,
        rootfs: &ImageHash,
        snapshot: &ImageHash,
    ) -> Result<InUse, ImageError> {
        let in_use = InUse {
            locks: [
                self.hold_one("image", rootfs)?,
                self.hold_one("snapshot", snapshot)?,
            ],
        };
        in_use.touch();
        Ok(in_use)
    }

    /// Keeps others from removing an image.
    pub(in crate::image) fn hold_image(&self, rootfs: &ImageHash) -> Result<Lock, ImageError> {
        self.hold_one("image", rootfs)
    }

    fn hold_one(&self, kind: &'static str, hash: &ImageHash) -> Result<Lock, ImageError> {
        let name = lock_name(kind, hash);
        let begin = std::time::Instant::now();
        loop {
            if let Some(lock) = self.locks.try_lock(&name, LockKind::Shared, LOCK_MODE)? {
                self.give(&lock);
                return Ok(lock);
            }
            if begin.elapsed() > HOLD_LIMIT {
                return Err(ImageError::Busy {
                    what: kind,
                    hash: hash.to_string(),
                    holder: self.holder(&name),
                });
            }
            std::thread::sleep(LOCK_POLL / 10);
        }
    }

    /// A lock that root made is the home owner's too, whose daemon takes it later.
    fn give(&self, lock: &Lock) {
        if rustix::process::geteuid().is_root() {
            let owner = self.home.owner();
            let _ = std::os::unix::fs::fchown(lock.file(), Some(owner.uid), Some(owner.gid));
        }
    }

    fn holder(&self, name: &str) -> Option<u32> {
        let file = self.locks.open_file(name, Access::Read).ok()?;
        host::fs::lock_holder(&file)
    }

    /// Keeps others from building or removing `image-<hash>` or `snapshot-<hash>`; waits for another build, and says
    /// for whom. A running daemon is not waited for.
    pub(in crate::image) async fn lock(
        &self,
        kind: &'static str,
        hash: &ImageHash,
        steps: &Steps,
    ) -> Result<Lock, ImageError> {
        let name = lock_name(kind, hash);
        let mut told = false;
        let mut users_seen = 0;
        loop {
            if let Some(lock) = self.locks.try_lock(&name, LockKind::Exclusive, LOCK_MODE)? {
                self.give(&lock);
                return Ok(lock);
            }
            // Who only looks holds a lock for a moment; a daemon is there at every look.
            users_seen = match self.locks.is_locked(&name)? {
                true => 0,
                false => users_seen + 1,
            };
            if users_seen > USERS_SEEN {
                return Err(ImageError::Busy {
                    what: kind,
                    hash: hash.to_string(),
                    holder: self.holder(&name),
                });
            }
            if !told && users_seen == 0 {
                let by = self
                    .holder(&name)
                    .map(|pid| format!(" (process {pid})"))
                    .unwrap_or_default();
                steps.note(&format!(
                    "another build{by} is at work on the same {kind}; waiting for it"
                ));
                told = true;
            }
            tokio::select! {
                () = tokio::time::sleep(LOCK_POLL) => {}
                () = steps.interrupted() => return Err(ImageError::Interrupted),
            }
        }
    }
}
