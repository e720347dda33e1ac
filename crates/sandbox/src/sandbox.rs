//! The life of one VM, from the moment an engine hands it over until its process is reaped.
//!
//! ```text
//!                 pause(as)                       resume
//!     Running ───────────────▶ Paused(Warm|Parked) ──────▶ Running
//!        │                          │
//!        │ destroy, last handle dropped, process died, channel lost, a pause or resume that failed or hung
//!        ▼                          ▼
//!      Dying(reason) ── process reaped ──▶ Dead(reason)
//! ```
//!
//! **Happy path.** [`Sandbox::adopt`] gives the VM to an *owner task*, the only code that ever touches the
//! [`Vm`](crate::Vm). Handles send it messages. A pool clone goes `Running → Paused(Warm)` once, is claimed
//! (`Running`), may be kept for its session (`Paused(Parked)`), and ends in `Dead`.
//!
//! **Failure paths**, all of which end in `Dead` with one sentence that says which it was:
//! - *the process dies*: the engine tells (signal, out of memory, guest powered off, guest panic);
//! - *the guest closes its control channel*: the process gets [`Limits::post_mortem`] to die by itself, so that a
//!   dying VM is reported as such and not as a closed channel; then it is killed;
//! - *the guest breaks the protocol*: killed at once;
//! - *pause or resume fails, or takes longer than [`Limits::pause`]*: nobody knows what state the virtual CPUs
//!   are in, so the VM is killed; the caller gets the error, everybody else the death;
//! - *somebody destroys it*, or the last handle is dropped: killed, also while a pause or resume hangs.
//!
//! There is one way into `Dying` and none out of it but `Dead`; [`Sandbox::died`] and [`Sandbox::destroy`] resolve
//! at `Dead`, when the process is reaped and its memory is back with the host.

use std::sync::Arc;
use std::time::Duration;

use guest_control::Client;
use host::slot::SlotId;
use tokio::sync::{mpsc, oneshot, watch};

use crate::engine::Vm;
use crate::error::SandboxError;
use crate::owner::{Owner, Request};
use crate::types::{BalloonStats, Death, DeviceStats, MemoryStats, StepTimes};

/// Why a VM is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PausedAs {
    /// Prepared and never used: any job of its profile may have it.
    Warm,
    /// Kept for the next job of its session.
    Parked,
}

/// Where a VM is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its virtual CPUs run.
    Running,
    /// They stand still; the process is alive and the control channel open.
    Paused(PausedAs),
    /// It is being killed or has died, and is not reaped yet.
    Dying(Death),
    /// Reaped: no process, no memory.
    Dead(Death),
}

impl State {
    /// How it ended or is ending, if so.
    pub fn death(&self) -> Option<&Death> {
        match self {
            State::Running | State::Paused(_) => None,
            State::Dying(death) | State::Dead(death) => Some(death),
        }
    }
}

/// How long the owner task waits for what should be short.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A pause or a resume: milliseconds on an idle host; generous because the host may be very busy.
    pub pause: Duration,
    /// How long a process whose control channel ended may take to die by itself before it is killed.
    pub post_mortem: Duration,
    /// Killing and reaping. A process stuck in the kernel is reported dead after this, with an error in the log;
    /// releasing its slot tries again.
    pub reap: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pause: Duration::from_secs(10),
            post_mortem: Duration::from_secs(1),
            reap: Duration::from_secs(10),
        }
    }
}

/// A handle on one VM. Clones share it; dropping the last one destroys the VM.
#[derive(Clone, Debug)]
pub struct Sandbox {
    inner: Arc<Inner>,
}

/// Senders close when the last handle goes, which is how the owner task learns of it.
#[derive(Debug)]
struct Inner {
    slot: SlotId,
    pid: u32,
    client: Client,
    steps: StepTimes,
    requests: mpsc::UnboundedSender<Request>,
    kill: watch::Sender<bool>,
    state: watch::Receiver<State>,
}

impl Sandbox {
    /// Takes over a running VM; spawns its owner task on the current runtime.
    pub fn adopt(vm: Box<dyn Vm>, slot: SlotId) -> Sandbox {
        Self::adopt_with(vm, slot, Limits::default())
    }

    /// [`Sandbox::adopt`] with other limits.
    pub fn adopt_with(vm: Box<dyn Vm>, slot: SlotId, limits: Limits) -> Sandbox {
        let (requests, requests_rx) = mpsc::unbounded_channel();
        let (kill, kill_rx) = watch::channel(false);
        let (state_tx, state) = watch::channel(State::Running);
        let inner = Inner {
            slot,
            pid: vm.pid(),
            client: vm.control(),
            steps: vm.steps(),
            requests,
            kill,
            state,
        };
        let owner = Owner::new(slot, limits, inner.client.clone(), state_tx);
        tokio::spawn(owner.run(vm, requests_rx, kill_rx));
        Sandbox {
            inner: Arc::new(inner),
        }
    }

    /// The guest's control channel.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// The slot it runs in.
    pub fn slot(&self) -> SlotId {
        self.inner.slot
    }

    /// Host process id.
    pub fn pid(&self) -> u32 {
        self.inner.pid
    }

    /// Where the time of its start went.
    pub fn steps(&self) -> &StepTimes {
        &self.inner.steps
    }

    /// Its state, to look at or to wait for a change of.
    pub fn state(&self) -> watch::Receiver<State> {
        self.inner.state.clone()
    }

    /// Stops the virtual CPUs. A VM that is paused already only changes its label.
    ///
    /// An error means that the VM is lost: it is being killed.
    pub async fn pause(&self, label: PausedAs) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Pause(label, reply)).await
    }

    /// Starts the virtual CPUs; nothing to do for a running VM. Errors as in [`Sandbox::pause`].
    pub async fn resume(&self) -> Result<(), SandboxError> {
        self.ask(Request::Resume).await
    }

    /// Memory of its process on the host.
    pub async fn memory(&self) -> Result<MemoryStats, SandboxError> {
        self.ask(Request::Memory).await
    }

    /// Gives a parked VM's memory back to the host, where the engine can, and tells what it took. An error does not end
    /// the VM. Gives up at once when something else is asked of the VM: a job that wants it does not wait for this.
    pub async fn reclaim_memory(&self) -> Result<BalloonStats, SandboxError> {
        self.ask(Request::ReclaimMemory).await
    }

    /// What its devices did since this was last asked, or since it was started, where the engine counts it.
    pub async fn take_device_stats(&self) -> Result<DeviceStats, SandboxError> {
        self.ask(Request::DeviceStats).await
    }

    /// Resolves when the VM is dead and reaped, at once if it is. Any number of callers may wait.
    pub async fn died(&self) -> Death {
        wait_for_death(self.inner.state.clone()).await
    }

    /// Kills the VM and returns when it is reaped; says how it ended, which is an earlier death if there was one.
    pub async fn destroy(&self) -> Death {
        self.kill();
        self.died().await
    }

    /// Starts killing the VM without waiting for it.
    pub fn kill(&self) {
        self.inner.kill.send_replace(true);
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, SandboxError>>) -> Request,
    ) -> Result<T, SandboxError> {
        let (reply, answer) = oneshot::channel();
        // A request that cannot be sent, or whose reply is dropped, met an owner that is burying the VM.
        if self.inner.requests.send(request(reply)).is_ok()
            && let Ok(answer) = answer.await
        {
            return answer;
        }
        Err(SandboxError::Died(self.died().await.reason))
    }
}

async fn wait_for_death(mut state: watch::Receiver<State>) -> Death {
    match state
        .wait_for(|state| matches!(state, State::Dead(_)))
        .await
    {
        Ok(dead) => dead.death().cloned(),
        Err(_) => None,
    }
    .unwrap_or_else(|| Death {
        // The owner task ends only through `Dead`; its runtime may be torn down under it, though.
        reason: "the runner stopped looking after the VM".to_owned(),
        oom: false,
    })
}
