//! WebSockets: one that each runner keeps open, and one for each exec of an operator.
//!
//! A runner is connected to one replica, its operators to any. What one says to the other goes over NATS without being
//! kept: `<ns>.push.<group>.<runner>` to the runner, `<ns>.exec.<id>` back to the operator.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api_types::push::{FromRunner, ToRunner};
use api_types::runner::Offer;
use api_types::{ClaimId, GroupName, ProblemKind, RunId, RunnerId};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use futures_util::StreamExt as _;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use utoipa::openapi::RefOr;

use super::auth::{Client, Runner};
use super::error::{ApiError, ApiResult, busy, problem};
use super::extract::{Params, RunPath};
use super::limits::place;
use super::{Problems, described_problem};
use crate::index::Wants;
use crate::run::State as RunState;
use crate::service::Service;

const MAX_MESSAGE_BYTES: usize = 512 << 10;
const PING: Duration = Duration::from_secs(15);
/// An exec whose runner says nothing at first for so long is given up.
const ANSWER: Duration = Duration::from_secs(10);

/// Who connects.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(rename_all = "camelCase")]
#[into_params(parameter_in = Query)]
pub(super) struct ConnectParams {
    /// Who.
    runner_id: RunnerId,
    /// Of which group.
    group: GroupName,
}

/// The answer to who wants something else than a WebSocket.
struct NoWebSocket;

impl utoipa::IntoResponses for NoWebSocket {
    fn responses() -> std::collections::BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let response = described_problem("The request asks for no WebSocket (version 13)");
        std::collections::BTreeMap::from([("426".to_owned(), RefOr::T(response))])
    }
}

type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

fn upgrade(upgrade: Upgrade) -> ApiResult<WebSocketUpgrade> {
    upgrade
        .map(|upgrade| {
            upgrade
                .max_message_size(MAX_MESSAGE_BYTES)
                .max_frame_size(MAX_MESSAGE_BYTES)
        })
        .map_err(|error| problem(ProblemKind::UpgradeRequired, error.to_string()))
}

/// A runner's WebSocket: text frames, `ToRunner` one way and `FromRunner` the other.
#[utoipa::path(get, path = "/api/runners/connect", tag = "runners", operation_id = "connectRunner",
    params(ConnectParams), responses((status = 101, description = "A WebSocket"), NoWebSocket, Problems),
    security(("runnerToken" = [])))]
pub(super) async fn connect(
    State(service): State<Arc<Service>>,
    runner: Runner,
    Params(params): Params<ConnectParams>,
    socket: Upgrade,
) -> ApiResult<Response> {
    runner.group(&params.group)?;
    let socket = upgrade(socket)?;
    let permit = place(&service.limits.waiters)
        .ok_or_else(|| busy("too many runners wait at this replica", 5))?;
    let subject = service.engine.push_subject(&params.group, params.runner_id);
    let pushes = service
        .engine
        .client()
        .subscribe(subject)
        .await
        .map_err(|error| problem(ProblemKind::Unavailable, error.to_string()))?;
    Ok(socket.on_upgrade(move |socket| {
        let connection = Connection {
            service,
            params,
            socket,
            waiting: None,
        };
        connection.serve(pushes, permit)
    }))
}

struct Connection {
    service: Arc<Service>,
    params: ConnectParams,
    socket: WebSocket,
    waiting: Option<oneshot::Receiver<Offer>>,
}

/// The next offer; never, where none was asked for.
async fn offered(waiting: &mut Option<oneshot::Receiver<Offer>>) -> Option<Offer> {
    match waiting {
        Some(receiver) => {
            let offer = receiver.await.ok();
            *waiting = None;
            offer
        }
        None => std::future::pending().await,
    }
}

impl Connection {
    async fn serve(mut self, mut pushes: async_nats::Subscriber, permit: OwnedSemaphorePermit) {
        let mut pings = tokio::time::interval(PING);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                message = self.socket.recv() => match message {
                    Some(Ok(Message::Text(text))) => {
                        heard = Instant::now();
                        if self.hear(&text).await.is_err() {
                            break;
                        }
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => heard = Instant::now(),
                    Some(Ok(Message::Binary(_) | Message::Close(_)) | Err(_)) | None => break,
                },
                push = pushes.next() => match push {
                    Some(push) => {
                        let Ok(text) = Utf8Bytes::try_from(push.payload) else { continue };
                        if self.socket.send(Message::Text(text)).await.is_err() {
                            break;
                        }
                    }
                    None => break,
                },
                offer = offered(&mut self.waiting) => {
                    let Some(offer) = offer else { continue };
                    let run = offer.run_id;
                    let text = serde_json::to_string(&ToRunner::Job(offer)).unwrap_or_default();
                    if self.socket.send(Message::Text(text.into())).await.is_err() {
                        self.service.index.take_back(run, Instant::now());
                        break;
                    }
                },
                _ = pings.tick() => {
                    let dead = heard.elapsed() > PING * 3;
                    if dead || self.socket.send(Message::Ping(axum::body::Bytes::new())).await.is_err() {
                        break;
                    }
                },
            }
        }
        drop(permit);
    }

    async fn hear(&mut self, text: &str) -> Result<(), ()> {
        let exec = match serde_json::from_str::<FromRunner>(text) {
            Ok(FromRunner::Ready {
                profiles,
                held_sessions,
            }) => {
                let wants = Wants {
                    runner: self.params.runner_id,
                    group: self.params.group.clone(),
                    profiles,
                    held: held_sessions,
                };
                self.waiting = Some(self.service.index.wait(wants, Instant::now()));
                return Ok(());
            }
            Ok(FromRunner::ExecOutput { exec_id, .. } | FromRunner::ExecExit { exec_id, .. }) => {
                exec_id
            }
            Err(_) => return Err(()),
        };
        // An id becomes part of a subject: only one that could be ours does.
        let id: ClaimId = exec.parse().map_err(|_| ())?;
        let subject = self.service.engine.subject(&format!("exec.{id}"));
        let sent = self
            .service
            .engine
            .client()
            .publish(subject, axum::body::Bytes::copy_from_slice(text.as_bytes()))
            .await;
        sent.map_err(|_| ())
    }
}

/// What to run.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ExecParams {
    /// Program and arguments, as a JSON list of strings. JSON's escapes and spaces may be used.
    #[param(
        max_length = 4096,
        pattern = r#"^\["[^"\\\x00-\x1f]*"(,"[^"\\\x00-\x1f]*")*\]$"#
    )]
    argv: String,
    /// Columns of a terminal; none: no terminal.
    columns: Option<u16>,
    /// Rows of a terminal.
    rows: Option<u16>,
}

/// Runs a command in the VM of a run. A WebSocket: the client sends `ExecInput` and `ExecResize` (their `execId` is
/// filled in), and gets `ExecOutput` and last `ExecExit`.
#[utoipa::path(get, path = "/api/runs/{run}/exec", tag = "runs", operation_id = "execInRun",
    params(("run" = RunId, Path, description = "Its id"), ExecParams),
    responses((status = 101, description = "A WebSocket"), NoWebSocket, Problems), security(("apiKey" = [])))]
pub(super) async fn exec(
    State(service): State<Arc<Service>>,
    client: Client,
    RunPath(run): RunPath,
    Params(params): Params<ExecParams>,
    socket: Upgrade,
) -> ApiResult<Response> {
    let (entry, _) = client.run(&service, run).await?;
    let RunState::Running(lease) = &entry.state else {
        return Err(problem(ProblemKind::NotRunning, "the run is not running"));
    };
    let argv: Vec<String> = serde_json::from_str(&params.argv)
        .ok()
        .filter(|argv: &Vec<String>| !argv.is_empty() && !argv.iter().any(|a| a.contains('\0')))
        .ok_or_else(|| {
            problem(
                ProblemKind::Malformed,
                "`argv` is a JSON list of at least one string, without NUL",
            )
        })?;
    let socket = upgrade(socket)?;
    let permit = place(&service.limits.followers)
        .ok_or_else(|| busy("too many followers at this replica", 5))?;
    let exec_id = ClaimId::random().to_string();
    let nats = service.engine.client();
    let answers = nats
        .subscribe(service.engine.subject(&format!("exec.{exec_id}")))
        .await
        .map_err(|error| problem(ProblemKind::Unavailable, error.to_string()))?;
    let relay = Relay {
        to_runner: service
            .engine
            .push_subject(&entry.group, lease.holder.runner_id),
        service: Arc::clone(&service),
        exec_id: exec_id.clone(),
    };
    let start = ToRunner::ExecStart {
        exec_id,
        run_id: run,
        epoch: entry.epoch,
        argv,
        pty: params.columns.zip(params.rows),
    };
    relay.say(&start).await?;
    Ok(socket.on_upgrade(move |socket| async move {
        relay.serve(socket, answers).await;
        drop(permit);
    }))
}

struct Relay {
    service: Arc<Service>,
    to_runner: String,
    exec_id: String,
}

impl Relay {
    async fn say(&self, message: &ToRunner) -> Result<(), ApiError> {
        let body = serde_json::to_vec(message)
            .map_err(|error| problem(ProblemKind::Internal, error.to_string()))?;
        self.service
            .engine
            .client()
            .publish(self.to_runner.clone(), body.into())
            .await
            .map_err(|error| problem(ProblemKind::Unavailable, error.to_string()))
    }

    async fn serve(self, mut socket: WebSocket, mut answers: async_nats::Subscriber) {
        let mut answered = false;
        let patience = tokio::time::sleep(ANSWER);
        tokio::pin!(patience);
        loop {
            tokio::select! {
                answer = answers.next() => {
                    answered = true;
                    let Some(answer) = answer else { break };
                    let last = matches!(
                        serde_json::from_slice(&answer.payload),
                        Ok(FromRunner::ExecExit { .. })
                    );
                    let Ok(text) = Utf8Bytes::try_from(answer.payload) else { continue };
                    if socket.send(Message::Text(text)).await.is_err() {
                        break;
                    }
                    if last {
                        return;
                    }
                },
                message = socket.recv() => match message {
                    Some(Ok(Message::Text(text))) => {
                        if self.forward(&text).await.is_none() {
                            break;
                        }
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(Message::Binary(_) | Message::Close(_)) | Err(_)) | None => break,
                },
                () = &mut patience, if !answered => {
                    let exit = FromRunner::ExecExit {
                        exec_id: self.exec_id.clone(),
                        exit_code: None,
                        error: Some("the runner does not answer; it may not be connected by WebSocket".to_owned()),
                    };
                    let text = serde_json::to_string(&exit).unwrap_or_default();
                    let _ = socket.send(Message::Text(text.into())).await;
                    break;
                },
            }
        }
        let end = ToRunner::ExecEnd {
            exec_id: self.exec_id.clone(),
        };
        let _ = self.say(&end).await;
    }

    async fn forward(&self, text: &str) -> Option<()> {
        let exec_id = self.exec_id.clone();
        let message = match serde_json::from_str(text).ok()? {
            ToRunner::ExecInput { data, .. } => ToRunner::ExecInput { exec_id, data },
            ToRunner::ExecResize { size, .. } => ToRunner::ExecResize { exec_id, size },
            _ => return None,
        };
        self.say(&message).await.ok()
    }
}
