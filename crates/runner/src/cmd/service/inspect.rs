//! What systemd shows of the service.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use serde::Serialize;

use super::systemd::{State, units};
use super::unit::UnitName;
use crate::context::{CliError, Context};
use crate::names::RunnerName;

#[derive(Serialize)]
struct Shown {
    unit: String,
    active: String,
    sub: String,
    /// Empty where systemd has no file of it.
    enabled: String,
    main_pid: u32,
    file: String,
}

pub(super) fn status(
    name: Option<&RunnerName>,
    json: bool,
    context: &Context,
) -> Result<ExitCode, CliError> {
    if !json {
        let unit = name.map(UnitName::of);
        let unit = unit.as_ref().map_or(UnitName::PATTERN, UnitName::as_str);
        let mut systemctl = Command::new("systemctl");
        systemctl.args(["status", "--no-pager", "--full", unit]);
        return Err(become_it(systemctl));
    }
    let units = match name {
        Some(name) => vec![UnitName::of(name)],
        None => units()?
            .iter()
            .filter_map(|unit| UnitName::runner(unit))
            .map(|name| UnitName::of(&name))
            .collect(),
    };
    let mut shown = Vec::new();
    for unit in units {
        let state = State::of(&unit)?;
        let get = |property: &str| state.get(property).to_owned();
        shown.push(Shown {
            unit: unit.as_str().to_owned(),
            active: get("ActiveState"),
            sub: get("SubState"),
            enabled: get("UnitFileState"),
            main_pid: state.get("MainPID").parse().unwrap_or(0),
            file: get("FragmentPath"),
        });
    }
    context.print_json(&shown)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn logs(name: &RunnerName, follow: bool, lines: u32) -> Result<ExitCode, CliError> {
    let mut journalctl = Command::new("journalctl");
    journalctl.args(["--no-pager", "--unit", UnitName::of(name).as_str()]);
    journalctl.args(["--lines", &lines.to_string()]);
    if follow {
        journalctl.arg("--follow");
    }
    Err(become_it(journalctl))
}

/// Returns only when it failed.
fn become_it(mut command: Command) -> CliError {
    let error = command.exec();
    CliError::failed(format_args!(
        "cannot start {:?}: {error}",
        command.get_program()
    ))
}
