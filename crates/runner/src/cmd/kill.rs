//! `runner kill`: cancels a running job.

use std::process::ExitCode;

use crate::context::{CliError, Context, block_on};
use crate::control::client::{self, RunPrefix};
use crate::control::protocol::{Reply, Request};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The job's submitter gets a result that says it was cancelled.\n\n\
    Examples:\n  runner kill 6f1c\n\nA job that no runner has taken yet is cancelled with `runner local cancel`."
)]
pub(crate) struct Args {
    /// Beginning of the run's id
    #[arg(value_name = "RUN")]
    run: RunPrefix,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home()?;
    block_on(async {
        let found = client::find(&home, &args.run).await?;
        let run = found.info.run_id;
        let reply = found
            .instance
            .ask(&Request::Cancel { run })
            .await
            .map_err(|error| client::broken(&error))?;
        match reply {
            Reply::Done => {
                context.print_line(run)?;
                Ok(ExitCode::SUCCESS)
            }
            Reply::Failed(failure) => Err(client::told(failure)),
            _ => Err(client::odd()),
        }
    })
}
