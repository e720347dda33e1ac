//! Claiming a run, and making a job of what the API says about it.

use std::collections::BTreeSet;
use std::sync::Arc;

use api_types::ClaimId;
use api_types::runner::{Claim, ExecutionContext, FirewallAuth, LeaseOf, LeaseRef};
use policy::Draft;
use zeroize::Zeroizing;

use super::{Held, Inner, Pause};
use crate::provider::ProviderEvent;
use crate::queue::{
    ApiSide, ClaimedJob, HandedSecret, Job, JobFields, JobHead, JobNetwork, JobResult, hand_over,
};

/// Claims the run of an offer and tells what came of it.
pub(super) async fn claim(inner: Arc<Inner>, head: JobHead) {
    let run = head.run_id;
    let Some(context) = win(&inner, &head).await else {
        inner.lock().claiming.remove(&run);
        (inner.tell)(ProviderEvent::Lost(run));
        return;
    };
    let lease = LeaseRef {
        run_id: run,
        epoch: context.epoch,
    };
    inner.hold(lease, inner.id, context.policy_revision);
    let job = match job_of(&inner, context, &head) {
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
        give_back(&inner, lease, actual).await;
        (inner.tell)(ProviderEvent::Lost(run));
        return;
    }
    if let Err(reason) = secrets(&inner, lease, &job.job).await {
        let why = format!("the run's secrets cannot be had: {reason}");
        inner.answered(JobResult::failed(run, 1, &why));
        (inner.tell)(ProviderEvent::Lost(run));
        return;
    }
    // Heartbeats renew the lease already, and may have brought its end while the secrets were on their way.
    let mark = |mark: fn(&Held) -> bool| inner.lock().held.get(&run).is_some_and(mark);
    if mark(|held| held.lost) {
        inner.forget(run);
        (inner.tell)(ProviderEvent::Lost(run));
        return;
    }
    (inner.tell)(ProviderEvent::Claimed(Box::new(job)));
    // The daemon cannot cancel what it does not have. Looked at after it was told, so that no cancel falls in between.
    if mark(|held| held.cancelled) {
        (inner.tell)(ProviderEvent::Cancelled(run));
    }
}

/// Sends the claim until it is answered: one that the API has taken and whose answer was lost is the same one.
async fn win(inner: &Inner, head: &JobHead) -> Option<ExecutionContext> {
    let claim = Claim {
        runner_id: inner.id,
        runner_name: Some(inner.runner.name.clone()),
        claim_id: ClaimId::random(),
    };
    let mut pause = Pause::default();
    loop {
        match inner.api.claim(head.run_id, &claim).await {
            Ok(context) if context.run_id == head.run_id => return Some(context),
            Ok(_) => {
                tracing::error!(run = %head.run_id, "the API answered a claim with another run");
                return None;
            }
            Err(error) if error.may_pass() => {
                tracing::warn!(run = %head.run_id, %error, "the claim is not answered; trying again");
                pause.wait(Some(&error)).await;
            }
            Err(error) => {
                tracing::info!(run = %head.run_id, %error, "not claimed");
                return None;
            }
        }
    }
}

fn job_of(inner: &Inner, context: ExecutionContext, head: &JobHead) -> Result<ClaimedJob, String> {
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
        })),
    })
}

async fn give_back(inner: &Inner, lease: LeaseRef, actual: JobHead) {
    let body = LeaseOf {
        runner_id: inner.id,
        epoch: lease.epoch,
    };
    inner.lock().known.insert(lease.run_id, actual);
    let mut pause = Pause::default();
    while let Err(error) = inner.api.release(lease.run_id, &body).await {
        if !error.may_pass() {
            break;
        }
        pause.wait(Some(&error)).await;
    }
    inner.forget(lease.run_id);
}

/// Fetches the values of the job's secrets, and leaves them where the network takes them from: in memory.
async fn secrets(inner: &Inner, lease: LeaseRef, job: &Job) -> Result<(), String> {
    let wanted = job.network.iter().flat_map(|network| &network.secrets);
    if wanted.count() == 0 {
        return Ok(());
    }
    let body = FirewallAuth {
        run_id: lease.run_id,
        runner_id: inner.id,
        epoch: lease.epoch,
    };
    let mut pause = Pause::default();
    let found = loop {
        match inner.api.secrets(&body).await {
            Ok(found) => break found,
            Err(error) if error.may_pass() => pause.wait(Some(&error)).await,
            Err(error) => return Err(error.to_string()),
        }
    };
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
    let left = hand_over(lease.run_id, &handed).map_err(|error| error.to_string())?;
    if let Some(held) = inner.lock().held.get_mut(&lease.run_id) {
        held.secrets = Some(left);
    }
    Ok(())
}
