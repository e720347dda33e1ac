//! The WebSocket to the API: words that save waiting, and commands that operators run in our VMs.
//!
//! Without it everything works, only later: offers come by poll, and the rest by the answers of heartbeats. Commands
//! do not.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use api_types::push::{FromRunner, ToRunner};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use guest_control::{ExecSpec, ExitStatus, PtySize, Session, Stream, UserSpec};
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::{Inner, Pause};
use crate::audit::{Action, Audit, Outcome, Who};
use crate::control::server::RunLookup;
use crate::names::RunId;

/// The API pings every 15 s; a connection that is silent for so long is dead.
const SILENCE: Duration = Duration::from_secs(45);
/// Commands at once.
const MAX_COMMANDS: usize = 64;
/// Pieces of input that wait for one command; more than that ends it.
const MAX_QUEUED: usize = 256;

/// What a command gets.
enum Input {
    Data(Bytes),
    End,
    Resize(PtySize),
}

/// A command that somebody wants: it is ended when this is dropped.
struct Wanted {
    input: mpsc::Sender<Input>,
    /// Heard also by one that does not read its input.
    _end: oneshot::Sender<()>,
}

/// Where commands are run, and where that is noted.
pub(super) struct Operators {
    pub(super) lookup: Arc<dyn RunLookup>,
    pub(super) audit: Audit,
}

/// Stays connected.
pub(super) async fn run(inner: Arc<Inner>, operators: Operators) {
    let operators = Arc::new(operators);
    let mut pause = Pause::default();
    loop {
        match inner.api.connect(inner.id, &inner.runner.group).await {
            Ok(socket) => {
                pause = Pause::default();
                // Something may have been said while nobody listened.
                inner.beat.notify_one();
                serve(&inner, &operators, socket).await;
                tracing::debug!("the WebSocket to the API has ended");
            }
            Err(error) => tracing::debug!(%error, "no WebSocket to the API"),
        }
        pause.wait(None).await;
    }
}

async fn serve(
    inner: &Arc<Inner>,
    operators: &Arc<Operators>,
    socket: WebSocketStream<reqwest::Upgraded>,
) {
    let (mut sink, mut stream) = socket.split();
    let (say, mut said) = mpsc::channel::<FromRunner>(64);
    // Each ends when it is dropped here, with this connection at the latest: whoever wanted it cannot be told any more.
    // So nothing waits for the tasks, and nothing aborts them: a session that is merely dropped leaves its process running.
    let mut commands: HashMap<String, Wanted> = HashMap::new();
    loop {
        tokio::select! {
            message = tokio::time::timeout(SILENCE, stream.next()) => {
                let text = match message {
                    Ok(Some(Ok(Message::Text(text)))) => text,
                    // Pings are answered by the library, as soon as something is sent or read.
                    Ok(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => {
                        if sink.flush().await.is_err() {
                            return;
                        }
                        continue;
                    }
                    _ => return,
                };
                match serde_json::from_str::<ToRunner>(&text) {
                    Ok(ToRunner::Look(_)) => inner.beat.notify_one(),
                    // Runs are taken by poll, one at a time; this was not asked for.
                    Ok(ToRunner::Job(_)) => {}
                    Ok(ToRunner::ExecStart { exec_id, run_id, epoch, argv, by, pty }) => {
                        commands.retain(|_, wanted| !wanted.input.is_closed());
                        let (input, inputs) = mpsc::channel(MAX_QUEUED);
                        let known = inner.lock().held.get(&run_id).is_some_and(|held| held.epoch == epoch);
                        let start = Start { exec_id: exec_id.clone(), run: run_id, argv, by, pty };
                        if known && commands.len() < MAX_COMMANDS {
                            let (end, ended) = oneshot::channel();
                            commands.insert(exec_id, Wanted { input, _end: end });
                            let submitter = inner.runner.submitter;
                            tokio::spawn(command(Arc::clone(operators), submitter, start, inputs, ended, say.clone()));
                        } else {
                            let why = if known { "too many commands run here" } else { "the run is not here" };
                            if say.try_send(exit(&start, None, Some(why.to_owned()))).is_err() {
                                return;
                            }
                        }
                    }
                    Ok(ToRunner::ExecInput { exec_id, data }) => {
                        let input = match data.map(|data| STANDARD.decode(data)) {
                            None => Input::End,
                            Some(Ok(bytes)) => Input::Data(bytes.into()),
                            Some(Err(_)) => continue,
                        };
                        give(&mut commands, &exec_id, input);
                    }
                    Ok(ToRunner::ExecResize { exec_id, size: (columns, rows) }) => {
                        give(&mut commands, &exec_id, Input::Resize(PtySize { cols: columns, rows }));
                    }
                    Ok(ToRunner::ExecEnd { exec_id }) => drop(commands.remove(&exec_id)),
                    // Of a later server.
                    Err(error) => tracing::debug!(%error, "a message of the API is not understood"),
                }
            }
            Some(word) = said.recv() => {
                let text = serde_json::to_string(&word).unwrap_or_default();
                if sink.send(Message::Text(text.into())).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Queues input for a command; one that does not read is ended.
fn give(commands: &mut HashMap<String, Wanted>, exec: &str, input: Input) {
    let full = commands
        .get(exec)
        .is_some_and(|wanted| wanted.input.try_send(input).is_err());
    if full {
        commands.remove(exec);
    }
}

struct Start {
    exec_id: String,
    run: RunId,
    argv: Vec<String>,
    /// The operator's API key.
    by: Option<String>,
    pty: Option<(u16, u16)>,
}

fn exit(start: &Start, exit_code: Option<i32>, error: Option<String>) -> FromRunner {
    FromRunner::ExecExit {
        exec_id: start.exec_id.clone(),
        exit_code,
        error,
    }
}

/// Runs a command until it ends or nobody wants it any more: [`Wanted`] is gone then.
async fn command(
    operators: Arc<Operators>,
    submitter: u32,
    start: Start,
    mut inputs: mpsc::Receiver<Input>,
    ended: oneshot::Receiver<()>,
    say: mpsc::Sender<FromRunner>,
) {
    let run = start.run;
    let argv: Vec<Vec<u8>> = start.argv.iter().map(|a| a.clone().into_bytes()).collect();
    let blot = |text| operators.lookup.blot(run, text);
    let action = Action::exec(&argv, "user", false, blot);
    let who = Who::of_api_key(submitter, start.by.clone());
    let entry = operators.audit.begin(who, run, action);
    let spec = ExecSpec {
        argv,
        user: UserSpec::User,
        stdin: start.pty.is_none(),
        pty: start.pty.map(|(columns, rows)| PtySize {
            cols: columns,
            rows,
        }),
        kill_group_on_exit: true,
        ..ExecSpec::default()
    };
    let started = match operators.lookup.client(run).await {
        Ok(client) => client.exec(spec).await.map_err(|error| error.to_string()),
        Err(failure) => Err(failure.message),
    };
    let session = match started {
        Ok(session) => session,
        Err(why) => {
            entry.set(Outcome::failed(&why));
            let _ = say.send(exit(&start, None, Some(why))).await;
            return;
        }
    };
    let wanted = tokio::select! {
        told = output(&start, &session, &say) => told,
        _ = ended => false,
        () = feed(&session, &mut inputs) => false,
    };
    if !wanted {
        let _ = session.kill().await;
    }
    let last = match session.wait().await {
        Ok(report) => {
            entry.set(Outcome::report(&report));
            match report.status {
                ExitStatus::Exited(code) => exit(&start, Some(code), None),
                ExitStatus::Signaled(signal) => {
                    exit(&start, Some(signal.saturating_add(128)), None)
                }
                ExitStatus::TimedOut => exit(&start, None, Some("it timed out".to_owned())),
            }
        }
        Err(error) => {
            entry.set(Outcome::failed(&error));
            exit(&start, None, Some(error.to_string()))
        }
    };
    let _ = say.send(last).await;
}

/// Says whether all of it could be told.
async fn output(start: &Start, session: &Session, say: &mpsc::Sender<FromRunner>) -> bool {
    let mut output = session.attach(0, true);
    while let Some(chunk) = output.next().await {
        let word = FromRunner::ExecOutput {
            exec_id: start.exec_id.clone(),
            stderr: chunk.stream == Stream::Stderr,
            data: STANDARD.encode(&chunk.data),
        };
        if say.send(word).await.is_err() {
            return false;
        }
    }
    true
}

/// Returns when nobody wants the command any more.
async fn feed(session: &Session, inputs: &mut mpsc::Receiver<Input>) {
    while let Some(input) = inputs.recv().await {
        // A process that has closed its input, or ended, is no failure.
        match input {
            Input::Data(data) => drop(session.write_stdin(data).await),
            Input::End => drop(session.close_stdin().await),
            Input::Resize(size) => drop(session.resize(size).await),
        }
    }
}

#[cfg(test)]
#[path = "push_tests.rs"]
mod tests;
