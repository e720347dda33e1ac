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

mod end;
mod errand;
mod jailed;
mod networks;
mod services;
mod start;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::process::{Pid, Signal};

use super::jail::Jails;
use super::signals::take_signals;
use super::wire::{self, Op, Refusal, Reply, Request, Response, Unit};
use super::{LauncherConfig, Reaped};
use crate::cgroup::Cgroups;
use crate::net::NetworkId;
use crate::slot::{Holding, HostLimits, SLOTS, SlotId, SlotRecord, SlotStore, StoreError};
use networks::Networks;
use services::Services;

/// A slot we hold, or a service, and what goes on in it.
struct Held {
    /// Of a slot.
    holding: Option<Holding>,
    main: Option<Main>,
    /// Of a jailed process: the first of its namespace, which has no purpose without it.
    keeper: Option<(Pid, OwnedFd)>,
    /// What the last main process left.
    last: Option<Reaped>,
    /// Requests to answer when the main process is dead.
    waiters: Vec<u64>,
    ending: Option<Ending>,
    /// Out-of-memory kills counted before the main process started.
    oom_before: u64,
    /// The network of the process that was started last.
    network: Option<NetworkId>,
}

impl Held {
    fn new(holding: Option<Holding>) -> Held {
        Held {
            holding,
            main: None,
            keeper: None,
            last: None,
            waiters: Vec::new(),
            ending: None,
            oom_before: 0,
            network: None,
        }
    }

    /// Its process is there, and about to execute its program.
    fn began(&mut self, (pid, pidfd): (Pid, OwnedFd), starting: Starting) {
        self.last = None;
        self.main = Some(Main {
            pid,
            pidfd,
            starting: Some(starting),
            failed: None,
        });
    }
}

struct Main {
    pid: Pid,
    pidfd: OwnedFd,
    /// The exec has not been seen yet.
    starting: Option<Starting>,
    /// The request to answer with why it failed before exec, when it is reaped.
    failed: Option<(u64, String)>,
}

struct Starting {
    request: u64,
    /// Ends without a byte when exec closes it; otherwise says what failed.
    report: OwnedFd,
    /// Where a jailed process's control directory arrives before that.
    control: Option<OwnedFd>,
}

/// Requests to answer when nothing of the slot runs any more.
#[derive(Default)]
struct Ending {
    kills: Vec<u64>,
    releases: Vec<u64>,
    /// Nothing runs in it and it could not be given back, as whoever asked has heard: it is tried again then.
    again: Option<Instant>,
}

pub(super) struct Server {
    socket: OwnedFd,
    signals: OwnedFd,
    config: LauncherConfig,
    own_pid: Option<Pid>,
    store: SlotStore,
    cgroups: Cgroups,
    jails: Jails,
    units: BTreeMap<Unit, Held>,
    services: Services,
    networks: Networks,
    /// The published list is older than the slots.
    unpublished: bool,
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
            units: BTreeMap::new(),
            services: Services::default(),
            networks: Networks::default(),
            unpublished: true,
        })
    }

    /// Serves until the daemon is gone, then ends everything.
    pub(super) fn run(mut self) {
        let mut buffer = vec![0; wire::MAX_MESSAGE];
        while let Ok(ready) = self.poll() {
            self.see_starts();
            self.reap();
            self.continue_endings();
            self.see_errands();
            if ready {
                match wire::receive::<Request>(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                    Ok(Some((request, fds))) => self.serve(request, fds),
                    Err(Errno::AGAIN) => {}
                    // The end of the connection, or something that is not our daemon's: both mean the end.
                    Ok(None) | Err(_) => break,
                }
            } else if self.unpublished {
                self.publish();
            }
        }
        self.end_everything();
    }

    /// Waits for something to do; true if the socket has something.
    fn poll(&self) -> rustix::io::Result<bool> {
        let endings = self.units.values().filter_map(|held| held.ending.as_ref());
        let look = endings.map(|ending| match ending.again {
            Some(_) => end::TRY_AGAIN,
            None => end::LOOK,
        });
        let look = look.chain(self.has_errands().then_some(errand::LOOK));
        let timeout = match self.unpublished {
            true => Some(Timespec::default()),
            false => look.min().and_then(|look| Timespec::try_from(look).ok()),
        };
        let mut fds = vec![
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        let reports = self.units.values().filter_map(|held| {
            let starting = held.main.as_ref()?.starting.as_ref()?;
            Some(PollFd::new(&starting.report, PollFlags::IN))
        });
        fds.extend(reports);
        fds.extend(
            self.networks
                .errand_sockets()
                .map(|socket| PollFd::new(socket, PollFlags::IN)),
        );
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) => Ok(fds.first().is_some_and(|fd| !fd.revents().is_empty())),
            Err(Errno::INTR) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Brings the published list up to date. Where that fails (a full disk) the next change tries again: nothing
    /// depends on it but what people and other runners see.
    fn publish(&mut self) {
        let _ = self.store.publish(&self.records());
        self.unpublished = false;
    }

    fn answer(&self, id: u64, result: Result<Reply, Refusal>) {
        self.answer_with(id, result, None);
    }

    fn answer_with<'a>(
        &self,
        id: u64,
        result: Result<Reply, Refusal>,
        fds: impl IntoIterator<Item = &'a OwnedFd>,
    ) {
        let fds: Vec<_> = fds.into_iter().map(AsFd::as_fd).collect();
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
                let held = self.units.get_mut(&Unit::Slot(slot));
                let result = match held.and_then(|held| held.holding.as_mut()) {
                    Some(holding) => self
                        .store
                        .update(slot, holding, record, &limits, &ours)
                        .map(|()| Reply::Done)
                        .map_err(|e| refusal("update the slot", e)),
                    None => Err(not_ours(Unit::Slot(slot))),
                };
                self.unpublished = true;
                self.answer(id, result);
            }
            Op::Launch(order) => {
                if let Err(refusal) = self.launch(id, order, fds) {
                    self.answer(id, Err(refusal));
                }
            }
            Op::LaunchJailed(order) => {
                if let Err(refusal) = self.launch_jailed(id, order, fds) {
                    self.answer(id, Err(refusal));
                }
            }
            Op::Freeze(slot, still) => {
                let result = self.freeze(slot, still);
                self.answer(id, result);
            }
            Op::Kill(unit) => self.end(unit, id, |ending| &mut ending.kills),
            Op::Release(slot) => self.end(Unit::Slot(slot), id, |ending| &mut ending.releases),
            Op::Wait(unit) => match self.units.get_mut(&unit) {
                None => self.answer(id, Err(not_ours(unit))),
                Some(held) if held.main.is_some() => held.waiters.push(id),
                Some(held) => {
                    let result = match held.last {
                        Some(_) => Ok(Reply::Reaped(held.last)),
                        None => Err(Refusal::step(
                            format!("wait for the process of {unit}"),
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
                self.unpublished = true;
                self.answer(id, result);
            }
            Op::TakeHandover(name, owner) => match crate::handover::take(&name, owner) {
                Ok(file) => self.answer_with(id, Ok(Reply::Handover), Some(&file.into())),
                Err(error) => {
                    self.answer(id, Err(Refusal::step("take what was handed over", error)))
                }
            },
            Op::Memory(slot) => match self.memory_file(slot) {
                Ok(file) => self.answer_with(id, Ok(Reply::MemoryFile), Some(&file)),
                Err(refusal) => self.answer(id, Err(refusal)),
            },
            Op::MakeHub(config) => self.make_hub(id, config),
            Op::MakeNetwork => self.make_network(id),
            Op::UnpluggedDevice => self.make_unplugged(id),
            Op::FlushNetwork(network) => self.flush_network(id, network),
            Op::CutNetwork(network) => self.cut_network(id, network),
            Op::DestroyNetwork(network) => self.destroy_network(id, network),
            Op::OpenDestinations(network, to, seconds) => self.open(id, network, to, seconds),
            Op::AdmitApi(at, seconds) => self.admit_api(id, at, seconds),
            Op::AllowInternal(addresses, seconds) => self.allow_internal(id, addresses, seconds),
        }
    }

    fn records(&self) -> BTreeMap<SlotId, SlotRecord> {
        let records = self.units.iter().filter_map(|(unit, held)| match unit {
            Unit::Slot(slot) => Some((*slot, held.holding.as_ref()?.record.clone())),
            Unit::Service(_) => None,
        });
        records.collect()
    }

    fn uid(&self, unit: Unit) -> u32 {
        let number = match unit {
            Unit::Slot(slot) => slot.0,
            Unit::Service(service) => match self.services.number(service) {
                Some(number) => SLOTS.saturating_add(number),
                // It never ran. No unit of anybody's has this one.
                None => u16::MAX,
            },
        };
        self.uid_of_number(number)
    }

    fn uid_of_number(&self, number: u16) -> u32 {
        self.config.uid_base.saturating_add(u32::from(number))
    }

    fn reserve(&mut self, record: SlotRecord, limits: &HostLimits) -> Result<Reply, Refusal> {
        let ours = self.records();
        let (slot, holding) = self
            .store
            .reserve(&record, limits, &ours, |slot| self.clean_orphan(slot))
            .map_err(|e| refusal("reserve a slot", e))?;
        self.units
            .insert(Unit::Slot(slot), Held::new(Some(holding)));
        self.unpublished = true;
        Ok(Reply::Slot(slot))
    }

    fn freeze(&self, slot: SlotId, still: bool) -> Result<Reply, Refusal> {
        let unit = Unit::Slot(slot);
        let cannot = |message: &dyn ToString| {
            let what = if still { "stop" } else { "continue" };
            Refusal::step(format!("{what} the process of {unit}"), message.to_string())
        };
        let held = self.units.get(&unit).ok_or_else(|| not_ours(unit))?;
        let main = held.main.as_ref();
        let main = main.ok_or_else(|| cannot(&"nothing runs in it"))?;
        let signal = if still { Signal::STOP } else { Signal::CONT };
        rustix::process::pidfd_send_signal(&main.pidfd, signal).map_err(|e| cannot(&e))?;
        Ok(Reply::Done)
    }

    fn memory_file(&self, slot: SlotId) -> Result<OwnedFd, Refusal> {
        let cannot = |message: &dyn ToString| {
            Refusal::step(
                format!("read the memory of slot {}", slot.0),
                message.to_string(),
            )
        };
        let unit = Unit::Slot(slot);
        let held = self.units.get(&unit).ok_or_else(|| not_ours(unit))?;
        let main = held
            .main
            .as_ref()
            .ok_or_else(|| cannot(&"nothing runs in it"))?;
        // The kernel checks who may look when the file is opened, so the daemon may read what root opened.
        let path = format!("/proc/{}/smaps_rollup", main.pid.as_raw_pid());
        let file = std::fs::File::open(path).map_err(|e| cannot(&e))?;
        Ok(file.into())
    }
}

fn not_ours(unit: Unit) -> Refusal {
    Refusal::step(format!("use {unit}"), "this runner does not hold it")
}

fn refusal(step: &str, error: StoreError) -> Refusal {
    match error {
        StoreError::NoRoom(usage) => Refusal::NoRoom(usage),
        StoreError::NoSlot(slots) => Refusal::NoSlot(slots),
        StoreError::Fs(error) => Refusal::step(step, error),
    }
}
