//! `runner local cancel`: takes a waiting job back, or has a running one stopped.

use std::process::ExitCode;

use crate::context::{CliError, Context};
use crate::control::client::RunPrefix;
use crate::names::GroupName;
use crate::queue::{GroupQueue, JobState};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The job's submitter gets a result that says it was cancelled.\n\n\
    Example:\n  runner local cancel --group vm0/demo 6f1c2f0e"
)]
pub(crate) struct Args {
    /// The job's group
    #[arg(long, value_name = "ORG/NAME")]
    group: GroupName,
    /// Beginning of the run's id
    #[arg(value_name = "RUN")]
    run: RunPrefix,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home_as_guest()?;
    let queue = GroupQueue::open(home.group(&args.group)?)?;
    let matching: Vec<_> = queue
        .list()?
        .into_iter()
        .filter(|listed| args.run.matches(listed.run_id))
        .collect();
    let (group, prefix) = (&args.group, &args.run);
    match matching.as_slice() {
        [] => Err(
            CliError::failed(format_args!("no job of group {group} begins with {prefix}"))
                .with_hint(format_args!(
                    "`runner local list --group {group}` shows its jobs"
                )),
        ),
        [listed] => match listed.state {
            JobState::Answered(_) => Err(CliError::failed(format_args!(
                "run {} has ended already",
                listed.run_id
            ))),
            JobState::Waiting | JobState::Running => {
                queue.cancel(listed.run_id)?;
                context.print_line(listed.run_id)?;
                Ok(ExitCode::SUCCESS)
            }
        },
        several => {
            let list: String = several
                .iter()
                .map(|listed| format!("\n  {}", listed.run_id))
                .collect();
            Err(CliError::failed(format_args!(
                "{} jobs of group {group} begin with {prefix}:{list}",
                several.len()
            ))
            .with_hint("give more of the id"))
        }
    }
}
