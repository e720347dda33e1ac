//! Claiming a run, and making a job of what the API says about it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use api_types::ClaimId;
use api_types::runner::{
    Claim, ExecutionContext, FirewallAuth, FirewallSecrets, LeaseOf, LeaseRef,
};
use policy::Draft;
use tokio::sync::{Mutex, mpsc};
use tokio::time::sleep;
use zeroize::Zeroizing;

use super::bring::LogStarts;
use super::{CallError, Held, Inner, Pause, View, inputs};
use crate::names::RunId;
use crate::provider::ProviderEvent;
use crate::queue::{
    ApiSide, ClaimedJob, HandedSecret, Job, JobFields, JobHead, JobNetwork, JobResult, hand_over,
};
use crate::status::Mode;

/// How long a daemon that leaves waits for an answer about a run that it is claiming.
const LAST_ANSWER: Duration = Duration::from_secs(5);

/// Claims the run of an offer and tells what came of it.
pub(super) async fn claim(inner: Arc<Inner>, head: JobHead) {
    let run = head.run_id;
    let Some(context) = win(&inner, &head).await else {
        inner.lost(run);
        return;
    };
    let lease = LeaseRef {
        run_id: run,
        epoch: context.epoch,
    };
    let logs = LogStarts::now(&inner.home, run);
    inner.hold(lease, inner.id, context.policy_revision, logs);
    let inputs = context
        .accepts_input
        .then(|| inputs::begin(&inner, lease, context.inputs));
    let job = match job_of(&inner, context, &head, inputs) {
        Ok(job) => job,
        Err(reason) => {
            let why = format!("the run cannot be started: {reason}");
            inner.answered(JobResult::failed(run, 1, &why));
            (inner.tell)(ProviderEvent::Lost(run));
            return;
        }
    };
    let actual = JobHead::of(&job.job, job.submitter, job.submitted);
    if !head.decides_like(&actual) {
        // It was admitted as something else. The next offer of it is known for what it is.
        inner.lock().known.add(actual);
        give_back(&inner, lease).await;
        return;
    }
    let handed = secrets(&inner, lease, &job.job).await;
    if let Some(Err(reason)) = handed {
        let why = format!("the run's secrets cannot be had: {reason}");
        inner.answered(JobResult::failed(run, 1, &why));
        (inner.tell)(ProviderEvent::Lost(run));
        return;
    }
    if handed.is_none() || is_leaving(&inner.view.borrow()) {
        // It has not begun: another runner may have it.
        give_back(&inner, lease).await;
        return;
    }
    // Heartbeats renew the lease already, and may have brought its end while the secrets were on their way.
    let is = |mark: fn(&Held) -> bool| inner.lock().held.get(&run).is_some_and(mark);
    if is(|held| held.lost) {
        inner.lost(run);
        return;
    }
    (inner.tell)(ProviderEvent::Claimed(Box::new(job)));
    // The daemon cannot cancel what it does not have. Looked at after it was told, so that no cancel falls in between.
    if is(|held| held.cancelled) {
        (inner.tell)(ProviderEvent::Cancelled(run));
    }
}

/// Whether the daemon takes no more jobs.
fn is_leaving(view: &View) -> bool {
    !matches!(view.mode, None | Some(Mode::Starting | Mode::Running))
}

/// Asks until it is answered for good. `None`: the daemon leaves, and cannot wait any longer.
async fn ask<T, F>(inner: &Inner, run: RunId, call: impl Fn() -> F) -> Option<Result<T, CallError>>
where
    F: Future<Output = Result<T, CallError>>,
{
    let leaving = || async {
        // The sender is part of `inner`.
        let _ = inner.view.subscribe().wait_for(is_leaving).await;
    };
    let limit = async {
        leaving().await;
        sleep(LAST_ANSWER).await;
    };
    tokio::pin!(limit);
    let (mut pause, mut hurried) = (Pause::default(), false);
    loop {
        let answer = tokio::select! {
            biased;
            answer = call() => answer,
            () = &mut limit => return None,
        };
        match answer {
            Err(error) if error.may_pass() => {
                tracing::warn!(%run, %error, "no answer about a run that is being claimed; asking again");
                tokio::select! {
                    () = pause.wait(Some(&error)) => {}
                    // At once, whatever the pause has grown to: what the API has given us is best given back.
                    () = leaving(), if !hurried => (pause, hurried) = (Pause::default(), true),
                    () = &mut limit => return None,
                }
            }
            answer => return Some(answer),
        }
    }
}

/// Sends the claim until it is answered: one that the API has taken and whose answer was lost is the same one.
async fn win(inner: &Inner, head: &JobHead) -> Option<ExecutionContext> {
    let claim = Claim {
        runner_id: inner.id,
        runner_name: Some(inner.runner.name.clone()),
        claim_id: ClaimId::random(),
    };
    let run = head.run_id;
    match ask(inner, run, || inner.api.claim(run, &claim)).await? {
        Ok(context) if context.run_id == run => Some(context),
        Ok(_) => {
            tracing::error!(%run, "the API answered a claim with another run");
            None
        }
        Err(error) => {
            tracing::info!(%run, %error, "not claimed");
            None
        }
    }
}

fn job_of(
    inner: &Inner,
    context: ExecutionContext,
    head: &JobHead,
    inputs: Option<mpsc::Receiver<String>>,
) -> Result<ClaimedJob, String> {
    let draft = |value: Option<serde_json::Value>| match value {
        Some(value) => Draft::from_json(&value.to_string()).map_err(|error| error.to_string()),
        None => Ok(Draft::default()),
    };
    let secrets: BTreeSet<policy::SecretName> = context
        .secrets
        .iter()
        .map(|name| {
            name.as_str()
                .parse()
                .map_err(|_| format!("no secret can be named {name}"))
        })
        .collect::<Result<_, _>>()?;
    let network = JobNetwork {
        policy: draft(context.policy)?,
        secrets,
    };
    let group_policy = draft(context.group_policy)?;
    let fields = JobFields {
        run_id: context.run_id,
        prompt: context.prompt,
        profile: context.profile,
        working_dir: context.working_dir,
        cli_agent_type: context.cli_agent_type.as_str().to_owned(),
        environment: context.environment,
        session_id: context.session_id,
        timeout_secs: context.timeout_secs,
        collect: Vec::new(),
        network: (!network.is_empty()).then_some(network),
        traceparent: None,
    };
    Ok(ClaimedJob {
        job: Job::new(fields).map_err(|error| error.to_string())?,
        submitter: inner.runner.submitter,
        submitted: head.submitted,
        api: Some(Box::new(ApiSide {
            url: inner.api.url().to_owned(),
            token: Zeroizing::new(context.sandbox_token),
            group_policy,
            resume: context.resume_session,
            inputs: inputs.map(Mutex::new),
        })),
    })
}

/// Gives a run back. Where the API does not hear of it, it finds out by the lease that nobody renews.
///
/// It is lost to us before the API hears of it: the offer that follows, which may come before the answer, is a new one.
async fn give_back(inner: &Inner, lease: LeaseRef) {
    let body = LeaseOf {
        runner_id: inner.id,
        epoch: lease.epoch,
    };
    let run = lease.run_id;
    // The daemon, which has the run no more, may leave; until this has been said it does not.
    inner.returning(|count| count.saturating_add(1));
    inner.lost(run);
    // Whatever it says: we do not have the run any more.
    let _ = ask(inner, run, || inner.api.release(run, &body)).await;
    inner.returning(|count| count.saturating_sub(1));
}

/// Fetches the values of the job's secrets, and leaves them where the network takes them from: in memory. `None`: the
/// daemon leaves.
async fn secrets(inner: &Inner, lease: LeaseRef, job: &Job) -> Option<Result<(), String>> {
    let wanted = job.network.iter().flat_map(|network| &network.secrets);
    if wanted.count() == 0 {
        return Some(Ok(()));
    }
    let body = FirewallAuth {
        run_id: lease.run_id,
        runner_id: inner.id,
        epoch: lease.epoch,
    };
    let found = ask(inner, lease.run_id, || inner.api.secrets(&body)).await?;
    let found = found.map_err(|error| error.to_string());
    Some(found.and_then(|found| leave(inner, lease.run_id, found)))
}

fn leave(inner: &Inner, run: RunId, found: FirewallSecrets) -> Result<(), String> {
    let mut handed = Vec::new();
    for secret in found.secrets {
        let value = Zeroizing::new(secret.value);
        let name = secret.name.as_str().parse();
        let hosts = secret.hosts.iter().map(|host| host.parse());
        handed.push(HandedSecret {
            name: name.map_err(|_| format!("no secret can be named {}", secret.name))?,
            value,
            hosts: hosts
                .collect::<Result<_, _>>()
                .map_err(|_| format!("the hosts of secret {} are none", secret.name))?,
        });
    }
    let left = hand_over(run, &handed).map_err(|error| error.to_string())?;
    if let Some(held) = inner.lock().held.get_mut(&run) {
        held.secrets = Some(left);
    }
    Ok(())
}
