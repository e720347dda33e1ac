//! What is asked of systemd, by its own programs.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

use super::unit::UnitName;
use crate::context::{CliError, note};

/// Fails where this host was not booted with systemd.
pub(super) fn require() -> Result<(), CliError> {
    if sd_notify::booted()? {
        return Ok(());
    }
    Err(
        CliError::failed("this host does not run systemd, whose units `runner service` manages")
            .with_hint("let your own supervisor run `runner start --config FILE --local`"),
    )
}

/// Fails for whoever may not manage units.
pub(super) fn require_root(command: &str) -> Result<(), CliError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(
        CliError::failed(format_args!("`runner service {command}` needs root"))
            .with_hint(format_args!("sudo runner service {command} …")),
    )
}

/// `systemctl ARGS`, which must succeed.
pub(super) fn systemctl<S: AsRef<OsStr>>(args: &[S]) -> Result<String, CliError> {
    let output = output(args)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words: Vec<_> = args
        .iter()
        .map(|arg| arg.as_ref().to_string_lossy())
        .collect();
    let told = String::from_utf8_lossy(&output.stderr);
    Err(CliError::failed(format_args!(
        "`systemctl {}` failed: {}",
        words.join(" "),
        told.trim()
    )))
}

fn output<S: AsRef<OsStr>>(args: &[S]) -> Result<Output, CliError> {
    Command::new("systemctl")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| CliError::failed(format_args!("cannot start systemctl: {error}")))
}

/// What systemd knows of a unit.
#[derive(Debug)]
pub(super) struct State(HashMap<String, String>);

impl State {
    /// Properties we look at.
    const PROPERTIES: &str = "LoadState,ActiveState,SubState,UnitFileState,MainPID,FragmentPath";

    pub(super) fn of(unit: &UnitName) -> Result<Self, CliError> {
        let text = systemctl(&["show", "--property", Self::PROPERTIES, unit.as_str()])?;
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        Ok(Self(
            pairs
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        ))
    }

    pub(super) fn get(&self, property: &str) -> &str {
        self.0.get(property).map_or("", String::as_str)
    }

    /// Whether a process of it may be there.
    pub(super) fn is_up(&self) -> bool {
        matches!(
            self.get("ActiveState"),
            "active" | "activating" | "reloading" | "deactivating"
        )
    }

    pub(super) fn is_active(&self) -> bool {
        matches!(self.get("ActiveState"), "active" | "reloading")
    }

    pub(super) fn has_failed(&self) -> bool {
        self.get("ActiveState") == "failed"
    }
}

/// Every runner's unit that systemd knows.
pub(super) fn units() -> Result<Vec<String>, CliError> {
    let text = systemctl(&[
        "list-units",
        "--all",
        "--plain",
        "--no-legend",
        "--no-pager",
        UnitName::PATTERN,
    ])?;
    let names = text
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    Ok(names.map(str::to_owned).collect())
}

/// A place in the journal, to show later what has been said since.
#[derive(Debug)]
pub(super) struct JournalMark(Option<String>);

impl JournalMark {
    /// Now.
    pub(super) fn now() -> Self {
        let output = Command::new("journalctl")
            .args(["--quiet", "-n", "1", "--show-cursor", "--output", "cat"])
            .stdin(Stdio::null())
            .output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let cursor = text.ok().and_then(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("-- cursor: "))
                .map(str::to_owned)
        });
        Self(cursor)
    }

    /// Shows on stderr what the unit's processes have said since.
    pub(super) fn show_since(&self, unit: &UnitName) {
        let mut command = Command::new("journalctl");
        command.args([
            "--quiet",
            "--no-pager",
            "--output",
            "cat",
            "-n",
            "30",
            "--unit",
        ]);
        command.arg(unit.as_str()).stdin(Stdio::null());
        if let Some(cursor) = &self.0 {
            command.arg(format!("--after-cursor={cursor}"));
        }
        if let Ok(output) = command.output() {
            for line in String::from_utf8_lossy(&output.stdout).lines() {
                note(format_args!("  {}", crate::terminal::escape(line)));
            }
        }
    }
}
