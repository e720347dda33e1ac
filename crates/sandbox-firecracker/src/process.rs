//! One jailed Firecracker process: started by the launcher, its API socket awaited, its end explained.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use host::launcher::{CgroupLimits, JailFile, JailName, JailSpec, Launcher};
use host::slot::SlotId;
use rustix::fs::inotify;
use sandbox::parts::console::Console;
use sandbox::parts::{reaped, watch};
use sandbox::{Death, DeviceStats, Place, SandboxError, Shape, StepTimes};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use crate::api::{Api, ApiError, FirecrackerVersion, Request};
use crate::death::death;
use crate::machine::{API_PATH, API_SOCKET};
use crate::metrics::{METRICS_PATH, Metrics};
use crate::programs::{Programs, Version};

/// How long a process whose socket broke may take to be reaped, and a reaped one's last words to be read.
const GRACE: Duration = Duration::from_secs(1);
/// How long a request may take that does not copy memory: milliseconds, on a host that is far too busy.
pub(crate) const SHORT: Duration = Duration::from_secs(30);
/// Between a socket's name and the moment it listens there are microseconds, and no event.
const LISTENS_SOON: Duration = Duration::from_micros(200);

/// Host memory of a VM's process beside its guest's, MiB: 5 of its own, 3 for the copy of the program in its jail, 16 at
/// most that it may leave there, page tables of its guest, and room for disk requests in flight.
pub(crate) const OVERHEAD_MB: u64 = 48;
/// The API's, the main loop's, and the keeper of its namespace; one a virtual CPU comes on top.
const TASKS: u32 = 8;

/// What a process is started with.
pub(crate) struct Plan<'a> {
    pub(crate) launcher: &'a Launcher,
    pub(crate) programs: &'a Programs,
    pub(crate) place: Place,
    pub(crate) shape: Shape,
    pub(crate) files: Vec<JailFile>,
}

/// A running process. Dropping it does not end it: the slot's launcher does.
pub(crate) struct Process {
    pub(crate) launcher: Launcher,
    pub(crate) slot: SlotId,
    pub(crate) pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    /// Its directory of sockets.
    control: OwnedFd,
    console: Console,
    /// Until they cannot be read any more.
    metrics: Option<Metrics>,
    pub(crate) steps: StepTimes,
    since: Instant,
    death: Option<Death>,
}

/// A file shown to a process.
pub(crate) fn shown(file: &File, name: JailName, writable: bool) -> Result<JailFile, SandboxError> {
    let file = file.try_clone().map_err(io_error("lend the VM a file"))?;
    Ok(JailFile {
        file,
        name,
        writable,
    })
}

pub(crate) fn io_error(action: &str) -> impl Fn(io::Error) -> SandboxError + '_ {
    move |source| SandboxError::Io {
        action: action.to_owned(),
        source,
    }
}

pub(crate) fn api_error(step: &'static str) -> impl Fn(ApiError) -> SandboxError {
    move |error| SandboxError::Engine {
        step,
        message: error.to_string(),
    }
}

impl Process {
    /// Starts it.
    pub(crate) async fn start(plan: Plan<'_>, since: Instant) -> Result<Process, SandboxError> {
        let pair = || -> io::Result<(UnixStream, OwnedFd)> {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok((UnixStream::from_std(ours)?, theirs.into()))
        };
        let (console, their_console) = pair().map_err(io_error("make the VM's console"))?;
        let lend = |file: &File| file.try_clone().map_err(io_error("lend the VM's programs"));
        let megabytes = plan.shape.memory_mb.saturating_add(OVERHEAD_MB);
        let jailed = plan
            .launcher
            .launch_jailed(JailSpec {
                slot: plan.place.slot,
                jailer: lend(&plan.programs.jailer)?,
                program: lend(&plan.programs.firecracker)?,
                args: [
                    "--api-sock",
                    API_PATH,
                    "--level",
                    "Warning",
                    "--metrics-path",
                    METRICS_PATH,
                ]
                .map(OsString::from)
                .to_vec(),
                files: plan.files,
                console: their_console,
                network: plan.place.network,
                limits: CgroupLimits {
                    memory_max: megabytes.saturating_mul(1024 * 1024),
                    pids_max: TASKS.saturating_add(plan.shape.vcpu),
                    cpu_weight: 100,
                },
            })
            .await?;
        let metrics =
            Metrics::open(&jailed.control).map_err(io_error("open the VM's metrics pipe"))?;
        let mut process = Process {
            launcher: plan.launcher.clone(),
            slot: plan.place.slot,
            pid: jailed.process.pid,
            pidfd: watch(jailed.process.pidfd).map_err(io_error("watch the VM's process"))?,
            control: jailed.control,
            console: Console::start(console),
            metrics: Some(metrics),
            steps: StepTimes::default(),
            since,
            death: None,
        };
        process.done("process");
        Ok(process)
    }

    /// Notes that a step is done.
    pub(crate) fn done(&mut self, step: &'static str) {
        let now = Instant::now();
        self.steps.0.push((step, now - self.since));
        self.since = now;
    }

    /// Path of a socket of its, for this process.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.control.as_raw_fd()))
    }

    /// Waits for its API and asks it for its version.
    pub(crate) async fn api(&mut self) -> Result<(Api, Version), SandboxError> {
        let mut api = self.connect().await?;
        let answer: FirecrackerVersion = api
            .get(&Request::GetVersion, SHORT)
            .await
            .map_err(api_error("version"))?;
        let version = answer.firecracker_version.parse();
        let version = version.map_err(|message| SandboxError::Engine {
            step: "version",
            message,
        })?;
        Ok((api, version))
    }

    async fn connect(&mut self) -> Result<Api, SandboxError> {
        let wait = io_error("wait for the VM's API socket");
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .map_err(|error| wait(error.into()))?;
        // By the descriptor: the directory has no path of the host.
        let directory = format!("/proc/self/fd/{}", self.control.as_raw_fd());
        inotify::add_watch(&events, directory, inotify::WatchFlags::CREATE)
            .map_err(|error| wait(error.into()))?;
        // SAFETY: an `OwnedFd` names the same open file until it is dropped, and the `AsyncFd` owns it until then.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
        let events = events.map_err(|error| wait(error.into()))?;
        let path = self.socket(API_SOCKET);
        loop {
            match Api::connect(&path).await {
                Ok(api) => return Ok(api),
                Err(ApiError::Connect { source, .. })
                    if source.kind() == io::ErrorKind::ConnectionRefused =>
                {
                    tokio::time::sleep(LISTENS_SOON).await;
                }
                Err(ApiError::Connect { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    let mut ready = events.readable().await.map_err(&wait)?;
                    let mut buffer = [std::mem::MaybeUninit::uninit(); 512];
                    let mut reader = inotify::Reader::new(events.get_ref(), &mut buffer);
                    while reader.next().is_ok() {}
                    ready.clear_ready();
                }
                Err(error) => return Err(api_error("socket")(error)),
            }
        }
    }

    /// What it has written of its devices since this was last called.
    pub(crate) fn take_device_stats(&mut self) -> Result<DeviceStats, SandboxError> {
        let Some(metrics) = &mut self.metrics else {
            return Ok(DeviceStats::default());
        };
        metrics.drain().map_err(io_error("read the VM's metrics"))?;
        Ok(metrics.take())
    }

    /// What the console says, for an error.
    pub(crate) fn console_detail(&self) -> String {
        let tail = self.console.tail();
        if tail.trim().is_empty() {
            "; its console is empty".to_owned()
        } else {
            format!("; the end of its console:\n{}", tail.trim_end())
        }
    }

    /// Runs a step of the way up; a process that dies meanwhile ends it at once.
    pub(crate) async fn unless_dead<T>(
        pidfd: &AsyncFd<OwnedFd>,
        step: impl Future<Output = Result<T, SandboxError>>,
    ) -> Result<T, SandboxError> {
        tokio::select! {
            biased;
            result = step => result,
            _ = pidfd.readable() => Err(SandboxError::Died("the VM's process ended".to_owned())),
        }
    }

    /// A second descriptor to wait for its death by, beside whatever else is done with it.
    pub(crate) fn death_watch(&self) -> Result<AsyncFd<OwnedFd>, SandboxError> {
        let copy = self.pidfd.get_ref().try_clone();
        copy.and_then(watch)
            .map_err(io_error("watch the VM's process"))
    }

    /// The error for a VM that did not come up: its process's own end, if it ended, is the better reason. Ends the
    /// process.
    pub(crate) async fn explain(mut self, error: SandboxError) -> SandboxError {
        let ended = !matches!(error, SandboxError::Timeout { .. });
        let death = if ended {
            tokio::time::timeout(GRACE, self.died()).await.ok()
        } else {
            None
        };
        if let Err(error) = self.launcher.kill(self.slot).await {
            tracing::warn!(slot = self.slot.0, %error, "a VM that did not come up may still run");
        }
        match (death, error) {
            // Firecracker answers what is wrong with a snapshot, and ends.
            (Some(_), error @ SandboxError::Engine { .. }) if is_refusal(&error) => error,
            (Some(death), _) => SandboxError::Died(death.reason),
            (None, error) => error,
        }
    }

    /// Cancel-safe.
    pub(crate) async fn died(&mut self) -> Death {
        if let Some(death) = &self.death {
            return death.clone();
        }
        let end = reaped(&self.pidfd, &self.launcher, self.slot);
        let reaped = match &mut self.metrics {
            // A pipe that nobody empties is full after some minutes.
            Some(metrics) => tokio::select! {
                reaped = end => reaped,
                error = metrics.follow() => {
                    tracing::warn!(slot = self.slot.0, %error, "a VM's metrics cannot be read any more");
                    self.metrics = None;
                    reaped(&self.pidfd, &self.launcher, self.slot).await
                }
            },
            None => end.await,
        };
        let reaped = match reaped {
            Ok(reaped) => reaped,
            Err(unknown) => return unknown,
        };
        let _ = tokio::time::timeout(GRACE, self.console.finish()).await;
        let death = death(reaped, &self.console.tail());
        self.death.insert(death).clone()
    }
}

fn is_refusal(error: &SandboxError) -> bool {
    matches!(error, SandboxError::Engine { message, .. } if message.contains(" was refused: "))
}
