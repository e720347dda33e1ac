//! For runners.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api_types::client::{Holder, Run};
use api_types::runner::{
    Claim, Complete, ExecutionContext, Fleet, Heartbeat, HeartbeatAnswer, Inputs, LeaseAnswer,
    LeaseOf, LeaseRef, LeaseVerdict, MAX_WAIT_SECS, NumberedInput, Poll, Polled, RunPolicy,
    RunnerInfo, Upload, UploadKind, Uploaded,
};
use api_types::{ProblemKind, RunId, RunnerId};
use axum::extract::State;
use axum::http::StatusCode;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use serde::Deserialize;

use super::Problems;
use super::auth::{Client, Runner, holds};
use super::context::{context, newer_policy};
use super::error::{ApiError, ApiResult, busy, problem};
use super::extract::{Json, Params, RunPath};
use super::limits::place;
use crate::engine::{Appended, ApplyError, Chunk, EngineError, FeedKind, dotted};
use crate::index::Wants;
use crate::run::{Command, Entry, State as RunState};
use crate::service::Service;

const MAX_LIST: usize = 1024;
const MAX_UPLOAD_BYTES: usize = 256 << 10;
/// After a run's end its runner may still bring what is left of its logs, for so long.
const AFTERWARDS_MILLIS: u64 = 10 * 60 * 1000;

/// The runners of the API key's groups, and what waits for them.
#[utoipa::path(get, path = "/api/runners", tag = "fleet", operation_id = "listRunners",
    responses((status = 200, description = "The fleet", body = Fleet), Problems), security(("apiKey" = [])))]
pub(super) async fn fleet(
    State(service): State<Arc<Service>>,
    client: Client,
) -> axum::Json<Fleet> {
    let mut queued = service.index.depths();
    queued.retain(|depth| client.groups().contains(&depth.group));
    axum::Json(Fleet {
        runners: service.fleet.of(client.groups()),
        queued,
    })
}

/// Offers a run to claim, and waits for one. Changes nothing: it may be dropped and sent again at any time.
#[utoipa::path(post, path = "/api/runners/poll", tag = "runners", operation_id = "pollJob", request_body = Poll,
    responses((status = 200, description = "A run, or none in this time", body = Polled), Problems),
    security(("runnerToken" = [])))]
pub(super) async fn poll(
    State(service): State<Arc<Service>>,
    runner: Runner,
    Json(body): Json<Poll>,
) -> ApiResult<axum::Json<Polled>> {
    runner.group(&body.group)?;
    if body.profiles.len() > MAX_LIST || body.held_sessions.len() > MAX_LIST {
        return Err(problem(
            ProblemKind::Invalid,
            "more than 1024 profiles or sessions",
        ));
    }
    if body.wait_secs > MAX_WAIT_SECS {
        return Err(problem(ProblemKind::Invalid, "`waitSecs` is at most 60"));
    }
    let wants = Wants {
        runner: body.runner_id,
        group: body.group,
        profiles: body.profiles,
        held: body.held_sessions,
    };
    if body.wait_secs == 0 {
        let job = service.index.offer(&wants, Instant::now());
        return Ok(axum::Json(Polled { job }));
    }
    let _place = place(&service.limits.waiters)
        .ok_or_else(|| busy("too many runners wait at this replica", 5))?;
    let wait = Duration::from_secs(body.wait_secs).min(service.config.max_wait);
    let mut offer = service.index.wait(wants, Instant::now());
    let job = match tokio::time::timeout(wait, &mut offer).await {
        Ok(offer) => offer.ok(),
        Err(_) => {
            offer.close();
            offer.try_recv().ok()
        }
    };
    Ok(axum::Json(Polled { job }))
}

/// Takes a run. 409: another runner was faster, or the run is over; nothing is wrong then, poll again.
#[utoipa::path(post, path = "/api/runners/jobs/{run}/claim", tag = "runners", operation_id = "claimJob",
    params(("run" = RunId, Path, description = "Its id")), request_body = Claim,
    responses((status = 200, description = "It is yours; renew the lease", body = ExecutionContext), Problems),
    security(("runnerToken" = [])))]
pub(super) async fn claim(
    State(service): State<Arc<Service>>,
    runner: Runner,
    RunPath(run): RunPath,
    Json(body): Json<Claim>,
) -> ApiResult<axum::Json<ExecutionContext>> {
    let hint = runner.hint(&service, run).await?;
    let now = service.clock.now();
    let holder = Holder {
        runner_id: body.runner_id,
        runner_name: body.runner_name,
        claimed_at: now,
    };
    let applied = service
        .engine
        .apply(run, hint, now, |revision| Command::Claim {
            holder: holder.clone(),
            claim: body.claim_id,
            revision,
        })
        .await;
    if let Err(ApplyError::Refused(_) | ApplyError::Unknown) = applied {
        // Or it would be offered again and again.
        service.look_again(run).await;
    }
    let applied = applied?;
    service.note(&applied);
    context(&service, &applied.entry, now).await.map(axum::Json)
}

async fn renewed(
    service: &Service,
    owner: &Runner,
    runner: RunnerId,
    lease: LeaseRef,
) -> ApiResult<LeaseAnswer> {
    let hint = owner.hint(service, lease.run_id).await?;
    let command = |_| Command::Renew {
        runner,
        epoch: lease.epoch,
    };
    let applied = service
        .engine
        .apply(lease.run_id, hint, service.clock.now(), command)
        .await?;
    service.note(&applied);
    let view = applied.entry.view();
    Ok(LeaseAnswer {
        run_id: lease.run_id,
        epoch: lease.epoch,
        verdict: LeaseVerdict::Renewed,
        cancel_requested: view.cancel_requested,
        policy_revision: applied.entry.policy_revision,
        inputs: applied.entry.inputs,
    })
}

/// Says that the runner is alive and what it is up to, and renews its leases. Every 10 seconds.
#[utoipa::path(post, path = "/api/runners/heartbeat", tag = "runners", operation_id = "runnerHeartbeat",
    request_body = Heartbeat,
    responses((status = 200, description = "What became of each lease", body = HeartbeatAnswer), Problems),
    security(("runnerToken" = [])))]
pub(super) async fn heartbeat(
    State(service): State<Arc<Service>>,
    runner: Runner,
    Json(body): Json<Heartbeat>,
) -> ApiResult<axum::Json<HeartbeatAnswer>> {
    runner.group(&body.group)?;
    if body.leases.len() > MAX_LIST
        || body.held_sessions.len() > MAX_LIST
        || body.profiles.len() > MAX_LIST
        || body.version.as_ref().is_some_and(|v| v.len() > 200)
    {
        return Err(problem(
            ProblemKind::Invalid,
            "more than 1024 leases, sessions or profiles, or a version longer than 200 bytes",
        ));
    }
    let id = body.runner_id;
    // Several at once, in their order.
    let leases: Vec<LeaseAnswer> = stream::iter(body.leases.clone())
        .map(|lease| {
            let (service, runner) = (&service, &runner);
            async move {
                let lost = |verdict| LeaseAnswer {
                    run_id: lease.run_id,
                    epoch: lease.epoch,
                    verdict,
                    cancel_requested: false,
                    policy_revision: 0,
                    inputs: 0,
                };
                match renewed(service, runner, id, lease).await {
                    Ok(answer) => answer,
                    Err(ApiError(problem)) => match problem.code {
                        ProblemKind::LeaseLost | ProblemKind::NotFound => lost(LeaseVerdict::Lost),
                        _ => lost(LeaseVerdict::Unknown),
                    },
                }
            }
        })
        .buffered(16)
        .collect()
        .await;
    let info = RunnerInfo {
        heartbeat: Heartbeat {
            leases: Vec::new(),
            ..body
        },
        seen_at: service.clock.now(),
    };
    let value = serde_json::to_vec(&info).map_err(|e| EngineError::Corrupt(e.to_string()))?;
    service
        .engine
        .fleet
        .put(
            &format!("runner.{}.{id}", dotted(&info.heartbeat.group)),
            Bytes::from(value),
        )
        .await?;
    service.note_runner(info);
    Ok(axum::Json(HeartbeatAnswer {
        leases,
        lease_secs: service.config.lease.as_secs(),
    }))
}

/// Renews one lease. 409: it is lost; stop the run and drop its result.
#[utoipa::path(post, path = "/api/runners/jobs/{run}/renew", tag = "runners", operation_id = "renewLease",
    params(("run" = RunId, Path, description = "Its id")), request_body = LeaseOf,
    responses((status = 200, description = "It lasts on", body = LeaseAnswer), Problems),
    security(("runnerToken" = [])))]
pub(super) async fn renew(
    State(service): State<Arc<Service>>,
    runner: Runner,
    RunPath(run): RunPath,
    Json(body): Json<LeaseOf>,
) -> ApiResult<axum::Json<LeaseAnswer>> {
    let lease = LeaseRef {
        run_id: run,
        epoch: body.epoch,
    };
    renewed(&service, &runner, body.runner_id, lease)
        .await
        .map(axum::Json)
}

/// Gives a run back that was not started: it waits again, in its old place.
#[utoipa::path(post, path = "/api/runners/jobs/{run}/release", tag = "runners", operation_id = "releaseJob",
    params(("run" = RunId, Path, description = "Its id")), request_body = LeaseOf,
    responses((status = 204, description = "It is no longer yours"), Problems), security(("runnerToken" = [])))]
pub(super) async fn release(
    State(service): State<Arc<Service>>,
    runner: Runner,
    RunPath(run): RunPath,
    Json(body): Json<LeaseOf>,
) -> ApiResult<StatusCode> {
    let hint = runner.hint(&service, run).await?;
    let command = |_| Command::Release {
        runner: body.runner_id,
        epoch: body.epoch,
    };
    let applied = service
        .engine
        .apply(run, hint, service.clock.now(), command)
        .await?;
    service.note(&applied);
    Ok(StatusCode::NO_CONTENT)
}

/// Answers a run. Sent again by the same claim it gets the same answer; by one that lost its lease it is refused.
#[utoipa::path(post, path = "/api/runners/jobs/{run}/complete", tag = "runners", operation_id = "completeJob",
    params(("run" = RunId, Path, description = "Its id")), request_body = Complete,
    responses((status = 200, description = "The run is done", body = Run), Problems),
    security(("runnerToken" = [])))]
pub(super) async fn complete(
    State(service): State<Arc<Service>>,
    runner: Runner,
    RunPath(run): RunPath,
    Json(body): Json<Complete>,
) -> ApiResult<axum::Json<Run>> {
    let hint = runner.hint(&service, run).await?;
    let command = |_| Command::Complete {
        runner: body.runner_id,
        epoch: body.epoch,
        exit_code: body.exit_code,
        error: body.error.clone(),
    };
    let applied = service
        .engine
        .apply(run, hint, service.clock.now(), command)
        .await?;
    service.note(&applied);
    Ok(axum::Json(applied.entry.view()))
}

/// Something before it is missing; this is wanted next.
pub(super) fn gap(next: u64, why: String) -> ApiError {
    let mut error = problem(ProblemKind::Gap, why);
    error.0.next = Some(next);
    error
}

/// What came of appending to a feed, as an answer.
pub(super) fn appended(outcome: Appended) -> ApiResult<u64> {
    match outcome {
        Appended::Next(next) => Ok(next),
        Appended::Gap(next) => Err(gap(next, format!("the next piece has to begin at {next}"))),
        Appended::Fenced => Err(crate::run::Refusal::LeaseLost.into()),
        Appended::Full => Err(problem(
            ProblemKind::TooLarge,
            "the run has said more of this than is kept (256 MiB); the rest is dropped",
        )),
    }
}

/// Brings a piece of a log, while the run runs or shortly after its end.
#[utoipa::path(post, path = "/api/runners/jobs/{run}/logs", tag = "runners", operation_id = "uploadLog",
    params(("run" = RunId, Path, description = "Its id")), request_body = Upload,
    responses((status = 200, description = "It is there", body = Uploaded), Problems),
    security(("runnerToken" = [])))]
pub(super) async fn upload(
    State(service): State<Arc<Service>>,
    runner: Runner,
    RunPath(run): RunPath,
    Json(body): Json<Upload>,
) -> ApiResult<axum::Json<Uploaded>> {
    if body.text.len() > MAX_UPLOAD_BYTES {
        return Err(problem(ProblemKind::Invalid, "`text` has at most 256 KiB"));
    }
    let (entry, _) = runner.run(&service, run).await?;
    let lease = LeaseRef {
        run_id: run,
        epoch: body.epoch,
    };
    match &entry.state {
        RunState::Done {
            result,
            by: Some(by),
        } if *by == (body.runner_id, body.epoch)
            && service.clock.now().saturating_sub(result.at) < AFTERWARDS_MILLIS => {}
        _ => holds(&entry, body.runner_id, lease)?,
    }
    let kind = match body.kind {
        UploadKind::Output => FeedKind::Output,
        UploadKind::Network => FeedKind::Network,
    };
    let outcome = service
        .engine
        .append(kind, run, body.epoch, body.start, &Chunk::Text(body.text))
        .await?;
    Ok(axum::Json(Uploaded {
        next: appended(outcome)?,
    }))
}

/// Who asks about which claim.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(rename_all = "camelCase")]
#[into_params(parameter_in = Query)]
pub(super) struct LeaseParams {
    /// Who asks.
    runner_id: RunnerId,
    /// Of which claim.
    epoch: u64,
    /// For inputs: only those with larger numbers.
    #[serde(default)]
    after: u64,
    /// For inputs: the `cursor` of the last answer.
    #[serde(default)]
    cursor: u64,
}

async fn leased(
    service: &Service,
    runner: &Runner,
    run: RunId,
    params: &LeaseParams,
) -> ApiResult<Entry> {
    let (entry, _) = runner.run(service, run).await?;
    let lease = LeaseRef {
        run_id: run,
        epoch: params.epoch,
    };
    holds(&entry, params.runner_id, lease)?;
    Ok(entry)
}

/// The run's own policy as it is now.
#[utoipa::path(get, path = "/api/runners/jobs/{run}/policy", tag = "runners", operation_id = "getJobPolicy",
    params(("run" = RunId, Path, description = "Its id"), LeaseParams),
    responses((status = 200, description = "It", body = RunPolicy), Problems), security(("runnerToken" = [])))]
pub(super) async fn policy(
    State(service): State<Arc<Service>>,
    runner: Runner,
    RunPath(run): RunPath,
    Params(params): Params<LeaseParams>,
) -> ApiResult<axum::Json<RunPolicy>> {
    let entry = leased(&service, &runner, run, &params).await?;
    let policy = match newer_policy(&service, &entry).await? {
        Some(policy) => Some(policy),
        None => service.engine.spec(&entry).await?.policy,
    };
    Ok(axum::Json(RunPolicy {
        policy,
        policy_revision: entry.policy_revision,
    }))
}

/// Inputs for the agent after a number, at most 100 at once.
#[utoipa::path(get, path = "/api/runners/jobs/{run}/inputs", tag = "runners", operation_id = "getJobInputs",
    params(("run" = RunId, Path, description = "Its id"), LeaseParams),
    responses((status = 200, description = "They", body = Inputs), Problems), security(("runnerToken" = [])))]
pub(super) async fn inputs(
    State(service): State<Arc<Service>>,
    runner: Runner,
    RunPath(run): RunPath,
    Params(params): Params<LeaseParams>,
) -> ApiResult<axum::Json<Inputs>> {
    leased(&service, &runner, run, &params).await?;
    let (mut inputs, mut from) = (Vec::new(), params.cursor);
    while let Some(piece) = service.engine.piece(FeedKind::Input, run, from).await? {
        from = piece.sequence.saturating_add(1);
        let sequence = piece.start.saturating_add(1);
        let texts: Vec<String> = serde_json::from_slice(&piece.body)
            .map_err(|error| EngineError::Corrupt(error.to_string()))?;
        if sequence > params.after {
            inputs.extend(
                texts
                    .into_iter()
                    .map(|text| NumberedInput { sequence, text }),
            );
        }
        if inputs.len() >= 100 {
            break;
        }
    }
    Ok(axum::Json(Inputs {
        inputs,
        cursor: from,
    }))
}
