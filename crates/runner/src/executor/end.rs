//! How a job ended, and why.

use std::time::Duration;

use guest_control::{ControlError, ExitReport, ExitStatus};
use sandbox::{Sandbox, SandboxError};
use tokio::time::timeout;

use crate::names::RunId;
use crate::queue::JobResult;

/// How long a VM whose control channel ended may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// A disk with less than this free is what a failed job failed of, most likely.
const DISK_FULL_BYTES: u64 = 1 << 20;

/// How a job ended.
pub(crate) struct Ended {
    /// The answer.
    pub(crate) result: JobResult,
    /// Whether the VM is fit for the session's next job.
    pub(crate) reusable: bool,
    /// It is the runner's failure and not the agent's.
    pub(crate) fault: bool,
}

impl Ended {
    pub(super) fn failed(result: JobResult) -> Self {
        Self {
            // Cancelled jobs and those whose time ran out have another.
            fault: result.exit_code == 1,
            result,
            reusable: false,
        }
    }
}

pub(super) fn timed_out(run: RunId, limit: Duration) -> JobResult {
    let why = format!("timed out after {} s", limit.as_secs());
    JobResult::failed(run, JobResult::TIMED_OUT, &why)
}

/// Turns the agent's end into an answer that says what happened.
pub(super) fn judge(run: RunId, report: &ExitReport, limit: Duration, last_line: &str) -> Ended {
    let code = match report.status {
        ExitStatus::Exited(0) => {
            return Ended {
                result: JobResult::exited(run, 0),
                reusable: true,
                fault: false,
            };
        }
        ExitStatus::Exited(code) => code,
        ExitStatus::Signaled(signal) => signal.saturating_add(128),
        ExitStatus::TimedOut => return Ended::failed(timed_out(run, limit)),
    };
    let mut why = Vec::new();
    if report.oom_kills > 0 {
        why.push(format!(
            "out of memory: the VM's kernel killed {} of the job's processes",
            report.oom_kills
        ));
    }
    if report.pids_limit_hits > 0 {
        why.push("process limit reached: the job could not start more processes".to_owned());
    }
    if report.disk_free_bytes < DISK_FULL_BYTES {
        why.push("disk full: the VM's disk has no space left".to_owned());
    }
    if why.is_empty() {
        why.push(match report.status {
            ExitStatus::Signaled(signal) => format!("the agent was killed by signal {signal}"),
            _ if last_line.is_empty() => format!("the agent exited with code {code}"),
            _ => last_line.to_owned(),
        });
    }
    Ended {
        result: JobResult::failed(run, code, &why.join("; ")),
        // A failed job's VM may be in any state: full disk, half-written files.
        reusable: false,
        fault: false,
    }
}

/// Says why the control channel failed: the VM's own end explains more than the channel's.
pub(super) async fn explain(sandbox: &Sandbox, error: SandboxError) -> String {
    let closed = matches!(
        error,
        SandboxError::Control(ControlError::Closed | ControlError::Protocol(_))
            | SandboxError::Died(_)
    );
    if !closed {
        return error.to_string();
    }
    match timeout(LAST_WORDS, sandbox.died()).await {
        Ok(death) if death.oom => format!("VM died: out of memory on the host ({})", death.reason),
        Ok(death) => format!("VM died: {}", death.reason),
        Err(_) => error.to_string(),
    }
}
