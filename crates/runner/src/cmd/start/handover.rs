//! Rolling replacement: a new instance of a runner takes over from the one that runs, without a job noticing.
//!
//! ```text
//! service manager      `start --takeover`        new instance              old instance
//!   reload ──────────▶ fork ───────────────────▶ proxy, images, budget,
//!                        │                        signals, queue, socket
//!                        │ waits                  Retire ────────────────▶ drains; its name is free
//!   new main process ◀───┼───────────────────────────────────────────────── MAINPID=new
//!                        │                        takes name and jobs      finishes its jobs, leaves
//!   reload done ◀────── exit 0 ◀───── ready ───── …
//! ```
//!
//! Until `Retire` the old instance knows of nothing: whatever fails before, it goes on. Both may hold claims at the same
//! time; a claim is a link that only one of them can make.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::Duration;

use host::fs::Lock;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitOptions};

use super::{name_if_free, only_one};
use crate::context::CliError;
use crate::control::client::{self, Instance};
use crate::control::protocol::{Reply, Request};
use crate::home::Home;
use crate::names::RunnerName;

/// How long an instance may take to say that it retires. One that says so after that would retire for nobody.
const RETIRE_LIMIT: Duration = Duration::from_secs(30);

/// Which side of the split one is on.
#[derive(Debug)]
pub(super) enum Side {
    /// The command that somebody waits for: it has waited, and this is its exit status.
    Command(ExitCode),
    /// The new instance.
    Instance(Readiness),
}

/// Ends the waiting of the command.
#[derive(Debug)]
pub(super) struct Readiness(File);

impl Readiness {
    /// The instance takes jobs.
    pub(super) fn tell(mut self) {
        // A command that was killed meanwhile waits for nothing.
        let _ = self.0.write_all(b"1");
    }
}

/// Splits the process: the command's part returns when the instance is ready or has failed.
///
/// The instance is no child of the command: a main process that is not systemd's own child is one whose end it does
/// not wait for, so a stop would kill it at once.
///
/// Only while the process has one thread.
pub(super) fn split() -> io::Result<Side> {
    let (reads, writes) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: the process has one thread, so the child may do whatever its parent could.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reads);
            // SAFETY: as above. Ending at once runs nothing of the command's.
            match unsafe { libc::fork() } {
                0 => Ok(Side::Instance(Readiness(writes.into()))),
                // SAFETY: takes no pointers and does not return.
                child => unsafe { libc::_exit(i32::from(child < 0)) },
            }
        }
        between => {
            drop(writes);
            Ok(Side::Command(wait(reads, between)?))
        }
    }
}

fn wait(reads: OwnedFd, between: libc::pid_t) -> io::Result<ExitCode> {
    rustix::process::waitpid(Pid::from_raw(between), WaitOptions::empty())?;
    let mut told = Vec::new();
    // Ends with a word, or with the instance, which has said why on stderr, which we share.
    File::from(reads).read_to_end(&mut told)?;
    Ok(if told.is_empty() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Takes the name of the instance that has it, which retires.
pub(super) async fn take_over(
    home: &Home,
    name: &RunnerName,
    ours: &str,
) -> Result<Lock, CliError> {
    let asked = retire_others(home, name, ours).await;
    // Who does not answer may be one that has retired long ago, or comes up as we do. When the one that had the name has let
    // go of it, there is no way back.
    if let Some(lock) = name_if_free(home, name)? {
        return Ok(lock);
    }
    asked?;
    only_one(home, name)
}

/// Asks every other instance of this name to retire; fails if one did not say that it does.
async fn retire_others(home: &Home, name: &RunnerName, ours: &str) -> Result<(), CliError> {
    let successor = std::process::id();
    let mut all = Ok(());
    for instance in Instance::live(home)? {
        if instance.runner != *name || instance.id == ours {
            continue;
        }
        let retire = Request::Retire { successor };
        match instance.ask_within(RETIRE_LIMIT, &retire).await {
            Ok(Reply::Done) => {}
            Ok(_) => all = Err(client::odd()),
            Err(error) => {
                all = Err(CliError::failed(format_args!(
                    "the running instance of {name} does not hand its jobs over: {error}"
                ))
                .with_hint(format_args!(
                    "it may be of an older version: `runner service drain --name {name} --wait 1h`, then stop and start it"
                )));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use host::fs::LockKind;

    use super::*;
    use crate::home::rel;

    #[tokio::test]
    async fn who_does_not_answer_is_in_the_way_only_with_the_name() {
        let top = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&top.path().join("home")).unwrap();
        let name = "demo".parse().unwrap();
        let instances = home.ensure_dir(rel::instances(&name)).unwrap();
        let silent = instances.create_dir("silent", 0o700).unwrap();
        let _alive = silent.lock("lock", LockKind::Exclusive, 0o600).unwrap();
        let held = name_if_free(&home, &name).unwrap().unwrap();
        let error = take_over(&home, &name, "ours").await.unwrap_err();
        assert!(error.to_string().contains("hand its jobs over"), "{error}");
        drop(held);
        take_over(&home, &name, "ours").await.unwrap();
    }
}
