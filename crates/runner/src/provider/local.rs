//! The local file queue as a provider: one thread that owns the group's directory.
//!
//! inotify is the fast path; a slow scan is the safety net for what inotify may miss (an overflow, a network file
//! system), and the time at which dead runners' claims are answered. The thread never waits for the daemon and the
//! daemon never for it, so cancelling works whatever either is busy with.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use host::fs::Dir;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Provider, ProviderEvent};
use crate::names::{ProfileName, RunId};
use crate::queue::{
    Change, Claim, FirstSeen, JobResult, LiveRunner, Look, QueueError, RunnerQueue, Scan, Unwanted,
    Watch,
};

/// How often the directory is looked through whatever inotify says.
const SLOW_SCAN: Duration = Duration::from_secs(5);
/// A malformed file that nobody declared finished may still be being written while it has not been the same for this long.
///
/// Long enough for a writer on a host that has no time for it: who breaks off closes the file, which is noticed at once.
const STILL_BEING_WRITTEN: Duration = Duration::from_secs(5);
/// When to look again at such a file.
const LOOK_AGAIN: Duration = STILL_BEING_WRITTEN.saturating_add(Duration::from_millis(100));
/// How often an answer that could not be written (a full disk) is tried again.
const RETRY_ANSWER: Duration = Duration::from_secs(1);
/// How often what nobody fetched is looked for.
const EXPIRE: Duration = Duration::from_secs(60);

#[derive(Debug)]
enum Command {
    Claim(RunId),
    Complete(JobResult),
    Stop,
}

/// A handle on the thread. Dropping it stops the thread, once every answer has been tried one last time.
#[derive(Debug)]
pub(crate) struct LocalProvider {
    commands: Mutex<mpsc::Sender<Command>>,
    bell: Arc<OwnedFd>,
    results: Dir,
    thread: Option<JoinHandle<()>>,
}

impl LocalProvider {
    /// Registers `runner` in the group's directory and starts watching it. `tell` is called on the provider's own
    /// thread and must not block.
    pub(crate) fn start(
        group: Dir,
        runner: &LiveRunner,
        tell: impl Fn(ProviderEvent) + Send + 'static,
    ) -> Result<Self, QueueError> {
        let queue = RunnerQueue::open(group, runner)?;
        let results = queue.results()?;
        // The watch stands before the first scan: nothing falls between.
        let watch = queue.watch()?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| QueueError::Watch(errno.into()))?;
        let bell = Arc::new(bell);
        let (commands, inbox) = mpsc::channel();
        let worker = Worker {
            queue,
            watch,
            bell: Arc::clone(&bell),
            inbox,
            tell: Box::new(tell),
            profiles: runner.profiles.clone(),
            offered: HashMap::new(),
            claimed: HashMap::new(),
            unwritten: Vec::new(),
            uncleaned: HashSet::new(),
            nameless: HashSet::new(),
            unfinished: FirstSeen::default(),
            unwanted: Unwanted::default(),
            next_scan: Instant::now(),
            next_expire: Instant::now(),
        };
        let thread = std::thread::Builder::new()
            .name("queue".to_owned())
            .spawn(move || worker.run())
            .map_err(QueueError::Watch)?;
        Ok(Self {
            commands: Mutex::new(commands),
            bell,
            results,
            thread: Some(thread),
        })
    }

    fn send(&self, command: Command) {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        // A thread that is gone has said `Broken`; there is nobody left to answer.
        let _ = commands.send(command);
        let _ = rustix::io::write(&*self.bell, &1_u64.to_ne_bytes());
    }
}

impl Provider for LocalProvider {
    fn claim(&self, id: RunId) {
        self.send(Command::Claim(id));
    }
    fn complete(&self, result: JobResult) {
        self.send(Command::Complete(result));
    }
    fn collect_dir(&self, id: RunId) -> Result<Dir, QueueError> {
        RunnerQueue::collect_dir(&self.results, id)
    }
}

impl Drop for LocalProvider {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A job that was claimed.
#[derive(Debug)]
struct Claimed {
    submitter: u32,
    cancel_told: bool,
}

struct Worker {
    queue: RunnerQueue,
    watch: Watch,
    bell: Arc<OwnedFd>,
    inbox: mpsc::Receiver<Command>,
    tell: Box<dyn Fn(ProviderEvent) + Send>,
    profiles: Vec<ProfileName>,
    /// Jobs the daemon knows of and has not claimed, with their submitters.
    offered: HashMap<RunId, u32>,
    claimed: HashMap<RunId, Claimed>,
    /// Answers that could not be written yet; `true`: the daemon waits to hear of it.
    unwritten: Vec<(JobResult, bool)>,
    /// Runs that are answered, of which something could not be removed yet: their claims stay.
    uncleaned: HashSet<RunId>,
    /// Names that were complained about already.
    nameless: HashSet<OsString>,
    /// Malformed files that somebody may still be writing.
    unfinished: FirstSeen<SystemTime>,
    unwanted: Unwanted,
    next_scan: Instant,
    next_expire: Instant,
}

impl Worker {
    fn run(mut self) {
        let reason = match self.work() {
            Ok(()) => {
                self.retry_answers();
                return;
            }
            Err(error) => error.to_string(),
        };
        (self.tell)(ProviderEvent::Broken(reason));
    }

    fn work(&mut self) -> Result<(), QueueError> {
        loop {
            loop {
                match self.inbox.try_recv() {
                    Ok(Command::Claim(id)) => self.claim(id),
                    Ok(Command::Complete(result)) => self.complete(result),
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Ok(()),
                    Err(TryRecvError::Empty) => break,
                }
            }
            self.hear()?;
            if Instant::now() >= self.next_scan {
                self.slow_scan();
            }
            self.wait().map_err(QueueError::Watch)?;
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> io::Result<()> {
        let until = if self.unwritten.is_empty() {
            self.next_scan
        } else {
            self.next_scan.min(Instant::now() + RETRY_ANSWER)
        };
        let wait = until.saturating_duration_since(Instant::now());
        let limit = Timespec::try_from(wait).map_err(io::Error::other)?;
        let mut fds = [
            PollFd::new(&self.watch, PollFlags::IN),
            PollFd::new(&*self.bell, PollFlags::IN),
        ];
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut count = [0_u8; 8];
        let _ = rustix::io::read(&*self.bell, &mut count);
        Ok(())
    }

    /// Deals with what inotify told.
    fn hear(&mut self) -> Result<(), QueueError> {
        for change in self.watch.changes().map_err(QueueError::Watch)? {
            match change {
                Change::Overflow => self.next_scan = Instant::now(),
                Change::Appeared { name, finished, .. } => {
                    let mut seen = Scan::default();
                    seen.add(name);
                    self.digest(seen, finished);
                }
            }
        }
        self.retry_answers();
        Ok(())
    }

    fn digest(&mut self, seen: Scan, finished: bool) {
        for id in seen.cancels {
            self.marker(id);
        }
        for id in seen.jobs {
            self.examine(id, finished);
        }
        for name in seen.nameless {
            if self.nameless.len() < 1000 && self.nameless.insert(name.clone()) {
                tracing::warn!(
                    ?name,
                    "ignored a job file whose name is no run id: nobody can be answered"
                );
            }
        }
    }

    fn slow_scan(&mut self) {
        self.next_scan = Instant::now() + SLOW_SCAN;
        match self.queue.scan() {
            Ok(scan) => {
                let there: HashSet<RunId> = scan.jobs.iter().copied().collect();
                self.unfinished.keep(|id| there.contains(&id));
                let lost: Vec<RunId> = self
                    .offered
                    .keys()
                    .filter(|id| !there.contains(id) || self.queue.is_taken(**id))
                    .copied()
                    .collect();
                for id in lost {
                    self.offered.remove(&id);
                    (self.tell)(ProviderEvent::Gone(id));
                }
                self.digest(scan, false);
            }
            Err(error) => tracing::warn!(%error, "cannot look through the group's directory"),
        }
        let queue = &self.queue;
        self.uncleaned.retain(|id| queue.clean_up(*id).is_err());
        let mut ours: HashSet<RunId> = self.claimed.keys().copied().collect();
        ours.extend(&self.uncleaned);
        ours.extend(self.unwritten.iter().map(|(result, _)| result.run_id));
        match self.queue.recover(&ours) {
            Ok(answered) => {
                for id in answered {
                    tracing::info!(run = %id, "answered the claim of a runner that is gone");
                }
            }
            Err(error) => tracing::warn!(%error, "cannot answer the claims of dead runners"),
        }
        if Instant::now() >= self.next_expire {
            self.next_expire = Instant::now() + EXPIRE;
            if let Err(error) = self.queue.expire(&mut self.unwanted, Instant::now()) {
                tracing::warn!(%error, "cannot remove old answers");
            }
        }
    }

    /// Decides what to do with a job file.
    fn examine(&mut self, id: RunId, finished: bool) {
        if self.offered.contains_key(&id) || self.claimed.contains_key(&id) {
            return;
        }
        match self.queue.look(id, finished) {
            Look::NotOurs => {}
            Look::Unfinished { reason, stamp } => {
                let now = Instant::now();
                if self.unfinished.age(id, stamp, now) < STILL_BEING_WRITTEN {
                    self.next_scan = self.next_scan.min(now + LOOK_AGAIN);
                } else {
                    self.refuse(id, &reason);
                }
            }
            Look::Bad(reason) => self.refuse(id, &reason),
            Look::Fresh(head) if self.is_cancelled(id, head.submitter) => {
                self.claim_and_answer(&JobResult::cancelled(id));
            }
            Look::Fresh(head) if self.profiles.contains(&head.profile) => {
                self.offered.insert(id, head.submitter);
                (self.tell)(ProviderEvent::Found(head));
            }
            // Another runner's, or nobody's.
            Look::Fresh(head) => match self.queue.is_served(&head.profile) {
                Ok(true) => {}
                Ok(false) => self.claim_and_answer(&JobResult::failed(
                    id,
                    1,
                    &format!(
                        "no running runner of this group serves the profile {}",
                        head.profile
                    ),
                )),
                Err(error) => tracing::warn!(%error, "cannot tell which runners are alive"),
            },
        }
    }

    /// Whether a job that is not claimed is cancelled; then it is told by whom.
    fn is_cancelled(&self, id: RunId, submitter: u32) -> bool {
        let by = self.queue.cancelled_by(id, submitter);
        if let Some(by) = by {
            (self.tell)(ProviderEvent::Marked { run: id, by });
        }
        by.is_some()
    }

    fn refuse(&mut self, id: RunId, reason: &str) {
        tracing::info!(run = %id, reason, "refused a job");
        self.claim_and_answer(&JobResult::failed(id, 1, reason));
    }

    /// Deals with a cancel marker.
    fn marker(&mut self, id: RunId) {
        if let Some(claimed) = self.claimed.get_mut(&id) {
            if !claimed.cancel_told
                && let Some(by) = self.queue.cancelled_by(id, claimed.submitter)
            {
                claimed.cancel_told = true;
                (self.tell)(ProviderEvent::Marked { run: id, by });
                (self.tell)(ProviderEvent::Cancelled(id));
            }
        } else if let Some(submitter) = self.offered.get(&id).copied() {
            if self.is_cancelled(id, submitter) {
                self.offered.remove(&id);
                (self.tell)(ProviderEvent::Gone(id));
                self.claim_and_answer(&JobResult::cancelled(id));
            }
        } else {
            // The job itself may have been seen too young, or belongs to a profile of another runner.
            self.examine(id, false);
        }
    }

    fn claim(&mut self, id: RunId) {
        self.offered.remove(&id);
        match self.queue.claim(id) {
            Ok(Claim::Won(job)) => {
                let submitter = job.submitter;
                self.claimed.insert(
                    id,
                    Claimed {
                        submitter,
                        cancel_told: false,
                    },
                );
                (self.tell)(ProviderEvent::Claimed(job));
                // A marker that came while the claim was on its way.
                self.marker(id);
            }
            Ok(Claim::Bad(reason)) => {
                (self.tell)(ProviderEvent::Lost(id));
                self.answer(JobResult::failed(id, 1, &reason), false);
            }
            Ok(Claim::Lost) => (self.tell)(ProviderEvent::Lost(id)),
            Err(error) => {
                // A full disk, most likely: the slow scan finds the job again.
                tracing::warn!(run = %id, %error, "cannot claim a job");
                (self.tell)(ProviderEvent::Lost(id));
            }
        }
    }

    /// Answers a job without running it, if nobody else has it.
    fn claim_and_answer(&mut self, result: &JobResult) {
        match self.queue.claim(result.run_id) {
            Ok(Claim::Won(_) | Claim::Bad(_)) => self.answer(result.clone(), false),
            Ok(Claim::Lost) => {}
            Err(error) => {
                tracing::warn!(run = %result.run_id, %error, "cannot claim a job to answer it");
            }
        }
    }

    fn complete(&mut self, result: JobResult) {
        self.answer(result, true);
    }

    fn answer(&mut self, result: JobResult, tell: bool) {
        match self.queue.answer(&result) {
            Ok(true) => {}
            // Nobody waits for this: whatever is in the way, somebody of the group may have put it there.
            Ok(false) => drop(self.uncleaned.insert(result.run_id)),
            Err(error) => {
                tracing::error!(run = %result.run_id, %error, "cannot write an answer; trying again");
                self.unwritten.push((result, tell));
                return;
            }
        }
        self.claimed.remove(&result.run_id);
        if tell {
            (self.tell)(ProviderEvent::Completed(result.run_id));
        }
    }

    fn retry_answers(&mut self) {
        for (result, tell) in std::mem::take(&mut self.unwritten) {
            self.answer(result, tell);
        }
    }
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
