//! Starting a slot's process: checks and cgroup here, the rest in the child.

use std::ffi::{CString, OsStr};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;
use rustix::process::{PidfdFlags, Signal, WaitOptions};

use super::{Held, Main, Server, Starting, not_ours};
use crate::launcher::child::{self, Plan};
use crate::launcher::fork::{self, Forked};
use crate::launcher::jail::ServiceRoot;
use crate::launcher::wire::{self, LaunchKind, LaunchOrder, Refusal, Reply, Unit};
use crate::launcher::{SERVICES, ServiceId};
use crate::slot::SLOTS;

/// VM processes are the first to go when the host runs out of memory; the kernel's scale ends at 1000.
pub(super) const VM_OOM_SCORE: i32 = 500;
/// A service goes after them, as every VM depends on it, and before the runner itself.
const SERVICE_OOM_SCORE: i32 = 0;

/// What differs between a VM's process and a service.
struct Place {
    mount_namespace: OwnedFd,
    network: Option<OwnedFd>,
    environment: Vec<CString>,
    oom_score_adj: i32,
}

impl Server {
    /// Makes sure that a service has a number of its own in the run directory.
    fn claim_service(&mut self, service: ServiceId) -> Result<(), String> {
        let mut services = std::mem::take(&mut self.services);
        let claimed = services.claim(self.store.run_dir(), service, |number| {
            self.clean_uid(self.uid_of_number(SLOTS.saturating_add(number)))
        });
        self.services = services;
        match claimed {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(format!(
                "all {SERVICES} services of {} are in use by runners of this host",
                self.config.run_dir.display()
            )),
            Err(error) => Err(error.to_string()),
        }
    }

    pub(super) fn launch(
        &mut self,
        id: u64,
        order: LaunchOrder,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        let unit = order.kind.unit();
        let cannot = |message: &dyn ToString| {
            Refusal::step(format!("start a process in {unit}"), message.to_string())
        };
        if let Unit::Service(service) = unit {
            if service.0 >= SERVICES {
                return Err(cannot(&format!("there are {SERVICES} services")));
            }
            self.claim_service(service).map_err(|e| cannot(&e))?;
            self.units.entry(unit).or_insert_with(|| Held::new(None));
        }
        let uid = self.uid(unit);
        let held = self.units.get(&unit).ok_or_else(|| not_ours(unit))?;
        if held.main.is_some() || held.ending.is_some() {
            return Err(cannot(&"one runs in it already"));
        }
        if fds.len() < order.targets.len() {
            return Err(cannot(&"its descriptors are not in order"));
        }
        let shown = fds.split_off(order.targets.len());
        let mut fds: Vec<_> = fds.into_iter().zip(order.targets).collect();
        let program = Path::new(OsStr::from_bytes(&order.program));
        if !program.is_absolute() {
            return Err(cannot(&"its program has no absolute path"));
        }
        let program = c_string(order.program).map_err(|e| cannot(&e))?;
        let mut argv = vec![program.clone()];
        for arg in order.args {
            argv.push(c_string(arg).map_err(|e| cannot(&e))?);
        }
        let network = match &order.kind {
            LaunchKind::Vm { network, .. } => network.map(|(network, _)| network),
            LaunchKind::Service { .. } => None,
        };
        let place = self
            .place(order.kind, shown, &mut fds)
            .map_err(|e| cannot(&e))?;
        if fds.iter().any(|(_, target)| !(0..1024).contains(target)) {
            return Err(cannot(&"its descriptors are not in order"));
        }

        self.cgroups
            .prepare(uid, &order.limits)
            .map_err(|e| cannot(&format!("its cgroup refused its limits: {e}")))?;
        let oom_before = self.cgroups.oom_kills(uid);
        let (report, report_end) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| cannot(&e))?;
        let plan = Plan {
            uid,
            program,
            argv,
            environment: place.environment,
            fds,
            mount_namespace: place.mount_namespace.as_fd(),
            network: place.network.as_ref().map(AsFd::as_fd),
            oom_score_adj: place.oom_score_adj,
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
        let held = self.units.get_mut(&unit).ok_or_else(|| not_ours(unit))?;
        held.oom_before = oom_before;
        held.network = network;
        let starting = Starting {
            request: id,
            report,
            control: None,
        };
        held.began((pid, pidfd), starting);
        Ok(())
    }

    /// Finds, or furnishes, where the process will be; a VM's network adds its device to the descriptors.
    fn place(
        &mut self,
        kind: LaunchKind,
        shown: Vec<OwnedFd>,
        fds: &mut Vec<(OwnedFd, i32)>,
    ) -> Result<Place, String> {
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(|e| e.to_string());
        match kind {
            LaunchKind::Vm {
                devices, network, ..
            } => {
                if !shown.is_empty() {
                    return Err("its descriptors are not in order".to_owned());
                }
                let namespace = match network {
                    None => None,
                    Some((id, target)) => {
                        let used = self
                            .units
                            .values()
                            .any(|held| held.main.is_some() && held.network == Some(id));
                        let (namespace, tap) = self
                            .networks
                            .for_launch(id)
                            .filter(|_| !used)
                            .ok_or_else(|| format!("network {id} is not free for it"))?;
                        fds.push((copy(tap)?, target));
                        Some(copy(namespace)?)
                    }
                };
                let devices = devices.iter();
                let devices = devices
                    .map(|path| PathBuf::from(OsStr::from_bytes(path)))
                    .collect();
                Ok(Place {
                    mount_namespace: copy(self.jails.for_devices(devices)?)?,
                    network: namespace,
                    environment: Vec::new(),
                    oom_score_adj: VM_OOM_SCORE,
                })
            }
            LaunchKind::Service {
                environment,
                resolv_conf,
                shown: paths,
                ..
            } => {
                if shown.len() != paths.len() {
                    return Err("its directories are not in order".to_owned());
                }
                let hub = self.networks.hub_namespace();
                let hub =
                    copy(hub.ok_or("a service runs in the network's hub, and there is none yet")?)?;
                let paths = paths.iter();
                let paths = paths.map(|path| PathBuf::from(OsStr::from_bytes(path)));
                let root = ServiceRoot {
                    resolv_conf,
                    shown: shown.into_iter().zip(paths).collect(),
                };
                let environment: Result<_, _> = environment.into_iter().map(c_string).collect();
                Ok(Place {
                    mount_namespace: self.jails.for_service(&root)?,
                    network: Some(hub),
                    environment: environment?,
                    oom_score_adj: SERVICE_OOM_SCORE,
                })
            }
        }
    }

    /// Answers launches whose child has reached exec. One that failed before it is answered when it is reaped, so that
    /// the slot is free again by then.
    pub(super) fn see_starts(&mut self) {
        let mut started = Vec::new();
        for held in self.units.values_mut() {
            if let Some(main) = held.main.as_mut()
                && let Some(starting) = main.starting.take_if(|s| is_readable(&s.report))
            {
                let request = starting.request;
                match main.outcome(starting) {
                    Ok(reply) => started.push((request, reply)),
                    Err(message) => {
                        main.failed = Some((request, message));
                        // Should it run all the same, nobody could do anything with it.
                        let _ = rustix::process::pidfd_send_signal(&main.pidfd, Signal::KILL);
                    }
                }
            }
        }
        for (request, (reply, fds)) in started {
            self.answer_with(request, Ok(reply), &fds);
        }
    }
}

impl Main {
    /// What a launch is answered with, once its report has ended; or why it failed.
    pub(super) fn outcome(&self, starting: Starting) -> Result<(Reply, Vec<OwnedFd>), String> {
        if let Some(message) = read_report(starting.report) {
            return Err(message);
        }
        let pid = u32::try_from(self.pid.as_raw_pid()).unwrap_or(0);
        let mut fds = vec![self.pidfd.try_clone().map_err(|e| e.to_string())?];
        if let Some(control) = starting.control {
            let mut buffer = [0; 16];
            let received = wire::receive::<bool>(&control, &mut buffer, RecvFlags::DONTWAIT);
            match received {
                Ok(Some((_, received))) => fds.extend(received),
                _ => return Err("its control directory did not arrive".to_owned()),
            }
        }
        Ok((Reply::Started { pid }, fds))
    }
}

pub(super) fn c_string(bytes: Vec<u8>) -> Result<CString, String> {
    CString::new(bytes).map_err(|_| "an argument or variable holds a NUL byte".to_owned())
}

/// Why a child did not reach exec; nothing if it did.
fn read_report(report: OwnedFd) -> Option<String> {
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
