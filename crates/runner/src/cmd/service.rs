//! `runner service`: the daemon as a unit of systemd, `vm0-runner-<name>.service`.
//!
//! ```text
//!            start                    install
//!   /run/systemd/system        /etc/systemd/system        where the unit file is; the first is gone after a reboot
//!        │  not active: start       │
//!        │  active: reload: a new instance takes over, the old one finishes its jobs (`start::handover`)
//!        ▼                          ▼
//!      running ◀──── resume ──── draining
//!        │  ──────── drain ────────▶ │
//!        └────── stop, uninstall ────┘   refused while jobs run, unless --force
//! ```

mod inspect;
mod instances;
mod lifecycle;
mod systemd;
mod unit;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;

use crate::cmd::parse;
use crate::context::{CliError, Context};
use crate::home::Home;
use crate::names::RunnerName;

/// Command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Start the service until the next reboot, or replace the one that runs without ending its jobs
    #[command(
        after_help = "The old instance of a running service finishes its jobs while the new one takes all others. \
Where the new one cannot start, the old one goes on.\n\n\
Examples:\n  sudo runner service start --config ~/.vm0-runner/runners/demo/runner.yaml --local\n  \
sudo runner service start --config ~/.vm0-runner/runners/demo/runner.yaml --local --env USE_MOCK_CLAUDE=true\n  \
sudo runner service start --config ~/.vm0-runner/runners/demo/runner.yaml --api-url https://api.example.com --api-token-file /etc/vm0/runner.token"
    )]
    Start(Run),
    /// Start the service now and at every boot
    #[command(
        after_help = "What runs under this name already is replaced as by `start`.\n\n\
Example:\n  sudo runner service install --config ~/.vm0-runner/runners/demo/runner.yaml --local"
    )]
    Install(Run),
    /// Stop the service
    #[command(
        after_help = "Refused while jobs run; with --force they may finish within stop_timeout_secs and are then cancelled.\n\n\
Examples:\n  sudo runner service stop --name demo\n  sudo runner service stop --name demo --force"
    )]
    Stop(End),
    /// Stop the service and take it out of the boot
    #[command(
        after_help = "Images, logs and the queue stay.\n\nExample:\n  sudo runner service uninstall --name demo"
    )]
    Uninstall(End),
    /// Take no new jobs; those that run go on
    #[command(after_help = "Jobs that come meanwhile wait in the queue.\n\n\
Examples:\n  sudo runner service drain --name demo\n  sudo runner service drain --name demo --wait 30m")]
    Drain {
        /// The runner's name
        #[arg(long)]
        name: RunnerName,
        /// Wait until no job runs, at most this long; exit 1 if some still do
        #[arg(long, value_name = "TIME", value_parser = parse::duration)]
        wait: Option<Duration>,
    },
    /// Take jobs again after a drain
    #[command(after_help = "Example:\n  sudo runner service resume --name demo")]
    Resume {
        /// The runner's name
        #[arg(long)]
        name: RunnerName,
    },
    /// Show the service as systemd sees it
    #[command(
        after_help = "Without --name: every runner's service of this host.\n\n\
Examples:\n  runner service status --name demo\n  runner service status --json"
    )]
    Status {
        /// The runner's name
        #[arg(long)]
        name: Option<RunnerName>,
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show the service's journal
    #[command(
        after_help = "Needs root, or a user of the group adm or systemd-journal.\n\n\
Examples:\n  runner service logs --name demo\n  runner service logs --name demo -n 20 --follow"
    )]
    Logs {
        /// The runner's name
        #[arg(long)]
        name: RunnerName,
        /// Go on with what comes
        #[arg(short, long)]
        follow: bool,
        /// How many lines to begin with
        #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
        lines: u32,
    },
}

/// What `start` and `install` take.
#[derive(Debug, clap::Args)]
struct Run {
    /// The runner's configuration, as `runner config` wrote it
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// The runner's name; to be sure that the file is the one that is meant
    #[arg(long)]
    name: Option<RunnerName>,
    /// Take jobs from the local file queue
    #[arg(long)]
    local: bool,
    /// Take runs from the Web API at this address
    #[arg(long, value_name = "URL", conflicts_with = "local")]
    api_url: Option<String>,
    /// File with the runner token for the Web API, readable for its owner only. The unit names the file; the token is
    /// in no unit and on no command line
    #[arg(long, value_name = "FILE", requires = "api_url")]
    api_token_file: Option<PathBuf>,
    /// Set a variable of the runner's environment; everybody on this host can read it
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse::variable)]
    env: Vec<(String, String)>,
    /// Read variables from this file when the runner starts: for what nobody else is to see
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
}

/// What `stop` and `uninstall` take.
#[derive(Debug, clap::Args)]
struct End {
    /// The runner's name
    #[arg(long)]
    name: RunnerName,
    /// Also while jobs run
    #[arg(long)]
    force: bool,
}

/// Runners of this home that are services, by their unit files.
pub(crate) fn of_home(home: &Home) -> Result<Vec<RunnerName>, CliError> {
    if systemd::require().is_err() {
        return Ok(Vec::new());
    }
    unit::of_home(home.path())
}

/// Ends a service and takes it out of the boot.
pub(crate) fn remove(name: &RunnerName, force: bool, context: &Context) -> Result<(), CliError> {
    systemd::require()?;
    lifecycle::remove(name, force, context).map(drop)
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    systemd::require()?;
    match args.action {
        Action::Start(run) => lifecycle::start(&run, unit::Place::UntilReboot, context),
        Action::Install(run) => lifecycle::start(&run, unit::Place::Persistent, context),
        Action::Stop(end) => lifecycle::stop(&end.name, end.force, context),
        Action::Uninstall(end) => lifecycle::uninstall(&end.name, end.force, context),
        Action::Drain { name, wait } => lifecycle::drain(&name, wait, context),
        Action::Resume { name } => lifecycle::resume(&name, context),
        Action::Status { name, json } => inspect::status(name.as_ref(), json, context),
        Action::Logs {
            name,
            follow,
            lines,
        } => inspect::logs(&name, follow, lines),
    }
}
