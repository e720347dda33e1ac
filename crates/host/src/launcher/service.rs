//! Services: the runner's own helpers that speak to the world, such as the proxy. They live in the hub.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::wire::{LaunchKind, LaunchOrder, Unit};
use super::{CgroupLimits, Launcher, LauncherError, Process, Reaped};

/// Most services of one runner directory.
pub const SERVICES: u16 = 16;

/// A service of this runner, 0 to 15. It runs as uid and gid `uid_base + SLOTS + n`, *n* being the lowest number that no
/// runner of the run directory uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServiceId(pub u16);

/// A service to start: in the hub's network, with a uid, a cgroup and a mount namespace of its own, no capabilities, no
/// new privileges. It sees the system's programs and certificates, an empty /tmp, and what it is shown.
#[derive(Debug)]
pub struct ServiceSpec {
    /// Which.
    pub service: ServiceId,
    /// Absolute path of the program, as the service sees it.
    pub program: PathBuf,
    /// Arguments after argv\[0\].
    pub args: Vec<OsString>,
    /// Its whole environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Descriptors it gets, each under exactly this number. Those of 0 to 2 that are not given are /dev/null.
    pub fds: Vec<(OwnedFd, i32)>,
    /// Directories and files, opened by whoever may read them, and where the service sees them, read-only.
    pub shown: Vec<(OwnedFd, PathBuf)>,
    /// Content of its /etc/resolv.conf.
    pub resolv_conf: String,
    /// Limits of its cgroup.
    pub limits: CgroupLimits,
}

impl Launcher {
    /// Starts a service; returns when its program runs. It dies with the launcher, [`Launcher::kill_service`] ends it
    /// before.
    pub async fn launch_service(&self, spec: ServiceSpec) -> Result<Process, LauncherError> {
        let ServiceSpec { fds, shown, .. } = spec;
        let environment = spec.environment.into_iter().map(|(name, value)| {
            let mut variable = name.into_vec();
            variable.push(b'=');
            variable.extend(value.into_vec());
            variable
        });
        let paths = shown.iter().map(|(_, path)| path.clone());
        let order = LaunchOrder {
            kind: LaunchKind::Service {
                service: spec.service,
                environment: environment.collect(),
                resolv_conf: spec.resolv_conf,
                shown: paths.map(|path| path.into_os_string().into_vec()).collect(),
            },
            program: spec.program.into_os_string().into_vec(),
            args: spec.args.into_iter().map(OsString::into_vec).collect(),
            targets: fds.iter().map(|(_, target)| *target).collect(),
            limits: spec.limits,
        };
        let shown = shown.iter().map(|(fd, _)| fd.as_fd());
        let fds: Vec<_> = fds.iter().map(|(fd, _)| fd.as_fd()).chain(shown).collect();
        self.start(order, &fds).await
    }

    /// Kills a service and what it started, and waits until all are reaped. Nothing if it was never started; what it
    /// left if it had died before.
    pub async fn kill_service(&self, service: ServiceId) -> Result<Option<Reaped>, LauncherError> {
        self.kill_unit(Unit::Service(service)).await
    }

    /// Waits until a service that was started has died.
    pub async fn wait_service(&self, service: ServiceId) -> Result<Reaped, LauncherError> {
        self.wait_unit(Unit::Service(service)).await
    }
}
