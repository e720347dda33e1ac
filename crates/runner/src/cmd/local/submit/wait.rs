//! Waiting for a job's answer, without asking again and again.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use super::notice::Notice;
use crate::cmd::logs::tail::Tail;
use crate::context::{CliError, note};
use crate::names::GroupName;
use crate::queue::{GroupQueue, Job, JobResult};
use crate::terminal::Escaper;

/// After this long without a live runner the submitter is told so.
const NOTICE_AFTER: Duration = Duration::from_secs(5);

/// How long a cancelled job may take to answer.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// How the waiting ended.
#[derive(Debug)]
pub(super) struct Outcome {
    /// What is printed.
    pub(super) result: JobResult,
}

impl Outcome {
    /// Submit's own exit status.
    pub(super) fn exit_code(&self) -> ExitCode {
        ExitCode::from(u8::from(self.result.exit_code != 0))
    }
}

/// Why the job is being left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    Interrupted,
    TimedOut(Duration),
}

/// Waits for one job.
#[derive(Debug)]
pub(super) struct Waiter<'a> {
    queue: &'a GroupQueue,
    group: &'a GroupName,
    job: &'a Job,
    notice: Notice,
    /// Whether the directory of answers is there, and listened to; otherwise the group's, in which it appears.
    in_results: bool,
    log: Option<Log>,
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl<'a> Waiter<'a> {
    /// Sets up every watch. Call before the job is submitted, so that no answer can come unseen.
    pub(super) fn new(
        queue: &'a GroupQueue,
        group: &'a GroupName,
        job: &'a Job,
        tail: Option<Tail>,
        raw: bool,
    ) -> Result<Self, CliError> {
        let (notice, in_results) = listen(queue)?;
        Ok(Self {
            queue,
            group,
            job,
            notice,
            in_results,
            log: tail.map(|tail| Log {
                tail,
                escaper: (!raw).then(Escaper::default),
            }),
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the answer, the user's Ctrl-C or the limit.
    pub(super) async fn wait(mut self, limit: Option<Duration>) -> Result<Outcome, CliError> {
        let run = self.job.run_id;
        let mut notice = Some(Instant::now() + NOTICE_AFTER);
        let mut deadline = limit.map(|limit| Instant::now() + limit);
        let mut leaving = None;
        loop {
            // Somebody who stopped reading the log still wants the result.
            if let Some(Err(error)) = self.log.as_mut().map(Log::print) {
                if error.kind() != io::ErrorKind::BrokenPipe {
                    return Err(error.into());
                }
                self.log = None;
            }
            if let Some(mut result) = self.queue.result(run)? {
                if let Some(log) = &mut self.log {
                    // The result is worth more than the log's last lines.
                    let _ = log.print().and_then(|()| log.finish());
                }
                if let Some(Leaving::TimedOut(limit)) = leaving
                    && result.exit_code != 0
                {
                    result = timed_out(self.job, limit);
                }
                return Ok(Outcome { result });
            }
            let left = tokio::select! {
                arrived = self.notice.arrived() => {
                    arrived?;
                    if !self.in_results {
                        (self.notice, self.in_results) = listen(self.queue)?;
                    }
                    continue;
                }
                changed = log_changed(&mut self.log) => {
                    changed?;
                    continue;
                }
                () = sleep(notice) => {
                    notice = None;
                    self.tell_if_alone()?;
                    continue;
                }
                () = sleep(deadline) => match (leaving, limit) {
                    (None, Some(limit)) => Leaving::TimedOut(limit),
                    // Cancelled, and the runner has not answered within the time it has for that.
                    _ => return self.abandon(leaving),
                },
                _ = self.interrupt.recv() => Leaving::Interrupted,
                _ = self.terminate.recv() => Leaving::Interrupted,
                _ = self.hang_up.recv() => Leaving::Interrupted,
            };
            if leaving.is_some() {
                // Asked twice: out at once. The cancel marker stays and the runner follows it.
                return self.abandon(leaving);
            }
            leaving = Some(left);
            deadline = Some(Instant::now() + CANCEL_LIMIT);
            if self.queue.withdraw(run)? {
                return Ok(Outcome {
                    result: match left {
                        Leaving::Interrupted => JobResult::cancelled(run),
                        Leaving::TimedOut(limit) => timed_out(self.job, limit),
                    },
                });
            }
            if self.queue.result(run)?.is_none() {
                self.queue.cancel(run)?;
            }
            note(format_args!(
                "cancelling run {run}; press Ctrl-C again to leave at once"
            ));
        }
    }

    /// Leaves a cancelled job to its runner.
    fn abandon(self, leaving: Option<Leaving>) -> Result<Outcome, CliError> {
        let run = self.job.run_id;
        note(format_args!(
            "run {run} was told to stop and has not answered; left it to its runner"
        ));
        Ok(Outcome {
            result: match leaving {
                Some(Leaving::TimedOut(limit)) => timed_out(self.job, limit),
                _ => JobResult::cancelled(run),
            },
        })
    }

    /// Says so when nobody is there to take the job.
    fn tell_if_alone(&self) -> Result<(), CliError> {
        if self.queue.is_claimed(self.job.run_id)? || !self.queue.live_runners()?.is_empty() {
            return Ok(());
        }
        let group = self.group;
        note(format_args!("waiting: no runner watches group {group}"));
        note(format_args!(
            "hint: start one with `sudo runner start --local --config FILE`; \
             `runner config --name NAME --group {group} --profile {}` writes FILE",
            self.job.profile
        ));
        Ok(())
    }
}

fn timed_out(job: &Job, limit: Duration) -> JobResult {
    JobResult::failed(
        job.run_id,
        JobResult::TIMED_OUT,
        &format!(
            "the job had not ended {} s after its submission and was cancelled",
            limit.as_secs()
        ),
    )
}

fn listen(queue: &GroupQueue) -> Result<(Notice, bool), CliError> {
    let (dir, in_results) = queue.where_answers_appear()?;
    Ok((Notice::new(dir)?, in_results))
}

async fn sleep(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// The job's log on stderr.
#[derive(Debug)]
struct Log {
    tail: Tail,
    escaper: Option<Escaper>,
}

async fn log_changed(log: &mut Option<Log>) -> io::Result<()> {
    match log {
        Some(log) => log.tail.changed().await,
        None => std::future::pending().await,
    }
}

impl Log {
    /// Prints all there is.
    fn print(&mut self) -> io::Result<()> {
        loop {
            let piece = self.tail.read()?;
            if piece.is_empty() {
                return Ok(());
            }
            let mut stderr = io::stderr().lock();
            match &mut self.escaper {
                Some(escaper) => stderr.write_all(escaper.push(&piece).as_bytes())?,
                None => stderr.write_all(&piece)?,
            }
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        let rest = self.escaper.as_mut().map(Escaper::finish);
        io::stderr().write_all(rest.unwrap_or_default().as_bytes())
    }
}
