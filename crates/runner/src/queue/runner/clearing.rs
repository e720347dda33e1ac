//! Clearing up in a group's directory: after jobs that were answered, after runners that died, and what nobody fetched.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::time::{Duration, Instant};

use host::fs::{Dir, LockKind};

use super::{ClaimText, RunnerQueue};
use crate::names::RunId;
use crate::queue::first_seen::FirstSeen;
use crate::queue::group::{QueueError, cancel_name, claim_name, job_name, result_name};
use crate::queue::registry;
use crate::queue::result::JobResult;

/// Results that nobody fetched are removed after this long, by the host's clock: they outlive runners.
const RESULT_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// And no sooner than this after we first saw them: the host's clock may just have been set.
const RESULT_SEEN: Duration = Duration::from_secs(24 * 3600);
/// Cancel markers without a job are removed after this long: they may be early, not lost.
const MARKER_LIFE: Duration = Duration::from_secs(60);
/// Largest claim, bytes.
const MAX_CLAIM_BYTES: u64 = 4096;

/// Since when we have seen what nobody wants, as it seems.
#[derive(Debug, Default)]
pub(crate) struct Unwanted {
    results: FirstSeen<()>,
    /// Cancel markers without a job.
    markers: FirstSeen<()>,
}

impl RunnerQueue {
    /// Removes job, marker and claim, in this order: without the claim the job would run again. Also after a power cut,
    /// so the first two are gone for good before the third goes: they are in other directories.
    pub(crate) fn clean_up(&self, id: RunId) -> Result<(), QueueError> {
        self.discard(&job_name(id))?;
        self.discard(&cancel_name(id))?;
        self.group.dir.sync()?;
        self.claims.remove_file(claim_name(id))?;
        Ok(())
    }

    /// Removes a name that everybody in the group may have put something under. What cannot be removed, such as
    /// somebody's directory that nobody else may look into, is put aside: nothing waits for it.
    fn discard(&self, name: &str) -> Result<(), QueueError> {
        if let Err(error) = self.group.dir.remove_tree(name) {
            tracing::warn!(%error, "put something of a job aside that cannot be removed");
            self.group.put_aside(name)?;
        }
        Ok(())
    }

    /// Finishes the stories of runners that died, and of claims that no runner made; `running` are our own. Returns
    /// the runs it answered.
    pub(crate) fn recover(&self, running: &HashSet<RunId>) -> Result<Vec<RunId>, QueueError> {
        // One runner at a time: two would answer the same claim, the second after its submitter has left.
        let Some(_lock) = self
            .claims
            .try_lock(".recovery", LockKind::Exclusive, 0o644)?
        else {
            return Ok(Vec::new());
        };
        let mut answered = Vec::new();
        for entry in self.claims.list()? {
            let Some(name) = entry.name.to_str() else {
                continue;
            };
            if let Some(instance) = name.strip_prefix(".instance-") {
                if instance != self.instance && !registry::is_live(&self.runners, instance)? {
                    self.claims.remove_file(name)?;
                }
                continue;
            }
            let Some(id) = name.strip_suffix(".claim").and_then(|s| s.parse().ok()) else {
                continue;
            };
            if running.contains(&id) {
                continue;
            }
            let reason = match self.claimant(name) {
                Some(instance) if instance == self.instance => {
                    "the claim on this job was not made by a runner"
                }
                Some(instance) if registry::is_live(&self.runners, &instance)? => continue,
                _ => "runner stopped while the job was running",
            };
            if let Err(error) = self.bury(id, reason) {
                tracing::warn!(run = %id, %error, "cannot answer the claim of a dead runner");
                continue;
            }
            answered.push(id);
        }
        registry::sweep(&self.runners)?;
        self.remove_half_written()?;
        Ok(answered)
    }

    /// Removes files that a runner was killed over. Only while no other runner of the group lives, which might be
    /// writing one; we ourselves are not, as whoever writes is who calls this.
    fn remove_half_written(&self) -> Result<(), QueueError> {
        let mut found = Vec::new();
        for dir in [&self.claims, &self.results] {
            let entries = dir.list()?.into_iter().map(|entry| entry.name);
            let half = entries.filter(|name| name.as_encoded_bytes().starts_with(b".tmp-"));
            found.extend(half.map(|name| (dir, name)));
        }
        // Looked for after the files: whoever wrote one of them was registered before, and who comes now wrote none of them.
        let others = registry::live(&self.runners)?;
        if others.iter().all(|runner| runner.instance == self.instance) {
            for (dir, name) in found {
                dir.remove_file(&name)?;
            }
        }
        Ok(())
    }

    fn claimant(&self, claim: &str) -> Option<String> {
        let bytes = self.claims.read_bounded(claim, MAX_CLAIM_BYTES).ok()?;
        let text: ClaimText = serde_json::from_slice(&bytes).ok()?;
        Some(text.instance)
    }

    fn bury(&self, id: RunId, reason: &str) -> Result<(), QueueError> {
        let has_job = self.group.dir.metadata(job_name(id))?.is_some();
        let has_result = self.results.metadata(result_name(id))?.is_some();
        if has_job && !has_result {
            self.answer(&JobResult::failed(id, 1, reason)).map(drop)
        } else {
            // Answered and only not cleaned up, or taken back by its submitter.
            self.clean_up(id)
        }
    }

    /// Removes answers that nobody fetched and markers that nothing belongs to.
    pub(crate) fn expire(&self, unwanted: &mut Unwanted, now: Instant) -> Result<(), QueueError> {
        let Unwanted { results, markers } = unwanted;
        let entries = self.results.list()?;
        let there: HashSet<RunId> = entries.iter().filter_map(|e| run_of(&e.name)).collect();
        results.keep(|id| there.contains(&id));
        for entry in entries {
            // What is nobody's has been there as long as it says.
            let seen = run_of(&entry.name).map(|id| results.age(id, (), now));
            if seen.is_none_or(|age| age >= RESULT_SEEN)
                && is_older(&self.results, &entry.name, RESULT_LIFE)
            {
                self.results.remove_tree(&entry.name)?;
            }
        }
        let cancels: HashSet<RunId> = self.scan()?.cancels.into_iter().collect();
        markers.keep(|id| cancels.contains(&id));
        for id in cancels {
            if self.group.dir.metadata(job_name(id))?.is_some() {
                markers.forget(id);
            } else if markers.age(id, (), now) >= MARKER_LIFE {
                self.discard(&cancel_name(id))?;
            }
        }
        Ok(())
    }
}

/// Whose a file of `.results` is.
fn run_of(name: &OsStr) -> Option<RunId> {
    name.to_str()?.split_once('.')?.0.parse().ok()
}

fn is_older(dir: &Dir, name: &OsStr, limit: Duration) -> bool {
    dir.metadata(name)
        .ok()
        .flatten()
        .and_then(|meta| meta.modified().ok())
        .and_then(|at| at.elapsed().ok())
        .is_some_and(|age| age > limit)
}
