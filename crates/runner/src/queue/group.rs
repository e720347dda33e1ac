//! A group's directory as its submitters use it.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use host::fs::{Access, Dir, EntryKind, FsError};

use super::job::{Job, JobError};
use super::registry::{self, LiveRunner};
use super::result::{JobResult, MAX_RESULT_BYTES};
#[cfg(test)]
use super::watch::Watch;
use crate::names::{ProfileName, RunId};

pub(super) const CLAIMS: &str = ".claims";
pub(super) const RESULTS: &str = ".results";
pub(super) const RUNNERS: &str = ".runners";

/// What can go wrong with the queue's files.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    /// The file system.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The job itself.
    #[error(transparent)]
    Job(#[from] JobError),
    /// A result file that no runner wrote.
    #[error("the result of run {run_id} cannot be understood: {reason}")]
    BadResult {
        /// Which.
        run_id: RunId,
        /// Why.
        reason: String,
    },
    /// A directory of the queue belongs to somebody who could cheat with it.
    #[error("{path} was refused: {reason}")]
    Planted {
        /// Which.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// Watching failed.
    #[error("the group's directory cannot be watched: {0}")]
    Watch(std::io::Error),
}

/// What a file in the group's directory is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueFile {
    Job(RunId),
    Cancel(RunId),
}

impl QueueFile {
    pub(super) fn parse(name: &OsStr) -> Option<Self> {
        let (stem, extension) = name.to_str()?.rsplit_once('.')?;
        let id = stem.parse().ok()?;
        match extension {
            "job" => Some(Self::Job(id)),
            "cancel" => Some(Self::Cancel(id)),
            _ => None,
        }
    }
}

pub(super) fn job_name(id: RunId) -> String {
    format!("{id}.job")
}
pub(super) fn cancel_name(id: RunId) -> String {
    format!("{id}.cancel")
}
pub(super) fn claim_name(id: RunId) -> String {
    format!("{id}.claim")
}
pub(super) fn result_name(id: RunId) -> String {
    format!("{id}.result")
}
pub(super) fn collected_name(id: RunId) -> String {
    format!("{id}.files")
}

/// Where a job is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum JobState {
    /// No runner has taken it.
    Waiting,
    /// A runner has.
    Running,
    /// The answer is there.
    Answered(JobResult),
}

/// One job of a group.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    /// The run.
    pub(crate) run_id: RunId,
    /// Where it is.
    pub(crate) state: JobState,
    /// What it asked for, if its file is there and we may read it.
    pub(crate) profile: Option<ProfileName>,
    /// When it was submitted, or answered.
    pub(crate) since: Option<SystemTime>,
}

/// A group's directory.
#[derive(Debug)]
pub(crate) struct GroupQueue {
    pub(super) dir: Dir,
    /// Whose runners serve it: the owner of the directory.
    pub(super) owner: u32,
    shared: bool,
}

impl GroupQueue {
    /// Takes the open directory of a group. The owner (and root) also makes what is missing in it.
    pub(crate) fn open(dir: Dir) -> Result<Self, QueueError> {
        let meta = dir.own_metadata()?;
        let queue = Self {
            owner: meta.uid(),
            shared: meta.mode() & 0o070 != 0,
            dir,
        };
        let me = rustix::process::geteuid().as_raw();
        if me == queue.owner || me == 0 {
            for name in [CLAIMS, RESULTS, RUNNERS] {
                match queue.dir.create_new_dir(name, 0o755) {
                    Ok(made) if me != queue.owner => made.set_owner(meta.uid(), meta.gid())?,
                    Ok(_) => {}
                    Err(error) if error.is_already_exists() => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(queue)
    }

    /// Gives what somebody planted under a name of the queue another one, under which nobody looks for anything.
    pub(super) fn put_aside(&self, name: &str) -> Result<(), QueueError> {
        let aside = format!(".refused-{}", RunId::random());
        Ok(self.dir.rename(name, &self.dir, aside)?)
    }

    /// Opens one of the runner's own directories, if it is there and nobody else could have written in it.
    pub(super) fn own_dir(&self, name: &str) -> Result<Option<Dir>, QueueError> {
        let dir = match self.dir.open_dir(name) {
            Ok(dir) => dir,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let meta = dir.own_metadata()?;
        let planted = |reason| QueueError::Planted {
            path: dir.path().display().to_string(),
            reason,
        };
        if meta.uid() != self.owner && meta.uid() != 0 {
            return Err(planted("it does not belong to the group's owner"));
        }
        if meta.mode() & 0o022 != 0 {
            return Err(planted("others may write in it"));
        }
        Ok(Some(dir))
    }

    /// Mode of files that the runner has to read: its own user's, or the Unix group's that shares the directory.
    fn file_mode(&self) -> u32 {
        if self.shared { 0o640 } else { 0o600 }
    }

    /// Puts a job into the queue. When this returns it is durable and runners have been told.
    pub(crate) fn submit(&self, job: &Job) -> Result<(), QueueError> {
        let temporary = self
            .dir
            .write_temporary(self.file_mode(), &job.to_bytes()?)?;
        let placed = self
            .give_to_owner(&temporary)
            .and_then(|()| self.dir.rename(&temporary, &self.dir, job_name(job.run_id)))
            .and_then(|()| self.dir.sync());
        if placed.is_err() {
            let _ = self.dir.remove_file(&temporary);
        }
        Ok(placed?)
    }

    /// What root submits in somebody's home belongs to them: their runner could not read it otherwise.
    fn give_to_owner(&self, name: &OsStr) -> Result<(), FsError> {
        if rustix::process::geteuid().is_root() && self.owner != 0 {
            let file = self.dir.open_file(name, Access::Read)?;
            let owner = rustix::fs::Uid::from_raw(self.owner);
            rustix::fs::fchown(&file, Some(owner), None).map_err(|errno| FsError::Io {
                path: self.dir.display_path(name),
                action: "given to its owner",
                source: errno.into(),
            })?;
        }
        Ok(())
    }

    /// Asks for a job to be cancelled; the answer comes as its result.
    pub(crate) fn cancel(&self, id: RunId) -> Result<(), QueueError> {
        Ok(self
            .dir
            .write_atomic(cancel_name(id), self.file_mode(), b"")?)
    }

    /// Takes back a job that no runner has claimed. False: a runner has it (or had it); cancel it and wait for its
    /// result instead.
    pub(crate) fn withdraw(&self, id: RunId) -> Result<bool, QueueError> {
        if self.is_claimed(id)? || self.result(id)?.is_some() {
            return Ok(false);
        }
        let removed = self.dir.remove_file(job_name(id))?;
        // A runner that claimed it meanwhile either misses the file and lets go, or has read it and answers.
        if self.is_claimed(id)? {
            return Ok(false);
        }
        self.dir.remove_file(cancel_name(id))?;
        Ok(removed)
    }

    /// Whether a runner, alive or not, has taken the job and its answer is not complete.
    pub(crate) fn is_claimed(&self, id: RunId) -> Result<bool, QueueError> {
        Ok(match self.own_dir(CLAIMS)? {
            Some(claims) => claims.metadata(claim_name(id))?.is_some(),
            None => false,
        })
    }

    /// The answer, if it is there.
    pub(crate) fn result(&self, id: RunId) -> Result<Option<JobResult>, QueueError> {
        let Some(results) = self.own_dir(RESULTS)? else {
            return Ok(None);
        };
        let bytes = match results.read_bounded(result_name(id), MAX_RESULT_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let bad = |reason| QueueError::BadResult { run_id: id, reason };
        let result = JobResult::parse(&bytes).map_err(|error| bad(error.to_string()))?;
        if result.run_id != id {
            return Err(bad(format!("it is about run {}", result.run_id)));
        }
        Ok(Some(result))
    }

    /// The directory of files that were copied out of the guest for this run: file *i* of the job's `collect` is `i`.
    pub(crate) fn collected(&self, id: RunId) -> Result<Option<Dir>, QueueError> {
        let Some(results) = self.own_dir(RESULTS)? else {
            return Ok(None);
        };
        match results.open_dir(collected_name(id)) {
            Ok(dir) => Ok(Some(dir)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the answer once it has been delivered. A submitter who may not (a shared group) leaves it to the
    /// runner, which removes old ones.
    pub(crate) fn forget(&self, id: RunId) {
        let _ = self
            .dir
            .remove_tree(format!("{RESULTS}/{}", collected_name(id)));
        let _ = self
            .dir
            .remove_file(format!("{RESULTS}/{}", result_name(id)));
    }

    /// The directory to listen to for answers, and whether it is their own: if a runner has not made that yet, it is
    /// the group's, in which it will appear.
    pub(crate) fn where_answers_appear(&self) -> Result<(Dir, bool), QueueError> {
        Ok(match self.own_dir(RESULTS)? {
            Some(results) => (results, true),
            // Opened anew: listening ends when any copy of its descriptor is closed.
            None => (self.dir.open_dir(".")?, false),
        })
    }

    #[cfg(test)]
    /// A watch that wakes when a result appears, or when the runner's directories do. Look once after making it.
    pub(crate) fn watch_results(&self) -> Result<Watch, QueueError> {
        let mut watch = Watch::new().map_err(QueueError::Watch)?;
        match self.own_dir(RESULTS)? {
            Some(results) => watch.add(&results),
            None => watch.add(&self.dir),
        }
        .map_err(QueueError::Watch)?;
        Ok(watch)
    }

    /// The runners that watch this group now.
    pub(crate) fn live_runners(&self) -> Result<Vec<LiveRunner>, QueueError> {
        Ok(match self.own_dir(RUNNERS)? {
            Some(runners) => registry::live(&runners)?,
            None => Vec::new(),
        })
    }

    /// Every job and undelivered answer, oldest first.
    pub(crate) fn list(&self) -> Result<Vec<Listed>, QueueError> {
        let mut found = Vec::new();
        for entry in self.dir.list()? {
            let Some(QueueFile::Job(run_id)) = QueueFile::parse(&entry.name) else {
                continue;
            };
            let job = match entry.kind {
                EntryKind::File => self
                    .dir
                    .read_bounded(&entry.name, super::job::MAX_JOB_BYTES)
                    .ok()
                    .and_then(|bytes| Job::parse(&bytes).ok()),
                _ => None,
            };
            found.push(Listed {
                run_id,
                state: match self.result(run_id)? {
                    Some(result) => JobState::Answered(result),
                    None if self.is_claimed(run_id)? => JobState::Running,
                    None => JobState::Waiting,
                },
                profile: job.map(|job| job.profile.clone()),
                since: self
                    .dir
                    .metadata(&entry.name)?
                    .and_then(|meta| meta.modified().ok()),
            });
        }
        if let Some(results) = self.own_dir(RESULTS)? {
            for entry in results.list()? {
                let stem = entry.name.to_str().and_then(|n| n.strip_suffix(".result"));
                let Some(run_id) = stem.and_then(|stem| stem.parse().ok()) else {
                    continue;
                };
                if found.iter().any(|listed| listed.run_id == run_id) {
                    continue;
                }
                if let Some(result) = self.result(run_id)? {
                    found.push(Listed {
                        run_id,
                        state: JobState::Answered(result),
                        profile: None,
                        since: results
                            .metadata(&entry.name)?
                            .and_then(|meta| meta.modified().ok()),
                    });
                }
            }
        }
        found.sort_by_key(|listed| (listed.since, listed.run_id));
        Ok(found)
    }
}
