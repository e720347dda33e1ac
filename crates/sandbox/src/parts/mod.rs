//! What more than one engine is made of: consoles, disks, the account of a death.

pub mod console;
pub mod disk;
pub mod image;
mod warm_up;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use host::launcher::{Launcher, Reaped};
use host::slot::SlotId;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::SandboxError;
use crate::types::{Death, MemoryStats};
pub use warm_up::warm_up;

/// Runs file work off the runtime's threads.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SandboxError> + Send + 'static,
) -> Result<T, SandboxError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(SandboxError::Io {
            action: "do file work in the background".to_owned(),
            source: std::io::Error::other(error),
        }),
    }
}

/// A step's result, or the error of a limit that passed.
pub async fn within<T>(
    step: &'static str,
    limit: Duration,
    future: impl Future<Output = Result<T, SandboxError>>,
) -> Result<T, SandboxError> {
    let result = tokio::time::timeout(limit, future).await;
    result.unwrap_or_else(|_| {
        Err(SandboxError::Timeout {
            step,
            limit,
            detail: String::new(),
        })
    })
}

/// Waits until a slot's process has died and says how, as its launcher reaped it. Cancel-safe: the launcher keeps its answer.
pub async fn reaped(
    pidfd: &AsyncFd<OwnedFd>,
    launcher: &Launcher,
    slot: SlotId,
) -> Result<Reaped, Death> {
    // An error would be the runtime's own end.
    let _ = pidfd.readable().await;
    launcher.wait(slot).await.map_err(|error| Death {
        reason: error.to_string(),
        oom: false,
    })
}

/// A future's result, and how long it took.
pub async fn timed<T>(future: impl Future<Output = T>) -> (T, Duration) {
    let start = Instant::now();
    let result = future.await;
    (result, start.elapsed())
}

/// Registers a pidfd: it becomes readable when the process has died.
pub fn watch(pidfd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open file until it is dropped, and the `AsyncFd` owns it until then.
    Ok(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?)
}

/// From `/proc/<pid>/status`, which anybody may read, as a VM's process belongs to another user than the runner: pages
/// that a clone copied for itself count as anonymous, untouched ones as the template's shared memory.
pub fn memory_of(pid: u32) -> Result<MemoryStats, SandboxError> {
    let path = format!("/proc/{pid}/status");
    let status = std::fs::read_to_string(&path).map_err(|source| SandboxError::Io {
        action: format!("read {path}"),
        source,
    })?;
    Ok(parse_memory(&status))
}

fn parse_memory(status: &str) -> MemoryStats {
    let kilobytes = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    MemoryStats {
        private_dirty: kilobytes("RssAnon") * 1024,
        resident: kilobytes("VmRSS") * 1024,
    }
}

/// What the kernel printed as it panicked, if it did.
pub fn panic_line(console: &str) -> Option<&str> {
    let at = console.rfind("Kernel panic")?;
    console.get(at..)?.lines().next()
}

/// A clause with the last line of a console, or nothing.
pub fn last_line(console: &str) -> String {
    console
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .map(|line| format!("; the last line of its console was: {line}"))
        .unwrap_or_default()
}

/// A clause with the name of a signal that processes of VMs die of, or nothing.
pub fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGKILL => " (SIGKILL)",
        libc::SIGSEGV => " (SIGSEGV)",
        libc::SIGABRT => " (SIGABRT)",
        libc::SIGBUS => " (SIGBUS: the host could not back its memory)",
        libc::SIGSYS => " (SIGSYS: it made a system call its seccomp filter forbids)",
        libc::SIGTERM => " (SIGTERM)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_passes_names_its_step() {
        let limit = Duration::from_secs(3);
        let done = within("save", limit, async { Ok(7) }).await;
        assert_eq!(done.unwrap(), 7);
        let hung = std::future::pending::<Result<(), SandboxError>>();
        let error = within("save", limit, hung).await.unwrap_err();
        assert_eq!(error.to_string(), "the VM did not get to `save` within 3s");
    }

    #[test]
    fn memory_comes_from_the_status_file() {
        let stats = parse_memory("Name:\tqemu\nVmRSS:\t   60000 kB\nRssAnon:\t   20000 kB\n");
        assert_eq!(stats.private_dirty, 20000 * 1024);
        assert_eq!(stats.resident, 60000 * 1024);
    }
}
