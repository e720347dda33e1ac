//! One VM: a process with a guest that answers.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use guest_control::{Client, MountSource, VSOCK_PORT};
use sandbox::parts::{memory_of, within};
use sandbox::{
    BalloonStats, Death, DeviceStats, IoLimits, MemoryStats, SandboxError, StepTimes, Vm,
};

use crate::api::{
    Action, ActionType, Api, BalloonState, BalloonUpdate, Request, RunState, VmState,
};
use crate::machine::{VSOCK_SOCKET, limit, load, save};
use crate::process::{Process, SHORT, api_error, io_error};
use crate::vsock;

/// Memory that a parked guest keeps beside what it uses, MiB.
const KEPT_MB: u64 = 64;
/// How often the balloon is looked at while it moves.
const LOOK: Duration = Duration::from_millis(50);

/// How a VM comes up.
pub(crate) enum Start {
    /// Described by these requests, and booted.
    Boot(Vec<Request>),
    /// Loaded from a snapshot, and held to these limits.
    Clone(IoLimits),
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Until the guest's root is mounted.
    pub(crate) start: Duration,
    /// Until a balloon holds what it is to hold.
    pub(crate) balloon: Duration,
}

/// A running VM.
pub(crate) struct FirecrackerVm {
    process: Process,
    api: Api,
    client: Client,
    /// What the balloon holds by our will, MiB.
    ballooned: u64,
    /// How long it may take to follow.
    balloon_limit: Duration,
    paused: bool,
}

impl FirecrackerVm {
    /// Brings the guest up to a mounted root within `limit`; kills the process if that fails, and says why.
    pub(crate) async fn bring_up(
        mut process: Process,
        start: Start,
        mount: MountSource,
        limits: Limits,
    ) -> Result<FirecrackerVm, SandboxError> {
        let mut step = "socket";
        let dead = match process.death_watch() {
            Ok(dead) => dead,
            Err(error) => return Err(process.explain(error).await),
        };
        let climb = climb(&mut process, start, mount, &mut step);
        let limit = limits.start;
        let result = tokio::time::timeout(limit, Process::unless_dead(&dead, climb)).await;
        match result {
            Ok(Ok((api, client))) => Ok(FirecrackerVm {
                process,
                api,
                client,
                ballooned: 0,
                balloon_limit: limits.balloon,
                paused: false,
            }),
            Ok(Err(error)) => Err(process.explain(error).await),
            Err(_) => {
                let error = SandboxError::Timeout {
                    step,
                    limit,
                    detail: process.console_detail(),
                };
                Err(process.explain(error).await)
            }
        }
    }

    /// Saves the machine into the files its jail was given, the guest quiesced and its CPUs stopped. Consumes the VM.
    pub(crate) async fn save(mut self, limit: Duration) -> Result<(), SandboxError> {
        let saved = within("save", limit, async {
            self.client.clone().quiesce().await?;
            let paused = Request::PatchVm(VmState {
                state: RunState::Paused,
            });
            let stop = self.api.send(&paused, SHORT).await;
            stop.map_err(api_error("stop"))?;
            // Writes the whole memory.
            self.api
                .send(&save(), limit)
                .await
                .map_err(api_error("save"))
        })
        .await;
        match saved {
            Ok(()) => {
                self.process.launcher.kill(self.process.slot).await?;
                Ok(())
            }
            Err(error) => Err(self.process.explain(error).await),
        }
    }

    /// For an error of a step that was not ours: kills the VM and adds what is known of its end.
    pub(crate) async fn give_up(self, error: SandboxError) -> SandboxError {
        self.process.explain(error).await
    }

    /// Sets the balloon and waits until the guest has followed, or does not any more, or the limit has passed; gives what
    /// the balloon then holds.
    async fn balloon(&mut self, megabytes: u64) -> Result<BalloonState, SandboxError> {
        self.set_balloon(megabytes).await?;
        let since = Instant::now();
        let mut before = None;
        let mut moved = since;
        loop {
            let state = self.balloon_state().await?;
            let now = state.actual_mib;
            if before.replace(now) != Some(now) {
                moved = Instant::now();
            }
            // One that stands still needs what it has not given, or gives back what it took when it needs it.
            // Guests fill and empty it by the MiB, so how long is a standstill depends on how slow they may be.
            let over = now == megabytes || moved.elapsed() > self.balloon_limit / 2;
            if over || since.elapsed() > self.balloon_limit {
                return Ok(state);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn balloon_state(&mut self) -> Result<BalloonState, SandboxError> {
        let asked = self.api.get(&Request::GetBalloonStatistics, SHORT).await;
        asked.map_err(api_error("balloon"))
    }

    async fn set_balloon(&mut self, megabytes: u64) -> Result<(), SandboxError> {
        // Whoever drops this before it is answered leaves a balloon that may be told so already.
        self.ballooned = self.ballooned.max(megabytes);
        let update = Request::PatchBalloon(BalloonUpdate {
            amount_mib: megabytes,
        });
        self.api
            .send(&update, SHORT)
            .await
            .map_err(api_error("balloon"))?;
        self.ballooned = megabytes;
        Ok(())
    }

    /// What the guest could give away, MiB.
    async fn spare(&self) -> Result<u64, SandboxError> {
        let stats = self.client.stats().await?;
        Ok((stats.mem_available_kb / 1024).saturating_sub(KEPT_MB))
    }

    async fn inflate(&mut self) -> Result<BalloonStats, SandboxError> {
        let spare = self.spare().await?;
        let wanted = self.ballooned.saturating_add(spare);
        let mut state = match spare {
            0 => self.balloon_state().await?,
            _ => self.balloon(wanted).await?,
        };
        if state.actual_mib < state.target_mib {
            // Nothing is left for it to do when it runs next.
            self.set_balloon(state.actual_mib).await?;
            state.target_mib = state.actual_mib;
        }
        Ok(BalloonStats {
            target_mb: state.target_mib,
            held_mb: state.actual_mib,
            guest_available_mb: state.available_memory.map(|bytes| bytes >> 20),
        })
    }
}

/// The way up; `step` is what it is at, for the error of a limit that passed.
async fn climb(
    process: &mut Process,
    start: Start,
    mount: MountSource,
    step: &mut &'static str,
) -> Result<(Api, Client), SandboxError> {
    let (mut api, version) = process.api().await?;
    process.done("socket");
    match start {
        Start::Boot(requests) => {
            *step = "describe";
            for request in &requests {
                let sent = api.send(request, SHORT).await;
                sent.map_err(api_error("describe"))?;
            }
            process.done("describe");
            *step = "boot";
            let start = Request::PutAction(Action {
                action_type: ActionType::InstanceStart,
            });
            let started = api.send(&start, SHORT).await;
            started.map_err(api_error("boot"))?;
        }
        Start::Clone(limits) => {
            *step = "load and resume";
            let loaded = api.send(&load(version), SHORT).await;
            loaded.map_err(api_error("load"))?;
            process.done("load and resume");
            // Before there is anything in the guest that could use what is limited. A snapshot has none of its own.
            for request in limit(limits) {
                let sent = api.send(&request, SHORT).await;
                sent.map_err(api_error("limit"))?;
            }
        }
    }
    *step = "handshake";
    let path = process.socket(VSOCK_SOCKET);
    let stream = vsock::connect(&path, VSOCK_PORT)
        .await
        .map_err(io_error("connect to the guest"))?;
    process.done("connect");
    // The limit around all of this is the one that counts.
    let client = Client::connect(stream, Duration::MAX).await?;
    process.done("handshake");
    *step = "mount";
    client.mount(mount).await?;
    process.done("mount");
    Ok((api, client))
}

#[async_trait]
impl Vm for FirecrackerVm {
    fn control(&self) -> Client {
        self.client.clone()
    }

    fn pid(&self) -> u32 {
        self.process.pid
    }

    async fn pause(&mut self) -> Result<(), SandboxError> {
        self.process.launcher.freeze(self.process.slot).await?;
        self.paused = true;
        Ok(())
    }

    /// Also gives the guest its memory back: it runs, and what it is to do next begins when this is done.
    async fn resume(&mut self) -> Result<(), SandboxError> {
        self.process.launcher.thaw(self.process.slot).await?;
        self.paused = false;
        if self.ballooned > 0 {
            self.balloon(0).await?;
        }
        Ok(())
    }

    async fn destroy(self: Box<Self>) -> Result<(), SandboxError> {
        self.process.launcher.kill(self.process.slot).await?;
        Ok(())
    }

    async fn died(&mut self) -> Death {
        self.process.died().await
    }

    fn memory(&self) -> Result<MemoryStats, SandboxError> {
        memory_of(self.process.pid)
    }

    /// A balloon is filled by the guest, so a paused one runs for this, with nothing to do.
    async fn reclaim_memory(&mut self) -> Result<BalloonStats, SandboxError> {
        if !self.paused {
            return Err(SandboxError::Engine {
                step: "reclaim memory",
                message: "only a parked VM gives memory back".to_owned(),
            });
        }
        self.process.launcher.thaw(self.process.slot).await?;
        let inflated = self.inflate().await;
        self.process.launcher.freeze(self.process.slot).await?;
        inflated
    }

    async fn take_device_stats(&mut self) -> Result<DeviceStats, SandboxError> {
        // One that stands still cannot write, and does nothing that it would write of.
        if !self.paused {
            let flush = Request::PutAction(Action {
                action_type: ActionType::FlushMetrics,
            });
            // Written when it is answered.
            let flushed = self.api.send(&flush, SHORT).await;
            flushed.map_err(api_error("flush metrics"))?;
        }
        self.process.take_device_stats()
    }

    fn steps(&self) -> StepTimes {
        self.process.steps.clone()
    }
}
