//! `runner local submit`, as a user calls it.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::host::Host;
use crate::process::Proc;
use crate::text::Text;
use crate::wait::{LONG, eventually_some};

/// A submission being put together.
pub struct Submit<'h> {
    host: &'h Host,
    prompt: String,
    profile: String,
    command: Command,
}

impl<'h> Submit<'h> {
    pub(crate) fn new(host: &'h Host, prompt: &str) -> Self {
        let mut command = host.runner(&["local", "submit", "--group", host.group()]);
        command.args(["--prompt", prompt]);
        Self {
            host,
            prompt: prompt.to_owned(),
            profile: host.profile().to_owned(),
            command,
        }
    }

    /// Another profile than the host's first.
    pub fn profile(mut self, profile: &str) -> Self {
        self.profile = profile.to_owned();
        self
    }

    /// `--env NAME=VALUE`.
    pub fn env(self, name: &str, value: &str) -> Self {
        self.arg("--env").arg(&format!("{name}={value}"))
    }

    /// `--session-id ID`.
    pub fn session(self, id: &str) -> Self {
        self.arg("--session-id").arg(id)
    }

    /// `--timeout SECONDS`.
    pub fn timeout_secs(self, seconds: u32) -> Self {
        self.arg("--timeout").arg(&seconds.to_string())
    }

    /// `--allow HOST[:PORT]`.
    pub fn allow(self, host: &str) -> Self {
        self.arg("--allow").arg(host)
    }

    /// `--secret NAME=env:…@HOST`, with the value in a variable of the command's.
    pub fn secret(mut self, name: &str, value: &str, host: &str) -> Self {
        let variable = format!("E2E_SECRET_{name}");
        self.command.env(&variable, value);
        self.arg("--secret")
            .arg(&format!("{name}=env:{variable}@{host}"))
    }

    /// One more argument.
    pub fn arg(mut self, argument: &str) -> Self {
        self.command.arg(argument);
        self
    }

    /// As this user, who must be able to reach the home and the binary.
    pub fn as_user(mut self, uid: u32) -> Self {
        self.command.uid(uid).gid(uid);
        self
    }

    /// Starts it.
    pub fn spawn(mut self) -> Pending<'h> {
        self.command.args(["--profile", &self.profile]);
        let mut child = self
            .command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the runner starts");
        Pending {
            host: self.host,
            prompt: self.prompt,
            stdout: Text::collect(child.stdout.take().expect("piped")),
            stderr: Text::collect(child.stderr.take().expect("piped")),
            child,
        }
    }

    /// Starts it and waits for its end.
    pub fn run(self) -> Outcome {
        self.spawn().wait()
    }
}

/// A submission whose command runs. Dropping it kills the command.
pub struct Pending<'h> {
    host: &'h Host,
    prompt: String,
    child: Child,
    /// What it wrote to stdout so far.
    pub stdout: Text,
    /// What it wrote to stderr so far: with `--follow`, the job's output.
    pub stderr: Text,
}

impl Pending<'_> {
    /// The run's id, from the queue: that of the job with this prompt, which must be the only one.
    pub fn run_id(&self) -> String {
        let what = format!("a job with the prompt {:?} is queued", self.prompt);
        eventually_some(&what, LONG, || self.host.queued(&self.prompt))
    }

    /// Waits until the agent runs in its VM; gives the run's id.
    pub fn running(&self) -> String {
        let run = self.run_id();
        self.host.until_runs(&run);
        run
    }

    /// Sends the command a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(process) = Proc::open(self.child.id()) {
            process.signal(signal);
        }
    }

    /// Whether the command still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    pub fn wait(self) -> Outcome {
        self.wait_within(LONG)
    }

    /// Waits for its end; panics after the deadline.
    pub fn wait_within(mut self, deadline: Duration) -> Outcome {
        let process = Proc::open(self.child.id());
        if let Some(process) = process
            && !process.ends_within(deadline)
        {
            panic!(
                "submit of {:?} has no answer after {deadline:?}; stderr: {}",
                self.prompt,
                self.stderr.now()
            );
        }
        let status = self.child.wait().expect("our child");
        Outcome {
            status,
            stdout: self.stdout.all(LONG),
            stderr: self.stderr.all(LONG),
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        // Already waited for in the usual case; both calls then fail and that is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a submission ended.
#[derive(Debug)]
pub struct Outcome {
    /// Of the submit command.
    pub status: ExitStatus,
    /// All of it.
    pub stdout: String,
    /// All of it.
    pub stderr: String,
}

impl Outcome {
    /// The result: stdout must be exactly one line of JSON with exactly the documented keys.
    pub fn result(&self) -> Value {
        let line = self.stdout.strip_suffix('\n');
        let value = line
            .filter(|line| !line.contains('\n'))
            .and_then(|line| serde_json::from_str::<Value>(line).ok());
        let Some(value) = value else {
            panic!("stdout is not one line of JSON: {self:?}");
        };
        let mut keys: Vec<&String> = value.as_object().expect("an object").keys().collect();
        keys.sort();
        assert_eq!(keys, ["error", "exit_code", "run_id"], "{self:?}");
        value
    }

    /// The run's id.
    pub fn run_id(&self) -> String {
        let result = self.result();
        result["run_id"].as_str().expect("a string").to_owned()
    }

    /// The result's error text, empty for null.
    pub fn error(&self) -> String {
        self.result()["error"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Panics unless the job ended with this code and submit's own status agrees.
    pub fn expect_exit(&self, code: i64) -> &Self {
        assert_eq!(self.result()["exit_code"], code, "{self:?}");
        assert_eq!(self.status.success(), code == 0, "{self:?}");
        self
    }

    /// Panics unless the job failed and its error holds one of these words.
    pub fn expect_error(&self, words: &[&str]) -> &Self {
        let error = self.error().to_lowercase();
        assert_ne!(self.result()["exit_code"], 0, "{self:?}");
        assert!(!self.status.success(), "{self:?}");
        assert!(
            words.iter().any(|word| error.contains(word)),
            "no word of {words:?} in the error: {self:?}"
        );
        self
    }
}
