//! Running nft: rules go in as one transaction, which is applied whole or not at all.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::MemfdFlags;
use rustix::process::Signal;

/// Not PATH, which may come from a user's environment while we are root.
const PLACES: [&str; 3] = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"];
/// Longest complaint that is passed on, bytes.
const MAX_COMPLAINT: usize = 500;
/// Longest list of tables that is believed, bytes.
const MAX_LIST: u64 = 1 << 20;

/// An nft that is at work in the namespace it was started in.
pub(crate) struct Transaction {
    child: Child,
    complaints: File,
}

impl Transaction {
    /// Starts applying `rules` to the calling thread's namespace.
    pub(crate) fn start(rules: &str) -> Result<Transaction, String> {
        let failed = |e: io::Error| format!("nft could not be started: {e}");
        let input = memory(rules).map_err(failed)?;
        let complaints = memory("").map_err(failed)?;
        let child = command()?
            .args(["-f", "-"])
            .stdin(input)
            .stdout(Stdio::null())
            .stderr(complaints.try_clone().map_err(failed)?)
            .spawn()
            .map_err(failed)?;
        Ok(Transaction { child, complaints })
    }

    /// Waits until it is done; nft's own words if it refused.
    pub(crate) fn finish(mut self) -> Result<(), String> {
        let status = self
            .child
            .wait()
            .map_err(|e| format!("nft was lost: {e}"))?;
        if status.success() {
            return Ok(());
        }
        let mut said = String::new();
        let read = self.complaints.rewind().and_then(|()| {
            let limit = u64::try_from(MAX_COMPLAINT).unwrap_or(u64::MAX);
            self.complaints.take(limit).read_to_string(&mut said)
        });
        match read {
            Ok(_) if !said.trim().is_empty() => {
                Err(format!("nft refused its rules: {}", said.trim()))
            }
            _ => Err(format!("nft ended with {status}")),
        }
    }
}

/// Applies `rules` to the calling thread's namespace.
pub(crate) fn apply(rules: &str) -> Result<(), String> {
    Transaction::start(rules)?.finish()
}

/// Names of the IPv4 tables in the calling thread's namespace.
pub(crate) fn tables() -> Result<Vec<String>, String> {
    let failed = |e: io::Error| format!("nft could not list tables: {e}");
    let mut child = command()?
        .args(["list", "tables", "ip"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout
            .take(MAX_LIST)
            .read_to_string(&mut text)
            .map_err(failed)?;
    }
    child.wait().map_err(failed)?;
    let names = text
        .lines()
        .filter_map(|line| line.strip_prefix("table ip "));
    Ok(names.map(|name| name.trim().to_owned()).collect())
}

fn command() -> Result<Command, String> {
    let program = PLACES
        .iter()
        .map(Path::new)
        .find(|path| path.is_file())
        .ok_or_else(|| {
            "nft is not installed: `runner setup` installs it (Debian and Ubuntu: apt-get install nftables)".to_owned()
        })?;
    let mut command = Command::new(program);
    command.env_clear().current_dir("/");
    // SAFETY: between fork and exec only one system call is made.
    unsafe {
        // Whoever waits for it may be killed for having waited too long.
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into)
        });
    }
    Ok(command)
}

/// A file in memory: unlike a pipe it never makes a writer wait.
fn memory(text: &str) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(c"nft", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}
