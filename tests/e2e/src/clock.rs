//! A clock that a test sets: the daemon's alone, or one command's, never the machine's.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use tempfile::TempDir;

use crate::host::Host;
use crate::skip::skip;

/// libfaketime for programs with threads, where Debian and Ubuntu put it.
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";

/// The real-time clock that one daemon, or another program, sees. Its monotonic clock is the machine's, as it is when a clock is set.
pub struct DaemonClock {
    place: TempDir,
    library: String,
}

impl DaemonClock {
    /// A clock that is right. `None`, with the reason reported, where the library is not installed.
    pub fn new() -> Option<Self> {
        let directories = ["x86_64-linux-gnu", "aarch64-linux-gnu"];
        let found = directories
            .map(|directory| format!("/usr/lib/{directory}/{LIBRARY}"))
            .into_iter()
            .find(|path| Path::new(path).exists());
        let Some(library) = found else {
            skip("it sets the daemon's clock, which needs libfaketime");
            return None;
        };
        let place = tempfile::tempdir().expect("a temporary directory");
        let clock = Self { place, library };
        clock.set(0);
        Some(clock)
    }

    /// Sets it to so many seconds from the machine's clock.
    pub fn set(&self, offset: i64) {
        let new = self.place.path().join("new");
        fs::write(&new, format!("{offset:+}\n")).expect("our directory");
        fs::rename(new, self.place.path().join("offset")).expect("our directory");
    }

    /// Lines for a shell in a mount namespace of its own: what it then becomes has this clock.
    pub fn script(&self) -> String {
        // The library's shared memory is never removed when a process is killed: it gets a place that goes with it.
        format!(
            "mount -t tmpfs -o size=1m none /dev/shm\n\
             export FAKETIME_TIMESTAMP_FILE='{}' FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1\n\
             export LD_PRELOAD='{}'",
            self.place.path().join("offset").display(),
            self.library
        )
    }

    /// Starts the host's runner with this clock.
    pub fn start_runner(&self, host: &Host) {
        let start = host.start_command();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "--", "sh", "-ec"])
            .arg(format!("{}\nexec \"$@\"", self.script()))
            .arg("sh")
            .arg(start.get_program())
            .args(start.get_args())
            .stdin(Stdio::null());
        for (name, value) in start.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        host.start_runner_with(command);
    }
}

/// The machine's clock, seconds since 1970.
pub fn seconds_now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("it is after 1970");
    i64::try_from(since.as_secs()).expect("a sane clock")
}
