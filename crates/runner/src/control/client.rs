//! The command line's end of the control socket: finding the run, then one operation on it.

use std::io;
use std::time::Duration;

use host::fs::Dir;

use super::SOCKET;
use super::protocol::{self, Connection, Failure, Reply, Request, RunInfo};
use crate::context::{CliError, note};
use crate::home::{Home, HomeError, rel};
use crate::names::{RunId, RunnerName};

/// Longest wait for an instance to say what it runs: a stopped one must not hide the others.
const LOOKUP_LIMIT: Duration = Duration::from_secs(3);

/// A live runner process, by its directory.
#[derive(Debug)]
pub(crate) struct Instance {
    /// The runner's name.
    pub(crate) runner: RunnerName,
    /// The process's own id, unlike that of any other.
    pub(crate) id: String,
    dir: Dir,
}

/// An active run and the runner process that runs it.
#[derive(Debug)]
pub(crate) struct ActiveRun {
    /// What it said of the run.
    pub(crate) info: RunInfo,
    /// Who runs it.
    pub(crate) instance: Instance,
}

impl Instance {
    /// Every instance of the home whose lock is held.
    pub(crate) fn live(home: &Home) -> Result<Vec<Self>, HomeError> {
        let mut live = Self::all(home)?;
        live.retain(Self::is_live);
        Ok(live)
    }

    /// Every instance of the home, with dead ones that nobody has cleaned up after.
    pub(crate) fn all(home: &Home) -> Result<Vec<Self>, HomeError> {
        let mut all = Vec::new();
        let runners = match home.dir().open_dir(rel::RUNNERS) {
            Err(error) if error.is_not_found() => return Ok(all),
            other => other?,
        };
        for entry in runners.list()? {
            let Some(Ok(runner)) = entry.name.to_str().map(str::parse::<RunnerName>) else {
                continue;
            };
            let instances = match home.dir().open_dir(rel::instances(&runner)) {
                Err(error) if error.is_not_found() => continue,
                other => other?,
            };
            for entry in instances.list()? {
                // It may be removed while we look.
                let Ok(dir) = instances.open_dir(&entry.name) else {
                    continue;
                };
                all.push(Self {
                    runner: runner.clone(),
                    id: entry.name.to_string_lossy().into_owned(),
                    dir,
                });
            }
        }
        Ok(all)
    }

    /// Whether its process still lives.
    pub(crate) fn is_live(&self) -> bool {
        self.dir.is_locked("lock").unwrap_or(false)
    }

    /// Whether it has come so far as to take requests.
    pub(crate) fn listens(&self) -> bool {
        self.dir.metadata(SOCKET).is_ok_and(|meta| meta.is_some())
    }

    /// Opens a connection and sends the request.
    pub(crate) async fn request(&self, request: &Request) -> io::Result<Connection> {
        let stream = self.dir.connect_socket(SOCKET)?;
        stream.set_nonblocking(true)?;
        let mut connection = protocol::frame(tokio::net::UnixStream::from_std(stream)?);
        protocol::send(&mut connection, request).await?;
        Ok(connection)
    }

    /// Sends the request and takes its one answer.
    pub(crate) async fn ask(&self, request: &Request) -> io::Result<Reply> {
        self.ask_within(LOOKUP_LIMIT, request).await
    }

    /// The same, with so much time for the answer.
    pub(crate) async fn ask_within(&self, limit: Duration, request: &Request) -> io::Result<Reply> {
        let mut connection = self.request(request).await?;
        let reply = tokio::time::timeout(limit, protocol::receive(&mut connection));
        reply
            .await
            .map_err(io::Error::from)??
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// The active runs of every live runner of the home. A runner that does not answer is named on stderr.
pub(crate) async fn active_runs(home: &Home) -> Result<Vec<ActiveRun>, CliError> {
    Ok(survey(home).await?.0)
}

/// The same, and the instances that did not answer.
pub(crate) async fn survey(home: &Home) -> Result<(Vec<ActiveRun>, Vec<Instance>), CliError> {
    let mut active = Vec::new();
    let mut silent = Vec::new();
    for instance in Instance::live(home)? {
        match instance.ask(&Request::Runs).await {
            Ok(Reply::Runs(runs)) => {
                for info in runs {
                    active.push(ActiveRun {
                        info,
                        instance: Instance {
                            runner: instance.runner.clone(),
                            id: instance.id.clone(),
                            dir: instance.dir.try_clone()?,
                        },
                    });
                }
            }
            Ok(_) => {
                note(format_args!(
                    "warning: runner {} gave an odd answer",
                    instance.runner
                ));
                silent.push(instance);
            }
            Err(error) => {
                note(format_args!(
                    "warning: runner {} does not answer: {error}",
                    instance.runner
                ));
                silent.push(instance);
            }
        }
    }
    Ok((active, silent))
}

/// The one active run whose id begins with `prefix`.
pub(crate) async fn find(home: &Home, prefix: &RunPrefix) -> Result<ActiveRun, CliError> {
    choose(active_runs(home).await?, prefix)
}

/// The one of these.
pub(crate) fn choose(active: Vec<ActiveRun>, prefix: &RunPrefix) -> Result<ActiveRun, CliError> {
    let listing = |runs: &[ActiveRun]| -> String {
        runs.iter()
            .map(|run| format!("\n  {}", line(run)))
            .collect()
    };
    let (mut matching, others): (Vec<_>, Vec<_>) = active
        .into_iter()
        .partition(|run| prefix.matches(run.info.run_id));
    match (matching.pop(), matching.is_empty()) {
        (Some(run), true) => Ok(run),
        (Some(run), false) => {
            matching.push(run);
            Err(CliError::failed(format_args!(
                "{} active runs begin with {prefix}:{}",
                matching.len(),
                listing(&matching)
            ))
            .with_hint("give more of the id"))
        }
        (None, _) if others.is_empty() => Err(CliError::failed(format_args!(
            "no active run begins with {prefix}: nothing is running"
        ))
        .with_hint("`runner logs` shows the log of a run that has ended")),
        (None, _) => Err(CliError::failed(format_args!(
            "no active run begins with {prefix}; active are:{}",
            listing(&others)
        ))),
    }
}

fn line(run: &ActiveRun) -> String {
    format!(
        "{}  {}  {}  runner {}",
        run.info.run_id,
        run.info.profile,
        crate::terminal::escape(&run.info.phase),
        run.instance.runner
    )
}

/// The beginning of a run id, as people type it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunPrefix(String);

impl RunPrefix {
    /// Whether the run's id begins with it.
    pub(crate) fn matches(&self, run: RunId) -> bool {
        run.to_string().starts_with(&self.0)
    }
}

impl From<RunId> for RunPrefix {
    /// All of it.
    fn from(run: RunId) -> Self {
        Self(run.to_string())
    }
}

impl std::fmt::Display for RunPrefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for RunPrefix {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let fits = (1..=36).contains(&text.len())
            && text
                .bytes()
                .all(|b| b == b'-' || b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err("it is the beginning of a run id: hex digits and hyphens, such as 6f1c2f0e".into())
        }
    }
}

/// A failure the daemon told.
pub(crate) fn told(failure: Failure) -> CliError {
    CliError::failed(failure.message)
}

/// The connection broke off or spoke nonsense.
pub(crate) fn broken(error: &io::Error) -> CliError {
    CliError::failed(format_args!("the connection to the runner broke: {error}"))
        .with_hint("`runner logs` shows what the job did until then")
}

/// The daemon answered something that does not fit the question.
pub(crate) fn odd() -> CliError {
    CliError::failed("the runner gave an answer out of place")
        .with_hint("the daemon may be of another version than this command")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_hex_and_hyphens_only() {
        for good in ["6", "6f1c2f0e", "6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f"] {
            good.parse::<RunPrefix>().unwrap();
        }
        let long = "a".repeat(37);
        for bad in ["", "..", "6F", "g", "a/b", "a\n", long.as_str()] {
            bad.parse::<RunPrefix>().unwrap_err();
        }
    }
}
