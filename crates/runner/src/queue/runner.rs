//! A group's directory as the runner uses it.

mod clearing;

pub(crate) use clearing::Unwanted;

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use api_types::runner::ResumeSession;
use host::fs::{Access, Dir, FsError};
use policy::Draft;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Mutex, mpsc};

use super::group::{
    CLAIMS, GroupQueue, QueueError, QueueFile, RESULTS, RUNNERS, cancel_name, claim_name,
    collected_name, job_name, result_name,
};
use super::job::{Job, JobError, MAX_JOB_BYTES};
use super::registry::{self, LiveRunner, Registration};
use super::result::JobResult;
use super::watch::Watch;
use zeroize::Zeroizing;

use crate::names::{ProfileName, RunId, SessionId};

/// What a claim says.
#[derive(Debug, Serialize, Deserialize)]
struct ClaimText {
    instance: String,
}

/// Names of variables: a digest, for all that counts is whether they are the same as another job's. Any number of jobs
/// may wait, each with as many names as its file has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VariableNames([u8; 32]);

impl VariableNames {
    /// Of these, in whatever order.
    pub(crate) fn of<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut names: Vec<_> = names.collect();
        names.sort_unstable();
        let mut digest = Sha256::new();
        for name in names {
            // With their lengths, or two lists could run into each other.
            digest.update((name.len() as u64).to_le_bytes());
            digest.update(name);
        }
        Self(digest.finalize().into())
    }

    /// Of a job that brings none, or of which none are known.
    pub(crate) fn none() -> Self {
        Self::of(std::iter::empty())
    }
}

/// What the queue needs to know of a job before it is claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JobHead {
    /// The run.
    pub(crate) run_id: RunId,
    /// What it asks for.
    pub(crate) profile: ProfileName,
    /// Whose VM it may meet again.
    pub(crate) session_id: Option<SessionId>,
    /// The variables it brings. Secrets travel in them, so they decide which VM it may meet.
    pub(crate) variables: VariableNames,
    /// Who submitted it: the owner of the file.
    pub(crate) submitter: u32,
    /// When (modification time of the file).
    pub(crate) submitted: SystemTime,
}

impl JobHead {
    /// Of a job that was read.
    pub(crate) fn of(job: &Job, submitter: u32, submitted: SystemTime) -> Self {
        Self {
            run_id: job.run_id,
            profile: job.profile.clone(),
            session_id: job.session_id.clone(),
            variables: {
                let secrets = job.network.iter().flat_map(|network| &network.secrets);
                let secrets = secrets.map(policy::SecretName::as_str);
                let names = job.environment.keys().map(String::as_str);
                VariableNames::of(names.chain(secrets))
            },
            submitter,
            submitted,
        }
    }

    /// Whether everything that is decided by a head is decided the same for the other. The variables decide which of a
    /// session's VMs a job may meet, and nothing else.
    pub(crate) fn decides_like(&self, other: &Self) -> bool {
        self.run_id == other.run_id
            && self.profile == other.profile
            && self.session_id == other.session_id
            && self.submitter == other.submitter
            && (self.session_id.is_none() || self.variables == other.variables)
    }
}

/// What stands under a job's name.
#[derive(Debug)]
pub(crate) enum Look {
    /// A job nobody has taken.
    Fresh(JobHead),
    /// Nothing, or somebody has it, or it cannot be read at the moment.
    NotOurs,
    /// It can never become a job: answer it with this.
    Bad(String),
    /// It makes no sense, but somebody may still be writing it: if it does not change, it is bad for this reason.
    Unfinished {
        /// What is wrong with it.
        reason: String,
        /// What changes when somebody writes to it.
        stamp: SystemTime,
    },
}

/// A job that is ours.
#[derive(Debug)]
pub(crate) struct ClaimedJob {
    /// What it says, read after the claim.
    pub(crate) job: Job,
    /// Who submitted it.
    pub(crate) submitter: u32,
    /// When (modification time of the file).
    pub(crate) submitted: SystemTime,
    /// What the Web API adds, where the job comes from there.
    pub(crate) api: Option<Box<ApiSide>>,
}

/// What only a job of the Web API has.
pub(crate) struct ApiSide {
    /// The API's address, for the guest.
    pub(crate) url: String,
    /// The guest's token: opens the webhooks of this run and claim.
    pub(crate) token: Zeroizing<String>,
    /// What the group's runs may not lift.
    pub(crate) group_policy: Draft,
    /// The session to go on with, as an earlier run left it.
    pub(crate) resume: Option<ResumeSession>,
    /// What clients tell the agent while it works, where the run takes any.
    pub(crate) inputs: Option<Mutex<mpsc::Receiver<String>>>,
}

impl std::fmt::Debug for ApiSide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiSide({})", self.url)
    }
}

/// What came of an attempt to claim.
#[derive(Debug)]
pub(crate) enum Claim {
    /// It is ours, and has to be answered.
    Won(Box<ClaimedJob>),
    /// Somebody else has it, or it is gone.
    Lost,
    /// It is ours, and cannot be run: answer it with this.
    Bad(String),
}

/// Everything in a group's directory, by kind.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Job files.
    pub(crate) jobs: Vec<RunId>,
    /// Cancel markers.
    pub(crate) cancels: Vec<RunId>,
    /// Files that end in `.job` and whose name is no run id: nobody can be answered.
    pub(crate) nameless: Vec<OsString>,
}

/// A group's directory, with the right to claim and answer.
#[derive(Debug)]
pub(crate) struct RunnerQueue {
    group: GroupQueue,
    claims: Dir,
    results: Dir,
    runners: Dir,
    /// A finished, fsynced file in `claims` that says whose the claims are: claiming is giving it one more name.
    claim_source: String,
    instance: String,
    _registration: Registration,
}

impl RunnerQueue {
    /// Opens the directory for the runner process `runner`, which must own it, and registers the runner in it.
    pub(crate) fn open(dir: Dir, runner: &LiveRunner) -> Result<Self, QueueError> {
        let group = GroupQueue::open(dir)?;
        let [claims, results, runners] =
            [CLAIMS, RESULTS, RUNNERS].map(|name| own_or_replace(&group, name));
        let (claims, results, runners) = (claims?, results?, runners?);
        // Registered before it writes anything: whatever is of nobody who lives, the recovery of another runner removes.
        let registration = Registration::new(runners.try_clone()?, runner)?;
        let claim_source = format!(".instance-{}", runner.instance);
        let text = serde_json::to_vec(&ClaimText {
            instance: runner.instance.clone(),
        })
        .unwrap_or_default();
        claims.write_atomic(&claim_source, 0o644, &text)?;
        Ok(Self {
            group,
            claims,
            results,
            runners,
            claim_source,
            instance: runner.instance.clone(),
            _registration: registration,
        })
    }

    /// A watch that wakes when jobs and cancel markers appear. Scan once after making it.
    pub(crate) fn watch(&self) -> Result<Watch, QueueError> {
        let mut watch = Watch::new().map_err(QueueError::Watch)?;
        watch.add(&self.group.dir).map_err(QueueError::Watch)?;
        Ok(watch)
    }

    /// Lists the directory, jobs in the order in which they were submitted.
    pub(crate) fn scan(&self) -> Result<Scan, QueueError> {
        let mut scan = Scan::default();
        for entry in self.group.dir.list()? {
            scan.add(entry.name);
        }
        scan.jobs.sort_by_cached_key(|id| {
            let meta = self.group.dir.metadata(job_name(*id)).ok().flatten();
            (meta.and_then(|meta| meta.modified().ok()), *id)
        });
        Ok(scan)
    }

    /// Examines a job that may be new. `finished`: its writer has said that it is whole.
    pub(crate) fn look(&self, id: RunId, finished: bool) -> Look {
        match self.claims.metadata(claim_name(id)) {
            Ok(None) => {}
            Ok(Some(_)) => return Look::NotOurs,
            Err(error) if is_ours(&error) => return not_now(id, &error),
            Err(error) => return Look::Bad(error.to_string()),
        }
        match self.read_job(id) {
            ReadJob::Gone => Look::NotOurs,
            ReadJob::NotNow(error) => not_now(id, &error),
            ReadJob::Good(read) => {
                Look::Fresh(JobHead::of(&read.job, read.submitter, read.submitted))
            }
            ReadJob::Bad {
                reason,
                modified: Some(stamp),
            } if !finished => Look::Unfinished { reason, stamp },
            ReadJob::Bad { reason, .. } => Look::Bad(reason),
        }
    }

    /// Claims a job: from `Won` and `Bad` on it is ours and [`RunnerQueue::answer`] or [`RunnerQueue::unclaim`]
    /// has to follow.
    pub(crate) fn claim(&self, id: RunId) -> Result<Claim, QueueError> {
        match self
            .claims
            .link(&self.claim_source, &self.claims, claim_name(id))
        {
            Ok(()) => {}
            Err(error) if error.is_already_exists() => return Ok(Claim::Lost),
            Err(error) => return Err(error.into()),
        }
        // Durable before the job starts: a host that loses power must not run it twice.
        if let Err(error) = self.claims.sync() {
            self.unclaim(id);
            return Err(error.into());
        }
        let claim = match self.read_job(id) {
            // Its submitter took it back, or another runner has answered it and cleaned up.
            ReadJob::Gone => {
                self.unclaim(id);
                return Ok(Claim::Lost);
            }
            ReadJob::NotNow(error) => {
                self.unclaim(id);
                return Err(error.into());
            }
            ReadJob::Good(read) => Claim::Won(Box::new(ClaimedJob {
                job: read.job,
                submitter: read.submitter,
                submitted: read.submitted,
                api: None,
            })),
            ReadJob::Bad { reason, .. } => Claim::Bad(reason),
        };
        // The job is there and ours: an answer that lies there already is not ours.
        if self.results.remove_tree(result_name(id)).unwrap_or(false) {
            tracing::warn!(run = %id, "removed a result that was there before the job was run");
        }
        let _ = self.results.remove_tree(collected_name(id));
        Ok(claim)
    }

    /// Gives a claimed job back unanswered, for this or another runner to claim again.
    pub(crate) fn unclaim(&self, id: RunId) {
        if let Err(error) = self.claims.remove_file(claim_name(id)) {
            tracing::warn!(run = %id, %error, "cannot give back a claim");
        }
    }

    /// Whose valid cancel marker lies there for a job of this submitter. Only the submitter, the runner's owner and
    /// root may cancel.
    pub(crate) fn cancelled_by(&self, id: RunId, submitter: u32) -> Option<u32> {
        match self.group.dir.metadata(cancel_name(id)) {
            Ok(Some(meta)) if meta.is_file() => {
                let allowed = [submitter, self.group.owner, 0].contains(&meta.uid());
                if !allowed {
                    tracing::warn!(run = %id, uid = meta.uid(), "ignored a cancel marker of somebody else");
                }
                allowed.then_some(meta.uid())
            }
            _ => None,
        }
    }

    /// Answers a claimed job: durably, then cleans up after it. False: the answer is there, but something of the job is
    /// in the way still, and [`RunnerQueue::clean_up`] is to be tried again.
    pub(crate) fn answer(&self, result: &JobResult) -> Result<bool, QueueError> {
        let bytes = serde_json::to_vec(result).map_err(|error| QueueError::BadResult {
            run_id: result.run_id,
            reason: error.to_string(),
        })?;
        self.results
            .write_atomic(result_name(result.run_id), 0o644, &bytes)?;
        let cleaned = self.clean_up(result.run_id);
        if let Err(error) = &cleaned {
            tracing::warn!(run = %result.run_id, %error, "cannot clean up after a job that is answered");
        }
        Ok(cleaned.is_ok())
    }

    /// A second descriptor on the directory of answers, for [`RunnerQueue::collect_dir`].
    pub(crate) fn results(&self) -> Result<Dir, QueueError> {
        Ok(self.results.try_clone()?)
    }

    /// Makes the directory that receives files copied out for this run.
    pub(crate) fn collect_dir(results: &Dir, id: RunId) -> Result<Dir, QueueError> {
        Ok(results.create_dir(collected_name(id), 0o755)?)
    }

    /// Whether some runner has claimed the job.
    pub(crate) fn is_taken(&self, id: RunId) -> bool {
        !matches!(self.claims.metadata(claim_name(id)), Ok(None))
    }

    /// Whether a live runner of the group, ourselves included, serves this profile.
    pub(crate) fn is_served(&self, profile: &ProfileName) -> Result<bool, QueueError> {
        Ok(registry::live(&self.runners)?
            .iter()
            .any(|runner| runner.profiles.contains(profile)))
    }

    fn read_job(&self, id: RunId) -> ReadJob {
        let name = job_name(id);
        let bad = |reason: String, modified| ReadJob::Bad { reason, modified };
        let file = match self.group.dir.open_file(&name, Access::Read) {
            Ok(file) => file,
            Err(error) if error.is_not_found() => return ReadJob::Gone,
            Err(error) if is_ours(&error) => return ReadJob::NotNow(error),
            Err(error) => {
                let modified = match &error {
                    // A regular file that we may not read yet may get its mode in a moment.
                    FsError::Io { .. } => self
                        .group
                        .dir
                        .metadata(&name)
                        .ok()
                        .flatten()
                        .and_then(|meta| meta.modified().ok()),
                    _ => None,
                };
                return bad(format!("the job file was refused: {error}"), modified);
            }
        };
        let meta = match file.metadata() {
            Ok(meta) => meta,
            Err(error) => return bad(format!("the job file cannot be examined: {error}"), None),
        };
        let modified = meta.modified().ok();
        if meta.nlink() == 0 {
            return ReadJob::Gone;
        }
        if meta.nlink() > 1 {
            return bad(
                "the job file was refused: it has a second name".to_owned(),
                modified,
            );
        }
        if meta.len() > MAX_JOB_BYTES {
            return bad(JobError::TooLarge.to_string(), modified);
        }
        let mut bytes = Vec::new();
        if let Err(error) = file
            .take(MAX_JOB_BYTES.saturating_add(1))
            .read_to_end(&mut bytes)
        {
            return bad(format!("the job file cannot be read: {error}"), modified);
        }
        match Job::parse(&bytes) {
            Ok(job) if job.run_id == id => ReadJob::Good(Box::new(ReadFile {
                job,
                submitter: meta.uid(),
                submitted: modified.unwrap_or(SystemTime::UNIX_EPOCH),
            })),
            Ok(job) => bad(
                format!(
                    "the job file's name and its `run_id` ({}) differ",
                    job.run_id
                ),
                modified,
            ),
            Err(error) => bad(error.to_string(), modified),
        }
    }
}

/// Whether it is this process or its host that has no room, and not the file that is wrong: another moment, or another
/// runner, may do better.
fn is_ours(error: &FsError) -> bool {
    let FsError::Io { source, .. } = error else {
        return false;
    };
    let code = source.raw_os_error();
    [Errno::MFILE, Errno::NFILE, Errno::NOMEM]
        .iter()
        .any(|errno| code == Some(errno.raw_os_error()))
}

/// The slow scan finds it again.
fn not_now(id: RunId, error: &FsError) -> Look {
    tracing::warn!(run = %id, %error, "cannot look at a job; looking again later");
    Look::NotOurs
}

impl Drop for RunnerQueue {
    fn drop(&mut self) {
        let _ = self.claims.remove_file(&self.claim_source);
    }
}

impl Scan {
    /// Sorts a name in; true if it was one the queue knows.
    pub(crate) fn add(&mut self, name: OsString) -> bool {
        match QueueFile::parse(&name) {
            Some(QueueFile::Job(id)) => self.jobs.push(id),
            Some(QueueFile::Cancel(id)) => self.cancels.push(id),
            None if has_job_suffix(&name) => self.nameless.push(name),
            None => return false,
        }
        true
    }
}

fn has_job_suffix(name: &OsStr) -> bool {
    use std::os::unix::ffi::OsStrExt;
    name.as_bytes().ends_with(b".job") && !name.as_bytes().starts_with(b".")
}

/// A job file as it was read.
#[derive(Debug)]
struct ReadFile {
    job: Job,
    submitter: u32,
    submitted: SystemTime,
}

#[derive(Debug)]
enum ReadJob {
    Gone,
    /// The job may be good: it cannot be read at the moment.
    NotNow(FsError),
    Good(Box<ReadFile>),
    Bad {
        reason: String,
        modified: Option<SystemTime>,
    },
}

/// Opens one of the runner's directories. One that somebody planted before the runner first came is put aside.
fn own_or_replace(group: &GroupQueue, name: &str) -> Result<Dir, QueueError> {
    match group.own_dir(name) {
        Ok(Some(dir)) => return Ok(dir),
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(%error, "put a planted directory of the queue aside");
            group.put_aside(name)?;
        }
    }
    Ok(group.dir.create_new_dir(name, 0o755)?)
}

#[cfg(test)]
#[path = "runner_tests.rs"]
mod tests;
