//! Installs what the runner needs.

use std::process::ExitCode;

use crate::context::{CliError, Context};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  runner setup")]
pub(crate) struct Args {}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let Args {} = args;
    let _ = context;
    Err(CliError::failed("`runner setup` is not there yet"))
}
