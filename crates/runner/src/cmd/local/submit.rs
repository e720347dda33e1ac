//! `runner local submit`: puts a job into the file queue and waits for its answer.
//!
//! ```text
//! validate everything ─▶ watch for results ─▶ write the job ─▶ waiting ─▶ answered: one JSON line
//!                                                                │ Ctrl-C, --timeout
//!                                                                ▼
//!                        taken back, nothing ran ◀─ unclaimed ─ leaving ─ claimed ─▶ cancel marker, ≤ 10 s
//! ```
//!
//! Nothing is written before all of the command line was checked; killed at any moment, it leaves a job that a
//! runner answers like any other.

mod collect;
mod network;
mod notice;
mod wait;

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::cmd::logs::tail::Tail;
use crate::cmd::parse;
use crate::context::{CliError, Context, block_on, note};
use crate::names::{GroupName, ProfileName, RunId, SessionId};
use crate::queue::{GroupQueue, Job, JobFields, MAX_PROMPT_BYTES, hand_over};
use crate::telemetry::TraceParent;
use collect::Collect;
use network::NetworkArgs;
use wait::Waiter;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Prints exactly one line: {\"run_id\":\"…\",\"exit_code\":0,\"error\":null}. Exit status 0 only if \
exit_code is 0.\nCtrl-C cancels the job and waits up to 10 s for its answer; a second one leaves at once.\n\
TRACEPARENT in the environment (W3C Trace Context) makes the job part of that trace.\n\n\
Examples:\n  \
    runner local submit --group vm0/demo --profile vm0/small --prompt 'nproc && free -m'\n  \
    runner local submit --group vm0/demo --prompt-file task.md --follow\n  \
    runner local submit --group vm0/demo --prompt 'make report' --collect /home/user/workspace/report.pdf=.\n  \
    runner local submit --group vm0/demo --prompt-file task.md --allow '*.github.com' --secret GH_TOKEN=env:GH_TOKEN@api.github.com"
)]
pub(crate) struct Args {
    /// The group whose runners may take the job
    #[arg(long, value_name = "ORG/NAME")]
    group: GroupName,
    /// What VM it runs in
    #[arg(long, value_name = "ORG/NAME", default_value = "vm0/default")]
    profile: ProfileName,
    /// What the agent is to do, at most 4 MiB
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "prompt_file",
        allow_hyphen_values = true
    )]
    prompt: Option<String>,
    /// Read the prompt from a file, or from standard input with `-`
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// Show the job's log on stderr while it runs
    #[arg(short, long)]
    follow: bool,
    /// Do not escape control characters of the log
    #[arg(long, requires = "follow")]
    raw: bool,
    /// Jobs of one session may be given the same VM, with its files, again
    #[arg(long, value_name = "ID")]
    session_id: Option<SessionId>,
    /// Cancel the job when it has not ended this long after its submission, such as 90, 5m
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    timeout: Option<Duration>,
    /// Set an environment variable of the agent (not VM0_*)
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse::variable)]
    env: Vec<(String, String)>,
    /// Directory in the VM that the agent works in
    #[arg(long, value_name = "DIR", default_value = "/home/user/workspace")]
    workdir: String,
    /// Which agent CLI runs
    #[arg(long, value_name = "TYPE", default_value = "claude-code")]
    cli_agent_type: String,
    /// Copy a file of the VM into a directory here when the job has ended
    #[arg(long, value_name = "PATH=DIR")]
    collect: Vec<Collect>,
    #[command(flatten)]
    network: NetworkArgs,
    /// Print the result as JSON (it always is)
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(file)) => read_prompt(file)?,
        (None, None) => return Err(CliError::usage("a prompt is missing")),
    };
    let (network, secrets) = args.network.resolve()?;
    let job = Job::new(JobFields {
        run_id: RunId::random(),
        prompt,
        profile: args.profile,
        working_dir: args.workdir,
        cli_agent_type: args.cli_agent_type,
        environment: args.env.into_iter().collect(),
        session_id: args.session_id,
        timeout_secs: args.timeout.map(|limit| limit.as_secs()),
        collect: args
            .collect
            .iter()
            .map(|collect| collect.guest_path().to_owned())
            .collect(),
        network,
        traceparent: trace_parent(),
    })
    .map_err(CliError::usage)?;
    let collect = args
        .collect
        .into_iter()
        .map(Collect::open)
        .collect::<Result<Vec<_>, _>>()?;
    let home = context.home_as_guest()?;
    let queue = GroupQueue::open(home.group(&args.group)?)?;
    let run = job.run_id;
    block_on(async {
        let tail = match args.follow {
            true => Some(Tail::open(
                home.logs()?,
                &crate::home::rel::system_log(&run),
            )?),
            false => None,
        };
        let waiter = Waiter::new(&queue, &args.group, &job, tail, args.raw)?;
        // Before the job, which may be claimed at once; what no runner took goes when we leave.
        let _secrets = match secrets.as_slice() {
            [] => None,
            secrets => Some(hand_over(run, secrets)?),
        };
        queue.submit(&job)?;
        let outcome = waiter.wait(args.timeout).await?;
        context.print_json(&outcome.result)?;
        let collected = collect::bring_out(&queue, run, &collect);
        queue.forget(run);
        collected?;
        Ok(outcome.exit_code())
    })
}

/// The span that this command is part of, if it was told one.
fn trace_parent() -> Option<TraceParent> {
    let text = std::env::var("TRACEPARENT").ok()?;
    match text.parse() {
        Ok(parent) => Some(parent),
        // As the specification has it: a trace is no reason to fail.
        Err(error) => {
            note(format_args!("TRACEPARENT is ignored: {error}"));
            None
        }
    }
}

fn read_prompt(file: &PathBuf) -> Result<String, CliError> {
    // One byte more than allowed is enough to know that it is too long.
    let limit = u64::try_from(MAX_PROMPT_BYTES).unwrap_or(u64::MAX) + 1;
    let mut bytes = Vec::new();
    let read = if file.as_os_str() == "-" {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    };
    read.map_err(|error| {
        CliError::failed(format_args!(
            "cannot read the prompt from {}: {error}",
            file.display()
        ))
    })?;
    if bytes.len() > MAX_PROMPT_BYTES {
        return Err(CliError::failed(format_args!(
            "the prompt in {} is longer than {MAX_PROMPT_BYTES} bytes",
            file.display()
        ))
        .with_hint("put the material into a file that the agent reads"));
    }
    String::from_utf8(bytes).map_err(|_| {
        CliError::failed(format_args!(
            "the prompt in {} is not UTF-8 text",
            file.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn a_prompt_may_begin_with_a_hyphen() {
        for prompt in ["- fix the bug", "--help", "-", "--follow", ""] {
            let line = ["submit", "--group", "vm0/demo", "--prompt", prompt];
            let line = Line::try_parse_from(line.into_iter().chain(["--timeout", "5m"])).unwrap();
            assert_eq!(line.args.prompt.as_deref(), Some(prompt));
            assert!(!line.args.follow && line.args.timeout.is_some());
        }
        let line = ["submit", "--group", "vm0/demo", "--prompt"];
        assert!(Line::try_parse_from(line).is_err());
    }
}
