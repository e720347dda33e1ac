//! The threads that send: one for events, one for everything that is due at a time.

use std::time::{Duration, Instant};

use api_types::guest::{
    Accepted, AgentComplete, AgentHeartbeat, Alive, Checkpoint, CheckpointAccepted, Events,
    MAX_EVENTS, Telemetry, TelemetryAccepted,
};
use serde_json::{Map, Value, json};

use super::Shared;
use super::client::CallError;
use super::metrics::Meter;
use super::outbox::{Lost, Next, Woken};

/// Bytes of events sent at once; the API takes twice as many.
const BATCH: usize = 256 * 1024;
/// A longer event would not be taken: it is replaced by a note of its type and length.
const LONGEST_EVENT: usize = 400 * 1024;
/// Bytes of log sent at once; the API takes 256 KiB.
const PIECE: usize = 200 * 1024;
/// Most samples that wait, and are sent at once.
const MAX_SAMPLES: usize = 720;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Times between attempts: doubled each time, unless the server says otherwise.
struct BackOff(Duration);

impl BackOff {
    fn new() -> Self {
        Self(FIRST_PAUSE)
    }

    fn next(&mut self, wanted: Option<Duration>) -> Duration {
        let own = self.0;
        self.0 = (own * 2).min(LONGEST_PAUSE);
        wanted.map_or(own, |wanted| wanted.max(own))
    }
}

impl Shared {
    /// Calls until there is an answer that another attempt would not change, or time is over.
    fn insist<T>(&self, call: impl Fn() -> Result<T, CallError>) -> Result<T, CallError> {
        let mut back_off = BackOff::new();
        loop {
            match call() {
                Err(CallError::Again { reason, after }) => {
                    if !self.outbox.pause(back_off.next(after)) {
                        return Err(CallError::Again { reason, after });
                    }
                }
                other => return other,
            }
        }
    }

    /// Sends the CLI's events as they come, until no more will.
    pub(super) fn send_events(&self) {
        let mut next = 0;
        let mut refused = false;
        while let Next::Lines(lines) = self.outbox.events(MAX_EVENTS, BATCH) {
            let mut events: Vec<_> = lines.iter().map(|line| self.event(line)).collect();
            if !refused {
                refused = self.send_batch(&mut next, &mut events);
            }
            self.outbox.lost(Lost {
                events: events.len() as u64,
                log_bytes: 0,
            });
        }
        if let Some(outcome) = (!refused).then(|| self.checkpoint()).flatten() {
            self.set_checkpoint(outcome);
        }
    }

    /// A line as it is sent.
    fn event(&self, line: &str) -> Map<String, Value> {
        let mut event: Map<String, Value> = serde_json::from_str(line).unwrap_or_default();
        if line.len() > LONGEST_EVENT {
            let kind = event.get("type").cloned().unwrap_or_default();
            event = Map::from_iter([
                ("type".to_owned(), kind),
                ("omittedBytes".to_owned(), json!(line.len())),
            ]);
        }
        self.masker.object(&mut event);
        event
    }

    /// Sends these; what is not taken stays. True if nothing ever will be.
    fn send_batch(&self, next: &mut u64, events: &mut Vec<Map<String, Value>>) -> bool {
        let mut at_once = events.len();
        let mut gaps = 0_u32;
        while !events.is_empty() {
            let numbered = events.iter().take(at_once).zip(*next..);
            let body = Events {
                run_id: self.run,
                events: numbered
                    .map(|(event, number)| {
                        let mut event = event.clone();
                        event.insert("sequenceNumber".to_owned(), json!(number));
                        event
                    })
                    .collect(),
            };
            let sent = self.insist(|| self.client.post::<Accepted>("events", &body));
            let wanted = match sent {
                Ok(accepted) => accepted.next,
                Err(CallError::Gap(wanted)) => wanted,
                Err(CallError::Unacceptable(reason)) => {
                    if at_once > 1 {
                        // One of them: the others are sent without it.
                        at_once = 1;
                    } else {
                        self.note(format!("an event is not taken by the API: {reason}"));
                        events.remove(0);
                        self.outbox.lost(Lost {
                            events: 1,
                            log_bytes: 0,
                        });
                    }
                    continue;
                }
                Err(error @ CallError::Refused(_)) => {
                    self.note(format!("events are refused by the API: {error}"));
                    return true;
                }
                Err(error @ CallError::Again { .. }) => {
                    self.note(format!("events could not be sent in time: {error}"));
                    return false;
                }
            };
            let taken = wanted
                .checked_sub(*next)
                .and_then(|n| usize::try_from(n).ok());
            match taken {
                Some(taken) if (1..=events.len()).contains(&taken) => {
                    events.drain(..taken);
                }
                // The server has another idea of where we are: it is the one that counts.
                _ => {
                    gaps += 1;
                    if gaps > 3 {
                        self.note(format!("the API wants event {wanted} again and again"));
                        return false;
                    }
                }
            }
            *next = wanted;
        }
        false
    }

    /// Sends the session's history; nothing if the CLI has not named a session.
    pub(super) fn checkpoint(&self) -> Option<Result<(), String>> {
        let session = self.session()?;
        Some(match session.read(&self.home) {
            Err(error) => Err(error.to_string()),
            Ok(history) => {
                let body = Checkpoint {
                    run_id: self.run,
                    cli_agent_session_id: session.id,
                    cli_agent_session_history: self.masker.text(&history),
                };
                let call = || self.client.post::<CheckpointAccepted>("checkpoints", &body);
                let sent = self.insist(call);
                sent.map(drop).map_err(|error| error.to_string())
            }
        })
    }

    /// Sends what is due at a time, until the end; then the rest of it, and that the agent is done.
    pub(super) fn send_telemetry(&self, heartbeat: Duration, interval: Duration) {
        let mut telemetry = TelemetrySender::default();
        let mut heartbeat_at = Instant::now() + heartbeat;
        let mut telemetry_at = Instant::now() + interval;
        loop {
            match self.outbox.until(heartbeat_at.min(telemetry_at)) {
                Woken::Closed => break,
                Woken::Checkpoint => match self.checkpoint() {
                    Some(Ok(())) => self.note("a checkpoint was asked for and made".to_owned()),
                    Some(Err(error)) => self.note(format!("no checkpoint could be made: {error}")),
                    None => self.note("no checkpoint: the CLI has no session yet".to_owned()),
                },
                Woken::Due => {
                    let now = Instant::now();
                    if heartbeat_at <= now {
                        let _later: Result<Alive, CallError> = self.heartbeat();
                        heartbeat_at = Instant::now() + heartbeat;
                    }
                    if telemetry_at <= now {
                        telemetry.measure();
                        // What is not taken now is sent with the next.
                        let _later = telemetry.send(self);
                        telemetry_at = Instant::now() + interval;
                    }
                }
            }
        }
        telemetry.measure();
        telemetry.send_rest(self);
        if let Some((exit_code, error)) = self.outcome() {
            let body = AgentComplete {
                run_id: self.run,
                exit_code,
                error: error.map(|error| self.masker.text(&error)),
            };
            if let Err(error) = self.insist(|| self.client.post::<()>("complete", &body)) {
                self.note(format!(
                    "the API was not told that the agent is done: {error}"
                ));
            }
        }
    }

    /// Says that the agent is alive.
    pub(super) fn heartbeat(&self) -> Result<Alive, CallError> {
        let body = AgentHeartbeat { run_id: self.run };
        self.client.post("heartbeat", &body)
    }
}

/// Log and samples on their way.
#[derive(Default)]
struct TelemetrySender {
    meter: Meter,
    piece: String,
    log_start: u64,
    samples: Vec<Map<String, Value>>,
    samples_start: u64,
    gaps: u32,
}

impl TelemetrySender {
    fn measure(&mut self) {
        if self.samples.len() >= MAX_SAMPLES {
            // The oldest says least; those that stay get its number.
            self.samples.remove(0);
        }
        self.samples.push(self.meter.sample());
    }

    fn send(&mut self, shared: &Shared) -> Result<(), CallError> {
        if self.piece.is_empty() {
            self.piece = shared.outbox.take_log(PIECE);
        }
        let body = Telemetry {
            run_id: shared.run,
            system_log_start: self.log_start,
            system_log: self.piece.clone(),
            metrics_start: self.samples_start,
            metrics: self.samples.clone(),
        };
        match shared.client.post::<TelemetryAccepted>("telemetry", &body) {
            Ok(accepted) => {
                self.piece.clear();
                self.samples.clear();
                self.log_start = accepted.system_log_next;
                self.samples_start = accepted.metrics_next;
                Ok(())
            }
            Err(CallError::Gap(next)) => {
                // It does not say of which: the log's position is tried first.
                self.gaps += 1;
                if self.gaps % 2 == 1 {
                    self.log_start = next;
                } else {
                    self.samples_start = next;
                }
                Err(CallError::Gap(next))
            }
            Err(error) => Err(error),
        }
    }

    /// Sends until nothing is left, or nothing more is taken.
    fn send_rest(&mut self, shared: &Shared) {
        let mut back_off = BackOff::new();
        loop {
            let reason = match self.send(shared) {
                Ok(()) if shared.outbox.unsent_log() == 0 => return,
                Ok(()) => continue,
                Err(CallError::Again { reason, after }) => {
                    if shared.outbox.pause(back_off.next(after)) {
                        continue;
                    }
                    reason
                }
                Err(CallError::Gap(_)) if self.gaps <= 4 => continue,
                Err(error) => error.to_string(),
            };
            shared.note(format!("the log could not be sent to its end: {reason}"));
            shared.outbox.lost(Lost {
                events: 0,
                log_bytes: self.piece.len() as u64,
            });
            return;
        }
    }
}
