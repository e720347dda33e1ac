//! What runs say, for clients: as it comes, by server-sent events, or all that there is.
//!
//! The id of a server-sent event is its place in the stream, for events of the agent with the number within its piece:
//! who comes back with `Last-Event-ID`, at whatever replica, goes on behind it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_types::{ProblemKind, RunId};
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::Problems;
use super::auth::Client;
use super::error::{ApiResult, busy, problem};
use super::extract::{Params, RunPath};
use super::limits::place;
use crate::engine::{EngineError, FeedKind, Position};
use crate::follow::{Follower, Wake};
use crate::service::Service;

/// A quiet follower asks so often whether the run is done, in case nobody told it.
const ASK_AGAIN: Duration = Duration::from_secs(15);

/// After which event to go on.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    sequence: u64,
    /// Items of that piece that were seen.
    seen: usize,
}

fn last_event_id(headers: &HeaderMap) -> ApiResult<Place> {
    let Some(value) = headers.get("last-event-id") else {
        return Ok(Place::default());
    };
    let parse = |text: &str| -> Option<Place> {
        match text.split_once('-') {
            Some((sequence, item)) => Some(Place {
                sequence: sequence.parse().ok()?,
                seen: item.parse::<usize>().ok()?.checked_add(1)?,
            }),
            None => Some(Place {
                sequence: text.parse::<u64>().ok()?.checked_add(1)?,
                seen: 0,
            }),
        }
    };
    value.to_str().ok().and_then(parse).ok_or_else(|| {
        problem(
            ProblemKind::Malformed,
            "the Last-Event-ID is not one that this feed gave",
        )
    })
}

type Sender = mpsc::Sender<Result<Event, Infallible>>;

/// Nobody listens any more.
struct Gone;

/// One client that follows one feed.
struct Stream {
    service: Arc<Service>,
    client: Client,
    kind: FeedKind,
    run: RunId,
    place: Place,
    sender: Sender,
}

impl Stream {
    async fn send(&self, event: Event) -> Result<(), Gone> {
        self.sender.send(Ok(event)).await.map_err(|_| Gone)
    }

    async fn emit(&mut self, piece: &Position) -> Result<(), Gone> {
        if piece.sequence < self.place.sequence {
            return Ok(());
        }
        let seen = if piece.sequence == self.place.sequence {
            self.place.seen
        } else {
            0
        };
        if self.kind == FeedKind::Events {
            let items: Vec<&serde_json::value::RawValue> =
                serde_json::from_slice(&piece.body).unwrap_or_default();
            for (number, item) in items.iter().enumerate().skip(seen) {
                let data = format!("{{\"epoch\":{},\"event\":{}}}", piece.epoch, item.get());
                let event = Event::default()
                    .id(format!("{}-{number}", piece.sequence))
                    .event("agent")
                    .data(data);
                self.send(event).await?;
            }
        } else {
            let text = String::from_utf8_lossy(&piece.body);
            let data =
                serde_json::json!({"epoch": piece.epoch, "start": piece.start, "text": text});
            let event = Event::default()
                .id(piece.sequence.to_string())
                .event("output")
                .data(data.to_string());
            self.send(event).await?;
        }
        self.place = Place {
            sequence: piece.sequence.saturating_add(1),
            seen: 0,
        };
        Ok(())
    }

    /// All that is there.
    async fn catch_up(&mut self) -> Result<Result<(), EngineError>, Gone> {
        loop {
            let found = self
                .service
                .engine
                .piece(self.kind, self.run, self.place.sequence)
                .await;
            match found {
                Ok(Some(piece)) => self.emit(&piece).await?,
                Ok(None) => return Ok(Ok(())),
                Err(error) => return Ok(Err(error)),
            }
        }
    }

    /// Tells the end, if it is one.
    async fn end(&mut self) -> Result<bool, Gone> {
        let Ok(found) = self.service.engine.run(self.run).await else {
            return Ok(false);
        };
        let data = match found {
            Some((entry, _)) if entry.is_done() => {
                serde_json::to_string(&entry.view()).unwrap_or_default()
            }
            // Removed: it was done.
            None => "{}".to_owned(),
            Some(_) => return Ok(false),
        };
        // What was written before the end is all there now.
        if self.catch_up().await?.is_err() {
            return Ok(false);
        }
        self.send(Event::default().event("end").data(data)).await?;
        Ok(true)
    }

    async fn go(mut self, mut follower: Follower) -> Result<(), Gone> {
        if self.catch_up().await?.is_err() || self.end().await? {
            return Ok(());
        }
        let mut looked = Instant::now();
        loop {
            let wake = tokio::select! {
                wake = tokio::time::timeout(ASK_AGAIN, follower.next()) => wake,
                () = self.sender.closed() => return Ok(()),
            };
            if looked.elapsed() >= ASK_AGAIN {
                looked = Instant::now();
                if !self.client.stands(&self.service).await {
                    return Ok(());
                }
            }
            match wake {
                Ok(Wake::Piece(piece)) => self.emit(&piece).await?,
                Ok(Wake::Behind) => {
                    if self.catch_up().await?.is_err() {
                        return Ok(());
                    }
                }
                Ok(Wake::Ended) | Err(_) => {
                    // A piece may have been on its way when its connection was lost. Where it cannot be found out now, it
                    // is the next time.
                    if wake.is_err() {
                        let _ = self.catch_up().await?;
                    }
                    if self.end().await? {
                        return Ok(());
                    }
                    // An end that is none yet: not at once again.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }
}

async fn stream(
    service: Arc<Service>,
    client: Client,
    run: RunId,
    kind: FeedKind,
    headers: HeaderMap,
) -> ApiResult<Response> {
    client.run(&service, run).await?;
    let place_in_feed = last_event_id(&headers)?;
    let permit = place(&service.limits.followers)
        .ok_or_else(|| busy("too many followers at this replica", 5))?;
    let follower = service.hub.follow(kind, run).await?;
    let (sender, receiver) = mpsc::channel(32);
    let stream = Stream {
        service,
        client,
        kind,
        run,
        place: place_in_feed,
        sender,
    };
    tokio::spawn(async move {
        let _ = stream.go(follower).await;
        drop(permit);
    });
    let events = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|event| (event, receiver))
    });
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(15));
    Ok(Sse::new(events).keep_alive(keep_alive).into_response())
}

/// One server-sent event, as its fields are in the stream.
#[derive(utoipa::ToSchema)]
#[expect(
    dead_code,
    reason = "only described, never made: the stream is written field by field"
)]
struct ServerEvent {
    /// What to send as `Last-Event-ID` to go on after it; `end` has none.
    id: Option<String>,
    /// `agent`, `output` or `end`.
    event: String,
    /// JSON.
    data: String,
}

/// Events of the agent CLI as they come: `agent` with `{"epoch", "event"}`, and `end` with the run when it is done.
#[utoipa::path(get, path = "/api/runs/{run}/events", tag = "runs", operation_id = "followEvents",
    params(("run" = RunId, Path, description = "Its id"),
        ("Last-Event-ID" = Option<String>, Header, description = "Go on after this event",
            pattern = "^[0-9]{1,19}(-[0-9]{1,9})?$")),
    responses((status = 200, description = "Server-sent events", body = ServerEvent, content_type = "text/event-stream"),
        Problems),
    security(("apiKey" = [])))]
pub(super) async fn events(
    State(service): State<Arc<Service>>,
    client: Client,
    RunPath(run): RunPath,
    headers: HeaderMap,
) -> ApiResult<Response> {
    stream(service, client, run, FeedKind::Events, headers).await
}

/// What the guest agent prints as it comes: `output` with `{"epoch", "start", "text"}`, and `end` with the run.
#[utoipa::path(get, path = "/api/runs/{run}/output", tag = "runs", operation_id = "followOutput",
    params(("run" = RunId, Path, description = "Its id"),
        ("Last-Event-ID" = Option<String>, Header, description = "Go on after this event",
            pattern = "^[0-9]{1,19}(-[0-9]{1,9})?$")),
    responses((status = 200, description = "Server-sent events", body = ServerEvent, content_type = "text/event-stream"),
        Problems),
    security(("apiKey" = [])))]
pub(super) async fn output(
    State(service): State<Arc<Service>>,
    client: Client,
    RunPath(run): RunPath,
    headers: HeaderMap,
) -> ApiResult<Response> {
    stream(service, client, run, FeedKind::Output, headers).await
}

/// Which log.
#[derive(Clone, Copy, Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
enum LogKind {
    /// What the guest agent printed, as its runner brought it.
    #[default]
    Output,
    /// What the guest agent uploaded itself.
    System,
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct LogParams {
    /// Which log; `output` if nothing is said.
    #[serde(default)]
    #[param(inline)]
    kind: LogKind,
}

/// All that is there of a feed, of the run's last claim that said anything.
async fn whole(
    service: Arc<Service>,
    client: Client,
    run: RunId,
    kind: FeedKind,
    media: &'static str,
) -> ApiResult<Response> {
    client.run(&service, run).await?;
    let permit = place(&service.limits.followers)
        .ok_or_else(|| busy("too many followers at this replica", 5))?;
    // The first piece is asked for here, so that a storage that does not answer is told as such.
    let first = service.engine.piece(kind, run, 1).await?;
    let pieces = futures_util::stream::unfold(
        (service, first, permit),
        move |(service, piece, permit)| async move {
            let piece = piece?;
            let from = piece.sequence.saturating_add(1);
            match service.engine.piece(kind, run, from).await {
                Ok(next) => {
                    // A retried run begins anew; what the lost claim said stands before it.
                    let mark = next.as_ref().is_some_and(|next| next.epoch != piece.epoch);
                    let body = if mark {
                        separated(&piece.body)
                    } else {
                        piece.body
                    };
                    Some((Ok(body), (service, next, permit)))
                }
                Err(error) => Some((
                    Err(std::io::Error::other(error.to_string())),
                    (service, None, permit),
                )),
            }
        },
    );
    let body = Body::from_stream(pieces);
    Ok(([(header::CONTENT_TYPE, media)], body).into_response())
}

/// With a line's end after it.
fn separated(body: &Bytes) -> Bytes {
    if body.ends_with(b"\n") {
        return body.clone();
    }
    let mut bytes = body.to_vec();
    bytes.push(b'\n');
    bytes.into()
}

/// A log of a run, all that there is now.
#[utoipa::path(get, path = "/api/runs/{run}/logs", tag = "runs", operation_id = "getLogs",
    params(("run" = RunId, Path, description = "Its id"), LogParams),
    responses((status = 200, description = "The text", body = String, content_type = "text/plain"), Problems),
    security(("apiKey" = [])))]
pub(super) async fn logs(
    State(service): State<Arc<Service>>,
    client: Client,
    RunPath(run): RunPath,
    Params(params): Params<LogParams>,
) -> ApiResult<Response> {
    let kind = match params.kind {
        LogKind::Output => FeedKind::Output,
        LogKind::System => FeedKind::System,
    };
    whole(service, client, run, kind, "text/plain; charset=utf-8").await
}

/// The network log of a run, all that there is now: JSON lines (`docs/network.md`).
#[utoipa::path(get, path = "/api/runs/{run}/network-log", tag = "runs", operation_id = "getNetworkLog",
    params(("run" = RunId, Path, description = "Its id")),
    responses((status = 200, description = "The lines", body = String, content_type = "application/jsonl"), Problems),
    security(("apiKey" = [])))]
pub(super) async fn network_log(
    State(service): State<Arc<Service>>,
    client: Client,
    RunPath(run): RunPath,
) -> ApiResult<Response> {
    whole(service, client, run, FeedKind::Network, "application/jsonl").await
}
