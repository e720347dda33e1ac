//! Checks this host.

use std::process::ExitCode;

use crate::context::{CliError, Context};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  runner doctor")]
pub(crate) struct Args {}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let Args {} = args;
    let _ = context;
    Err(CliError::failed("`runner doctor` is not there yet"))
}
