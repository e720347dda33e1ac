//! `runner audit`: who did what to running jobs.

use std::collections::VecDeque;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::ExitCode;

use host::fs::{Access, Dir};

use crate::audit::{ASIDE, AUDIT_LOG, Action, Event, Line, SUFFIX};
use crate::context::{CliError, Context, note};
use crate::control::client::RunPrefix;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Every exec, attach, cp, kill, cancel and change of policy, with who did it, when and how it went. For root it also \
says who became root, such as by sudo. The log is logs/audit.jsonl in the home; the values of a job's secrets are not in it.\n\n\
Examples:\n  runner audit\n  runner audit 6f1c\n  runner audit --lines 1000 --json | jq 'select(.action == \"exec\") | .command'"
)]
pub(crate) struct Args {
    /// Only this run, by the beginning of its id
    #[arg(value_name = "RUN")]
    run: Option<RunPrefix>,
    /// Show the last N
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    lines: usize,
    /// Print the log's own lines, one JSON object each
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let logs = context.home()?.logs()?;
    let mut last: VecDeque<Line> = VecDeque::new();
    let mut unreadable = 0_usize;
    for file in files(&logs)? {
        let file = match logs.open_file(&file, Access::Read) {
            Err(error) if error.is_not_found() => continue,
            other => other?,
        };
        for line in BufReader::new(file).split(b'\n') {
            let line = line?;
            let Ok(line) = serde_json::from_slice::<Line>(&line) else {
                unreadable = unreadable.saturating_add(1);
                continue;
            };
            let wanted = args.run.as_ref().is_none_or(|run| run.matches(line.run_id));
            // People are told of a thing once: when it is over, or that it is not.
            if !wanted {
                continue;
            }
            if !args.json && line.event == Event::End {
                let begun = |one: &Line| {
                    one.event == Event::Begin && one.id == line.id && one.instance == line.instance
                };
                if let Some(at) = last.iter().rposition(begun) {
                    last.remove(at);
                }
            }
            last.push_back(line);
            if last.len() > args.lines {
                last.pop_front();
            }
        }
    }
    if unreadable > 0 {
        note(format_args!(
            "warning: {unreadable} lines cannot be understood"
        ));
    }
    for line in last {
        match args.json {
            true => context.print_json(&line)?,
            false => context.print(Row(&line))?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The log's files, oldest first.
fn files(logs: &Dir) -> Result<Vec<PathBuf>, CliError> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in logs.list()? {
        let name = entry.name.to_str();
        if name.is_some_and(|name| name.starts_with(ASIDE) && name.ends_with(SUFFIX)) {
            files.push(entry.name.into());
        }
    }
    files.sort();
    files.push(AUDIT_LOG.into());
    Ok(files)
}

/// A line for people.
struct Row<'a>(&'a Line);

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Line {
            time,
            run_id,
            by,
            action,
            outcome,
            ..
        } = self.0;
        let run = run_id.to_string();
        let run = run.get(..8).unwrap_or(&run);
        let how = match outcome {
            None => "has not ended".to_owned(),
            Some(outcome) => match (&outcome.error, outcome.exit_code) {
                (Some(error), _) => format!("failed: {error}"),
                (None, Some(code)) => format!("exit {code}"),
                (None, None) => "ok".to_owned(),
            },
        };
        let text = format!(
            "{time}  {run}  {:16}  {:7}  {how:10}  {}",
            by.short(),
            action.name(),
            what(action)
        );
        // Nothing in the file is trusted to be fit for a terminal.
        writeln!(f, "{}", crate::terminal::escape(&text).trim_end())
    }
}

fn what(action: &Action) -> String {
    match action {
        Action::Exec {
            command,
            cut,
            as_user,
            ..
        } => {
            let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
            let user = match as_user.as_str() {
                "root" => "(root) ",
                _ => "",
            };
            let more = if *cut { " …" } else { "" };
            format!("{user}{}{more}", words.join(" "))
        }
        Action::Attach { session } => format!("session {session}"),
        Action::CpOut { path } => format!("{path} → host"),
        Action::CpIn { path, .. } => format!("host → {path}"),
        Action::Kill | Action::Cancel => String::new(),
        Action::Policy { deny, allow } => {
            let part = |name: &str, rules: &[String]| match rules {
                [] => String::new(),
                rules => format!("{name} {} ", rules.join(" ")),
            };
            part("deny", deny) + &part("allow", allow)
        }
    }
}

/// A word as a shell would take it.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:=+@%,".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}
