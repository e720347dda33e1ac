//! Commands that operators run in the VMs of runs: a WebSocket for each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api_types::push::{FromRunner, ToRunner};
use api_types::{ClaimId, Epoch, ProblemKind, RunId};
use axum::extract::State;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket};
use axum::response::Response;
use futures_util::StreamExt as _;
use futures_util::stream::SplitStream;
use serde::Deserialize;

use super::Problems;
use super::auth::Client;
use super::error::{ApiError, ApiResult, busy, problem};
use super::extract::{Params, RunPath};
use super::limits::place;
use super::outbox::{Outbox, Unsent};
use super::push::{NUMBER, NoWebSocket, Upgrade, flushed, upgrade};
use crate::run::{Entry, State as RunState};
use crate::service::Service;

/// An exec that no runner's connection takes for so long is given up.
const ANSWER: Duration = Duration::from_secs(10);
const LOST: &str = "some of what the command said was lost on its way";
const SLOW: &str = "the command says more than is read: more than 8 MiB wait";

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
    let by = Some(client.id().to_owned());
    let mut relay = Relay {
        client,
        to_runner: service
            .engine
            .push_subject(&entry.group, lease.holder.runner_id),
        service: Arc::clone(&service),
        run,
        epoch: entry.epoch,
        exec_id: exec_id.clone(),
        answers: 0,
        unflushed: 0,
    };
    let start = ToRunner::ExecStart {
        exec_id,
        run_id: run,
        epoch: entry.epoch,
        argv,
        by,
        pty: params.columns.zip(params.rows),
    };
    relay.say(&start).await?;
    Ok(socket.on_upgrade(move |socket| async move {
        relay.serve(socket, answers).await;
        drop(permit);
    }))
}

/// How it ended.
enum End {
    /// The command did, and its exit is on its way to the operator.
    Exited,
    /// The operator left.
    Left,
    /// It cannot go on, for a reason that the operator is told.
    Failed(&'static str),
}

struct Relay {
    service: Arc<Service>,
    client: Client,
    to_runner: String,
    run: RunId,
    epoch: Epoch,
    exec_id: String,
    /// How many came.
    answers: u64,
    unflushed: usize,
}

impl Relay {
    async fn say(&mut self, message: &ToRunner) -> Result<(), ApiError> {
        let body = serde_json::to_vec(message)
            .map_err(|error| problem(ProblemKind::Internal, error.to_string()))?;
        let bytes = body.len();
        self.service
            .engine
            .client()
            .publish(self.to_runner.clone(), body.into())
            .await
            .map_err(|error| problem(ProblemKind::Unavailable, error.to_string()))?;
        flushed(&self.service, &mut self.unflushed, bytes)
            .await
            .map_err(|()| problem(ProblemKind::Unavailable, "NATS does not answer"))
    }

    async fn serve(mut self, socket: WebSocket, answers: async_nats::Subscriber) {
        let (sink, mut stream) = socket.split();
        let outbox = Outbox::new(sink);
        let end = self.relay(&outbox, &mut stream, answers).await;
        if !matches!(end, End::Exited) {
            let end = ToRunner::ExecEnd {
                exec_id: self.exec_id.clone(),
            };
            let _ = self.say(&end).await;
        }
        match end {
            End::Left => {}
            End::Exited => outbox.close(None, &mut stream).await,
            End::Failed(why) => {
                let exit = FromRunner::ExecExit {
                    exec_id: self.exec_id,
                    exit_code: None,
                    error: Some(why.to_owned()),
                };
                let text = serde_json::to_string(&exit).unwrap_or_default();
                outbox.close(Some(text.into()), &mut stream).await;
            }
        }
    }

    async fn relay(
        &mut self,
        outbox: &Outbox,
        socket: &mut SplitStream<WebSocket>,
        mut answers: async_nats::Subscriber,
    ) -> End {
        let period = self.service.config.ping;
        let mut pings = tokio::time::interval(period);
        let mut heard = Instant::now();
        let mut answered: Option<Instant> = None;
        let patience = tokio::time::sleep(ANSWER);
        tokio::pin!(patience);
        loop {
            tokio::select! {
                answer = answers.next() => {
                    answered = Some(Instant::now());
                    let Some(answer) = answer else { return End::Failed(LOST) };
                    if let Some(end) = self.answer(outbox, answer) {
                        return end;
                    }
                },
                message = socket.next() => match message {
                    Some(Ok(Message::Text(text))) => {
                        heard = Instant::now();
                        if self.forward(&text).await.is_none() {
                            return End::Left;
                        }
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => heard = Instant::now(),
                    Some(Ok(Message::Binary(_) | Message::Close(_)) | Err(_)) | None => return End::Left,
                },
                () = &mut patience, if answered.is_none() => {
                    return End::Failed("the runner does not answer; it may not be connected by WebSocket");
                },
                _ = pings.tick() => {
                    if heard.elapsed() > period * 3 {
                        return End::Left;
                    }
                    if answered.is_some_and(|at| at.elapsed() > period * 3) {
                        return End::Failed("nothing is heard of the runner's WebSocket any more");
                    }
                    if !self.client.stands(&self.service).await {
                        return End::Failed("the API key was revoked");
                    }
                    if !self.is_running().await {
                        return End::Failed("the run has ended, or its runner has lost it");
                    }
                    match outbox.ping() {
                        Ok(()) => {}
                        Err(Unsent::Full) => return End::Failed(SLOW),
                        Err(Unsent::Gone) => return End::Left,
                    }
                },
            }
        }
    }

    /// Passes an answer on to the operator. One without a body says only that the runner is there.
    fn answer(&mut self, outbox: &Outbox, answer: async_nats::Message) -> Option<End> {
        let empty = answer.payload.is_empty();
        if !empty {
            self.answers = self.answers.saturating_add(1);
        }
        let number = answer.headers.as_ref().and_then(|h| h.get(NUMBER));
        if number.is_some_and(|number| number.as_str().parse() != Ok(self.answers)) {
            return Some(End::Failed(LOST));
        }
        if empty {
            return None;
        }
        let last = matches!(
            serde_json::from_slice(&answer.payload),
            Ok(FromRunner::ExecExit { .. })
        );
        let text = Utf8Bytes::try_from(answer.payload).ok()?;
        match outbox.say(text) {
            Ok(()) => last.then_some(End::Exited),
            Err(Unsent::Full) => Some(End::Failed(SLOW)),
            Err(Unsent::Gone) => Some(End::Left),
        }
    }

    /// Whether the run still has the claim that it had. What this replica knows may be old: its "no" is asked for again.
    async fn is_running(&self) -> bool {
        let has = |entry: &Entry| {
            entry.epoch == self.epoch && matches!(entry.state, RunState::Running(_))
        };
        if self
            .service
            .index
            .hint(self.run)
            .is_some_and(|(entry, _)| has(&entry))
        {
            return true;
        }
        match self.service.engine.run(self.run).await {
            Ok(Some((entry, _))) => has(&entry),
            Ok(None) => false,
            Err(_) => true,
        }
    }

    async fn forward(&mut self, text: &str) -> Option<()> {
        let exec_id = self.exec_id.clone();
        let message = match serde_json::from_str(text).ok()? {
            ToRunner::ExecInput { data, .. } => ToRunner::ExecInput { exec_id, data },
            ToRunner::ExecResize { size, .. } => ToRunner::ExecResize { exec_id, size },
            _ => return None,
        };
        self.say(&message).await.ok()
    }
}
