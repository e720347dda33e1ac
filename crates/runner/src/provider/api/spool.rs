//! Answers on their way: on disk before the daemon may forget a run, gone when the API has them.
//!
//! A file for each in `runners/<name>/spool`, named by instance and run. What an instance leaves behind, the next one of
//! this name brings.

use std::path::Path;

use api_types::{Epoch, RunId, RunnerId};
use host::fs::{Dir, FsError};
use serde::{Deserialize, Serialize};

use crate::home::{Home, HomeError, rel};
use crate::names::RunnerName;
use crate::queue::JobResult;

/// Largest file, bytes.
const MAX_BYTES: u64 = 64 << 10;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Spooled {
    /// Who claimed the run.
    pub(super) runner_id: RunnerId,
    /// Which claim.
    pub(super) epoch: Epoch,
    /// The answer.
    pub(super) result: JobResult,
}

/// The answers of one runner.
#[derive(Debug)]
pub(super) struct Spool {
    dir: Dir,
    instances: Dir,
    instance: String,
}

impl Spool {
    pub(super) fn open(home: &Home, name: &RunnerName, instance: &str) -> Result<Self, HomeError> {
        Ok(Self {
            dir: home.ensure_dir(rel::runner(name).join("spool"))?,
            instances: home.ensure_dir(rel::instances(name))?,
            instance: instance.to_owned(),
        })
    }

    fn name(&self, run: RunId) -> String {
        format!("{}.{run}", self.instance)
    }

    /// Keeps an answer; when this returns it survives a crash of the host.
    pub(super) fn keep(&self, answer: &Spooled) -> Result<(), FsError> {
        let bytes = serde_json::to_vec(answer).unwrap_or_default();
        self.dir
            .write_atomic(self.name(answer.result.run_id), 0o600, &bytes)
    }

    /// Forgets one of ours.
    pub(super) fn remove(&self, run: RunId) {
        if let Err(error) = self.dir.remove_file(self.name(run)) {
            tracing::warn!(%run, %error, "an answer that was brought cannot be removed");
        }
    }

    /// Takes over what instances that are gone have left.
    pub(super) fn adopt(&self) -> Vec<Spooled> {
        let entries = match self.dir.list() {
            Ok(entries) => entries,
            Err(error) => {
                tracing::warn!(%error, "answers of earlier runners cannot be listed");
                return Vec::new();
            }
        };
        let mut adopted = Vec::new();
        for entry in entries {
            let Some((instance, run)) = entry.name.to_str().and_then(|n| n.split_once('.')) else {
                continue;
            };
            let Ok(run) = run.parse::<RunId>() else {
                continue;
            };
            let alive = self.instances.is_locked(Path::new(instance).join("lock"));
            if instance == self.instance || alive.unwrap_or(false) {
                continue;
            }
            let bytes = self.dir.read_bounded(&entry.name, MAX_BYTES);
            let answer = bytes
                .ok()
                .and_then(|b| serde_json::from_slice::<Spooled>(&b).ok());
            let Some(answer) = answer.filter(|answer| answer.result.run_id == run) else {
                tracing::error!(file = ?entry.name, "an answer that an earlier runner left cannot be read; it stays where it is");
                continue;
            };
            // Ours from now on; two instances that start at once take each file once.
            if self
                .dir
                .rename(&entry.name, &self.dir, self.name(run))
                .is_ok()
            {
                adopted.push(answer);
            }
        }
        adopted
    }
}
