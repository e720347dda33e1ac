//! The WebSocket that each runner keeps open. Those of operators are in `exec`.
//!
//! A runner is connected to one replica, its operators to any. What one says to the other goes over NATS without being
//! kept: `<ns>.push.<group>.<runner>` to the runner, `<ns>.exec.<id>` back to the operator.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_types::push::{FromRunner, ToRunner};
use api_types::runner::Offer;
use api_types::{ClaimId, GroupName, ProblemKind, RunnerId};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::SplitStream;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use utoipa::openapi::RefOr;

use super::auth::Runner;
use super::error::{ApiResult, busy, problem};
use super::extract::Params;
use super::limits::place;
use super::outbox::{Outbox, Unsent};
use super::{Problems, described_problem};
use crate::index::Wants;
use crate::service::Service;

const MAX_MESSAGE_BYTES: usize = 512 << 10;
/// The header of an answer's number.
pub(super) const NUMBER: &str = "Vm0-Number";
/// Most bytes of one WebSocket on their way to NATS.
const MAX_UNFLUSHED: usize = 1 << 20;
/// Longest time for them.
const FLUSH: Duration = Duration::from_secs(10);

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
pub(super) struct NoWebSocket;

impl utoipa::IntoResponses for NoWebSocket {
    fn responses() -> std::collections::BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let response = described_problem("The request asks for no WebSocket (version 13)");
        std::collections::BTreeMap::from([("426".to_owned(), RefOr::T(response))])
    }
}

pub(super) type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

pub(super) fn upgrade(upgrade: Upgrade) -> ApiResult<WebSocketUpgrade> {
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
        let (sink, stream) = socket.split();
        let connection = Connection {
            service,
            runner,
            params,
            outbox: Outbox::new(sink),
            waiting: None,
            execs: HashMap::new(),
            unflushed: 0,
        };
        connection.serve(stream, pushes, permit)
    }))
}

struct Connection {
    service: Arc<Service>,
    runner: Runner,
    params: ConnectParams,
    outbox: Outbox,
    waiting: Option<oneshot::Receiver<Offer>>,
    /// Commands of operators that were passed on and have not ended, with how many answers went back.
    execs: HashMap<ClaimId, u64>,
    /// Bytes that went to NATS since they were last waited for.
    unflushed: usize,
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
    async fn serve(
        mut self,
        mut socket: SplitStream<WebSocket>,
        mut pushes: async_nats::Subscriber,
        permit: OwnedSemaphorePermit,
    ) {
        let period = self.service.config.ping;
        let mut pings = tokio::time::interval(period);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                message = socket.next() => match message {
                    Some(Ok(Message::Text(text))) => {
                        heard = Instant::now();
                        if self.hear(&text).await.is_err() {
                            break;
                        }
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => heard = Instant::now(),
                    Some(Ok(Message::Binary(_) | Message::Close(_)) | Err(_)) | None => break,
                },
                push = pushes.next() => {
                    let Some(push) = push else { break };
                    if self.pass_on(push.payload).await.is_err() {
                        break;
                    }
                },
                offer = offered(&mut self.waiting) => {
                    let Some(offer) = offer else { continue };
                    let run = offer.run_id;
                    let text = serde_json::to_string(&ToRunner::Job(offer)).unwrap_or_default();
                    if self.outbox.say(text.into()).is_err() {
                        self.service.index.take_back(run, Instant::now());
                        break;
                    }
                },
                _ = pings.tick() => {
                    let silent = heard.elapsed() > period * 3 || self.outbox.ping().is_err();
                    if silent || !self.runner.stands(&self.service).await {
                        break;
                    }
                    for (exec, answers) in &self.execs {
                        let _ = alive(&self.service, *exec, *answers).await;
                    }
                },
            }
        }
        // Whoever waits for one of them would wait for ever.
        for (exec, answers) in std::mem::take(&mut self.execs) {
            let _ = self
                .answer_end(exec, answers, "the runner's WebSocket has ended")
                .await;
        }
        drop(permit);
    }

    /// A word of another replica, to the runner.
    async fn pass_on(&mut self, payload: Bytes) -> Result<(), ()> {
        let Ok(text) = Utf8Bytes::try_from(payload) else {
            return Ok(());
        };
        let (exec, start, end) = match serde_json::from_str(&text) {
            Ok(ToRunner::ExecStart { exec_id, .. }) => (Some(exec_id), true, false),
            Ok(ToRunner::ExecInput { exec_id, .. } | ToRunner::ExecResize { exec_id, .. }) => {
                (Some(exec_id), false, false)
            }
            Ok(ToRunner::ExecEnd { exec_id }) => (Some(exec_id), false, true),
            Ok(ToRunner::Job(_) | ToRunner::Look(_)) | Err(_) => (None, false, false),
        };
        let exec: Option<ClaimId> = exec.and_then(|id| id.parse().ok());
        // Of one that has ended.
        if exec.is_some_and(|id| !start && !self.execs.contains_key(&id)) {
            return Ok(());
        }
        match (self.outbox.say(text), exec) {
            (Err(Unsent::Gone), _) => Err(()),
            // A hint may get lost, a piece of input may not.
            (Err(Unsent::Full), None) => Ok(()),
            (Err(Unsent::Full), Some(id)) => self.give_up(id).await,
            (Ok(()), Some(id)) if start => {
                self.execs.insert(id, 0);
                // A command may say nothing for long: its operator hears at once that somebody has it.
                alive(&self.service, id, 0).await
            }
            (Ok(()), Some(id)) if end => {
                self.execs.remove(&id);
                Ok(())
            }
            (Ok(()), _) => Ok(()),
        }
    }

    /// Ends a command whose input comes faster than the runner reads.
    async fn give_up(&mut self, exec: ClaimId) -> Result<(), ()> {
        let answers = self.execs.remove(&exec).unwrap_or_default();
        let end = ToRunner::ExecEnd {
            exec_id: exec.to_string(),
        };
        let text = serde_json::to_string(&end).unwrap_or_default();
        self.outbox.say_anyway(text.into()).map_err(|_| ())?;
        let why = "more is said to the runner than it reads: more than 8 MiB wait";
        self.answer_end(exec, answers, why).await
    }

    async fn answer_end(&self, exec: ClaimId, answers: u64, why: &str) -> Result<(), ()> {
        let exit = FromRunner::ExecExit {
            exec_id: exec.to_string(),
            exit_code: None,
            error: Some(why.to_owned()),
        };
        let text = serde_json::to_vec(&exit).unwrap_or_default();
        answer(&self.service, exec, answers.saturating_add(1), text.into()).await
    }

    /// A word of the runner.
    async fn hear(&mut self, text: &str) -> Result<(), ()> {
        let (exec, last) = match serde_json::from_str::<FromRunner>(text) {
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
            Ok(FromRunner::ExecOutput { exec_id, .. }) => (exec_id, false),
            Ok(FromRunner::ExecExit { exec_id, .. }) => (exec_id, true),
            Err(_) => return Err(()),
        };
        // An id becomes part of a subject: only one that was passed on does. Of one that has ended nobody listens.
        let id: ClaimId = exec.parse().map_err(|_| ())?;
        let Some(answers) = self.execs.get_mut(&id) else {
            return Ok(());
        };
        *answers = answers.saturating_add(1);
        let number = *answers;
        if last {
            self.execs.remove(&id);
        }
        answer(
            &self.service,
            id,
            number,
            Bytes::copy_from_slice(text.as_bytes()),
        )
        .await?;
        flushed(&self.service, &mut self.unflushed, text.len()).await
    }
}

/// Waits now and then until what was said has left for NATS: what a fast talker says does not pile up here.
pub(super) async fn flushed(
    service: &Service,
    unflushed: &mut usize,
    bytes: usize,
) -> Result<(), ()> {
    *unflushed = unflushed.saturating_add(bytes);
    if *unflushed < MAX_UNFLUSHED {
        return Ok(());
    }
    *unflushed = 0;
    let flush = service.engine.client().flush();
    match tokio::time::timeout(FLUSH, flush).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(()),
    }
}

/// Says to an operator's replica that the runner has the command still, and how many answers there were.
async fn alive(service: &Service, exec: ClaimId, answers: u64) -> Result<(), ()> {
    answer(service, exec, answers, Bytes::new()).await
}

/// Each answer has its number, so that a lost one is noticed.
async fn answer(service: &Service, exec: ClaimId, number: u64, body: Bytes) -> Result<(), ()> {
    let mut headers = async_nats::HeaderMap::new();
    headers.insert(NUMBER, number.to_string());
    let subject = service.engine.subject(&format!("exec.{exec}"));
    let sent = service
        .engine
        .client()
        .publish_with_headers(subject, headers, body);
    sent.await.map_err(|_| ())
}
