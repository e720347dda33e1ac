//! Starts the agent CLI.

use std::env::set_current_dir;
use std::fs::create_dir_all;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::api::{Session, SessionError};
use crate::emulation::is_emulated;
use crate::env::{AgentEnv, NOT_FOR_THE_CLI, Prompt};

/// Switches off what the CLI would otherwise do over the network when it starts, about two seconds of it.
const CLI_ENVIRONMENT: &[&str] = &[
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
    "CLAUDE_CODE_DISABLE_FEEDBACK_SURVEY",
    "CLAUDE_CODE_DISABLE_TERMINAL_TITLE",
    "DISABLE_AUTOUPDATER",
    "DISABLE_ERROR_REPORTING",
    "DISABLE_INSTALLATION_CHECKS",
    "DISABLE_TELEMETRY",
];

/// Switches the JavaScript compiler of the CLI's runtime off: an emulator translates compiled code a second time, and again
/// whenever it changes. Side by side, the way to "Not logged in" took 27 to 51 s compiled and 9 to 41 s interpreted, on a host
/// that was busy with other work; in every pair the interpreted run was the faster one.
const NO_COMPILER: &str = "BUN_JSC_useJIT";

/// Why the CLI could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("signals cannot be caught: {0}")]
    Signals(io::Error),
    #[error("the working directory {path:?} cannot be used: {source}")]
    WorkingDir { path: PathBuf, source: io::Error },
    #[error("the session {id} cannot be resumed: {source}")]
    Session { id: String, source: SessionError },
    #[error("the agent CLI {program:?} cannot be started: {source}")]
    Start {
        program: &'static str,
        source: io::Error,
    },
}

impl LaunchError {
    /// As a shell would: 127 when the program is not there, 126 when it cannot be executed.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Start { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            Self::Start { .. } => 126,
            Self::WorkingDir { .. } | Self::Session { .. } | Self::Signals(_) => 1,
        }
    }
}

/// Makes `path` the current directory, creating it when it is missing.
pub(crate) fn enter_working_dir(path: &Path) -> Result<(), LaunchError> {
    let entered = set_current_dir(path).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => create_dir_all(path).and_then(|()| set_current_dir(path)),
        _ => Err(error),
    });
    entered.map_err(|source| LaunchError::WorkingDir {
        path: path.to_owned(),
        source,
    })
}

/// Puts the history of the session to resume where the CLI looks for it. The working directory is entered already.
pub(crate) fn restore_session(env: &AgentEnv) -> Result<(), LaunchError> {
    let (Some(id), Some(file)) = (&env.resume_session, &env.resume_file) else {
        return Ok(());
    };
    let cwd = std::env::current_dir().map_err(|source| LaunchError::WorkingDir {
        path: env.working_dir.clone(),
        source,
    })?;
    let session = Session {
        id: id.clone(),
        cwd,
    };
    session
        .restore(&env.home, file)
        .map_err(|source| LaunchError::Session {
            id: id.to_string(),
            source,
        })
}

/// Starts the CLI as leader of its own process group, its standard output on a pipe. Standard error is the
/// agent's own: it passes through untouched.
pub(crate) fn start(env: &AgentEnv) -> Result<Child, LaunchError> {
    let mut command = Command::new(env.cli);
    command
        .args(["--print", "--verbose", "--output-format", "stream-json"])
        .arg("--dangerously-skip-permissions");
    if let Some(session) = &env.resume_session {
        command.arg("--resume").arg(session.to_string());
    }
    match &env.prompt {
        // Nothing after `--` is a flag, whatever the prompt begins with.
        Prompt::Argument(prompt) => command.arg("--").arg(prompt).stdin(Stdio::null()),
        Prompt::Stdin => command.stdin(Stdio::inherit()),
        // It says which message it reads when: a client sees what became of its inputs.
        Prompt::Messages => command
            .args(["--input-format", "stream-json", "--replay-user-messages"])
            .stdin(Stdio::piped()),
    };
    for name in NOT_FOR_THE_CLI {
        command.env_remove(name);
    }
    for name in CLI_ENVIRONMENT {
        command.env(name, "1");
    }
    if is_emulated() && std::env::var_os(NO_COMPILER).is_none() {
        command.env(NO_COMPILER, "0");
    }
    command
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|source| LaunchError::Start {
            program: env.cli,
            source,
        })
}
