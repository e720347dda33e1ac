//! `runner logs`: what a job printed, also after it has ended.

pub(crate) mod tail;

use std::io::{self, Write};
use std::process::ExitCode;

use crate::context::{CliError, Context, block_on};
use crate::control::client::{self, RunPrefix};
use crate::home::Home;
use crate::names::RunId;
use crate::terminal::{self, Escaper};
use tail::Tail;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "On a terminal, control characters in the log are shown escaped; elsewhere it is copied byte by \
byte.\n\nExamples:\n  runner logs 6f1c\n  runner logs 6f1c --follow\n  runner logs 6f1c --raw > job.log"
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
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home()?;
    block_on(async {
        let run = find(&home, &args.run).await?;
        let mut tail = Tail::open(home.logs()?, &run)?;
        // The watch is set, so a job that ends from here on is noticed by its log being closed.
        let mut active = args.follow
            && client::active_runs(&home)
                .await?
                .iter()
                .any(|active| active.info.run_id == run);
        if !active && !tail.exists() {
            return Err(CliError::failed(format_args!("run {run} has no log")));
        }
        let mut out = Out::new(args.raw || !terminal::is_terminal(io::stdout()));
        loop {
            let piece = tail.read()?;
            if !piece.is_empty() {
                out.write(&piece)?;
            } else if active && !tail.is_closed() {
                tail.changed().await?;
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

/// Finds the run among logs and active runs.
async fn find(home: &Home, prefix: &RunPrefix) -> Result<RunId, CliError> {
    let mut found: Vec<RunId> = Vec::new();
    for entry in home.logs()?.list()? {
        let run = entry
            .name
            .to_str()
            .and_then(|name| name.strip_prefix("system-")?.strip_suffix(".log"))
            .and_then(|id| id.parse().ok());
        found.extend(run.filter(|run| prefix.matches(*run)));
    }
    if found.is_empty() {
        return Ok(client::find(home, prefix).await?.info.run_id);
    }
    found.sort_unstable();
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

/// Stdout, with the log escaped or as it is.
struct Out {
    escaper: Option<Escaper>,
}

impl Out {
    fn new(raw: bool) -> Self {
        Self {
            escaper: (!raw).then(Escaper::default),
        }
    }

    fn write(&mut self, piece: &[u8]) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        match &mut self.escaper {
            Some(escaper) => stdout.write_all(escaper.push(piece).as_bytes()),
            None => stdout.write_all(piece),
        }
        .and_then(|()| stdout.flush())
        .map_err(CliError::stdout)
    }

    fn finish(&mut self) -> Result<(), CliError> {
        let rest = self.escaper.as_mut().map(Escaper::finish);
        self.write_rest(rest.unwrap_or_default().as_bytes())
    }

    fn write_rest(&mut self, rest: &[u8]) -> Result<(), CliError> {
        io::stdout()
            .write_all(rest)
            .and_then(|()| io::stdout().flush())
            .map_err(CliError::stdout)
    }
}
