//! One job, top to bottom: VM up, agent started, output streamed, end explained, files collected.
//!
//! The executor never decides about VMs or leases and never answers: it returns what happened, and the daemon does
//! the rest. Dropping it at any point is safe; whatever it had started goes with the VM's slot.

mod agent;
mod collect;
mod end;
mod last_line;
mod vm;

use std::sync::Arc;
use std::time::Duration;

use host::fs::Dir;
use host::net::NetworkId;
use sandbox::{DeviceStats, Place, Sandbox, SandboxError, Template};
use tokio::sync::watch;
use tokio::time::timeout;

use agent::{agent, environment, leave_session};
use collect::collect;
use end::explain;
use vm::vm_up;

pub(crate) use end::Ended;
pub(crate) use vm::{give_memory_back, park, wake_now, warm_up};

use crate::daemon::CancelReason;
use crate::network::{Admission, JobNetworks, NetworkError};
use crate::provider::Provider;
use crate::queue::{ApiSide, Job, JobResult};
use crate::run_log::RunLog;
use crate::status::Phase;
use crate::telemetry::Steps;

/// Limit on copying all of a job's files out.
const COLLECT_LIMIT: Duration = Duration::from_secs(300);
/// Limit on putting a session's history into the VM. The job's own time begins after it.
const SESSION_LIMIT: Duration = Duration::from_secs(300);

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
    let ended = agent(setting, job, api, env, &sandbox, log, progress).await;
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

#[cfg(test)]
#[path = "executor_tests.rs"]
mod tests;
