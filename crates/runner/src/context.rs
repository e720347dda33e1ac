//! What every command shares: where the home is, how output is written, how failure is told.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::firecracker::FirecrackerError;
use crate::home::{self, Home, HomeError};
use crate::image::ImageError;

/// Handed to every command.
#[derive(Debug)]
pub(crate) struct Context {
    home: Option<PathBuf>,
}

impl Context {
    /// `home` is the user's `--home` or `VM0_RUNNER_HOME`, if any.
    pub(crate) fn new(home: Option<PathBuf>) -> Self {
        Self { home }
    }

    /// The home's absolute path, without touching it.
    pub(crate) fn home_path(&self) -> Result<PathBuf, CliError> {
        Ok(home::resolve(self.home.as_deref())?)
    }

    /// The home as the user named it, for commands that start this program again.
    pub(crate) fn named_home(&self) -> Option<&std::path::Path> {
        self.home.as_deref()
    }

    /// Opens the home, creating it when it is missing.
    pub(crate) fn home(&self) -> Result<Home, CliError> {
        Ok(Home::open_or_create(&self.home_path()?)?)
    }

    /// Opens the home to use a group in it, which another user may share with us.
    pub(crate) fn home_as_guest(&self) -> Result<Home, CliError> {
        Ok(Home::open_as_guest(&self.home_path()?)?)
    }

    /// Writes a result to stdout. A reader that went away ends the command silently.
    pub(crate) fn print(&self, text: impl Display) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        write!(stdout, "{text}")
            .and_then(|()| stdout.flush())
            .map_err(CliError::stdout)
    }

    /// [`Context::print`] and a newline.
    pub(crate) fn print_line(&self, text: impl Display) -> Result<(), CliError> {
        self.print(format_args!("{text}\n"))
    }

    /// Prints a value as one line of JSON.
    pub(crate) fn print_json(&self, value: &impl serde::Serialize) -> Result<(), CliError> {
        self.print_line(serde_json::to_string(value)?)
    }
}

/// Tells a person something on stderr. Unlike `eprintln!` it does not panic when nobody reads that any more.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Runs a command's asynchronous part on this thread.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(work)
}

/// Why a command failed, as it is told to a person: a sentence and, where somebody can act, what to do.
///
/// It deliberately is not a `std::error::Error`: every such error becomes one by `?`.
#[derive(Debug)]
pub(crate) struct CliError {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Failed,
    Usage,
    BrokenPipe,
}

impl CliError {
    /// The command failed (exit 1).
    pub(crate) fn failed(message: impl Display) -> Self {
        Self {
            kind: Kind::Failed,
            message: message.to_string(),
            hint: None,
        }
    }

    /// The command was called wrongly (exit 2).
    pub(crate) fn usage(message: impl Display) -> Self {
        Self {
            kind: Kind::Usage,
            message: message.to_string(),
            hint: None,
        }
    }

    /// Says what to do about it.
    pub(crate) fn with_hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// Stdout could not be written.
    pub(crate) fn stdout(error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::BrokenPipe => Kind::BrokenPipe,
            _ => Kind::Failed,
        };
        Self {
            kind,
            message: format!("cannot write to standard output: {error}"),
            hint: None,
        }
    }

    /// Prints it to stderr and gives the exit status: 1, 2, or for a closed pipe silently that of a process
    /// that died of SIGPIPE.
    pub(crate) fn report(&self) -> ExitCode {
        if self.kind == Kind::BrokenPipe {
            return ExitCode::from(141);
        }
        let mut stderr = io::stderr().lock();
        // If stderr is gone too, the exit status is all that is left to say.
        let _ = writeln!(stderr, "error: {}", self.message);
        if let Some(hint) = &self.hint {
            let _ = writeln!(stderr, "hint: {hint}");
        }
        ExitCode::from(if self.kind == Kind::Usage { 2 } else { 1 })
    }
}

impl Display for CliError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl<E: std::error::Error + 'static> From<E> for CliError {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Many errors already tell their cause's words.
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            source = cause.source();
        }
        let any = &error as &dyn std::error::Error;
        let hint = any
            .downcast_ref::<HomeError>()
            .and_then(HomeError::hint)
            .or_else(|| any.downcast_ref::<ImageError>().and_then(ImageError::hint))
            .or_else(|| {
                any.downcast_ref::<FirecrackerError>()
                    .and_then(FirecrackerError::hint)
            });
        Self {
            kind: Kind::Failed,
            message,
            hint,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_tell_their_causes_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read the file")]
        struct Outer(#[source] io::Error);
        let error = CliError::from(Outer(io::Error::other("disk on fire")));
        assert_eq!(error.to_string(), "cannot read the file: disk on fire");

        #[derive(Debug, thiserror::Error)]
        #[error("cannot read the file: {0}")]
        struct Telling(#[source] io::Error);
        let error = CliError::from(Telling(io::Error::other("disk on fire")));
        assert_eq!(error.to_string(), "cannot read the file: disk on fire");
    }

    #[test]
    fn a_closed_stdout_is_silent_and_other_failures_are_not() {
        let closed = CliError::stdout(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(closed.kind, Kind::BrokenPipe);
        let full = CliError::stdout(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(full.kind, Kind::Failed);
    }
}
