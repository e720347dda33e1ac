//! Starting a jailed process: its keeper first, then the jailer in the keeper's process namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use rustix::thread::LinkNameSpaceType;

use super::start::{VM_OOM_SCORE, c_string};
use super::{Server, Starting, not_ours};
use crate::launcher::fork::{self, Forked};
use crate::launcher::jailer::{self, Plan, check_program};
use crate::launcher::wire::{JailOrder, Refusal, Unit};
use crate::launcher::{keeper, socket_pair};

impl Server {
    pub(super) fn launch_jailed(
        &mut self,
        id: u64,
        order: JailOrder,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        let unit = Unit::Slot(order.slot);
        let cannot = |message: &dyn ToString| {
            Refusal::step(
                format!("start a jailed process in {unit}"),
                message.to_string(),
            )
        };
        let held = self.units.get(&unit).ok_or_else(|| not_ours(unit))?;
        if held.main.is_some() || held.ending.is_some() {
            return Err(cannot(&"one runs in it already"));
        }
        let mut fds = fds.into_iter();
        let (Some(jailer), Some(program), Some(console)) = (fds.next(), fds.next(), fds.next())
        else {
            return Err(cannot(&"its descriptors are not in order"));
        };
        if fds.len() != order.files.len() {
            return Err(cannot(&"its descriptors are not in order"));
        }
        check_program(&jailer, "jailer").map_err(|e| cannot(&e))?;
        check_program(&program, "firecracker").map_err(|e| cannot(&e))?;
        let args: Result<Vec<_>, _> = order.args.into_iter().map(c_string).collect();
        let args = args.map_err(|e| cannot(&e))?;
        let files: Vec<_> = fds
            .zip(order.files)
            .map(|(fd, (name, writable))| (fd, name, writable))
            .collect();

        let uid = self.uid(unit);
        self.cgroups
            .prepare(uid, &order.limits)
            .map_err(|e| cannot(&format!("its cgroup refused its limits: {e}")))?;
        let oom_before = self.cgroups.oom_kills(uid);
        let pipe = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (report, report_end) = pipe.map_err(|e| cannot(&e))?;
        let (control, control_end) = socket_pair().map_err(|e| cannot(&e))?;
        self.jails.for_jailer().map_err(|e| cannot(&e))?;
        // Last of what may fail before there is a process: from here on the device is the process's.
        if let Some(network) = order.network {
            let used = self
                .units
                .values()
                .any(|held| held.main.is_some() && held.network == Some(network));
            if used {
                return Err(cannot(&format!("network {network} is not free for it")));
            }
            self.networks
                .leave_device(network, uid)
                .map_err(|e| cannot(&e))?;
        }
        let network = match order.network {
            None => None,
            Some(network) => Some(
                self.networks
                    .namespace(network)
                    .ok_or_else(|| cannot(&format!("network {network} is gone")))?,
            ),
        };
        let mount_namespace = self.jails.for_jailer().map_err(|e| cannot(&e))?;
        let plan = Plan {
            uid,
            id: format!("vm-{}", order.slot.0),
            jailer,
            program,
            console,
            args,
            files,
            mount_namespace: mount_namespace.as_fd(),
            network: network.map(AsFd::as_fd),
            oom_score_adj: VM_OOM_SCORE,
            cgroups: &self.cgroups,
            pids_max: order.limits.pids_max,
            control: control_end,
        };
        let group = self.cgroups.open_unified(uid);
        let group = group.as_ref().map(AsFd::as_fd);
        let started = start(&plan, group, &report_end);
        drop((plan, report_end));
        let (pid, pidfd, keeper) = started.map_err(|e| cannot(&e))?;
        let held = self.units.get_mut(&unit).ok_or_else(|| not_ours(unit))?;
        held.oom_before = oom_before;
        held.network = order.network;
        let starting = Starting {
            request: id,
            report,
            control: Some(control),
        };
        held.began((pid, pidfd), starting);
        // Should that of the last process not be reaped yet, it is without being waited for.
        held.keeper = Some(keeper);
        Ok(())
    }
}

/// Starts keeper and jailer; gives the jailer's process, which becomes the program's, and the keeper.
fn start(
    plan: &Plan<'_>,
    group: Option<BorrowedFd<'_>>,
    report: &OwnedFd,
) -> io::Result<(Pid, OwnedFd, (Pid, OwnedFd))> {
    let ours = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    // SAFETY: the launcher is single-threaded, so the child may do what any process may; it ends in `_exit`.
    let keeper = match unsafe { fork::fork_first(group) }? {
        Forked::Parent(pid) => pid,
        Forked::Child { in_group } => keeper::keep(plan.uid, plan.cgroups, in_group, &ours),
    };
    let keeper_fd = watch(keeper)?;
    let started = in_namespace_of(keeper, || {
        // SAFETY: as above; it ends in exec or `_exit`.
        match unsafe { fork::fork(group) }? {
            Forked::Parent(pid) => watch(pid).map(|pidfd| (pid, pidfd)),
            Forked::Child { in_group } => {
                let Err((step, error)) = jailer::become_jailer(plan, in_group);
                let message = format!("it could not {step}: {error}");
                let _ = rustix::io::write(report, message.as_bytes());
                // SAFETY: ends the process without running anything of the launcher's.
                unsafe { libc::_exit(127) }
            }
        }
    });
    match started {
        Ok((pid, pidfd)) => Ok((pid, pidfd, (keeper, keeper_fd))),
        Err(e) => {
            // Whatever is in its namespace goes with it, and all are reaped with the others.
            let _ = rustix::process::pidfd_send_signal(&keeper_fd, Signal::KILL);
            Err(e)
        }
    }
}

/// Calls `work`, whose children are born in the process namespace of `first`.
fn in_namespace_of<T>(first: Pid, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let kind = Some(LinkNameSpaceType::ProcessID);
    let home = File::open("/proc/self/ns/pid")?;
    let theirs = File::open(format!("/proc/{}/ns/pid", first.as_raw_pid()))?;
    rustix::thread::move_into_link_name_space(theirs.as_fd(), kind)?;
    let result = work();
    rustix::thread::move_into_link_name_space(home.as_fd(), kind)?;
    result
}

fn watch(child: Pid) -> io::Result<OwnedFd> {
    // Cannot be somebody else's number: a child stays until we reap it.
    rustix::process::pidfd_open(child, PidfdFlags::empty()).map_err(|e| {
        let _ = rustix::process::kill_process(child, Signal::KILL);
        let _ = rustix::process::waitpid(Some(child), WaitOptions::empty());
        e.into()
    })
}
