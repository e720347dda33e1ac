//! One QEMU process.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use guest_control::{Client, MountSource};
use host::launcher::{CgroupLimits, LaunchSpec, Launcher, NetworkUse};
use host::slot::SlotId;
use sandbox::parts::console::Console;
use sandbox::parts::image::OpenImage;
use sandbox::parts::{memory_of, reaped, watch, within};
use sandbox::{BalloonStats, Death, DeviceStats, MemoryStats, Place, SandboxError, StepTimes, Vm};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use crate::death::Evidence;
use crate::disk::Disk;
use crate::machine::{Accel, Machine, Start, TB_SIZE_MB, fd};
use crate::qmp::{Command, Qmp, QmpError};

/// How long a process that has closed its sockets may take to be reaped, and a reaped one's last words to be read.
const GRACE: Duration = Duration::from_secs(1);

/// Host memory of a QEMU process beside its guest's and its code cache, MiB: measured at 40–55 resident after a
/// restore, of which program text is shared; the rest is room for disk requests in flight and page tables.
const PROCESS_MB: u64 = 96;

/// Host memory a VM may take beyond its guest's.
pub(crate) fn overhead_mb(accel: Accel) -> u64 {
    match accel {
        Accel::Tcg => PROCESS_MB + u64::from(TB_SIZE_MB),
        Accel::Kvm => PROCESS_MB,
    }
}

/// Guest memory that may be charged to the process's cgroup.
///
/// A clone's first touch of a page that is a hole in the template's memfd makes the kernel fill the hole with a zero
/// page, for good, and then copy it for the clone; both are charged to whoever came first. The holes are filled once
/// for all clones, which is why [`Template::resident_mb`](sandbox::Template::resident_mb) counts the template whole;
/// but any one clone may be the one that fills them all.
fn guest_charge_mb(start: Start, memory_mb: u64) -> u64 {
    match start {
        Start::Boot => memory_mb,
        Start::Clone => memory_mb.saturating_mul(2),
    }
}

/// Copies of an image's descriptors for one process, under the numbers it knows them by.
pub(crate) fn lend_image(image: &OpenImage) -> Result<Vec<(OwnedFd, RawFd)>, SandboxError> {
    Ok(vec![
        (lend(&image.kernel)?, fd::KERNEL),
        (lend(&image.initrd)?, fd::INITRD),
        (lend(&image.rootfs)?, fd::ROOTFS),
    ])
}

const STDERR: RawFd = 2;

/// What one process is started with.
pub(crate) struct Plan<'a> {
    pub(crate) launcher: &'a Launcher,
    pub(crate) program: PathBuf,
    pub(crate) place: Place,
    pub(crate) machine: Machine,
    pub(crate) start: Start,
    pub(crate) image: &'a OpenImage,
    pub(crate) ram: &'a File,
    pub(crate) disk: Disk,
    /// A clone's device state.
    pub(crate) state: Option<File>,
}

/// A started process on its way up: no QMP handshake, no guest handshake yet.
pub(crate) struct Starting {
    vm: Parts,
    qmp: Option<UnixStream>,
    agent: Option<UnixStream>,
    /// What it is doing, for the error of a limit that passed.
    step: &'static str,
    since: Instant,
}

/// What stays of it for the VM's life.
struct Parts {
    launcher: Launcher,
    slot: SlotId,
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    console: Console,
    qmp: Option<Qmp>,
    steps: StepTimes,
    death: Option<Death>,
}

/// A running VM.
pub(crate) struct QemuVm {
    parts: Parts,
    client: Client,
}

fn io_error(action: &str) -> impl Fn(std::io::Error) -> SandboxError + '_ {
    move |source| SandboxError::Io {
        action: action.to_owned(),
        source,
    }
}

/// A copy of a descriptor for a process.
pub(crate) fn lend(file: &File) -> Result<OwnedFd, SandboxError> {
    file.try_clone()
        .map(OwnedFd::from)
        .map_err(io_error("wire up the VM's descriptors"))
}

fn qmp_error(step: &'static str) -> impl Fn(QmpError) -> SandboxError {
    move |error| SandboxError::Engine {
        step,
        message: error.to_string(),
    }
}

impl Starting {
    /// Starts the process.
    pub(crate) async fn launch(plan: Plan<'_>, since: Instant) -> Result<Starting, SandboxError> {
        let wiring = io_error("wire up the VM's descriptors");
        let pair = || -> Result<(UnixStream, OwnedFd), std::io::Error> {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok((UnixStream::from_std(ours)?, theirs.into()))
        };
        let (qmp, their_qmp) = pair().map_err(&wiring)?;
        let (agent, their_agent) = pair().map_err(&wiring)?;
        let (console, their_console) = pair().map_err(&wiring)?;
        let mut fds = lend_image(plan.image)?;
        // What QEMU itself complains of belongs to the same tail as the guest's last words.
        let complaints = their_console.try_clone().map_err(&wiring)?;
        fds.extend([
            (complaints, STDERR),
            (their_qmp, fd::QMP),
            (their_agent, fd::AGENT),
            (their_console, fd::CONSOLE),
            (lend(plan.ram)?, fd::RAM),
            (plan.disk.read_write.into(), fd::DISK_RW),
            (plan.disk.read_only.into(), fd::DISK_RO),
        ]);
        fds.extend(plan.state.map(|state| (state.into(), fd::STATE)));
        let network = match plan.place.network {
            Some(network) => Some(NetworkUse {
                network,
                tap: fd::TAP,
            }),
            None => {
                fds.push((plan.launcher.unplugged_device().await?, fd::TAP));
                None
            }
        };
        let shape = plan.machine.shape;
        let memory_mb = guest_charge_mb(plan.start, shape.memory_mb)
            .saturating_add(overhead_mb(plan.machine.accel));
        let process = plan
            .launcher
            .launch(LaunchSpec {
                slot: plan.place.slot,
                program: plan.program,
                args: plan.machine.args(plan.start),
                fds,
                network,
                devices: match plan.machine.accel {
                    Accel::Kvm => vec![PathBuf::from("/dev/kvm")],
                    Accel::Tcg => Vec::new(),
                },
                limits: CgroupLimits {
                    memory_max: memory_mb.saturating_mul(1024 * 1024),
                    // Main loop, RCU, one thread a CPU, and QEMU's I/O pool of at most 64.
                    pids_max: 80 + shape.vcpu,
                    cpu_weight: 100,
                },
            })
            .await?;
        let mut starting = Starting {
            vm: Parts {
                launcher: plan.launcher.clone(),
                slot: plan.place.slot,
                pid: process.pid,
                pidfd: watch(process.pidfd).map_err(io_error("watch the VM's process"))?,
                console: Console::start(console),
                qmp: None,
                steps: StepTimes::default(),
                death: None,
            },
            qmp: Some(qmp),
            agent: Some(agent),
            step: "process",
            since,
        };
        starting.done("process");
        Ok(starting)
    }

    fn done(&mut self, step: &'static str) {
        let now = Instant::now();
        self.vm.steps.0.push((step, now - self.since));
        self.since = now;
    }

    /// Brings the guest up to a mounted root within `limit`; kills the process if that fails, and says why.
    pub(crate) async fn bring_up(
        mut self,
        start: Start,
        mount: MountSource,
        limit: Duration,
    ) -> Result<QemuVm, SandboxError> {
        let result = tokio::time::timeout(limit, self.climb(start, mount)).await;
        let error = match result {
            Ok(Ok(client)) => {
                return Ok(QemuVm {
                    parts: self.vm,
                    client,
                });
            }
            Ok(Err(error)) => error,
            Err(_) => SandboxError::Timeout {
                step: self.step,
                limit,
                detail: self.vm.console_detail(),
            },
        };
        Err(self.vm.explain(error).await)
    }

    async fn climb(&mut self, start: Start, mount: MountSource) -> Result<Client, SandboxError> {
        self.step = "socket";
        let stream = self.qmp.take().ok_or_else(used_twice)?;
        let mut qmp = Qmp::connect(stream).await.map_err(qmp_error("socket"))?;
        self.done("socket");
        if start == Start::Clone {
            self.step = "load";
            qmp.prepare_migration().await.map_err(qmp_error("load"))?;
            qmp.load(fd::STATE).await.map_err(qmp_error("load"))?;
            self.done("load");
            self.step = "resume";
            qmp.run(Command::Cont).await.map_err(qmp_error("resume"))?;
            self.done("resume");
        }
        let stream = self.agent.take().ok_or_else(used_twice)?;
        follow_port(&qmp, &stream).map_err(io_error("watch the guest's port"))?;
        self.vm.qmp = Some(qmp);
        self.step = "handshake";
        // The limit around all of this is the one that counts.
        let client = Client::connect(stream, Duration::MAX).await?;
        self.done("handshake");
        self.step = "mount";
        client.mount(mount).await?;
        self.done("mount");
        Ok(client)
    }
}

/// QEMU keeps its end of the control channel open when the guest has closed the port: nobody would ever answer. This
/// ends the channel as if it had not.
fn follow_port(qmp: &Qmp, channel: &UnixStream) -> std::io::Result<()> {
    let channel = channel.as_fd().try_clone_to_owned()?;
    let closed = qmp.port_closed();
    tokio::spawn(async move {
        if closed.await {
            // It may have ended meanwhile, which is the aim.
            let _ = rustix::net::shutdown(&channel, rustix::net::Shutdown::Both);
        }
    });
    Ok(())
}

fn used_twice() -> SandboxError {
    SandboxError::Engine {
        step: "start",
        message: "a VM was brought up twice".to_owned(),
    }
}

impl Parts {
    fn console_detail(&self) -> String {
        let tail = self.console.tail();
        if tail.trim().is_empty() {
            "; its console is empty".to_owned()
        } else {
            format!("; the end of its console:\n{}", tail.trim_end())
        }
    }

    /// The error for a VM that did not come up: its process's own end, if it ended, is the better reason.
    async fn explain(mut self, error: SandboxError) -> SandboxError {
        let ended = !matches!(error, SandboxError::Timeout { .. });
        let death = if ended {
            tokio::time::timeout(GRACE, self.died()).await.ok()
        } else {
            None
        };
        if let Err(error) = self.launcher.kill(self.slot).await {
            tracing::warn!(slot = self.slot.0, %error, "a VM that did not come up may still run");
        }
        match death {
            Some(death) => SandboxError::Died(death.reason),
            None => error,
        }
    }

    /// Cancel-safe.
    async fn died(&mut self) -> Death {
        if let Some(death) = &self.death {
            return death.clone();
        }
        let reaped = match reaped(&self.pidfd, &self.launcher, self.slot).await {
            Ok(reaped) => reaped,
            Err(unknown) => return unknown,
        };
        let shutdown = match &mut self.qmp {
            Some(qmp) => qmp.last_words(GRACE).await,
            None => None,
        };
        let _ = tokio::time::timeout(GRACE, self.console.finish()).await;
        let death = Evidence {
            reaped,
            shutdown,
            console: &self.console.tail(),
        }
        .death();
        self.death.insert(death).clone()
    }
}

impl QemuVm {
    /// Saves the machine: the guest quiesced, its CPUs stopped, device state written to `file`. Consumes the VM; what
    /// is left of it is its memory.
    pub(crate) async fn save(mut self, file: &File, limit: Duration) -> Result<(), SandboxError> {
        let Parts { qmp, .. } = &mut self.parts;
        // Held until the CPUs stand still: the guest must not see its port closed in between.
        let _open = self.client.clone();
        let saved = within("save", limit, async {
            self.client.quiesce().await?;
            let qmp = qmp.as_mut().ok_or_else(used_twice)?;
            qmp.run(Command::Stop).await.map_err(qmp_error("stop"))?;
            qmp.prepare_migration().await.map_err(qmp_error("save"))?;
            qmp.save(file.as_fd()).await.map_err(qmp_error("save"))
        })
        .await;
        match saved {
            Ok(()) => {
                self.parts.launcher.kill(self.parts.slot).await?;
                Ok(())
            }
            Err(error) => Err(self.parts.explain(error).await),
        }
    }

    /// For an error of a step that was not ours: kills the VM and adds what is known of its end.
    pub(crate) async fn give_up(self, error: SandboxError) -> SandboxError {
        self.parts.explain(error).await
    }

    async fn command(&mut self, step: &'static str, command: Command) -> Result<(), SandboxError> {
        let qmp = self.parts.qmp.as_mut().ok_or_else(used_twice)?;
        qmp.run(command).await.map_err(qmp_error(step))
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn control(&self) -> Client {
        self.client.clone()
    }

    fn pid(&self) -> u32 {
        self.parts.pid
    }

    async fn pause(&mut self) -> Result<(), SandboxError> {
        self.command("pause", Command::Stop).await
    }

    async fn resume(&mut self) -> Result<(), SandboxError> {
        self.command("resume", Command::Cont).await
    }

    async fn destroy(self: Box<Self>) -> Result<(), SandboxError> {
        self.parts.launcher.kill(self.parts.slot).await?;
        Ok(())
    }

    async fn died(&mut self) -> Death {
        self.parts.died().await
    }

    fn memory(&self) -> Result<MemoryStats, SandboxError> {
        memory_of(self.parts.pid)
    }

    async fn reclaim_memory(&mut self) -> Result<BalloonStats, SandboxError> {
        Err(SandboxError::Unavailable {
            engine: "QEMU",
            reason: "a clone has no balloon: QEMU's would discard memory of the template"
                .to_owned(),
        })
    }

    async fn take_device_stats(&mut self) -> Result<DeviceStats, SandboxError> {
        Err(SandboxError::Unavailable {
            engine: "QEMU",
            reason: "its block and network counters are not read".to_owned(),
        })
    }

    fn steps(&self) -> StepTimes {
        self.parts.steps.clone()
    }
}
