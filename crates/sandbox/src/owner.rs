//! The task that owns a VM; see [`crate::Sandbox`] for the picture.

use std::future::Future;

use guest_control::{Client, CloseReason};
use host::slot::SlotId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::engine::Vm;
use crate::error::SandboxError;
use crate::sandbox::{Limits, PausedAs, State};
use crate::types::{BalloonStats, Death, DeviceStats, MemoryStats};

type Reply<T> = oneshot::Sender<Result<T, SandboxError>>;

/// What handles ask of the owner.
#[derive(Debug)]
pub(crate) enum Request {
    Pause(PausedAs, Reply<()>),
    Resume(Reply<()>),
    Memory(Reply<MemoryStats>),
    ReclaimMemory(Reply<BalloonStats>),
    DeviceStats(Reply<DeviceStats>),
}

/// Everything the task knows beside the VM itself, which it borrows again for every wait.
pub(crate) struct Owner {
    slot: SlotId,
    limits: Limits,
    client: Client,
    state: watch::Sender<State>,
}

/// What ended a wait.
enum Event {
    Killed,
    Died(Death),
    ChannelClosed(CloseReason),
    Request(Request),
}

/// How an operation on the VM went.
enum Outcome {
    Done,
    /// The VM has to go; the caller of the operation is told the same.
    Fatal(Death),
}

impl Owner {
    pub(crate) fn new(
        slot: SlotId,
        limits: Limits,
        client: Client,
        state: watch::Sender<State>,
    ) -> Self {
        Self {
            slot,
            limits,
            client,
            state,
        }
    }

    /// Serves requests until something ends the VM, then buries it.
    pub(crate) async fn run(
        self,
        mut vm: Box<dyn Vm>,
        mut requests: mpsc::UnboundedReceiver<Request>,
        mut kill: watch::Receiver<bool>,
    ) {
        // What put an end to the wait for a balloon.
        let mut next = None;
        let death = loop {
            let event = if let Some(request) = next.take() {
                Event::Request(request)
            } else {
                tokio::select! {
                    // A kill goes before whatever else is ready, and a death before a request it makes pointless.
                    biased;
                    () = killed(&mut kill) => Event::Killed,
                    death = vm.died() => Event::Died(death),
                    reason = self.client.closed() => Event::ChannelClosed(reason),
                    request = requests.recv() => match request {
                        Some(request) => Event::Request(request),
                        None => Event::Killed,
                    },
                }
            };
            match event {
                Event::Killed => break destroyed(),
                Event::Died(death) => break death,
                Event::ChannelClosed(reason) => {
                    break self.post_mortem(vm.as_mut(), reason, &mut kill).await;
                }
                Event::Request(Request::ReclaimMemory(reply)) => {
                    match self
                        .reclaim(vm.as_mut(), reply, &mut requests, &mut kill)
                        .await
                    {
                        Ok(interrupted_by) => next = interrupted_by,
                        Err(death) => break death,
                    }
                }
                Event::Request(request) => {
                    if let Outcome::Fatal(death) = self.serve(vm.as_mut(), request, &mut kill).await
                    {
                        break death;
                    }
                }
            }
        };
        self.bury(vm, death).await;
    }

    async fn serve(
        &self,
        vm: &mut dyn Vm,
        request: Request,
        kill: &mut watch::Receiver<bool>,
    ) -> Outcome {
        match request {
            Request::Pause(label, reply) => {
                let already = matches!(*self.state.borrow(), State::Paused(_));
                if already {
                    self.enter(State::Paused(label));
                    let _ = reply.send(Ok(()));
                    return Outcome::Done;
                }
                let done = self.bounded("pause", vm.pause(), kill).await;
                self.conclude(vm, done, State::Paused(label), reply, kill)
                    .await
            }
            Request::Resume(reply) => {
                let already = matches!(*self.state.borrow(), State::Running);
                if already {
                    let _ = reply.send(Ok(()));
                    return Outcome::Done;
                }
                let done = self.bounded("resume", vm.resume(), kill).await;
                self.conclude(vm, done, State::Running, reply, kill).await
            }
            Request::Memory(reply) => {
                let _ = reply.send(vm.memory());
                Outcome::Done
            }
            Request::DeviceStats(reply) => {
                match self
                    .bounded("count the work of", vm.take_device_stats(), kill)
                    .await
                {
                    // Without the capability, or refused: the VM is as it was.
                    Ok(stats) => {
                        let _ = reply.send(stats);
                        Outcome::Done
                    }
                    Err(death) => Outcome::Fatal(death),
                }
            }
            // Served by `reclaim`, which needs the other requests.
            Request::ReclaimMemory(_) => Outcome::Done,
        }
    }

    /// Has a parked VM give memory back until something else is asked of it, which is handed back to be served next: what
    /// wants the VM does not wait for its balloon.
    async fn reclaim(
        &self,
        vm: &mut dyn Vm,
        reply: Reply<BalloonStats>,
        requests: &mut mpsc::UnboundedReceiver<Request>,
        kill: &mut watch::Receiver<bool>,
    ) -> Result<Option<Request>, Death> {
        let request = tokio::select! {
            biased;
            request = requests.recv() => request,
            done = self.bounded("reclaim memory", vm.reclaim_memory(), kill) => {
                // Without the capability, or refused: the VM is as it was.
                let _ = reply.send(done?);
                return Ok(None);
            }
        };
        let _ = reply.send(Err(SandboxError::Engine {
            step: "reclaim memory",
            message: "the VM was wanted meanwhile".to_owned(),
        }));
        // No handle is left.
        let request = request.ok_or_else(destroyed)?;
        let paused = matches!(*self.state.borrow(), State::Paused(_));
        if paused && !matches!(request, Request::Resume(_)) {
            let stopped = self.bounded("pause", vm.pause(), kill).await?;
            stopped.map_err(|error| Death {
                reason: error.to_string(),
                oom: false,
            })?;
        }
        Ok(Some(request))
    }

    /// Runs one operation, unless somebody kills the VM or the limit passes first. The inner result is the VM's own.
    async fn bounded<T>(
        &self,
        step: &'static str,
        operation: impl Future<Output = Result<T, SandboxError>>,
        kill: &mut watch::Receiver<bool>,
    ) -> Result<Result<T, SandboxError>, Death> {
        tokio::select! {
            biased;
            () = killed(kill) => Err(destroyed()),
            done = timeout(self.limits.pause, operation) => done.map_err(|_| Death {
                reason: format!(
                    "the VM engine did not {step} the VM within {:?}",
                    self.limits.pause
                ),
                oom: false,
            }),
        }
    }

    /// Publishes the new state before the caller hears of it, so that whoever is told sees it.
    async fn conclude(
        &self,
        vm: &mut dyn Vm,
        done: Result<Result<(), SandboxError>, Death>,
        next: State,
        reply: Reply<()>,
        kill: &mut watch::Receiver<bool>,
    ) -> Outcome {
        match done {
            Ok(Ok(())) => {
                self.enter(next);
                let _ = reply.send(Ok(()));
                Outcome::Done
            }
            Ok(Err(error)) => {
                let reason = match &error {
                    SandboxError::Died(reason) => reason.clone(),
                    other => other.to_string(),
                };
                let _ = reply.send(Err(error));
                let own = self.own_account(vm, kill).await;
                Outcome::Fatal(own.unwrap_or(Death { reason, oom: false }))
            }
            Err(death) => {
                let _ = reply.send(Err(SandboxError::Died(death.reason.clone())));
                Outcome::Fatal(death)
            }
        }
    }

    /// The control channel ended: finds out whether the process is dying too, and says what happened.
    async fn post_mortem(
        &self,
        vm: &mut dyn Vm,
        reason: CloseReason,
        kill: &mut watch::Receiver<bool>,
    ) -> Death {
        let verdict = match reason {
            CloseReason::Protocol(what) => {
                return Death {
                    reason: format!("the guest broke the control protocol ({what}) and was killed"),
                    oom: false,
                };
            }
            CloseReason::GuestGone => "the guest closed its control channel and was killed",
            CloseReason::Local => "the runner closed the guest's control channel",
        };
        self.own_account(vm, kill).await.unwrap_or_else(|| Death {
            reason: verdict.to_owned(),
            oom: false,
        })
    }

    /// How the process says it died, if it does within the post-mortem limit: the better reason for whatever
    /// failed because it is gone.
    async fn own_account(
        &self,
        vm: &mut dyn Vm,
        kill: &mut watch::Receiver<bool>,
    ) -> Option<Death> {
        tokio::select! {
            biased;
            death = vm.died() => Some(death),
            () = killed(kill) => None,
            () = tokio::time::sleep(self.limits.post_mortem) => None,
        }
    }

    /// The only way to `Dead`.
    async fn bury(self, vm: Box<dyn Vm>, death: Death) {
        self.enter(State::Dying(death.clone()));
        match timeout(self.limits.reap, vm.destroy()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(slot = self.slot.0, %error, "the VM's process may not be reaped");
            }
            Err(_) => {
                tracing::error!(
                    slot = self.slot.0,
                    limit = ?self.limits.reap,
                    "the VM's process was killed and did not end in time"
                );
            }
        }
        self.enter(State::Dead(death));
    }

    fn enter(&self, state: State) {
        tracing::debug!(slot = self.slot.0, ?state, "VM state");
        self.state.send_replace(state);
    }
}

/// Resolves when a kill was asked for, or no handle is left to ask.
async fn killed(kill: &mut watch::Receiver<bool>) {
    let _ = kill.wait_for(|kill| *kill).await;
}

fn destroyed() -> Death {
    Death {
        reason: "the VM was destroyed by the runner".to_owned(),
        oom: false,
    }
}
