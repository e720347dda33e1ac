//! `runner uninstall`: takes everything off this host that runners of a home have put there.

use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;

use serde::Serialize;

use crate::cmd::{gc, service};
use crate::context::{CliError, Context, note};
use crate::control::client::Instance;
use crate::home::{Home, rel};
use crate::names::RunnerName;
use crate::terminal;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Removed are the services of the home's runners, slots that dead runners left, and the home itself: images, the \
certificate authority, queue, logs and configurations. Packages that `runner setup` installed stay, and what is in /run \
goes with the next boot.\n\n\
Refused while jobs run, unless --force, and while a runner runs that is no service: end that first. Refused in any case \
where the home holds something that no runner has put there.\n\n\
Examples:\n  sudo runner uninstall --dry-run\n  sudo runner uninstall\n  sudo runner uninstall --yes --force"
)]
pub(crate) struct Args {
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Also while jobs run: they may finish within stop_timeout_secs and are then cancelled
    #[arg(long)]
    force: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is there to remove.
#[derive(Debug, Serialize)]
struct Plan {
    home: String,
    /// Runners that are services.
    services: Vec<RunnerName>,
    /// Runners that a person started.
    running: Vec<RunnerName>,
    dry_run: bool,
}

impl Plan {
    fn of(home: &Home, dry_run: bool) -> Result<Self, CliError> {
        let services = service::of_home(home)?;
        let mut running: Vec<RunnerName> = Instance::live(home)?
            .into_iter()
            .map(|instance| instance.runner)
            .filter(|runner| !services.contains(runner))
            .collect();
        running.sort();
        running.dedup();
        Ok(Self {
            home: home.path().display().to_string(),
            services,
            running,
            dry_run,
        })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.dry_run {
            "would remove"
        } else {
            "removed"
        };
        for name in &self.services {
            writeln!(f, "{verb} the service of runner {name}")?;
        }
        writeln!(f, "{verb} {} with all that is in it", self.home)
    }
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let path = context.home_path()?;
    // Nor made by a look at what would be removed.
    if !path.exists() {
        return Err(CliError::failed(format_args!(
            "there is no home at {}: nothing to remove",
            path.display()
        ))
        .with_hint("--home DIR names another"));
    }
    let home = context.home()?;
    require_own(&home)?;
    let plan = Plan::of(&home, args.dry_run)?;
    if !args.dry_run {
        if !rustix::process::geteuid().is_root() {
            return Err(CliError::failed("`runner uninstall` needs root")
                .with_hint("run it with sudo; --dry-run shows without it what would be removed"));
        }
        if let Some(name) = plan.running.first() {
            return Err(
                CliError::failed(format_args!("runner {name} runs, and not as a service"))
                    .with_hint("end it first, as it was started: with Ctrl-C, or SIGTERM"),
            );
        }
        if !args.yes && !agreed(&plan)? {
            return Err(CliError::failed("nothing was removed"));
        }
        for name in &plan.services {
            service::remove(name, args.force, context)?;
        }
        for error in gc::slots(false)?.failed {
            note(format_args!("warning: {error}"));
        }
        // By descriptors and without following links, as the standard library does it.
        std::fs::remove_dir_all(home.path()).map_err(|error| {
            CliError::failed(format_args!("{} cannot be removed: {error}", plan.home))
                .with_hint("running it again goes on with what is left")
        })?;
    }
    if args.json {
        context.print_json(&plan)?;
    } else {
        context.print(&plan)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails for a directory that no runner made, or that holds something else beside: everything in it would go.
fn require_own(home: &Home) -> Result<(), CliError> {
    let entries = home.dir().list()?;
    let known = |name: &std::ffi::OsStr| rel::TOP.iter().any(|own| name == *own);
    let why = match entries.iter().find(|entry| !known(&entry.name)) {
        Some(entry) => format!(
            "it holds {}, which is no runner's",
            terminal::escape(&entry.name.to_string_lossy())
        ),
        None if entries.is_empty() => "it is empty".to_owned(),
        None => return Ok(()),
    };
    Err(CliError::failed(format_args!(
        "{} is not removed: {why}",
        home.path().display()
    ))
    .with_hint("--home DIR names the home that is meant; move away what is to stay"))
}

/// Asks whoever sits there.
fn agreed(plan: &Plan) -> Result<bool, CliError> {
    if !terminal::is_terminal(std::io::stdin()) {
        return Err(CliError::usage(
            "`runner uninstall` removes everything, so it wants --yes where it cannot ask",
        ));
    }
    let services = plan.services.len();
    let mut stderr = std::io::stderr();
    write!(
        stderr,
        "This removes {} with all images, logs and jobs in it, and {services} service(s). Type yes to go on: ",
        plan.home
    )?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn uninstall(home: &Path, dry_run: bool) -> Result<ExitCode, CliError> {
        let args = Args {
            dry_run,
            yes: true,
            force: false,
            json: true,
        };
        run(args, &Context::new(Some(home.to_owned())))
    }

    #[test]
    fn what_is_no_home_or_holds_more_than_one_stays() {
        let temp = tempfile::tempdir().unwrap();
        let home = temp.path().join("home");
        for dry_run in [true, false] {
            let error = uninstall(&home, dry_run).unwrap_err().to_string();
            assert!(error.contains("no home at"), "{error}");
            assert!(!home.exists());
        }
        std::fs::create_dir(&home).unwrap();
        let error = uninstall(&home, true).unwrap_err().to_string();
        assert!(error.contains("empty"), "{error}");
        std::fs::create_dir(home.join("photos")).unwrap();
        std::fs::write(home.join("photos/a.jpg"), "a").unwrap();
        for known in [false, true] {
            if known {
                std::fs::create_dir(home.join(rel::IMAGES)).unwrap();
            }
            for dry_run in [true, false] {
                let error = uninstall(&home, dry_run).unwrap_err().to_string();
                assert!(error.contains("photos"), "{error}");
                assert!(home.join("photos/a.jpg").exists());
            }
        }
        std::fs::remove_dir_all(home.join("photos")).unwrap();
        uninstall(&home, true).unwrap();
        assert!(home.exists());
    }
}
