//! Copies files into or out of a running job's VM.

use std::process::ExitCode;

use crate::context::{CliError, Context};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  runner cp")]
pub(crate) struct Args {}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let Args {} = args;
    let _ = context;
    Err(CliError::failed("`runner cp` is not there yet"))
}
