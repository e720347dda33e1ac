//! Starting a slot's process: checks and cgroup here, the rest in the child.

use std::ffi::{CString, OsStr};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, Signal, WaitOptions};

use super::{Main, Server, Starting, not_ours};
use crate::launcher::child::{self, Plan};
use crate::launcher::fork::{self, Forked};
use crate::launcher::wire::{LaunchOrder, Refusal, Reply};

impl Server {
    pub(super) fn launch(
        &mut self,
        id: u64,
        order: LaunchOrder,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        let slot = order.slot;
        let uid = self.uid(slot);
        let cannot = |message: &dyn ToString| {
            Refusal::step(
                format!("start a process in slot {}", slot.0),
                message.to_string(),
            )
        };
        let held = self.slots.get_mut(&slot).ok_or_else(|| not_ours(slot))?;
        if held.main.is_some() || held.ending.is_some() {
            return Err(cannot(&"one runs in it already"));
        }
        if fds.len() != order.targets.len() || order.targets.iter().any(|n| !(0..1024).contains(n))
        {
            return Err(cannot(&"its descriptors are not in order"));
        }
        let program = Path::new(OsStr::from_bytes(&order.program));
        if !program.is_absolute() {
            return Err(cannot(&"its program has no absolute path"));
        }
        let c_string = |bytes: Vec<u8>| {
            CString::new(bytes).map_err(|_| cannot(&"an argument holds a NUL byte"))
        };
        let program = c_string(order.program)?;
        let mut argv = vec![program.clone()];
        for arg in order.args {
            argv.push(c_string(arg)?);
        }
        let devices = order.devices.iter();
        let devices = devices
            .map(|path| PathBuf::from(OsStr::from_bytes(path)))
            .collect();
        let mount_namespace = self.jails.for_devices(devices).map_err(|e| cannot(&e))?;

        self.cgroups
            .prepare(uid, &order.limits)
            .map_err(|e| cannot(&format!("its cgroup refused its limits: {e}")))?;
        held.oom_before = self.cgroups.oom_kills(uid);
        held.last = None;

        let (report, report_end) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| cannot(&e))?;
        let plan = Plan {
            uid,
            program,
            argv,
            fds: fds.into_iter().zip(order.targets).collect(),
            mount_namespace: mount_namespace.as_fd(),
            cgroups: &self.cgroups,
            pids_max: order.limits.pids_max,
            parent: self.own_pid,
        };
        let group = self.cgroups.open_unified(uid);
        // SAFETY: the launcher is single-threaded, so the child may do what any process may; it ends in exec or _exit.
        let pid = match unsafe { fork::fork(group.as_ref().map(AsFd::as_fd)) } {
            Ok(Forked::Parent(pid)) => pid,
            Ok(Forked::Child { in_group }) => run_child(&plan, in_group, &report_end),
            Err(e) => return Err(cannot(&e)),
        };
        drop(report_end);
        // Cannot be somebody else's number: a child stays until we reap it.
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(e) => {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
                return Err(cannot(&e));
            }
        };
        held.main = Some(Main {
            pid,
            pidfd,
            starting: Some(Starting {
                request: id,
                report,
            }),
            failed: None,
        });
        Ok(())
    }

    /// Answers launches whose child has reached exec. One that failed before it is answered when it is reaped, so that
    /// the slot is free again by then.
    pub(super) fn see_starts(&mut self) {
        let mut started = Vec::new();
        for held in self.slots.values_mut() {
            if let Some(main) = held.main.as_mut()
                && let Some(starting) = main.starting.take_if(|s| is_readable(&s.report))
            {
                match read_report(starting.report) {
                    None => started.push((starting.request, main.reply())),
                    Some(message) => main.failed = Some((starting.request, message)),
                }
            }
        }
        for (request, (reply, pidfd)) in started {
            self.answer_with(request, Ok(reply), pidfd.as_ref());
        }
    }
}

impl Main {
    /// What a launch is answered with.
    pub(super) fn reply(&self) -> (Reply, Option<OwnedFd>) {
        let pid = u32::try_from(self.pid.as_raw_pid()).unwrap_or(0);
        (Reply::Started { pid }, self.pidfd.try_clone().ok())
    }
}

/// Why a child did not reach exec; nothing if it did.
pub(super) fn read_report(report: OwnedFd) -> Option<String> {
    let mut message = String::new();
    if let Err(e) = std::fs::File::from(report).read_to_string(&mut message) {
        message = e.to_string();
    }
    (!message.is_empty()).then_some(message)
}

/// The child's side of the fork: exec, or report why not.
fn run_child(plan: &Plan<'_>, in_group: bool, report: &OwnedFd) -> ! {
    let Err((step, error)) = child::become_program(plan, in_group);
    let _ = rustix::io::write(report, format!("it could not {step}: {error}").as_bytes());
    // SAFETY: ends the process without running anything of the launcher's.
    unsafe { libc::_exit(127) }
}

fn is_readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    matches!(rustix::event::poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
}
