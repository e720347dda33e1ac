//! One job, top to bottom: VM up, agent started, output streamed, end explained, files collected.
//!
//! The executor never decides about VMs or leases and never answers: it returns what happened, and the daemon does
//! the rest. Dropping it at any point is safe; whatever it had started goes with the VM's slot.

mod collect;
mod last_line;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api_types::runner::ResumeSession;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use guest_control::{
    ControlError, ExecSpec, ExitReport, ExitStatus, FileSpec, Session, Stream, UserSpec, Wake,
};
use host::fs::Dir;
use host::net::NetworkId;
use sandbox::{BalloonStats, DeviceStats, Place, Sandbox, SandboxError, Template};
use tokio::sync::watch;
use tokio::time::timeout;

use collect::collect;
use last_line::LastLine;

use crate::daemon::CancelReason;
use crate::names::RunId;
use crate::network::{Admission, JobNetworks, NetworkError};
use crate::provider::Provider;
use crate::queue::{ApiSide, Job, JobResult, MAX_STRING_BYTES, is_reserved};
use crate::run_log::RunLog;
use crate::status::Phase;
use crate::telemetry::Steps;

/// The agent in the guest.
const AGENT: &[u8] = b"/usr/local/bin/guest-agent";
/// Where the agent finds the history of the session that it goes on with.
const RESUMED: &str = "/tmp/.vm0-resume-session.jsonl";
/// The guest enforces a job's time limit; a guest that does not is given up this much later.
const TIMEOUT_GRACE: Duration = Duration::from_secs(30);
/// How long output may still come after the agent has ended.
const DRAIN: Duration = Duration::from_secs(5);
/// How long a VM whose control channel ended may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Limit on copying all of a job's files out.
const COLLECT_LIMIT: Duration = Duration::from_secs(300);
/// Limit on putting a session's history into the VM. The job's own time begins after it.
const SESSION_LIMIT: Duration = Duration::from_secs(300);
/// A disk with less than this free is what a failed job failed of, most likely.
const DISK_FULL_BYTES: u64 = 1 << 20;
/// Limit on the warm-up job: an emulated guest on a busy host.
const WARM_UP_LIMIT: Duration = Duration::from_secs(120);

/// Warm-up jobs before a clone counts as warm. The first brings nearly everything; under emulation the second still takes
/// a fifth off a job's way from submit to result (33 to 27 ms), for 30 ms of a CPU spent while nobody waits.
const WARM_UP_ROUNDS: u32 = 2;

/// Where the job's VM comes from.
pub(crate) enum VmSource {
    /// A paused one: warm, or kept for the session.
    Paused(Sandbox),
    /// A restore of the snapshot in this place.
    Restore(Arc<dyn Template>, Place),
}

/// What is the same for every job of this runner.
#[derive(Clone)]
pub(crate) struct Setting {
    /// The home, for logs.
    pub(crate) home: Arc<Dir>,
    /// Where collected files go.
    pub(crate) provider: Arc<dyn Provider>,
    /// Longest time of any job.
    pub(crate) job_timeout: Duration,
    /// Most bytes of a job's log.
    pub(crate) log_max: u64,
    /// `USE_MOCK_CLAUDE` of the runner's own environment.
    pub(crate) mock: Option<String>,
    /// The network of jobs; without it VMs have none.
    pub(crate) networks: Option<Arc<JobNetworks>>,
    /// Restores and warm-ups that go on at the same time.
    pub(crate) restores: Arc<tokio::sync::Semaphore>,
}

/// What the executor tells while it works.
pub(crate) trait Progress: Send + Sync {
    /// It got further.
    fn phase(&self, phase: Phase);
    /// The VM is up and answers.
    fn vm(&self, sandbox: &Sandbox);
    /// What the VM's devices did for it, where its engine counts that.
    fn devices(&self, stats: DeviceStats);
}

/// How a job ended.
pub(crate) struct Ended {
    /// The answer.
    pub(crate) result: JobResult,
    /// Whether the VM is fit for the session's next job.
    pub(crate) reusable: bool,
    /// It is the runner's failure and not the agent's.
    pub(crate) fault: bool,
}

/// A claimed job, and what it runs in.
pub(crate) struct Work<'a> {
    /// The job.
    pub(crate) job: &'a Job,
    /// Who submitted it.
    pub(crate) submitter: u32,
    /// What the Web API adds.
    pub(crate) api: Option<&'a ApiSide>,
    /// Where its VM comes from.
    pub(crate) source: VmSource,
    /// The VM's network, where this runner has networks.
    pub(crate) network: Option<NetworkId>,
    /// Where it is noted how long its steps took.
    pub(crate) steps: &'a Steps,
}

/// Runs a claimed job. Resolves soon after `cancel` says so, whatever it is at.
pub(crate) async fn execute(
    setting: &Setting,
    work: Work<'_>,
    mut cancel: watch::Receiver<Option<CancelReason>>,
    progress: &dyn Progress,
) -> Ended {
    let run = work.job.run_id;
    let mut log = match RunLog::create(&setting.home, run, setting.log_max) {
        Ok(log) => log,
        Err(error) => {
            let why = format!("the job's system log cannot be made: {error}");
            return Ended::failed(JobResult::failed(run, 1, &why));
        }
    };
    let mut admission = None;
    let steps = work.steps;
    let ended = tokio::select! {
        // A job that is cancelled and ends at the same moment has ended.
        biased;
        ended = attempt(setting, work, &mut admission, &mut log, progress) => ended,
        reason = cancelled(&mut cancel) => Ended::failed(reason.result(run)),
    };
    // Whatever happened: nothing of the job may still speak, and its network log is whole before the answer.
    if let Some(admission) = admission {
        let closing = steps.begin("network.close");
        admission.end().await;
        closing.end(true);
    }
    // The agent's own last line is in the log already; everything else is said there too.
    if let Some(error) = &ended.result.error
        && ended.result.exit_code != 0
    {
        log.note(error);
    }
    // Before the answer: whoever has the result finds the whole log.
    log.finish();
    ended
}

async fn cancelled(cancel: &mut watch::Receiver<Option<CancelReason>>) -> CancelReason {
    let reason = cancel.wait_for(Option::is_some).await.map(|reason| *reason);
    match reason {
        Ok(reason) => reason.unwrap_or(CancelReason::User),
        // Nobody is left who could cancel.
        Err(_) => std::future::pending().await,
    }
}

async fn attempt(
    setting: &Setting,
    work: Work<'_>,
    admission: &mut Option<Admission>,
    log: &mut RunLog,
    progress: &dyn Progress,
) -> Ended {
    let Work {
        job,
        source,
        api,
        steps,
        ..
    } = work;
    let run = job.run_id;
    // Both at once: neither needs the other, and the agent needs both.
    let network = async {
        // Where there are no networks there is no such step.
        let step = work.network.and(setting.networks.as_ref());
        let step = step.map(|_| steps.begin("network.register"));
        let admitted = admit(setting, job, work.submitter, api, work.network).await;
        if let Some(step) = step {
            step.end(admitted.is_ok());
        }
        admitted
    };
    let vm = async {
        let step = steps.begin(match source {
            VmSource::Paused(_) => "vm.resume",
            VmSource::Restore(..) => "vm.restore",
        });
        let sandbox = vm_up(setting, source).await;
        step.end(sandbox.is_ok());
        sandbox
    };
    let (sandbox, admitted) = tokio::join!(vm, network);
    let sandbox = match sandbox {
        Ok(sandbox) => sandbox,
        Err(error) => {
            let why = format!("the job's VM could not be started: {error}");
            return Ended::failed(JobResult::failed(run, 1, &why));
        }
    };
    match admitted {
        Ok(admitted) => *admission = admitted,
        Err(error) => {
            let why = format!("the job got no network: {error}");
            return Ended::failed(JobResult::failed(run, 1, &why));
        }
    }
    progress.vm(&sandbox);
    let mut env = environment(job, api, admission.as_ref(), setting.mock.as_deref());
    if let Some(session) = api.and_then(|api| api.resume.as_ref()) {
        // The guest decides when it takes the data: one that never does must not hold the job.
        let left = timeout(SESSION_LIMIT, leave_session(session, &sandbox)).await;
        let left = left.unwrap_or_else(|_| {
            Err(SandboxError::Timeout {
                step: "the session's history",
                limit: SESSION_LIMIT,
                detail: String::new(),
            })
        });
        match left {
            Ok(variables) => env.extend(variables),
            Err(error) => {
                let why = explain(&sandbox, error).await;
                return Ended::failed(JobResult::failed(run, 1, &why));
            }
        }
    }
    let step = steps.begin("agent");
    let ended = agent(setting, job, env, &sandbox, log, progress).await;
    step.end(
        ended
            .as_ref()
            .is_ok_and(|ended| ended.result.exit_code == 0),
    );
    // A VM that died has nobody left to ask, and a refusal is no reason to fail a job.
    match sandbox.take_device_stats().await {
        Ok(stats) => progress.devices(stats),
        Err(SandboxError::Unavailable { .. } | SandboxError::Died(_)) => {}
        Err(error) => tracing::warn!(%run, %error, "what the VM's devices did is not known"),
    }
    let mut ended = match ended {
        Ok(ended) => ended,
        Err(error) => {
            let why = explain(&sandbox, error).await;
            return Ended::failed(JobResult::failed(run, 1, &why));
        }
    };
    if !job.collect.is_empty() {
        progress.phase(Phase::Finishing);
        let step = steps.begin("collect");
        let collecting = timeout(COLLECT_LIMIT, collect(setting, job, sandbox.client())).await;
        let collected = collecting.unwrap_or_else(|_| {
            Err(format!(
                "copying files out of the VM took longer than {} s",
                COLLECT_LIMIT.as_secs()
            ))
        });
        step.end(collected.is_ok());
        if let Err(why) = collected {
            let code = match ended.result.exit_code {
                0 => 1,
                code => code,
            };
            let before = ended
                .result
                .error
                .map_or(String::new(), |e| format!("{e}; "));
            ended = Ended::failed(JobResult::failed(run, code, &format!("{before}{why}")));
        }
    }
    ended
}

/// Registers the job's network, where this runner has networks.
async fn admit(
    setting: &Setting,
    job: &Job,
    submitter: u32,
    api: Option<&ApiSide>,
    network: Option<NetworkId>,
) -> Result<Option<Admission>, NetworkError> {
    match (&setting.networks, network) {
        (Some(networks), Some(network)) => {
            Ok(Some(networks.admit(job, submitter, api, network).await?))
        }
        _ => Ok(None),
    }
}

/// Gets a VM that runs and has a mounted disk.
async fn vm_up(setting: &Setting, source: VmSource) -> Result<Sandbox, SandboxError> {
    match source {
        VmSource::Paused(sandbox) => {
            sandbox.resume().await?;
            Ok(sandbox)
        }
        VmSource::Restore(template, place) => {
            // Closed only when the process ends.
            let _turn = setting.restores.acquire().await;
            let vm = template.restore(place).await?;
            Ok(Sandbox::adopt(vm, place.slot))
        }
    }
}

/// Time and entropy for a guest that was standing still until now.
pub(crate) fn wake_now() -> Result<Wake, SandboxError> {
    let mut entropy = [0_u8; 32];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty()).map_err(
        |errno| SandboxError::Io {
            action: "get entropy for the guest".to_owned(),
            source: errno.into(),
        },
    )?;
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Wake {
        realtime_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
        entropy,
    })
}

/// The agent's environment: the job's own, and over it what only the runner may say.
fn environment(
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
    if is_long(&job.prompt) {
        set("VM0_PROMPT_STDIN", "1");
    } else {
        set("VM0_PROMPT", &job.prompt);
    }
    if let Some(mock) = mock {
        set("USE_MOCK_CLAUDE", mock);
    }
    env
}

/// What the agent is to keep out of its webhooks, as it reads it: base64, separated by commas. The values of secrets are
/// not among it: no VM gets them.
fn masked<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    let encoded: Vec<_> = texts.map(|text| STANDARD.encode(text)).collect();
    encoded.join(",")
}

/// Puts a session's history where the agent takes it from; gives the variables that tell it.
async fn leave_session(
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

/// Longer than one string of an environment may be: travels by stdin.
fn is_long(prompt: &str) -> bool {
    prompt.len() > MAX_STRING_BYTES
}

/// Starts the agent, streams its output and waits for its end.
async fn agent(
    setting: &Setting,
    job: &Job,
    env: Vec<(String, String)>,
    sandbox: &Sandbox,
    log: &mut RunLog,
    progress: &dyn Progress,
) -> Result<Ended, SandboxError> {
    let asked = job.timeout_secs.map(Duration::from_secs);
    let limit = asked.map_or(setting.job_timeout, |asked| asked.min(setting.job_timeout));
    let spec = ExecSpec {
        argv: vec![AGENT.to_vec()],
        env,
        cwd: None,
        user: UserSpec::User,
        stdin: is_long(&job.prompt),
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
        watch_agent(job, &session, log, &mut last_line),
    )
    .await;
    let report = match report {
        Ok(report) => report?,
        // The guest should have ended it and did not.
        Err(_) => return Ok(Ended::failed(timed_out(job.run_id, limit))),
    };
    Ok(judge(job.run_id, &report, limit, &last_line.text()))
}

/// Feeds the prompt, copies output to the log and waits for the end, all at once.
async fn watch_agent(
    job: &Job,
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
    let feed = async {
        if is_long(&job.prompt) {
            // An agent that ends without reading everything makes this fail; its end tells more.
            let _ = session
                .write_stdin(Bytes::copy_from_slice(job.prompt.as_bytes()))
                .await;
            let _ = session.close_stdin().await;
        }
    };
    let end = session.wait();
    tokio::pin!(copy, feed, end);
    let (mut copied, mut fed) = (false, false);
    let report = loop {
        tokio::select! {
            report = &mut end => break report?,
            () = &mut copy, if !copied => copied = true,
            () = &mut feed, if !fed => fed = true,
        }
    };
    if !copied {
        // Everything is in the ring by now, so this only ends early if the log's disk hangs.
        let _ = timeout(DRAIN, copy).await;
    }
    Ok(report)
}

fn timed_out(run: RunId, limit: Duration) -> JobResult {
    let why = format!("timed out after {} s", limit.as_secs());
    JobResult::failed(run, JobResult::TIMED_OUT, &why)
}

/// Turns the agent's end into an answer that says what happened.
fn judge(run: RunId, report: &ExitReport, limit: Duration, last_line: &str) -> Ended {
    let code = match report.status {
        ExitStatus::Exited(0) => {
            return Ended {
                result: JobResult::exited(run, 0),
                reusable: true,
                fault: false,
            };
        }
        ExitStatus::Exited(code) => code,
        ExitStatus::Signaled(signal) => signal.saturating_add(128),
        ExitStatus::TimedOut => return Ended::failed(timed_out(run, limit)),
    };
    let mut why = Vec::new();
    if report.oom_kills > 0 {
        why.push(format!(
            "out of memory: the VM's kernel killed {} of the job's processes",
            report.oom_kills
        ));
    }
    if report.pids_limit_hits > 0 {
        why.push("process limit reached: the job could not start more processes".to_owned());
    }
    if report.disk_free_bytes < DISK_FULL_BYTES {
        why.push("disk full: the VM's disk has no space left".to_owned());
    }
    if why.is_empty() {
        why.push(match report.status {
            ExitStatus::Signaled(signal) => format!("the agent was killed by signal {signal}"),
            _ if last_line.is_empty() => format!("the agent exited with code {code}"),
            _ => last_line.to_owned(),
        });
    }
    Ended {
        result: JobResult::failed(run, code, &why.join("; ")),
        // A failed job's VM may be in any state: full disk, half-written files.
        reusable: false,
        fault: false,
    }
}

/// Says why the control channel failed: the VM's own end explains more than the channel's.
async fn explain(sandbox: &Sandbox, error: SandboxError) -> String {
    let closed = matches!(
        error,
        SandboxError::Control(ControlError::Closed | ControlError::Protocol(_))
            | SandboxError::Died(_)
    );
    if !closed {
        return error.to_string();
    }
    match timeout(LAST_WORDS, sandbox.died()).await {
        Ok(death) if death.oom => format!("VM died: out of memory on the host ({})", death.reason),
        Ok(death) => format!("VM died: {}", death.reason),
        Err(_) => error.to_string(),
    }
}

impl Ended {
    fn failed(result: JobResult) -> Self {
        Self {
            // Cancelled jobs and those whose time ran out have another.
            fault: result.exit_code == 1,
            result,
            reusable: false,
        }
    }
}

/// Restores a clone, runs the fixed warm-up job through the whole chain (agent, mock CLI, bash) and pauses it. The
/// warm-up knows no secret, and clock and entropy are set again at the claim.
pub(crate) async fn warm_up(
    template: &Arc<dyn Template>,
    place: Place,
) -> Result<Sandbox, SandboxError> {
    let vm = template.restore(place).await?;
    let sandbox = Sandbox::adopt(vm, place.slot);
    for _ in 0..WARM_UP_ROUNDS {
        warm_up_job(&sandbox).await?;
    }
    sandbox.pause(sandbox::PausedAs::Warm).await?;
    Ok(sandbox)
}

async fn warm_up_job(sandbox: &Sandbox) -> Result<(), SandboxError> {
    let env = [
        ("VM0_RUN_ID", "00000000-0000-0000-0000-000000000000"),
        ("VM0_API_URL", ""),
        ("VM0_API_TOKEN", ""),
        ("VM0_WORKING_DIR", "/tmp"),
        ("CLI_AGENT_TYPE", "claude-code"),
        ("VM0_PROMPT", "true"),
        ("USE_MOCK_CLAUDE", "true"),
    ];
    let spec = ExecSpec {
        argv: vec![AGENT.to_vec()],
        env: env.map(|(n, v)| (n.to_owned(), v.to_owned())).to_vec(),
        user: UserSpec::User,
        timeout: Some(WARM_UP_LIMIT),
        wake: Some(wake_now()?),
        kill_group_on_exit: true,
        ..ExecSpec::default()
    };
    let session = sandbox.client().exec(spec).await?;
    let report = timeout(WARM_UP_LIMIT.saturating_add(TIMEOUT_GRACE), session.wait())
        .await
        .map_err(|_| SandboxError::Timeout {
            step: "the end of the warm-up job",
            limit: WARM_UP_LIMIT,
            detail: String::new(),
        })??;
    if report.status != ExitStatus::Exited(0) {
        return Err(SandboxError::Engine {
            step: "warm-up job",
            message: format!("it ended with {:?}", report.status),
        });
    }
    Ok(())
}

/// Makes a VM fit to wait for its session's next job: nothing of the last one runs.
pub(crate) async fn park(sandbox: &Sandbox) -> Result<(), SandboxError> {
    sandbox.client().kill_all().await?;
    sandbox.pause(sandbox::PausedAs::Parked).await
}

/// Has a VM that is parked give its memory back, where its engine can.
pub(crate) async fn give_memory_back(
    sandbox: &Sandbox,
) -> Result<Option<BalloonStats>, SandboxError> {
    match sandbox.reclaim_memory().await {
        Ok(balloon) => Ok(Some(balloon)),
        Err(SandboxError::Unavailable { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[path = "executor_tests.rs"]
mod tests;
