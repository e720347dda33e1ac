//! Answers on their way: on disk before the daemon may forget a run, gone when the API has them.
//!
//! A file for each in `runners/<name>/spool`, named by instance and run. What an instance leaves behind, the next one of
//! this name brings.

use std::path::Path;

use api_types::{Epoch, RunId, RunnerId};
use host::fs::{Dir, FsError};
use serde::{Deserialize, Serialize};

use super::bring::LogStarts;
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
    /// Where this claim's part of the run's logs begins.
    #[serde(default)]
    pub(super) logs: LogStarts,
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

    /// Takes over what instances that are gone have left, but for runs that are `ours`.
    pub(super) fn adopt(&self, ours: impl Fn(RunId) -> bool) -> Vec<Spooled> {
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
            if instance == self.instance || alive.unwrap_or(true) || ours(run) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use host::fs::LockKind;

    fn answer(run: RunId, epoch: Epoch) -> Spooled {
        Spooled {
            runner_id: RunnerId::random(),
            epoch,
            logs: LogStarts::default(),
            result: JobResult::failed(run, 1, "it ended"),
        }
    }

    #[test]
    fn what_is_left_is_taken_once_its_instance_is_gone_and_only_once() {
        let top = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&top.path().join("home")).unwrap();
        let name: RunnerName = "demo".parse().unwrap();
        let run = RunId::random();
        let old = Spool::open(&home, &name, "old").unwrap();
        old.keep(&answer(run, 1)).unwrap();
        let dir = home.ensure_dir(rel::instances(&name).join("old")).unwrap();
        let alive = dir.lock("lock", LockKind::Exclusive, 0o600).unwrap();

        let new = Spool::open(&home, &name, "new").unwrap();
        assert_eq!(new.adopt(|_| false), [], "its instance lives");
        drop(alive);
        assert_eq!(new.adopt(|_| true), [], "the run is ours by a later claim");
        let adopted = new.adopt(|_| false);
        assert_eq!(adopted.len(), 1);
        assert_eq!((adopted[0].result.run_id, adopted[0].epoch), (run, 1));
        assert_eq!(new.adopt(|_| false), [], "it was taken");
        new.remove(run);
        let next = Spool::open(&home, &name, "next").unwrap();
        assert_eq!(next.adopt(|_| false), [], "it was brought");
    }

    #[test]
    fn what_cannot_be_read_is_neither_brought_nor_deleted() {
        let top = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&top.path().join("home")).unwrap();
        let name: RunnerName = "demo".parse().unwrap();
        let spool = Spool::open(&home, &name, "new").unwrap();
        let (run, other) = (RunId::random(), RunId::random());
        let swapped = serde_json::to_vec(&answer(other, 1)).unwrap();
        for (file, bytes) in [
            (format!("old.{run}"), b"{".to_vec()),
            (format!("older.{run}"), swapped),
            ("old.no-run".to_owned(), b"{}".to_vec()),
        ] {
            spool.dir.write_atomic(file, 0o600, &bytes).unwrap();
        }
        assert_eq!(spool.adopt(|_| false), []);
        assert_eq!(spool.dir.list().unwrap().len(), 3);
    }
}
