//! PID 1 of the guest.
//!
//! ```text
//!   boot::prepare ──▶ serve the port `agent`, or vsock ──▶ shutdown
//!    mounts, modules      │ ▲
//!    cgroups, sysctls     │ └── host gone, or became quiet for a snapshot: wait for the next handshake
//!                         ▼
//!          guest::Guest (guest_control::server::Os)
//!          ├ root.rs    the agent's root, in a mount namespace of its own
//!          ├ spawn.rs   processes, started into that namespace and a cgroup
//!          ├ reaper.rs  the one place that waits for them
//!          ├ files.rs   files inside that root
//!          └ clock.rs   time and entropy after a restore
//! ```
//!
//! Everything runs on one thread: the kernel lets only a single-threaded process change its mount namespace, and under
//! emulation every further piece of code has to be translated first. Errors of a request go to the host; an error that
//! leaves the guest useless ends PID 1, the kernel panics and the VM is gone, which the host notices at once.

mod boot;
mod cgroup;
mod clock;
mod clone;
mod environment;
mod files;
mod guest;
mod kmsg;
mod network;
mod port;
mod reaper;
mod root;
mod spawn;
mod stats;
mod users;
mod vsock;

use std::process::ExitCode;
use std::sync::Arc;

use guest_control::VSOCK_WORD;
use guest_control::server::{Ended, Os, OsError, serve};

use crate::guest::Guest;
use crate::port::Port;
use crate::reaper::Reaper;
use crate::vsock::Listener;

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        eprintln!("error: guest-init is the first process of a guest and nothing else");
        return ExitCode::FAILURE;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            kmsg::log(&format!("cannot go on: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), OsError> {
    boot::prepare()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| OsError::new("starting the event loop", error))?;
    runtime.block_on(serve_host())
}

async fn serve_host() -> Result<(), OsError> {
    let reaper = Arc::new(Reaper::new()?);
    let waiter = Arc::clone(&reaper);
    tokio::spawn(async move { waiter.run().await });
    let guest = Arc::new(Guest::new(reaper)?);
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if command_line
        .split_whitespace()
        .any(|word| word == VSOCK_WORD)
    {
        serve_vsock(&guest).await
    } else {
        serve_port(&guest).await
    }
}

/// Whether the machine is one with a vsock device instead of a virtio-serial port, which is Firecracker's.
fn has_vsock() -> bool {
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    command_line
        .split_whitespace()
        .any(|word| word == VSOCK_WORD)
}

async fn serve_port(guest: &Arc<Guest>) -> Result<(), OsError> {
    let mut port = Port::open("agent")
        .await
        .map_err(|error| OsError::new("opening the virtio port `agent`", error))?;
    loop {
        port.wait_for_host()
            .await
            .map_err(|error| OsError::new("waiting for the host", error))?;
        let ended = serve(&mut port, guest).await;
        let broken = matches!(ended, Ended::Protocol(_));
        settle(guest, ended).await;
        if broken {
            port.discard_until_host_goes()
                .await
                .map_err(|error| OsError::new("draining the port", error))?;
        }
    }
}

async fn serve_vsock(guest: &Arc<Guest>) -> Result<(), OsError> {
    let listener =
        Listener::open().map_err(|error| OsError::new("listening on the vsock port", error))?;
    loop {
        let mut stream = listener
            .accept()
            .await
            .map_err(|error| OsError::new("waiting for the host", error))?;
        let ended = serve(&mut stream, guest).await;
        // Whoever listens at the other end learns at once that nothing more comes.
        drop(stream);
        settle(guest, ended).await;
    }
}

/// Does what the end of a conversation asks for.
async fn settle(guest: &Guest, ended: Ended) {
    match ended {
        Ended::Quiet => {}
        Ended::Shutdown => guest.shutdown(),
        Ended::HostGone => abandon(guest).await,
        Ended::Protocol(what) => {
            kmsg::log(&format!("the host broke the control protocol: {what}"));
            abandon(guest).await;
        }
    }
}

/// Nobody will ever ask for these processes again.
async fn abandon(guest: &Guest) {
    if let Err(error) = guest.kill_all().await {
        kmsg::log(&format!("killing what the host left: {error}"));
    }
}
