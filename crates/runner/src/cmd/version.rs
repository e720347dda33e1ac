//! Prints version, commit and platform.

use std::process::ExitCode;

use serde::Serialize;

use crate::context::{CliError, Context};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  runner version\n  runner version --json")]
pub(crate) struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    os: &'static str,
    arch: &'static str,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let report = Report {
        version: crate::cli::VERSION,
        os: std::env::consts::OS,
        arch: std::env::consts::ARCH,
    };
    if args.json {
        context.print_json(&report)?;
    } else {
        context.print_line(format_args!(
            "runner {} {}-{}",
            report.version, report.arch, report.os
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
