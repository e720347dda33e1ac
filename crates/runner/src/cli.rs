//! The command line: parsing, dispatch, and how every command reports failure.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::cmd;
use crate::context::{CliError, Context};

/// Version of this build, with the commit it was made from.
pub(crate) const VERSION: &str = match option_env!("VM0_RUNNER_VERSION") {
    Some(version) => version,
    None => concat!(env!("CARGO_PKG_VERSION"), " (commit unknown)"),
};

/// Run coding-agent jobs from a queue, each in its own microVM.
#[derive(Debug, Parser)]
#[command(
    name = "runner",
    version = VERSION,
    disable_help_subcommand = true,
    after_help = "Examples:\n  \
        sudo runner setup                       install what the runner needs\n  \
        sudo runner build --profile vm0/small   build the small image and its snapshot\n  \
        runner config --name demo --group vm0/demo --profile vm0/small\n  \
        sudo runner start --config ~/.vm0-runner/runners/demo/runner.yaml --local\n  \
        runner local submit --group vm0/demo --profile vm0/small --prompt 'uname -a'\n\n\
        Every command has its own --help with examples. Results go to stdout, everything else to stderr.\n\
        Exit status: 0 ok, 1 failed (with `error:` and often `hint:` on stderr), 2 wrong usage."
)]
pub(crate) struct Cli {
    /// Directory that holds everything the runner keeps [default: ~/.vm0-runner of the invoking user]
    #[arg(
        long,
        global = true,
        env = "VM0_RUNNER_HOME",
        value_name = "DIR",
        hide_env_values = true
    )]
    home: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

/// Every command; each lives in `cmd/<name>.rs`.
#[derive(Debug, Subcommand)]
enum Command {
    /// Install what the runner needs on this host
    Setup(cmd::setup::Args),
    /// Build the image and snapshot of a profile
    Build(cmd::build::Args),
    /// Write or check a runner's configuration
    Config(cmd::config::Args),
    /// Run the daemon that takes and runs jobs
    Start(cmd::start::Args),
    /// Run the daemon as a systemd service
    Service(cmd::service::Args),
    /// Submit jobs through the local file queue
    Local(cmd::local::Args),
    /// Execute a command in a running job's VM
    Exec(cmd::exec::Args),
    /// Copy files into or out of a running job's VM
    Cp(cmd::cp::Args),
    /// Show a job's log
    Logs(cmd::logs::Args),
    /// Show or change what a running job may reach
    Policy(cmd::policy::Args),
    /// Watch what runs, in a terminal
    Top(cmd::top::Args),
    /// Show who did what to running jobs
    Audit(cmd::audit::Args),
    /// Cancel a running job
    Kill(cmd::kill::Args),
    /// Remove what nobody needs any more: images, logs, leftovers
    Gc(cmd::gc::Args),
    /// Take everything off this host that runners of a home have put there
    Uninstall(cmd::uninstall::Args),
    /// Check every prerequisite of this host
    Doctor(cmd::doctor::Args),
    /// Measure this host and engine
    Benchmark(cmd::benchmark::Args),
    /// Print a shell completion script
    Completion(cmd::completion::Args),
    /// Print version, commit and platform
    Version(cmd::version::Args),
}

/// Parses the process's arguments, runs the command, reports its failure.
pub(crate) fn main() -> ExitCode {
    run(std::env::args_os())
}

fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // clap prints help and version to stdout, usage errors to stderr; a closed pipe is no failure of ours.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(2)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let context = Context::new(cli.home);
    match dispatch(cli.command, &context) {
        Ok(code) => code,
        Err(error) => error.report(),
    }
}

fn dispatch(command: Command, context: &Context) -> Result<ExitCode, CliError> {
    match command {
        Command::Setup(args) => cmd::setup::run(args, context),
        Command::Build(args) => cmd::build::run(args, context),
        Command::Config(args) => cmd::config::run(args, context),
        Command::Start(args) => cmd::start::run(args, context),
        Command::Service(args) => cmd::service::run(args, context),
        Command::Local(args) => cmd::local::run(args, context),
        Command::Exec(args) => cmd::exec::run(args, context),
        Command::Cp(args) => cmd::cp::run(args, context),
        Command::Logs(args) => cmd::logs::run(args, context),
        Command::Policy(args) => cmd::policy::run(args, context),
        Command::Top(args) => cmd::top::run(args, context),
        Command::Audit(args) => cmd::audit::run(args, context),
        Command::Kill(args) => cmd::kill::run(args, context),
        Command::Gc(args) => cmd::gc::run(args, context),
        Command::Uninstall(args) => cmd::uninstall::run(args, context),
        Command::Doctor(args) => cmd::doctor::run(args, context),
        Command::Benchmark(args) => cmd::benchmark::run(args, context),
        Command::Completion(args) => cmd::completion::run(args, context),
        Command::Version(args) => cmd::version::run(args, context),
    }
}

/// The whole command line, for completion scripts.
pub(crate) fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What stands behind the mark in docs/commands.md: the help of every command, as it is printed.
    fn reference() -> String {
        fn each(command: &mut clap::Command, name: &str, text: &mut String) {
            let help = command.clone().term_width(110).render_long_help();
            let help = help.to_string();
            let lines: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
            let lines = lines.join("\n");
            text.push_str(&format!("\n### {name}\n\n```text\n{lines}\n```\n"));
            for inner in command.get_subcommands_mut() {
                let name = format!("{name} {}", inner.get_name());
                each(inner, &name, text);
            }
        }
        let mut command = command();
        command.build();
        let mut text = String::new();
        each(&mut command, "runner", &mut text);
        text
    }

    #[test]
    fn the_reference_in_the_documentation_is_the_help_that_is_printed() {
        const MARK: &str = "<!-- From here on generated from --help; VM0_UPDATE_DOCS=1 cargo test -p runner reference -->\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/commands.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (before, found) = text.split_once(MARK).unwrap();
        let wanted = reference();
        if std::env::var_os("VM0_UPDATE_DOCS").is_some() {
            std::fs::write(path, format!("{before}{MARK}{wanted}")).unwrap();
        } else {
            assert!(
                found == wanted,
                "write it anew: VM0_UPDATE_DOCS=1 cargo test -p runner reference"
            );
        }
    }

    #[test]
    fn the_map_in_the_documentation_has_every_command_once() {
        let text = include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../docs/commands.md"
        ));
        let (map, _) = text.split_once("<!-- From here on").unwrap();
        let rows = map.lines().filter(|line| line.starts_with("| `runner "));
        let mut cells: Vec<&str> = rows.filter_map(|row| row.split("` |").next()).collect();
        for command in command().get_subcommands() {
            let named = format!("`runner {}", command.get_name());
            assert!(map.contains(&named), "{named}");
        }
        let all = cells.len();
        cells.sort_unstable();
        cells.dedup();
        assert_eq!(cells.len(), all, "a row stands there twice");
    }

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_examples() {
        let mut command = command();
        command.build();
        command.clone().debug_assert();
        fn check(command: &clap::Command) {
            if command.get_subcommands().next().is_none() {
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(
                    help.contains("Example"),
                    "`{}` has no example",
                    command.get_name()
                );
            }
            command.get_subcommands().for_each(check);
        }
        check(&command);
    }
}
