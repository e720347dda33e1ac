//! Which runners watch a group: one locked file each in `.runners`.

use std::io::{Seek, Write};

use host::fs::{Dir, FsError, Lock, LockKind};
use serde::{Deserialize, Serialize};

use crate::names::{ProfileName, RunnerName};

/// Largest registration, bytes: thousands of profiles.
const MAX_BYTES: u64 = 1 << 20;

/// A runner that watches a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LiveRunner {
    /// Id of the runner process, unlike that of any other.
    pub(crate) instance: String,
    /// The runner's name.
    pub(crate) name: RunnerName,
    /// Its process.
    pub(crate) pid: u32,
    /// What it serves.
    pub(crate) profiles: Vec<ProfileName>,
}

/// Our own registration: holds the lock, takes the file away when it is dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    dir: Dir,
    instance: String,
    _lock: Lock,
}

impl Registration {
    /// Appears in `.runners`, locked before it has its name: nobody ever sees it unlocked.
    pub(super) fn new(dir: Dir, runner: &LiveRunner) -> Result<Self, FsError> {
        let temporary = format!(".tmp-{}", runner.instance);
        let lock = dir.lock(&temporary, LockKind::Exclusive, 0o644)?;
        let text = serde_json::to_vec(runner).unwrap_or_default();
        let mut file = lock.file();
        let written = file
            .rewind()
            .and_then(|()| file.write_all(&text))
            .and_then(|()| file.sync_all())
            .map_err(|source| FsError::Io {
                path: dir.display_path(&temporary),
                action: "written",
                source,
            });
        if let Err(error) =
            written.and_then(|()| dir.rename(&temporary, &dir, runner.instance.as_str()))
        {
            let _ = dir.remove_file(&temporary);
            return Err(error);
        }
        Ok(Self {
            dir,
            instance: runner.instance.clone(),
            _lock: lock,
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _ = self.dir.remove_file(self.instance.as_str());
    }
}

/// Whether the runner process of this id lives and watches the group of this `.runners` directory.
pub(super) fn is_live(runners: &Dir, instance: &str) -> Result<bool, FsError> {
    if !is_instance(instance) {
        return Ok(false);
    }
    runners.is_locked(instance)
}

/// The runners that live.
pub(super) fn live(runners: &Dir) -> Result<Vec<LiveRunner>, FsError> {
    let mut found = Vec::new();
    for entry in runners.list()? {
        let Some(instance) = entry.name.to_str().filter(|name| is_instance(name)) else {
            continue;
        };
        if !runners.is_locked(instance).unwrap_or(false) {
            continue;
        }
        if let Ok(bytes) = runners.read_bounded(instance, MAX_BYTES)
            && let Ok(runner) = serde_json::from_slice(&bytes)
        {
            found.push(runner);
        }
    }
    Ok(found)
}

/// Removes what dead runners left.
pub(super) fn sweep(runners: &Dir) -> Result<(), FsError> {
    for entry in runners.list()? {
        // Only who holds the lock may remove: a file that is being registered now is locked.
        if runners.is_locked(&entry.name).unwrap_or(true) {
            continue;
        }
        if let Ok(Some(_lock)) = runners.try_lock(&entry.name, LockKind::Exclusive, 0o644) {
            runners.remove_file(&entry.name)?;
        }
    }
    Ok(())
}

/// Instance ids are UUIDs; anything else in a claim or directory was not written by a runner.
fn is_instance(text: &str) -> bool {
    text.parse::<crate::names::RunId>().is_ok()
}
