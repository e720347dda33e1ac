//! Webhooks of the guest agent, and the one of the runner's proxy. Nothing that a guest says decides anything.

use std::sync::Arc;

use api_types::client::Secret;
use api_types::guest::{
    Accepted, AgentComplete, AgentHeartbeat, Alive, Checkpoint, CheckpointAccepted, Events,
    MAX_EVENTS, Telemetry, TelemetryAccepted,
};
use api_types::runner::{FirewallAuth, FirewallSecrets, LeaseRef};
use api_types::{ClaimId, ProblemKind};
use axum::extract::{FromRequest as _, Request, State};
use axum::http::StatusCode;

use super::Problems;
use super::auth::{Guest, Runner, holds};
use super::context::session_key;
use super::error::{ApiResult, busy, problem};
use super::extract::Json;
use super::limits::Seat;
use super::runners::appended;
use crate::engine::{Chunk, EngineError, FeedKind, body_json};
use crate::run::{Advice, Command};
use crate::service::Service;

const MAX_EVENTS_BYTES: usize = 512 << 10;
const MAX_TEXT_BYTES: usize = 256 << 10;
const MAX_HISTORY_BYTES: usize = 32 << 20;

/// The agent is alive, and reaches the API.
#[utoipa::path(post, path = "/api/webhooks/agent/heartbeat", tag = "webhooks", operation_id = "agentHeartbeat",
    request_body = AgentHeartbeat, responses((status = 200, description = "So is the run", body = Alive), Problems),
    security(("sandboxToken" = [])))]
pub(super) async fn heartbeat(
    State(service): State<Arc<Service>>,
    guest: Guest,
    Json(body): Json<AgentHeartbeat>,
) -> ApiResult<axum::Json<Alive>> {
    let (_, lease) = guest.lease(&service, body.run_id).await?;
    Ok(axum::Json(Alive {
        cancel_requested: lease.cancel_requested,
    }))
}

fn items(
    values: &[serde_json::Map<String, serde_json::Value>],
) -> ApiResult<Vec<Box<serde_json::value::RawValue>>> {
    let items = values
        .iter()
        .map(body_json)
        .collect::<Result<Vec<_>, EngineError>>()?;
    let bytes: usize = items.iter().map(|item| item.get().len()).sum();
    if items.len() > MAX_EVENTS || bytes > MAX_EVENTS_BYTES {
        return Err(problem(
            ProblemKind::Invalid,
            "at most 1000 items and 512 KiB at once",
        ));
    }
    Ok(items)
}

/// Events of the agent CLI. Those that are there already are left out; a gap is refused with the number that is wanted.
#[utoipa::path(post, path = "/api/webhooks/agent/events", tag = "webhooks", operation_id = "agentEvents",
    request_body = Events, responses((status = 200, description = "They are there", body = Accepted), Problems),
    security(("sandboxToken" = [])))]
pub(super) async fn events(
    State(service): State<Arc<Service>>,
    guest: Guest,
    Json(body): Json<Events>,
) -> ApiResult<axum::Json<Accepted>> {
    guest.lease(&service, body.run_id).await?;
    let number = |event: &serde_json::Map<String, serde_json::Value>| {
        event
            .get("sequenceNumber")
            .and_then(serde_json::Value::as_u64)
    };
    let start = body
        .events
        .first()
        .map_or(Some(0), number)
        .ok_or_else(unnumbered)?;
    for (event, behind) in body.events.iter().zip(0_u64..) {
        // The first is not to wrap around when the numbers end.
        let expected = start.checked_add(behind).ok_or_else(unnumbered)?;
        if number(event) != Some(expected) {
            return Err(unnumbered());
        }
    }
    let chunk = Chunk::Items(items(&body.events)?);
    let outcome = service
        .engine
        .append(FeedKind::Events, guest.run, guest.epoch, start, &chunk)
        .await?;
    Ok(axum::Json(Accepted {
        next: appended(outcome)?,
    }))
}

fn unnumbered() -> super::error::ApiError {
    problem(
        ProblemKind::Invalid,
        "each event has a `sequenceNumber`, one more than that of the event before it",
    )
}

/// The agent's log and measurements, each from its own position on.
#[utoipa::path(post, path = "/api/webhooks/agent/telemetry", tag = "webhooks", operation_id = "agentTelemetry",
    request_body = Telemetry,
    responses((status = 200, description = "They are there", body = TelemetryAccepted), Problems),
    security(("sandboxToken" = [])))]
pub(super) async fn telemetry(
    State(service): State<Arc<Service>>,
    guest: Guest,
    Json(body): Json<Telemetry>,
) -> ApiResult<axum::Json<TelemetryAccepted>> {
    guest.lease(&service, body.run_id).await?;
    if body.system_log.len() > MAX_TEXT_BYTES {
        return Err(problem(
            ProblemKind::Invalid,
            "`systemLog` has at most 256 KiB",
        ));
    }
    let metrics = Chunk::Items(items(&body.metrics)?);
    let log = Chunk::Text(body.system_log);
    let engine = &service.engine;
    let (run, epoch) = (guest.run, guest.epoch);
    let (system, metrics) = tokio::join!(
        engine.append(FeedKind::System, run, epoch, body.system_log_start, &log),
        engine.append(FeedKind::Metrics, run, epoch, body.metrics_start, &metrics),
    );
    Ok(axum::Json(TelemetryAccepted {
        system_log_next: appended(system?)?,
        metrics_next: appended(metrics?)?,
    }))
}

/// The CLI's session, from which a later run of the session goes on.
#[utoipa::path(post, path = "/api/webhooks/agent/checkpoints", tag = "webhooks", operation_id = "agentCheckpoint",
    request_body = Checkpoint,
    responses((status = 200, description = "It is kept", body = CheckpointAccepted), Problems),
    security(("sandboxToken" = [])))]
pub(super) async fn checkpoints(
    State(service): State<Arc<Service>>,
    guest: Guest,
    request: Request,
) -> ApiResult<axum::Json<CheckpointAccepted>> {
    // One at a time, and only while the token is good: there may be much of the body.
    let place = service.limits.checkpoint(&guest.run.to_string());
    let place = place.ok_or_else(|| busy("another checkpoint of the run is under way", 1))?;
    guest.lease(&service, guest.run).await?;
    let seat = request.extensions().get::<Arc<Seat>>().cloned();
    let Json(body) = Json::<Checkpoint>::from_request(request, &service).await?;
    let (entry, _) = guest.lease(&service, body.run_id).await?;
    if body.cli_agent_session_history.len() > MAX_HISTORY_BYTES {
        return Err(problem(
            ProblemKind::Invalid,
            "a history has at most 32 MiB",
        ));
    }
    // Runs that belong to no session are resumed by nobody: theirs would be kept for nothing.
    if let Some(session) = &entry.session {
        let key = session_key(&entry, session);
        // Goes on when the sender is gone: half a history would be kept for nobody.
        let kept = tokio::spawn(async move {
            let cli_session = body.cli_agent_session_id.to_string();
            let history = body.cli_agent_session_history.as_bytes();
            let kept = service.engine.keep_checkpoint(&key, cli_session, history);
            let kept = kept.await;
            drop((seat, place, guest));
            kept
        });
        kept.await
            .map_err(|error| problem(ProblemKind::Internal, error.to_string()))??;
    }
    Ok(axum::Json(CheckpointAccepted {
        checkpoint_id: ClaimId::random().to_string(),
    }))
}

/// The agent believes to be done. Only noted: the runner completes the run.
#[utoipa::path(post, path = "/api/webhooks/agent/complete", tag = "webhooks", operation_id = "agentComplete",
    request_body = AgentComplete, responses((status = 204, description = "Noted"), Problems),
    security(("sandboxToken" = [])))]
pub(super) async fn complete(
    State(service): State<Arc<Service>>,
    guest: Guest,
    Json(body): Json<AgentComplete>,
) -> ApiResult<StatusCode> {
    guest.lease(&service, body.run_id).await?;
    let command = |_| {
        Command::Advise(Advice {
            epoch: guest.epoch,
            exit_code: body.exit_code,
            error: body.error.clone(),
        })
    };
    let applied = service
        .engine
        .apply(guest.run, None, service.clock.now(), command)
        .await?;
    service.note(&applied);
    Ok(StatusCode::NO_CONTENT)
}

/// The run's secrets, for the runner's proxy. Takes the runner's token and its claim's epoch; no guest's token opens it.
#[utoipa::path(post, path = "/api/webhooks/agent/firewall/auth", tag = "runners", operation_id = "firewallAuth",
    request_body = FirewallAuth,
    responses((status = 200, description = "They", body = FirewallSecrets), Problems),
    security(("runnerToken" = [])))]
pub(super) async fn firewall_auth(
    State(service): State<Arc<Service>>,
    runner: Runner,
    Json(body): Json<FirewallAuth>,
) -> ApiResult<axum::Json<FirewallSecrets>> {
    let (entry, _) = runner.run(&service, body.run_id).await?;
    let lease = LeaseRef {
        run_id: body.run_id,
        epoch: body.epoch,
    };
    holds(&entry, body.runner_id, lease)?;
    let spec = service.engine.spec(&entry).await?;
    let secrets: Vec<Secret> = match &spec.sealed {
        None => Vec::new(),
        Some(sealed) => {
            let plain = service
                .keyring
                .open_sealed(&entry.run.to_string(), sealed)
                .await?;
            serde_json::from_slice(&plain)
                // The parser's text could repeat a value.
                .map_err(|_| EngineError::Corrupt("secrets cannot be read".to_owned()))?
        }
    };
    Ok(axum::Json(FirewallSecrets { secrets }))
}
