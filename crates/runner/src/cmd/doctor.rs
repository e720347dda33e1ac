//! Checks every prerequisite of this host and what is going on on it, and says which command fixes what is wrong.

mod anomalies;
mod checks;
mod engines;
mod hints;
mod mend;
mod network;
mod production;
mod scene;
mod telemetry;

use std::fmt;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use sandbox_qemu::Kvm;
use serde::Serialize;

use anomalies::Shown;

use crate::cmd::setup;
use crate::config::EngineChoice;
use crate::context::{CliError, Context};
use crate::names::RunnerName;
use crate::profile::ProfileSpec;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  runner doctor\n  sudo runner doctor --profile vm0/default --json\n  sudo runner doctor --fix\n  \
    sudo runner doctor --engine firecracker --production\n\n\
    PASS is good, WARN works with less than it could, FAIL must be fixed. Exits with 1 if anything is FAIL.\n\
    What is wrong with what runs is looked at again for three seconds, and told if it is still so."
)]
pub(crate) struct Args {
    /// The profile that is to run here
    #[arg(
        long,
        value_name = "ORG/NAME[:KEY=VALUE,…]",
        default_value = "vm0/small"
    )]
    profile: ProfileSpec,
    /// The engine that is to run it
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
    /// Also check what a host in production needs; done in any case where KVM has hardware support
    #[arg(long)]
    production: bool,
    /// Of the runners, look at this one only
    #[arg(long, value_name = "NAME")]
    name: Option<RunnerName>,
    /// Clean up what dead runners left: slots, processes, tables (needs root)
    #[arg(long)]
    fix: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
enum Status {
    /// As it should be.
    Pass,
    /// The runner works, but with less than it could.
    Warn,
    /// The runner does not work.
    Fail,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pass => "PASS",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        })
    }
}

/// What a check found, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Outcome {
    status: Status,
    /// What was found, for a person.
    found: String,
    /// The command that fixes it, or what to do where no command can.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Outcome {
    fn pass(found: impl fmt::Display) -> Self {
        Self {
            status: Status::Pass,
            found: found.to_string(),
            fix: None,
        }
    }

    fn warn(found: impl fmt::Display, fix: impl fmt::Display) -> Self {
        Self {
            status: Status::Warn,
            found: found.to_string(),
            fix: Some(fix.to_string()),
        }
    }

    fn fail(found: impl fmt::Display, fix: impl fmt::Display) -> Self {
        Self {
            status: Status::Fail,
            found: found.to_string(),
            fix: Some(fix.to_string()),
        }
    }
}

/// What checks look at.
struct Subject<'a> {
    context: &'a Context,
    home: PathBuf,
    profile: &'a ProfileSpec,
    engine: EngineChoice,
}

impl Subject<'_> {
    /// Whether Firecracker is to run here, or could.
    fn wants_firecracker(&self) -> bool {
        setup::not_wanted(self.engine, &Kvm::of_host()).is_none()
    }
}

/// One prerequisite. Later parts of the runner add theirs to [`checks::ALL`], [`network::ALL`],
/// [`telemetry::ALL`] or [`production::ALL`].
struct Check {
    name: &'static str,
    run: fn(&Subject<'_>) -> Outcome,
}

#[derive(Serialize)]
struct Line {
    name: &'static str,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Serialize)]
struct Report {
    /// Nothing is FAIL.
    ok: bool,
    checks: Vec<Line>,
    /// What runs.
    runners: Vec<Shown>,
    /// What is wrong with it, or was until `--fix`.
    anomalies: Vec<Line>,
    /// What `--fix` did.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fixed: Vec<String>,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let subject = Subject {
        context,
        home: context.home_path()?,
        profile: &args.profile,
        engine: args.engine,
    };
    let checks: Vec<Line> = checks::ALL
        .iter()
        .chain(network::ALL)
        .chain(telemetry::ALL)
        .chain(match args.production || Kvm::of_host() == Kvm::Hardware {
            true => production::ALL,
            false => &[],
        })
        .map(|check| Line {
            name: check.name,
            outcome: (check.run)(&subject),
        })
        .collect();
    let (mut runners, mut anomalies, mut fixed) = (Vec::new(), Vec::new(), Vec::new());
    // A home that is missing or refused has its own line above.
    if subject.home.exists()
        && let Ok(home) = context.home()
    {
        let (mut found, mut scene) = anomalies::persisting(&home, args.name.as_ref());
        if args.fix && !found.is_empty() {
            fixed = mend::mend(&found)?;
            (found, scene) = anomalies::persisting(&home, args.name.as_ref());
        }
        runners = anomalies::shown(&scene);
        anomalies.extend(found.into_iter().map(Line::from));
        anomalies.extend(hints::look(&home));
    }
    let report = Report {
        ok: checks
            .iter()
            .chain(&anomalies)
            .all(|line| line.outcome.status != Status::Fail),
        checks,
        runners,
        anomalies,
        fixed,
    };
    if args.json {
        context.print_json(&report)?;
    } else {
        context.print(Table {
            report: &report,
            colour: std::io::stdout().is_terminal(),
        })?;
    }
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The report for a person.
struct Table<'a> {
    report: &'a Report,
    colour: bool,
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = || self.report.checks.iter().chain(&self.report.anomalies);
        let width = lines().map(|line| line.name.len()).max().unwrap_or(0);
        for Line { name, outcome } in lines() {
            let (on, off) = match (self.colour, outcome.status) {
                (false, _) => ("", ""),
                (true, Status::Pass) => ("\x1b[32m", "\x1b[0m"),
                (true, Status::Warn) => ("\x1b[33m", "\x1b[0m"),
                (true, Status::Fail) => ("\x1b[31m", "\x1b[0m"),
            };
            writeln!(
                f,
                "{on}{}{off}  {name:width$}  {}",
                outcome.status, outcome.found
            )?;
            if let Some(fix) = &outcome.fix {
                writeln!(f, "      {:width$}  → {fix}", "")?;
            }
        }
        for fixed in &self.report.fixed {
            writeln!(f, "FIXED {fixed}")?;
        }
        for Shown {
            name,
            mode,
            pid,
            vms,
        } in &self.report.runners
        {
            let pid = pid.map(|pid| format!(", pid {pid}")).unwrap_or_default();
            writeln!(f, "\nrunner {name}: {mode}{pid}")?;
            for vm in vms {
                write!(f, "  {}  {:9}  slot {}", vm.run_id, vm.phase, vm.slot)?;
                if let (Some(address), Some(port)) = (&vm.address, vm.proxy_port) {
                    write!(f, "  {address} → proxy port {port}")?;
                }
                if let Some(redirect) = vm.redirect {
                    write!(f, " (redirected to {redirect})")?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_the_fix_below_what_was_found() {
        let report = Report {
            ok: false,
            checks: vec![
                Line {
                    name: "a",
                    outcome: Outcome::pass("fine"),
                },
                Line {
                    name: "long",
                    outcome: Outcome::fail("missing", "sudo runner setup"),
                },
            ],
            runners: Vec::new(),
            anomalies: Vec::new(),
            fixed: Vec::new(),
        };
        assert_eq!(
            Table {
                report: &report,
                colour: false
            }
            .to_string(),
            "PASS  a     fine\nFAIL  long  missing\n            → sudo runner setup\n"
        );
        let json = serde_json::to_string(&report).unwrap();
        assert!(
            json.contains(
                r#"{"name":"long","status":"FAIL","found":"missing","fix":"sudo runner setup"}"#
            ),
            "{json}"
        );
    }
}
