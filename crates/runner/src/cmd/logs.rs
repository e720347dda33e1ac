//! `runner logs`: what a job printed, or what it did in the network, also after it has ended.

mod network;
pub(crate) mod tail;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::context::{CliError, Context, block_on};
use crate::control::client::{self, RunPrefix};
use crate::home::{Home, rel};
use crate::names::RunId;
use crate::terminal::{self, Escaper};
use network::Table;
use tail::Tail;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "On a terminal, control characters in the log are shown escaped; elsewhere it is copied byte by \
byte.\n\nExamples:\n  runner logs 6f1c\n  runner logs 6f1c --follow\n  runner logs 6f1c --raw > job.log\n  \
runner logs 6f1c --network --follow\n  runner logs 6f1c --network --json | jq 'select(.action == \"DENY\")'"
)]
pub(crate) struct Args {
    /// Beginning of the run's id
    #[arg(value_name = "RUN")]
    run: RunPrefix,
    /// Keep printing until the job ends
    #[arg(short, long)]
    follow: bool,
    /// Do not escape control characters, even on a terminal
    #[arg(long)]
    raw: bool,
    /// Show what the job did in the network instead: requests, connections, queries, and what was denied
    #[arg(long, conflicts_with = "raw")]
    network: bool,
    /// Print the network log's own lines, one JSON object each (docs/network.md, "Network log")
    #[arg(long, requires = "network")]
    json: bool,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home()?;
    block_on(async {
        let run = find(&home, &args.run, args.network).await?;
        let (what, path): (_, PathBuf) = match args.network {
            true => ("network log", rel::network_log(&run)),
            false => ("log", rel::system_log(&run)),
        };
        let mut tail = Tail::open(home.logs()?, &path)?;
        // A job that gets no network never has a log of it: that it is over, its other log tells.
        let mut end = match args.network {
            true => Some(Tail::open(home.logs()?, &rel::system_log(&run))?),
            false => None,
        };
        // The watch is set, so a job that ends from here on is noticed by its log being closed.
        let mut active = args.follow
            && client::active_runs(&home)
                .await?
                .iter()
                .any(|active| active.info.run_id == run);
        if !active && !tail.exists() {
            return Err(none(what, &run, args.network));
        }
        let mut out = Out::new(&args);
        loop {
            let piece = tail.read()?;
            if !piece.is_empty() {
                out.write(&piece)?;
            } else if active && !tail.is_closed() && !end.as_ref().is_some_and(Tail::is_closed) {
                match &mut end {
                    None => tail.changed().await?,
                    Some(end) => {
                        end.look()?;
                        tokio::select! {
                            changed = tail.changed() => changed?,
                            ended = end.changed() => ended?,
                        }
                    }
                }
            } else if active {
                // Closed: once more, for what was written just before.
                active = false;
            } else {
                out.finish()?;
                return Ok(ExitCode::SUCCESS);
            }
        }
    })
}

fn none(what: &str, run: &RunId, network: bool) -> CliError {
    let error = CliError::failed(format_args!("run {run} has no {what}"));
    if network {
        error.with_hint(format_args!(
            "its job got no network, or not yet: `runner logs {run}` says how far it came"
        ))
    } else {
        error
    }
}

/// The run whose log has this name.
fn run_of(name: &str, network: bool) -> Option<RunId> {
    let system = || name.strip_prefix("system-")?.strip_suffix(".log");
    let other = || name.strip_prefix("network-")?.strip_suffix(".jsonl");
    let id = system().or_else(|| network.then(other).flatten())?;
    id.parse().ok()
}

/// Finds the run among logs and active runs.
async fn find(home: &Home, prefix: &RunPrefix, network: bool) -> Result<RunId, CliError> {
    let mut found: Vec<RunId> = Vec::new();
    for entry in home.logs()?.list()? {
        let name = entry.name.to_str();
        let run = name.and_then(|name| run_of(name, network));
        found.extend(run.filter(|run| prefix.matches(*run)));
    }
    if found.is_empty() {
        let active = client::active_runs(home).await?;
        if !active.iter().any(|run| prefix.matches(run.info.run_id)) {
            return Err(CliError::failed(format_args!(
                "no run that begins with {prefix} is active or has a log"
            ))
            .with_hint(
                "`runner top` shows the last runs; logs of older ones are removed after some days",
            ));
        }
        return Ok(client::choose(active, prefix)?.info.run_id);
    }
    found.sort_unstable();
    // One that has both logs.
    found.dedup();
    match found.as_slice() {
        [run] => Ok(*run),
        several => {
            let list: String = several.iter().map(|run| format!("\n  {run}")).collect();
            Err(CliError::failed(format_args!(
                "{} logs begin with {prefix}:{list}",
                several.len()
            ))
            .with_hint("give more of the id"))
        }
    }
}

/// Stdout, with the log as it is to be shown.
enum Out {
    /// Byte by byte.
    Raw,
    /// Escaped.
    Escaped(Escaper),
    /// The network log, for people.
    Table(Table),
}

impl Out {
    fn new(args: &Args) -> Self {
        let is_terminal = terminal::is_terminal(io::stdout());
        if args.network && !args.json {
            let columns = is_terminal.then(|| terminal::size(io::stdout()));
            return Self::Table(Table::new(
                columns.map(|size| size.map_or(100, |size| size.cols)),
            ));
        }
        if args.raw || !is_terminal {
            Self::Raw
        } else {
            Self::Escaped(Escaper::default())
        }
    }

    fn write(&mut self, piece: &[u8]) -> Result<(), CliError> {
        match self {
            Self::Raw => print(piece),
            Self::Escaped(escaper) => print(escaper.push(piece).as_bytes()),
            Self::Table(table) => print(table.push(piece).as_bytes()),
        }
    }

    fn finish(&mut self) -> Result<(), CliError> {
        match self {
            Self::Raw => Ok(()),
            Self::Escaped(escaper) => print(escaper.finish().as_bytes()),
            Self::Table(table) => print(table.finish().as_bytes()),
        }
    }
}

fn print(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(CliError::stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_run_is_found_by_its_log_and_one_without_is_told_of() {
        let temp = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&temp.path().join("home")).unwrap();
        let run = RunId::random();
        let prefix = RunPrefix::from(run);
        let error = find(&home, &prefix, false).await.unwrap_err().to_string();
        assert!(error.contains("is active or has a log"), "{error}");
        home.logs().unwrap();
        std::fs::write(home.at(rel::system_log(&run)), "").unwrap();
        assert_eq!(find(&home, &prefix, false).await.unwrap(), run);
    }
}
