//! `runner local list`: the jobs of a group.

use std::fmt::Write;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::context::{CliError, Context, note};
use crate::names::{GroupName, ProfileName, RunId};
use crate::queue::{GroupQueue, JobState, Listed, LiveRunner};
use crate::terminal;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Jobs that wait or run, and answers that nobody has fetched.\n\n\
    Examples:\n  runner local list --group vm0/demo\n  runner local list --group vm0/demo --json | jq .jobs"
)]
pub(crate) struct Args {
    /// The group
    #[arg(long, value_name = "ORG/NAME")]
    group: GroupName,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    group: &'a GroupName,
    runners: &'a [LiveRunner],
    jobs: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    run_id: RunId,
    state: &'static str,
    profile: Option<ProfileName>,
    /// Seconds since the Unix epoch.
    since_unix: Option<u64>,
    exit_code: Option<i32>,
    error: Option<String>,
}

impl Row {
    fn new(listed: Listed) -> Self {
        let (state, exit_code, error) = match listed.state {
            JobState::Waiting => ("queued", None, None),
            JobState::Running => ("running", None, None),
            JobState::Answered(result) => ("done", Some(result.exit_code), result.error),
        };
        Self {
            run_id: listed.run_id,
            state,
            profile: listed.profile,
            since_unix: listed
                .since
                .and_then(|since| since.duration_since(UNIX_EPOCH).ok())
                .map(|since| since.as_secs()),
            exit_code,
            error,
        }
    }
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home_as_guest()?;
    let queue = GroupQueue::open(home.group(&args.group)?)?;
    let runners = queue.live_runners()?;
    let report = Report {
        group: &args.group,
        runners: &runners,
        jobs: queue.list()?.into_iter().map(Row::new).collect(),
    };
    if args.json {
        context.print_json(&report)?;
    } else {
        context.print(table(&report))?;
        if runners.is_empty() {
            note(format_args!("no runner watches group {}", args.group));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn table(report: &Report<'_>) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let mut text = format!(
        "{:<36}  {:<7}  {:>6}  {:<16}  RESULT\n",
        "RUN", "STATE", "AGE", "PROFILE"
    );
    for row in &report.jobs {
        let age = row
            .since_unix
            .map_or_else(|| "-".to_owned(), |since| age(now.saturating_sub(since)));
        let profile = row.profile.as_ref().map_or("-", ProfileName::as_str);
        let result = match (row.exit_code, &row.error) {
            (Some(code), Some(error)) => format!("{code}: {}", terminal::escape(error)),
            (Some(code), None) => code.to_string(),
            _ => "-".to_owned(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:<36}  {:<7}  {age:>6}  {profile:<16}  {result}",
            row.run_id.to_string(),
            row.state
        );
    }
    text
}

/// A length of time in its largest unit.
fn age(secs: u64) -> String {
    match secs {
        0..60 => format!("{secs}s"),
        60..3600 => format!("{}m", secs / 60),
        3600..86_400 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_shown_in_their_largest_unit() {
        for (secs, shown) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (7200, "2h"),
            (90_000, "1d"),
        ] {
            assert_eq!(age(secs), shown);
        }
    }
}
