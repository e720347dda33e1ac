//! The daemon processes of one runner, asked through their control sockets.

use std::time::{Duration, Instant};

use crate::context::{CliError, note};
use crate::control::client::{self, Instance};
use crate::control::protocol::{Reply, Request};
use crate::home::Home;
use crate::names::{RunId, RunnerName};
use crate::status::{Mode, Status};

/// Between two looks at what a daemon says of itself.
const LOOK: Duration = Duration::from_millis(50);
/// A daemon follows a signal within this.
const FOLLOWS: Duration = Duration::from_secs(10);

/// What every live instance of a runner says of itself: that which takes jobs, and predecessors that finish theirs.
/// An instance that does not answer is an error: nobody knows what it runs.
pub(super) async fn statuses(home: &Home, name: &RunnerName) -> Result<Vec<Status>, CliError> {
    let mut statuses = Vec::new();
    for instance in Instance::live(home)? {
        if instance.runner != *name {
            continue;
        }
        match instance.ask(&Request::Status).await {
            // It has not come so far that it could run a job.
            Ok(Reply::Status(text)) if text.is_empty() => {}
            Ok(Reply::Status(text)) => statuses.push(serde_json::from_str(&text)?),
            Ok(_) => return Err(client::odd()),
            // It ended meanwhile, or has no socket yet: then it has no jobs.
            Err(_) if !instance.is_live() || !instance.listens() => {}
            Err(error) => {
                return Err(CliError::failed(format_args!(
                    "an instance of runner {name} does not say what it runs: {error}"
                ))
                .with_hint("--force ends it all the same"));
            }
        }
    }
    Ok(statuses)
}

/// Their runs.
pub(super) fn runs(statuses: &[Status]) -> Vec<RunId> {
    let runs = statuses.iter().flat_map(|status| &status.active_runs);
    runs.map(|run| run.run_id).collect()
}

/// Waits until none of the instances takes jobs any more, after they were told.
pub(super) async fn wait_drained(home: &Home, name: &RunnerName) -> Result<Vec<Status>, CliError> {
    let begin = Instant::now();
    loop {
        let statuses = statuses(home, name).await?;
        if statuses.iter().all(|status| status.mode != Mode::Running) {
            return Ok(statuses);
        }
        if begin.elapsed() > FOLLOWS {
            return Err(CliError::failed(format_args!(
                "runner {name} goes on taking jobs, though it was told not to"
            ))
            .with_hint(format_args!(
                "its log says more: runner service logs --name {name}"
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until no job runs; gives those that still do after `limit`.
pub(super) async fn wait_empty(
    home: &Home,
    name: &RunnerName,
    limit: Duration,
) -> Result<Vec<RunId>, CliError> {
    let begin = Instant::now();
    let mut told = usize::MAX;
    loop {
        let left = runs(&statuses(home, name).await?);
        if left.is_empty() || begin.elapsed() >= limit {
            return Ok(left);
        }
        if left.len() != told {
            told = left.len();
            note(format_args!("waiting for {told} running job(s)"));
        }
        tokio::time::sleep(LOOK.saturating_mul(4)).await;
    }
}
