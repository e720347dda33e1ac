//! A hand-driven QEMU process, to compare ours with: the same arguments and files, nothing else.
//!
//! No launcher, no namespaces, no cgroup, no task, no typed client: a plain child process of the caller, and canned
//! lines written to its socket. For benchmarks only.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guest_control::Client;
use sandbox::parts::blocking;
use sandbox::{ImageFiles, SandboxError, Shape, SnapshotOutcome};

use crate::engine::QemuEngine;
use crate::machine::{Start, fd};
use crate::template::QemuTemplate;

/// How long a hand-driven process took, in the order of things.
#[derive(Clone, Copy, Debug)]
pub struct RawTimes {
    /// From before the process is started until the guest has answered the handshake.
    pub restore: Duration,
    /// From `cont` of the paused guest until it has answered a ping.
    pub claim: Duration,
}

/// A child that is killed and reaped on every way out.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl QemuEngine {
    /// Restores one clone of a snapshot by hand, pauses it, claims it, and ends it.
    pub async fn raw_restore(
        &self,
        image: ImageFiles,
        shape: Shape,
        snapshot_dir: &Path,
        outcome: &SnapshotOutcome,
    ) -> Result<RawTimes, SandboxError> {
        let machine = self.machine_of(shape, snapshot_dir, outcome)?;
        let launcher = self.launcher.clone();
        let program = self.qemu.path.clone();
        let dir = snapshot_dir.to_owned();
        let template =
            blocking(move || QemuTemplate::open(launcher, program, machine, &image, &dir)).await?;
        let (disk, state) = template.private_files()?;

        let failed = |source| SandboxError::Io {
            action: "drive QEMU by hand".to_owned(),
            source,
        };
        let pairs = [fd::QMP, fd::AGENT, fd::CONSOLE].map(|number| (number, UnixStream::pair()));
        let mut fds: Vec<(OwnedFd, RawFd)> = Vec::new();
        let mut ours = Vec::new();
        for (number, pair) in pairs {
            let (our_end, their_end) = pair.map_err(failed)?;
            fds.push((their_end.into(), number));
            ours.push(our_end);
        }
        fds.extend(template.shared_files()?);
        fds.push((disk.read_write.into(), fd::DISK_RW));
        fds.push((disk.read_only.into(), fd::DISK_RO));
        fds.push((state.into(), fd::STATE));
        fds.push((self.launcher.unplugged_device().await?, fd::TAP));
        let mut ours = ours.into_iter();
        let (Some(qmp), Some(agent), Some(_console)) = (ours.next(), ours.next(), ours.next())
        else {
            return Err(failed(std::io::ErrorKind::Other.into()));
        };

        let mut command = Command::new(&self.qemu.path);
        command
            .args(machine.args(Start::Clone))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // Above the numbers they get, so that no copy overwrites a descriptor still to be copied.
        let mut high = Vec::new();
        for (from, to) in &fds {
            let moved = rustix::io::fcntl_dupfd_cloexec(from, 64).map_err(|e| failed(e.into()))?;
            high.push((moved, *to));
        }
        let numbers: Vec<(RawFd, RawFd)> = high
            .iter()
            .map(|(from, to)| (from.as_raw_fd(), *to))
            .collect();
        // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe; the vector is not changed.
        unsafe {
            command.pre_exec(move || {
                for (from, to) in &numbers {
                    if libc::dup2(*from, *to) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }

        let start = Instant::now();
        let _child = Reaped(command.spawn().map_err(failed)?);
        drop((high, fds));
        let mut qmp = tokio::task::spawn_blocking(move || {
            let mut qmp = Canned(BufReader::new(qmp));
            qmp.until("QMP")?;
            qmp.say(r#"{"execute":"qmp_capabilities"}"#)?;
            qmp.say(
                r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"x-ignore-shared","state":true},{"capability":"events","state":true}]}}"#,
            )?;
            qmp.say(&format!(
                r#"{{"execute":"migrate-incoming","arguments":{{"uri":"fd:{}"}}}}"#,
                fd::STATE
            ))?;
            qmp.until(r#""status": "completed""#)?;
            qmp.say(r#"{"execute":"cont"}"#)?;
            Ok(qmp)
        })
        .await
        .map_err(|error| failed(std::io::Error::other(error)))?
        .map_err(failed)?;
        agent.set_nonblocking(true).map_err(failed)?;
        let agent = tokio::net::UnixStream::from_std(agent).map_err(failed)?;
        let client = Client::connect(agent, Duration::from_secs(60)).await?;
        let restore = start.elapsed();

        client.ping().await?;
        qmp.say(r#"{"execute":"stop"}"#).map_err(failed)?;
        let start = Instant::now();
        qmp.say(r#"{"execute":"cont"}"#).map_err(failed)?;
        client.ping().await?;
        Ok(RawTimes {
            restore,
            claim: start.elapsed(),
        })
    }
}

/// Lines out, lines in, nothing understood.
struct Canned(BufReader<UnixStream>);

impl Canned {
    /// Sends a command and waits for its answer.
    fn say(&mut self, line: &str) -> std::io::Result<()> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes())?;
        self.until(r#"{"return""#)
    }

    fn until(&mut self, word: &str) -> std::io::Result<()> {
        let mut line = String::new();
        while !line.contains(word) {
            line.clear();
            if self.0.read_line(&mut line)? == 0 || line.contains(r#"{"error""#) {
                return Err(std::io::Error::other(format!("QEMU said: {line}")));
            }
        }
        Ok(())
    }
}
