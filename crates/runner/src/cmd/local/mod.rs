//! `runner local …`: the local file queue, from the submitter's side.

pub(crate) mod cancel;
pub(crate) mod list;
pub(crate) mod submit;

use std::process::ExitCode;

use clap::Subcommand;

use crate::context::{CliError, Context};

/// Command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Submit a job and wait for its result
    Submit(Box<submit::Args>),
    /// Cancel a job
    Cancel(cancel::Args),
    /// List a group's jobs
    List(list::Args),
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    match args.command {
        Command::Submit(args) => submit::run(*args, context),
        Command::Cancel(args) => cancel::run(args, context),
        Command::List(args) => list::run(args, context),
    }
}
