//! The agent's environment, parsed once into types that cannot be wrong.
//!
//! | variable | meaning |
//! |---|---|
//! | `VM0_RUN_ID` | the run, for the log's first line |
//! | `VM0_API_URL`, `VM0_API_TOKEN` | where webhooks go; an empty token (local mode) turns them off |
//! | `VM0_SECRET_VALUES` | texts that webhooks must not carry, in base64, separated by commas |
//! | `VM0_PROMPT` | the prompt |
//! | `VM0_PROMPT_STDIN` | `1`: the prompt is standard input instead (it is longer than one execve string may be) |
//! | `VM0_INPUT` | `1`: standard input holds messages for the CLI, as its `stream-json`: the prompt, then what comes while it works |
//! | `VM0_WORKING_DIR` | where the agent CLI runs; made when missing |
//! | `CLI_AGENT_TYPE` | `claude-code`, which is also what empty means |
//! | `USE_MOCK_CLAUDE` | `true`: run the mock CLI instead of `claude` |
//! | `VM0_RESUME_SESSION_ID` | session to go on with |
//! | `VM0_RESUME_SESSION_FILE` | where the host has put that session's history, if it is not in its place yet |
//! | `VM0_STUCK_TOOL_TIMEOUT_SECS` | how long a web tool may take (180) |
//! | `VM0_POST_RESULT_GRACE_SECS` | how long the CLI may stay after its result (10) |
//! | `VM0_TERM_GRACE_SECS` | how long it may take to end after SIGTERM (5) |
//! | `VM0_DRAIN_SECS` | how long its output is read after it has exited (5) |
//! | `VM0_HEARTBEAT_SECS` | time between two heartbeats (60) |
//! | `VM0_TELEMETRY_SECS` | time between two pieces of telemetry (5) |
//! | `VM0_API_DEADLINE_SECS` | how long what the API lacks may take at the end (30) |
//!
//! The times are decimal numbers of seconds.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::Duration;

use api_types::SessionId;

use crate::api::ApiEnv;

/// Program run when `USE_MOCK_CLAUDE` is `true`.
const MOCK_CLAUDE: &str = "/usr/local/bin/guest-mock-claude";

/// Variables that are the agent's business and not the CLI's: the token above all, and the prompt, which the
/// CLI gets as an argument and would otherwise carry, and hand on, a second time.
pub(crate) const NOT_FOR_THE_CLI: &[&str] = &[
    "VM0_API_TOKEN",
    "VM0_PROMPT",
    "VM0_PROMPT_STDIN",
    "VM0_INPUT",
    "VM0_SECRET_VALUES",
    "VM0_RESUME_SESSION_ID",
    "VM0_RESUME_SESSION_FILE",
    "VM0_HEARTBEAT_SECS",
    "VM0_TELEMETRY_SECS",
    "VM0_API_DEADLINE_SECS",
    "VM0_STUCK_TOOL_TIMEOUT_SECS",
    "VM0_POST_RESULT_GRACE_SECS",
    "VM0_TERM_GRACE_SECS",
    "VM0_DRAIN_SECS",
];

/// What is wrong with the environment the host gave.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EnvError {
    #[error("{0} is missing from the agent's environment")]
    Missing(&'static str),
    #[error("{name} is {value:?}, which is not {expected}")]
    Invalid {
        name: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error("{0}")]
    Secrets(String),
}

/// Everything the host tells the agent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct AgentEnv {
    pub(crate) run_id: String,
    pub(crate) prompt: Prompt,
    pub(crate) working_dir: PathBuf,
    /// Program to run: an absolute path, or a name looked up in `PATH`.
    pub(crate) cli: &'static str,
    pub(crate) resume_session: Option<SessionId>,
    /// Where that session's history lies, if it has to be put into its place.
    pub(crate) resume_file: Option<PathBuf>,
    /// The user's home, where the CLI keeps its sessions.
    pub(crate) home: PathBuf,
    /// Where the run is reported to; nothing: nowhere.
    pub(crate) api: Option<ApiEnv>,
    pub(crate) limits: Limits,
}

/// Where the CLI finds its prompt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// As its last argument.
    Argument(OsString),
    /// On standard input, which it inherits from the agent.
    Stdin,
    /// As the first of the messages on its standard input, which the agent hands on.
    Messages,
}

/// How long the agent waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// A WebSearch or WebFetch call without a result for this long ends the run.
    pub(crate) stuck_tool: Duration,
    /// The CLI is terminated when it is still there this long after its final result.
    pub(crate) post_result: Duration,
    /// From SIGTERM to SIGKILL.
    pub(crate) term: Duration,
    /// How long output is still read when the CLI has exited but somebody holds the pipe.
    pub(crate) drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stuck_tool: Duration::from_secs(180),
            post_result: Duration::from_secs(10),
            term: Duration::from_secs(5),
            drain: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// What is said when a web tool takes too long.
    pub(crate) fn tool_timeout(&self, tool: &str) -> String {
        format!(
            "Tool timeout: {tool} exceeded {}s without returning a result",
            self.stuck_tool.as_secs_f64()
        )
    }
}

impl AgentEnv {
    /// Reads the process's environment.
    pub(crate) fn from_process() -> Result<Self, EnvError> {
        Self::parse(|name| std::env::var_os(name))
    }

    /// Reads an environment through `lookup`. A variable that is empty counts as not there.
    fn parse(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, EnvError> {
        let get = |name: &'static str| lookup(name).filter(|value| !value.is_empty());
        let required = |name| get(name).ok_or(EnvError::Missing(name));

        let flag = |name| match get(name) {
            None => Ok(false),
            Some(flag) if flag == "1" => Ok(true),
            Some(flag) => Err(invalid(name, &flag, "\"1\"")),
        };
        let prompt = if flag("VM0_INPUT")? {
            Prompt::Messages
        } else if flag("VM0_PROMPT_STDIN")? {
            Prompt::Stdin
        } else {
            Prompt::Argument(required("VM0_PROMPT")?)
        };
        if let Some(kind) = get("CLI_AGENT_TYPE").filter(|kind| kind != "claude-code") {
            return Err(invalid("CLI_AGENT_TYPE", &kind, "\"claude-code\""));
        }
        let mock = get("USE_MOCK_CLAUDE").is_some_and(|value| value == "true");
        let defaults = Limits::default();
        let seconds = |name, default| match get(name) {
            None => Ok(default),
            Some(value) => value
                .to_str()
                .and_then(|text| text.parse().ok())
                .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
                .ok_or_else(|| invalid(name, &value, "a number of seconds")),
        };
        let text = |name: &'static str, value: OsString| {
            value
                .into_string()
                .map_err(|value| invalid(name, &value, "UTF-8"))
        };
        let resume_session = match get("VM0_RESUME_SESSION_ID") {
            None => None,
            Some(id) => Some(
                id.to_str()
                    .and_then(|text| text.parse().ok())
                    .ok_or_else(|| invalid("VM0_RESUME_SESSION_ID", &id, "a session's id"))?,
            ),
        };
        let api = match get("VM0_API_TOKEN") {
            None => None,
            Some(token) => Some(ApiEnv {
                url: text("VM0_API_URL", required("VM0_API_URL")?)?,
                token: text("VM0_API_TOKEN", token)
                    .map_err(|_| EnvError::Secrets("VM0_API_TOKEN is not UTF-8".to_owned()))?,
                secrets: match get("VM0_SECRET_VALUES") {
                    None => Vec::new(),
                    Some(list) => {
                        ApiEnv::secrets(&list.to_string_lossy()).map_err(EnvError::Secrets)?
                    }
                },
                heartbeat: seconds("VM0_HEARTBEAT_SECS", Duration::from_secs(60))?,
                telemetry: seconds("VM0_TELEMETRY_SECS", Duration::from_secs(5))?,
                deadline: seconds("VM0_API_DEADLINE_SECS", Duration::from_secs(30))?,
            }),
        };
        Ok(Self {
            resume_session,
            resume_file: get("VM0_RESUME_SESSION_FILE").map(PathBuf::from),
            home: get("HOME").map_or_else(|| "/home/user".into(), PathBuf::from),
            api,
            run_id: required("VM0_RUN_ID")?.to_string_lossy().into_owned(),
            prompt,
            working_dir: required("VM0_WORKING_DIR")?.into(),
            cli: if mock { MOCK_CLAUDE } else { "claude" },
            limits: Limits {
                stuck_tool: seconds("VM0_STUCK_TOOL_TIMEOUT_SECS", defaults.stuck_tool)?,
                post_result: seconds("VM0_POST_RESULT_GRACE_SECS", defaults.post_result)?,
                term: seconds("VM0_TERM_GRACE_SECS", defaults.term)?,
                drain: seconds("VM0_DRAIN_SECS", defaults.drain)?,
            },
        })
    }
}

fn invalid(name: &'static str, value: &OsString, expected: &'static str) -> EnvError {
    EnvError::Invalid {
        name,
        value: String::from_utf8_lossy(value.as_bytes()).into_owned(),
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(changes: &[(&str, &str)]) -> Result<AgentEnv, EnvError> {
        let base = [
            ("VM0_RUN_ID", "r-1"),
            ("VM0_API_URL", ""),
            ("VM0_API_TOKEN", ""),
            ("VM0_PROMPT", "echo hi"),
            ("VM0_WORKING_DIR", "/home/user/workspace"),
            ("CLI_AGENT_TYPE", "claude-code"),
        ];
        AgentEnv::parse(|name| {
            let all = changes.iter().chain(&base);
            all.filter(|(key, _)| *key == name)
                .map(|(_, value)| OsString::from(value))
                .next()
        })
    }

    #[test]
    fn the_local_mode_environment_is_understood() {
        assert_eq!(
            parse(&[]).unwrap(),
            AgentEnv {
                run_id: "r-1".into(),
                prompt: Prompt::Argument("echo hi".into()),
                working_dir: "/home/user/workspace".into(),
                cli: "claude",
                resume_session: None,
                resume_file: None,
                home: "/home/user".into(),
                api: None,
                limits: Limits::default(),
            }
        );
    }

    #[test]
    fn only_true_means_the_mock() {
        for (value, cli) in [
            ("true", MOCK_CLAUDE),
            ("false", "claude"),
            ("1", "claude"),
            ("", "claude"),
        ] {
            let env = parse(&[("USE_MOCK_CLAUDE", value)]).unwrap();
            assert_eq!(env.cli, cli, "{value:?}");
        }
    }

    #[test]
    fn a_long_prompt_comes_by_stdin() {
        let env = parse(&[("VM0_PROMPT_STDIN", "1"), ("VM0_PROMPT", "")]).unwrap();
        assert_eq!(env.prompt, Prompt::Stdin);
        assert!(parse(&[("VM0_PROMPT_STDIN", "yes")]).is_err());
        let env = parse(&[("VM0_INPUT", "1"), ("VM0_PROMPT", "")]).unwrap();
        assert_eq!(env.prompt, Prompt::Messages);
        assert!(parse(&[("VM0_INPUT", "true")]).is_err());
    }

    #[test]
    fn what_is_needed_must_be_there() {
        for name in ["VM0_RUN_ID", "VM0_PROMPT", "VM0_WORKING_DIR"] {
            let error = parse(&[(name, "")]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        // A token without an address.
        let error = parse(&[("VM0_API_TOKEN", "t")]).unwrap_err();
        assert_eq!(error, EnvError::Missing("VM0_API_URL"));
        assert!(parse(&[("VM0_RESUME_SESSION_ID", "../x")]).is_err());
        let error = parse(&[("CLI_AGENT_TYPE", "other")]).unwrap_err();
        assert!(error.to_string().contains("claude-code"));
    }

    #[test]
    fn times_are_decimal_seconds() {
        let env = parse(&[("VM0_DRAIN_SECS", "0.25")]).unwrap();
        assert_eq!(env.limits.drain, Duration::from_millis(250));
        for bad in ["-1", "soon", "inf", "nan", "1e300"] {
            assert!(parse(&[("VM0_DRAIN_SECS", bad)]).is_err(), "{bad}");
        }
    }
}
