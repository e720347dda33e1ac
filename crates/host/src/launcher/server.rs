//! The launcher's own loop: one thread, one poll, no waiting anywhere else.
//!
//! ```text
//!            launch                 exec seen            main process reaped
//!   held ──────────────▶ launching ───────────▶ running ─────────────────────▶ dead ──▶ (launch again)
//!    ▲ │                     │ failed before exec                               │
//!    │ └── release ──▶ ending ◀── kill / release (SIGKILL to all, wait until nothing of the slot is left) ──┘
//!  reserve                 └──▶ kill: held again       release: group removed, file removed, unlocked
//! ```
//!
//! At the end of the connection every slot is ended and the process exits.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus};

use super::child::{self, Plan};
use super::jail::Jails;
use super::wire::{self, LaunchOrder, Op, Refusal, Reply, Request, Response};
use super::{LauncherConfig, Reaped};
use crate::cgroup::Cgroups;
use crate::process;
use crate::slot::{Holding, SlotId, SlotRecord, SlotStore, StoreError};

/// Signals that a terminal, a service manager or a person sends to the whole group: the daemon decides what they
/// mean, and the launcher ends when the daemon does.
pub(super) const IGNORED_SIGNALS: [libc::c_int; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPIPE,
];

/// How often a slot that is ending is looked at again, beside every death that is reported.
const ENDING_LOOK: Duration = Duration::from_millis(10);
/// How long the end of the connection may take: VMs must be gone within a second of their daemon.
const LAST_CLEANING: Duration = Duration::from_millis(900);
/// How long processes of a dead owner may take to die.
const ORPHAN_LIMIT: Duration = Duration::from_secs(2);

/// A slot we hold and what goes on in it.
struct Slot {
    holding: Holding,
    main: Option<Main>,
    /// What the last main process left.
    last: Option<Reaped>,
    /// Requests to answer when the main process is dead.
    waiters: Vec<u64>,
    ending: Option<Ending>,
    /// Out-of-memory kills counted before the main process started.
    oom_before: u64,
}

struct Main {
    pid: Pid,
    pidfd: OwnedFd,
    /// The exec has not been seen yet.
    starting: Option<Starting>,
}

struct Starting {
    request: u64,
    /// Ends without a byte when exec closes it; otherwise says what failed.
    report: OwnedFd,
}

/// Requests to answer when nothing of the slot runs any more.
#[derive(Default)]
struct Ending {
    kills: Vec<u64>,
    releases: Vec<u64>,
}

pub(super) struct Server {
    socket: OwnedFd,
    signals: OwnedFd,
    config: LauncherConfig,
    own_pid: Option<Pid>,
    store: SlotStore,
    cgroups: Cgroups,
    jails: Jails,
    slots: BTreeMap<SlotId, Slot>,
}

impl Server {
    /// Prepares everything that may fail, so that the daemon hears of it before its first job.
    pub(super) fn new(socket: OwnedFd, config: LauncherConfig) -> Result<Server, Refusal> {
        let signals = take_signals().map_err(|e| Refusal::step("listen for dying children", e))?;
        let store = SlotStore::open(&config.run_dir)
            .map_err(|e| Refusal::step("open the run directory", e))?;
        let site = config.run_dir.join("root");
        store
            .run_dir()
            .create_dir("root", 0o755)
            .map_err(|e| Refusal::step("make the root's directory", e))?;
        let mut cgroups = Cgroups::detect();
        cgroups.establish();
        let mut jails = Jails::new(site);
        jails
            .for_devices(Vec::new())
            .map_err(|e| Refusal::step("make the VMs' mount namespace", e))?;
        Ok(Server {
            socket,
            signals,
            config,
            own_pid: Some(rustix::process::getpid()),
            store,
            cgroups,
            jails,
            slots: BTreeMap::new(),
        })
    }

    /// Serves until the daemon is gone, then ends everything.
    pub(super) fn run(mut self) {
        let mut buffer = vec![0; wire::MAX_MESSAGE];
        while let Ok(ready) = self.poll() {
            self.see_starts();
            self.reap();
            self.continue_endings();
            if ready {
                match wire::receive::<Request>(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                    Ok(Some((request, fds))) => self.serve(request, fds),
                    Err(Errno::AGAIN) => {}
                    // The end of the connection, or something that is not our daemon's: both mean the end.
                    Ok(None) | Err(_) => break,
                }
            }
        }
        self.end_everything();
    }

    /// Waits for something to do; true if the socket has something.
    fn poll(&self) -> rustix::io::Result<bool> {
        let ending = self.slots.values().any(|slot| slot.ending.is_some());
        let timeout = ending
            .then(|| Timespec::try_from(ENDING_LOOK).ok())
            .flatten();
        let mut fds = vec![
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        let reports = self.slots.values().filter_map(|slot| {
            let starting = slot.main.as_ref()?.starting.as_ref()?;
            Some(PollFd::new(&starting.report, PollFlags::IN))
        });
        fds.extend(reports);
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) => Ok(fds.first().is_some_and(|fd| !fd.revents().is_empty())),
            Err(Errno::INTR) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn answer(&self, id: u64, result: Result<Reply, Refusal>) {
        self.answer_with(id, result, None);
    }

    fn answer_with(&self, id: u64, result: Result<Reply, Refusal>, fd: Option<&OwnedFd>) {
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        // A daemon that is gone is noticed by the next read.
        let _ = wire::encode(&Response { id, result })
            .and_then(|bytes| wire::send(&self.socket, &bytes, &fds));
    }

    fn serve(&mut self, request: Request, fds: Vec<OwnedFd>) {
        let Request { id, op } = request;
        match op {
            Op::Reserve(record, limits) => {
                let result = self.reserve(record, &limits);
                self.answer(id, result);
            }
            Op::Update(slot, record, limits) => {
                let ours = self.records();
                let result = match self.slots.get_mut(&slot) {
                    Some(held) => self
                        .store
                        .update(slot, &mut held.holding, record, &limits, &ours)
                        .map(|()| Reply::Done)
                        .map_err(|e| refusal("update the slot", e)),
                    None => Err(not_ours(slot)),
                };
                self.answer(id, result);
            }
            Op::Launch(order) => {
                if let Err(refusal) = self.launch(id, order, fds) {
                    self.answer(id, Err(refusal));
                }
            }
            Op::Kill(slot) => self.end(slot, id, |ending| &mut ending.kills),
            Op::Release(slot) => self.end(slot, id, |ending| &mut ending.releases),
            Op::Wait(slot) => match self.slots.get_mut(&slot) {
                None => self.answer(id, Err(not_ours(slot))),
                Some(held) if held.main.is_some() => held.waiters.push(id),
                Some(held) => {
                    let result = match held.last {
                        Some(_) => Ok(Reply::Reaped(held.last)),
                        None => Err(Refusal::step(
                            format!("wait for the process of slot {}", slot.0),
                            "none was started in it",
                        )),
                    };
                    self.answer(id, result);
                }
            },
            Op::Usage => {
                let result = self.store.usage(&self.records());
                let result = result
                    .map(Reply::Usage)
                    .map_err(|e| Refusal::step("look at the host's slots", e));
                self.answer(id, result);
            }
            Op::ReclaimOrphans => {
                let ours = self.records();
                let result = self
                    .store
                    .reclaim_orphans(&ours, |slot| self.clean_orphan(slot));
                let result = result
                    .map(Reply::Count)
                    .map_err(|e| Refusal::step("reclaim slots", e));
                self.answer(id, result);
            }
            Op::Memory(slot) => match self.memory_file(slot) {
                Ok(file) => self.answer_with(id, Ok(Reply::MemoryFile), Some(&file)),
                Err(refusal) => self.answer(id, Err(refusal)),
            },
        }
    }

    fn records(&self) -> BTreeMap<SlotId, SlotRecord> {
        let records = self.slots.iter();
        records
            .map(|(slot, held)| (*slot, held.holding.record.clone()))
            .collect()
    }

    fn uid(&self, slot: SlotId) -> u32 {
        self.config.uid_base.saturating_add(u32::from(slot.0))
    }

    fn reserve(
        &mut self,
        record: SlotRecord,
        limits: &crate::slot::HostLimits,
    ) -> Result<Reply, Refusal> {
        let ours = self.records();
        let (slot, holding) = self
            .store
            .reserve(&record, limits, &ours, |slot| self.clean_orphan(slot))
            .map_err(|e| refusal("reserve a slot", e))?;
        self.slots.insert(
            slot,
            Slot {
                holding,
                main: None,
                last: None,
                waiters: Vec::new(),
                ending: None,
                oom_before: 0,
            },
        );
        Ok(Reply::Slot(slot))
    }

    /// Kills what a dead owner left running in a slot and removes its group; false if something stays.
    fn clean_orphan(&self, slot: SlotId) -> bool {
        let uid = self.uid(slot);
        process::kill_uid(uid, ORPHAN_LIMIT) && self.remove_group(uid)
    }

    /// The kernel lets go of a group a moment after its last process is reaped by somebody else.
    fn remove_group(&self, uid: u32) -> bool {
        let deadline = Instant::now() + Duration::from_millis(200);
        loop {
            match self.cgroups.remove(uid) {
                Ok(()) => return true,
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(_) => return false,
            }
        }
    }

    fn launch(&mut self, id: u64, order: LaunchOrder, fds: Vec<OwnedFd>) -> Result<(), Refusal> {
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
        // SAFETY: the launcher is single-threaded, so the child may do what any process may; it ends in exec or _exit.
        let pid = match unsafe { libc::fork() } {
            -1 => return Err(cannot(&io::Error::last_os_error())),
            0 => run_child(&plan, &report_end),
            pid => Pid::from_raw(pid).ok_or_else(|| cannot(&"fork gave no process"))?,
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
        });
        Ok(())
    }

    /// Answers launches whose child has reached exec or failed before it.
    fn see_starts(&mut self) {
        let mut answers = Vec::new();
        for (slot, held) in &mut self.slots {
            let Some(main) = held.main.as_mut() else {
                continue;
            };
            let Some(starting) = main.starting.take_if(|s| is_readable(&s.report)) else {
                continue;
            };
            let mut message = String::new();
            let read = std::fs::File::from(starting.report).read_to_string(&mut message);
            let result = match read {
                Ok(0) => main.pidfd.try_clone().map_err(|e| e.to_string()),
                Ok(_) => Err(message),
                Err(e) => Err(e.to_string()),
            };
            let pid = u32::try_from(main.pid.as_raw_pid()).unwrap_or(0);
            answers.push((starting.request, *slot, pid, result));
        }
        for (request, slot, pid, result) in answers {
            match result {
                Ok(pidfd) => self.answer_with(request, Ok(Reply::Started { pid }), Some(&pidfd)),
                Err(message) => self.answer(
                    request,
                    Err(Refusal::step(
                        format!("start a process in slot {}", slot.0),
                        message,
                    )),
                ),
            }
        }
    }

    /// Reaps every dead child: main processes, and whatever they left to us as their subreaper.
    fn reap(&mut self) {
        // Several deaths may be one signal; what matters is that it is no longer pending.
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.signals, &mut info).is_ok_and(|read| read > 0) {}
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let uid_base = self.config.uid_base;
            let Some((slot, held)) = self
                .slots
                .iter_mut()
                .find(|(_, held)| held.main.as_ref().is_some_and(|main| main.pid == pid))
            else {
                continue;
            };
            // A child that failed before exec has its report read before it is forgotten.
            if let Some(starting) = held.main.take().and_then(|main| main.starting) {
                let mut message = String::new();
                let _ = std::fs::File::from(starting.report).read_to_string(&mut message);
                if message.is_empty() {
                    "it died at once".clone_into(&mut message);
                }
                let step = format!("start a process in slot {}", slot.0);
                let result = Err(Refusal::step(step, message));
                let _ = wire::encode(&Response {
                    id: starting.request,
                    result,
                })
                .and_then(|bytes| wire::send(&self.socket, &bytes, &[]));
            }
            let uid = uid_base.saturating_add(u32::from(slot.0));
            let reaped = Reaped {
                oom_killed: self.cgroups.oom_kills(uid) > held.oom_before,
                ..reaped(status)
            };
            held.last = Some(reaped);
            for waiter in std::mem::take(&mut held.waiters) {
                self.answer(waiter, Ok(Reply::Reaped(Some(reaped))));
            }
        }
    }

    /// Begins to end a slot's processes; the request is answered when nothing is left of them.
    fn end(&mut self, slot: SlotId, id: u64, requests: fn(&mut Ending) -> &mut Vec<u64>) {
        let Some(held) = self.slots.get_mut(&slot) else {
            self.answer(id, Err(not_ours(slot)));
            return;
        };
        requests(held.ending.get_or_insert_default()).push(id);
        if let Some(main) = &held.main {
            // Our child, not reaped: the number is still its own.
            let _ = rustix::process::pidfd_send_signal(&main.pidfd, Signal::KILL);
        }
        self.continue_ending(slot);
    }

    fn continue_endings(&mut self) {
        let ending: Vec<SlotId> = self
            .slots
            .iter()
            .filter(|(_, held)| held.ending.is_some())
            .map(|(slot, _)| *slot)
            .collect();
        for slot in ending {
            self.continue_ending(slot);
        }
    }

    /// Kills what is left of a slot that is ending, or answers when nothing is.
    fn continue_ending(&mut self, slot: SlotId) {
        let uid = self.uid(slot);
        let Some(held) = self.slots.get_mut(&slot) else {
            return;
        };
        if held.main.is_some() || !kill_rest(&self.cgroups, uid) {
            return;
        }
        let Some(ending) = held.ending.take() else {
            return;
        };
        let last = held.last;
        for id in ending.kills {
            self.answer(id, Ok(Reply::Reaped(last)));
        }
        if ending.releases.is_empty() {
            return;
        }
        let result = self.give_back(slot);
        for id in ending.releases {
            let result = result.as_ref().map(|()| Reply::Done);
            self.answer(id, result.map_err(|e| Refusal::step("release a slot", e)));
        }
    }

    /// Removes what is named after an empty slot and unlocks it.
    fn give_back(&mut self, slot: SlotId) -> Result<(), String> {
        if !self.remove_group(self.uid(slot)) {
            return Err(format!("the cgroup of slot {} is not empty", slot.0));
        }
        let Some(held) = self.slots.remove(&slot) else {
            return Ok(());
        };
        for waiter in held.waiters {
            self.answer(waiter, Err(not_ours(slot)));
        }
        let ours = self.records();
        self.store
            .release(slot, held.holding, &ours)
            .map_err(|e| e.to_string())
    }

    fn memory_file(&self, slot: SlotId) -> Result<OwnedFd, Refusal> {
        let cannot = |message: &dyn ToString| {
            Refusal::step(
                format!("read the memory of slot {}", slot.0),
                message.to_string(),
            )
        };
        let held = self.slots.get(&slot).ok_or_else(|| not_ours(slot))?;
        let main = held
            .main
            .as_ref()
            .ok_or_else(|| cannot(&"nothing runs in it"))?;
        // The kernel checks who may look when the file is opened, so the daemon may read what root opened.
        let path = format!("/proc/{}/smaps_rollup", main.pid.as_raw_pid());
        let file = std::fs::File::open(path).map_err(|e| cannot(&e))?;
        Ok(file.into())
    }

    /// The daemon is gone: kill everything, reap it, and leave nothing named behind.
    fn end_everything(&mut self) {
        let deadline = Instant::now() + LAST_CLEANING;
        for held in self.slots.values() {
            if let Some(main) = &held.main {
                let _ = rustix::process::pidfd_send_signal(&main.pidfd, Signal::KILL);
            }
        }
        while Instant::now() < deadline {
            self.reap();
            let slots: Vec<SlotId> = self.slots.keys().copied().collect();
            for slot in slots {
                let dead = self
                    .slots
                    .get(&slot)
                    .is_some_and(|held| held.main.is_none());
                if dead && kill_rest(&self.cgroups, self.uid(slot)) {
                    // What stays behind is found by the next runner's reclaim.
                    let _ = self.give_back(slot);
                }
            }
            if self.slots.is_empty() {
                break;
            }
            let mut fds = [PollFd::new(&self.signals, PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, Timespec::try_from(ENDING_LOOK).ok().as_ref());
        }
        self.cgroups.remove_parents();
    }
}

/// Kills whatever else runs in a slot whose main process is dead; true if there was nothing.
fn kill_rest(cgroups: &Cgroups, uid: u32) -> bool {
    match cgroups.members(uid) {
        // A process cannot leave its group: it sees no cgroup file system.
        Some(members) if members.is_empty() => true,
        Some(_) | None => {
            let left = process::of_uid(uid);
            for process in &left {
                let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
            }
            left.is_empty()
        }
    }
}

/// The child's side of the fork: exec, or report why not.
fn run_child(plan: &Plan<'_>, report: &OwnedFd) -> ! {
    let Err((step, error)) = child::become_program(plan);
    let _ = rustix::io::write(report, format!("it could not {step}: {error}").as_bytes());
    // SAFETY: ends the process without running anything of the launcher's.
    unsafe { libc::_exit(127) }
}

fn is_readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    matches!(rustix::event::poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
}

fn reaped(status: WaitStatus) -> Reaped {
    Reaped {
        code: status.exit_status(),
        signal: status.terminating_signal(),
        oom_killed: false,
    }
}

fn not_ours(slot: SlotId) -> Refusal {
    Refusal::step(
        format!("use slot {}", slot.0),
        "this runner does not hold it",
    )
}

fn refusal(step: &str, error: StoreError) -> Refusal {
    match error {
        StoreError::NoRoom(usage) => Refusal::NoRoom(usage),
        StoreError::NoSlot(slots) => Refusal::NoSlot(slots),
        StoreError::Fs(error) => Refusal::step(step, error),
    }
}

/// Ignores what is not for us and turns SIGCHLD into something to poll.
fn take_signals() -> io::Result<OwnedFd> {
    for signal in IGNORED_SIGNALS {
        // SAFETY: SIG_IGN is a valid disposition for these signals.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: sigset_t is plain data, initialised by sigemptyset before it is read; signalfd gives a new descriptor
    // that nobody else owns.
    unsafe {
        // The process we were forked from may have ignored it, which would reap children behind our back.
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Closes every descriptor of the daemon's that came along with the fork, but for stderr and `keep`.
pub(super) fn close_others(keep: &OwnedFd) -> io::Result<()> {
    let keep = u32::try_from(keep.as_raw_fd()).unwrap_or(u32::MAX);
    for (first, last) in [
        (3, keep.saturating_sub(1)),
        (keep.saturating_add(1), u32::MAX),
    ] {
        // SAFETY: the only descriptors in use from here on are the ones kept.
        if first <= last && unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) } != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
