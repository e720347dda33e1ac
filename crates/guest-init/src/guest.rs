//! What the host can ask of this guest.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guest_control::server::{Os, OsError, Spawned};
use guest_control::{ExecSpec, FileSpec, GuestStats, MountSource, Wake};
use rustix::io::Errno;
use rustix::system::RebootCommand;

use crate::cgroup::{self, Cgroups};
use crate::clock::Clock;
use crate::files::NewFile;
use crate::kmsg;
use crate::reaper::Reaper;
use crate::root::Root;
use crate::spawn::{self, Session};
use crate::stats;

/// The operating system behind the control server.
#[derive(Debug)]
pub(crate) struct Guest {
    clock: Clock,
    reaper: Arc<Reaper>,
    cgroups: Arc<Cgroups>,
    root: Mutex<Option<Arc<Root>>>,
    files: AtomicU64,
}

impl Guest {
    pub(crate) fn new(reaper: Arc<Reaper>) -> Result<Self, OsError> {
        Ok(Self {
            clock: Clock::new()?,
            reaper,
            cgroups: Arc::new(Cgroups::new()?),
            root: Mutex::new(None),
            files: AtomicU64::new(0),
        })
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<Root>>> {
        self.root.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn root(&self) -> Result<Arc<Root>, OsError> {
        self.slot()
            .clone()
            .ok_or_else(|| OsError::new("the agent's root is not mounted", Errno::NODEV))
    }

    /// Kills every process but this one and waits until all are gone.
    async fn kill_everything(&self) -> Result<(), OsError> {
        let mut failure = None;
        self.reaper
            .until(|| {
                // The cgroup first, which no fork escapes; then whoever has moved out of it.
                failure = cgroup::kill_agent().err();
                // SAFETY: signals all processes except this one (kill(2): not init, not the sender).
                unsafe { libc::kill(-1, libc::SIGKILL) };
                failure.is_some() || self.reaper.reap()
            })
            .await;
        failure.map_or(Ok(()), Err)
    }
}

impl Os for Guest {
    type Process = Session;
    type NewFile = NewFile;

    fn wake(&self, wake: &Wake) -> Result<(), OsError> {
        self.clock.wake(wake)
    }

    fn mount(&self, source: MountSource) -> Result<(), OsError> {
        let mut slot = self.slot();
        if slot.is_some() {
            return Err(OsError::new("the agent's root is mounted", Errno::BUSY));
        }
        *slot = Some(Arc::new(Root::build(source)?));
        Ok(())
    }

    async fn unmount(&self) -> Result<(), OsError> {
        self.kill_everything().await?;
        *self.slot() = None;
        Ok(())
    }

    async fn kill_all(&self) -> Result<(), OsError> {
        self.kill_everything().await
    }

    fn spawn(&self, spec: &ExecSpec) -> Result<Spawned<Session>, OsError> {
        spawn::spawn(spec, &self.root()?, &self.cgroups, &self.reaper)
    }

    fn stats(&self) -> Result<GuestStats, OsError> {
        let root = self.slot().clone();
        stats::gather(root.as_deref())
    }

    fn open(&self, path: &str) -> Result<File, OsError> {
        Ok(self.root()?.open_regular(path)?.into())
    }

    fn create(&self, spec: &FileSpec) -> Result<NewFile, OsError> {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        NewFile::create(&*self.root()?, spec, number)
    }

    fn commit(&self, file: NewFile) -> Result<(), OsError> {
        file.place()
    }

    fn shutdown(&self) {
        rustix::fs::sync();
        // Not every machine has a power switch; a reset ends the VM as well (QEMU runs with -no-reboot). Firecracker's has
        // none, and the kernel would halt for good where it finds none.
        let commands: &[RebootCommand] = if crate::has_vsock() {
            &[RebootCommand::Restart]
        } else {
            &[RebootCommand::PowerOff, RebootCommand::Restart]
        };
        for &command in commands {
            if let Err(error) = rustix::system::reboot(command) {
                kmsg::log(&format!("powering off: {error}"));
            }
        }
    }
}
