//! Cancels a running job.

use std::process::ExitCode;

use crate::context::{CliError, Context};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  runner kill")]
pub(crate) struct Args {}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let Args {} = args;
    let _ = context;
    Err(CliError::failed("`runner kill` is not there yet"))
}
