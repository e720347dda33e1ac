//! The agent in the guest: what it is told, how it is started, and what it says until it ends.

use std::time::Duration;

use api_types::runner::ResumeSession;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use guest_control::{ControlError, ExecSpec, ExitReport, FileSpec, Session, Stream, UserSpec};
use sandbox::{Sandbox, SandboxError};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use uuid::Uuid;

use super::end::{Ended, judge, timed_out};
use super::last_line::LastLine;
use super::vm::wake_now;
use super::{Progress, Setting};
use crate::network::Admission;
use crate::queue::{ApiSide, Job, MAX_STRING_BYTES, is_reserved};
use crate::run_log::RunLog;
use crate::status::Phase;

/// The agent in the guest.
pub(super) const AGENT: &[u8] = b"/usr/local/bin/guest-agent";
/// Where the agent finds the history of the session that it goes on with.
const RESUMED: &str = "/tmp/.vm0-resume-session.jsonl";
/// The guest enforces a job's time limit; a guest that does not is given up this much later.
pub(super) const TIMEOUT_GRACE: Duration = Duration::from_secs(30);
/// How long output may still come after the agent has ended.
const DRAIN: Duration = Duration::from_secs(5);

/// The agent's environment: the job's own, and over it what only the runner may say.
pub(super) fn environment(
    job: &Job,
    api: Option<&ApiSide>,
    admission: Option<&Admission>,
    mock: Option<&str>,
) -> Vec<(String, String)> {
    // Refused at submit already; this is the place that must hold even if that one is wrong.
    let own = job
        .environment
        .iter()
        .filter(|(name, _)| !is_reserved(name));
    let mut env: Vec<(String, String)> = own.map(|(n, v)| (n.clone(), v.clone())).collect();
    let placeholders: Vec<_> = admission
        .into_iter()
        .flat_map(Admission::environment)
        .collect();
    let masked = masked(placeholders.iter().map(|(_, text)| text.as_str()));
    env.extend(placeholders);
    let mut set = |name: &str, value: &str| env.push((name.to_owned(), value.to_owned()));
    set("VM0_RUN_ID", &job.run_id.to_string());
    // The local queue has no sandbox token: the agent's webhooks are off.
    set("VM0_API_URL", api.map_or("", |api| &api.url));
    set("VM0_API_TOKEN", api.map_or("", |api| &api.token));
    set("VM0_SECRET_VALUES", &masked);
    set("VM0_WORKING_DIR", &job.working_dir);
    set("CLI_AGENT_TYPE", &job.cli_agent_type);
    match Stdin::of(job, api) {
        Stdin::Nothing => set("VM0_PROMPT", &job.prompt),
        Stdin::Prompt => set("VM0_PROMPT_STDIN", "1"),
        Stdin::Messages(_) => set("VM0_INPUT", "1"),
    }
    if let Some(mock) = mock {
        set("USE_MOCK_CLAUDE", mock);
    }
    env
}

/// What the agent is to keep out of its webhooks, as it reads it: base64, separated by commas. The values of secrets are
/// not among it: no VM gets them.
pub(super) fn masked<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    let encoded: Vec<_> = texts.map(|text| STANDARD.encode(text)).collect();
    encoded.join(",")
}

/// Puts a session's history where the agent takes it from; gives the variables that tell it.
pub(super) async fn leave_session(
    session: &ResumeSession,
    sandbox: &Sandbox,
) -> Result<[(String, String); 2], SandboxError> {
    let spec = FileSpec {
        path: RESUMED.to_owned(),
        mode: 0o600,
        user: UserSpec::User,
    };
    let history = session.session_history.as_bytes();
    sandbox.client().write_file(spec, history).await?;
    let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    Ok([
        variable("VM0_RESUME_SESSION_ID", &session.session_id),
        variable("VM0_RESUME_SESSION_FILE", RESUMED),
    ])
}

/// What the agent gets on its standard input.
enum Stdin<'a> {
    Nothing,
    /// The prompt, which is longer than one string of an environment may be.
    Prompt,
    /// The prompt and what clients say while it works.
    Messages(&'a Mutex<mpsc::Receiver<String>>),
}

impl<'a> Stdin<'a> {
    fn of(job: &Job, api: Option<&'a ApiSide>) -> Self {
        match api.and_then(|api| api.inputs.as_ref()) {
            Some(inputs) => Self::Messages(inputs),
            None if job.prompt.len() > MAX_STRING_BYTES => Self::Prompt,
            None => Self::Nothing,
        }
    }

    /// Feeds it all. An agent that ends without reading everything makes this fail; its end tells more.
    async fn feed(&self, prompt: &str, session: &Session) -> Result<(), ControlError> {
        match self {
            Self::Nothing => return Ok(()),
            Self::Prompt => {
                let prompt = Bytes::copy_from_slice(prompt.as_bytes());
                session.write_stdin(prompt).await?;
            }
            Self::Messages(inputs) => {
                session.write_stdin(message(prompt)).await?;
                let mut inputs = inputs.lock().await;
                while let Some(input) = inputs.recv().await {
                    session.write_stdin(message(&input)).await?;
                }
            }
        }
        session.close_stdin().await
    }
}

/// A message of the agent's user, as the CLI reads it: a line of its `stream-json`. With ids, the CLI says of each one when it
/// reads it; without, it says it once of several.
fn message(text: &str) -> Bytes {
    let message = serde_json::json!({
        "type": "user",
        "uuid": Uuid::new_v4(),
        "message": {"role": "user", "content": text},
    });
    Bytes::from(format!("{message}\n"))
}

/// Starts the agent, streams its output and waits for its end.
pub(super) async fn agent(
    setting: &Setting,
    job: &Job,
    api: Option<&ApiSide>,
    env: Vec<(String, String)>,
    sandbox: &Sandbox,
    log: &mut RunLog,
    progress: &dyn Progress,
) -> Result<Ended, SandboxError> {
    let asked = job.timeout_secs.map(Duration::from_secs);
    let limit = asked.map_or(setting.job_timeout, |asked| asked.min(setting.job_timeout));
    let stdin = Stdin::of(job, api);
    let spec = ExecSpec {
        argv: vec![AGENT.to_vec()],
        env,
        cwd: None,
        user: UserSpec::User,
        stdin: !matches!(stdin, Stdin::Nothing),
        pty: None,
        timeout: Some(limit),
        wake: Some(wake_now()?),
        kill_group_on_exit: true,
    };
    let session = sandbox.client().exec(spec).await?;
    progress.phase(Phase::Running);
    let mut last_line = LastLine::default();
    let report = timeout(
        limit.saturating_add(TIMEOUT_GRACE),
        watch_agent(
            stdin.feed(&job.prompt, &session),
            &session,
            log,
            &mut last_line,
        ),
    )
    .await;
    let report = match report {
        Ok(report) => report?,
        // The guest should have ended it and did not.
        Err(_) => return Ok(Ended::failed(timed_out(job.run_id, limit))),
    };
    Ok(judge(job.run_id, &report, limit, &last_line.text()))
}

/// Feeds the agent, copies output to the log and waits for the end, all at once.
async fn watch_agent(
    feed: impl Future<Output = Result<(), ControlError>>,
    session: &Session,
    log: &mut RunLog,
    last_line: &mut LastLine,
) -> Result<ExitReport, ControlError> {
    let mut output = session.attach(0, true);
    let copy = async {
        while let Some(chunk) = output.next().await {
            if chunk.stream == Stream::Stderr {
                last_line.push(&chunk.data);
            }
            log.write(&chunk.data);
        }
    };
    let end = session.wait();
    tokio::pin!(copy, feed, end);
    let (mut copied, mut fed) = (false, false);
    let report = loop {
        tokio::select! {
            report = &mut end => break report?,
            () = &mut copy, if !copied => copied = true,
            _ = &mut feed, if !fed => fed = true,
        }
    };
    if !copied {
        // Everything is in the ring by now, so this only ends early if the log's disk hangs.
        let _ = timeout(DRAIN, copy).await;
    }
    Ok(report)
}
