//! The daemon's end of the control socket.
//!
//! A connection's life:
//!
//! ```text
//! accepted ─ peer is owner or root? ─ no ─▶ closed
//!    │ first frame
//!    ├─ Runs, Status, Cancel, Policy… ──▶ one answer ──▶ closed
//!    ├─ ReadFile, WriteFile ───▶ bytes ──▶ Done ──▶ closed
//!    └─ Exec, Attach ──▶ attached ─┬─ process ended ──▶ Exited ──▶ closed
//!                                  ├─ Detach ──▶ left running, can be attached to again
//!                                  └─ connection ended ──▶ process killed
//! ```

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{FutureExt, SinkExt, StreamExt};
use guest_control::{Client, ExecSpec, FileSpec, PtySize, Session, Stream, UserSpec};
use policy::RuleArgument;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::protocol::{
    self, CHUNK, Connection, Failure, Input, Refusal, Reply, Request, RunInfo, STDIN_WINDOW,
};
use super::sessions::Sessions;
use crate::audit::{Action, Audit, Entry, Outcome, Who};
use crate::names::RunId;
use crate::status::Status;

/// A peer that connects and says nothing is dropped after this.
const FIRST_FRAME_LIMIT: Duration = Duration::from_secs(10);

/// Connections served at once; more wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 256;

/// What the server asks the daemon. Implementations answer from the daemon's own state and must not
/// block; only a change of policy waits, for the proxy.
#[async_trait]
pub(crate) trait RunLookup: Send + Sync + 'static {
    /// The runs that are active now, oldest first.
    async fn runs(&self) -> Vec<RunInfo>;
    /// The control channel of a run's VM.
    async fn client(&self, run: RunId) -> Result<Client, Failure>;
    /// Cancels a run; returns when that is decided, not when the run has ended.
    async fn cancel(&self, run: RunId) -> Result<(), Failure>;
    /// Takes the values of a run's secrets out of a text.
    fn blot(&self, run: RunId, text: String) -> String;
    /// What `status.json` says now, for who reads it here; nothing before there is a status.
    fn snapshot(&self) -> Option<Status>;
    /// Gives the runner's name to another process, and leaves when the last job has ended.
    async fn retire(&self, successor: u32);
    /// What `status.json` says now.
    async fn status(&self) -> String;
    /// What a run may reach, in canonical form.
    async fn policy(&self, run: RunId) -> Result<String, Refusal>;
    /// Puts rules before a run's others, denials first; returns the changed policy when it holds.
    async fn change_policy(
        &self,
        run: RunId,
        deny: &[RuleArgument],
        allow: &[RuleArgument],
    ) -> Result<String, Refusal>;
}

/// Serves the socket until the future is dropped, which ends every connection.
///
/// `listener` comes from [`host::fs::Dir::bind_socket`]; `owner` is the home's owner: nobody else but root is heard.
/// What peers do to runs is noted in `audit`.
pub(crate) async fn serve(
    listener: std::os::unix::net::UnixListener,
    owner: u32,
    lookup: Arc<dyn RunLookup>,
    audit: Audit,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let sessions = Arc::new(Sessions::default());
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => {
                let stream = match accepted {
                    Ok((stream, _)) => stream,
                    // Out of descriptors, or a peer that was gone at once: neither ends the server.
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a control connection");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                };
                let who = match stream.peer_cred() {
                    Ok(peer) if peer.uid() == owner || peer.uid() == 0 => Who::of_peer(&peer),
                    Ok(peer) => {
                        tracing::warn!(uid = peer.uid(), "control connection of a stranger refused");
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "control connection without credentials refused");
                        continue;
                    }
                };
                let handler = Handler {
                    lookup: Arc::clone(&lookup),
                    sessions: Arc::clone(&sessions),
                    audit: audit.clone(),
                    who,
                };
                connections.spawn(async move {
                    if let Err(error) = handler.run(protocol::frame(stream)).await {
                        tracing::debug!(%error, "control connection ended");
                    }
                });
            }
        }
    }
}

struct Handler {
    lookup: Arc<dyn RunLookup>,
    sessions: Arc<Sessions>,
    audit: Audit,
    who: Who,
}

fn policy(answer: Result<String, Refusal>) -> Reply {
    match answer {
        Ok(canonical) => Reply::Policy(canonical),
        Err(refusal) => Reply::Refused(refusal),
    }
}

/// How an attachment ended.
enum End {
    Exited,
    Detached,
    PeerGone,
}

impl Handler {
    async fn run(self, mut connection: Connection) -> io::Result<()> {
        let first = tokio::time::timeout(FIRST_FRAME_LIMIT, protocol::receive(&mut connection));
        let Some(request) = first.await.map_err(io::Error::from)?? else {
            return Ok(());
        };
        let reply = match request {
            Request::Runs => Reply::Runs(self.lookup.runs().await),
            Request::Status => Reply::Status(self.lookup.status().await),
            Request::Cancel { run } => {
                let entry = self.begin(run, Action::Kill);
                match self.lookup.cancel(run).await {
                    Ok(()) => {
                        entry.set(Outcome::ok());
                        Reply::Done
                    }
                    Err(failure) => {
                        entry.set(Outcome::failed(&failure.message));
                        Reply::Failed(failure)
                    }
                }
            }
            Request::Retire { successor } => {
                // Who has given up waiting has ended by now, and takes over nothing.
                if connection.next().now_or_never().is_some() {
                    return Ok(());
                }
                self.lookup.retire(successor).await;
                Reply::Done
            }
            Request::Policy { run } => policy(self.lookup.policy(run).await),
            Request::ChangePolicy { run, deny, allow } => {
                let entry = self.begin(run, Action::policy(&deny, &allow));
                let changed = self.lookup.change_policy(run, &deny, &allow).await;
                entry.set(match &changed {
                    Ok(_) => Outcome::ok(),
                    Err(refusal) => Outcome::failed(&refusal.message),
                });
                policy(changed)
            }
            Request::Exec { run, spec, detach } => {
                let user = match spec.user {
                    UserSpec::Root => "root",
                    UserSpec::User => "user",
                };
                let blot = |text| self.lookup.blot(run, text);
                let action = Action::exec(&spec.argv, user, detach, blot);
                let entry = self.begin(run, action);
                return self.exec(connection, run, spec, detach, &entry).await;
            }
            Request::Attach { run, session, size } => {
                let entry = self.begin(run, Action::Attach { session });
                return self.attach(connection, run, session, size, &entry).await;
            }
            Request::ReadFile { run, path } => {
                let shown = Action::text(&path, |text| self.lookup.blot(run, text));
                let entry = self.begin(run, Action::CpOut { path: shown });
                return self.read_file(connection, run, &path, &entry).await;
            }
            Request::WriteFile { run, file } => {
                let action = Action::CpIn {
                    path: Action::text(&file.path, |text| self.lookup.blot(run, text)),
                    mode: format!("{:o}", file.mode),
                };
                let entry = self.begin(run, action);
                return self.write_file(connection, run, file, &entry).await;
            }
        };
        protocol::send(&mut connection, &reply).await
    }

    fn begin(&self, run: RunId, action: Action) -> Entry {
        self.audit.begin(self.who.clone(), run, action)
    }

    async fn exec(
        &self,
        mut connection: Connection,
        run: RunId,
        spec: ExecSpec,
        detach: bool,
        entry: &Entry,
    ) -> io::Result<()> {
        let started = match self.lookup.client(run).await {
            Ok(client) => client.exec(spec).await.map_err(Failure::from),
            Err(failure) => Err(failure),
        };
        let session = match started {
            Ok(session) => session,
            Err(failure) => return fail(&mut connection, failure, entry).await,
        };
        let id = self.sessions.number();
        let reply = Reply::Started {
            session: id,
            pid: session.pid(),
        };
        if let Err(error) = protocol::send(&mut connection, &reply).await {
            kill(&session).await;
            return Err(error);
        }
        if detach {
            self.keep(id, run, session).await;
            entry.set(Outcome::ok());
            return protocol::send(&mut connection, &Reply::Done).await;
        }
        self.serve_attached(connection, run, id, session, entry)
            .await
    }

    async fn attach(
        &self,
        mut connection: Connection,
        run: RunId,
        id: u32,
        size: Option<PtySize>,
        entry: &Entry,
    ) -> io::Result<()> {
        let Some(session) = self.sessions.take(id, run) else {
            let failure = Failure::new(format_args!(
                "run {run} has no detached session {id}; it ended, or somebody is attached to it"
            ));
            return fail(&mut connection, failure, entry).await;
        };
        if let Some(size) = size {
            // A process that has ended has no terminal any more; its output still is to be had.
            let _ = session.resize(size).await;
        }
        let reply = Reply::Started {
            session: id,
            pid: session.pid(),
        };
        if let Err(error) = protocol::send(&mut connection, &reply).await {
            // Nobody has been attached: it waits for the next who asks.
            self.keep(id, run, session).await;
            return Err(error);
        }
        self.serve_attached(connection, run, id, session, entry)
            .await
    }

    /// Keeps a session for whoever attaches next.
    async fn keep(&self, id: u32, run: RunId, session: Session) {
        let active = self.lookup.runs().await;
        self.sessions.keep(id, run, session, &active);
    }

    async fn serve_attached(
        &self,
        connection: Connection,
        run: RunId,
        id: u32,
        session: Session,
        entry: &Entry,
    ) -> io::Result<()> {
        match attached(connection, &session, entry).await {
            Ok(End::Exited) => Ok(()),
            Ok(End::Detached) => {
                entry.set(Outcome::ok());
                self.keep(id, run, session).await;
                Ok(())
            }
            gone => {
                kill(&session).await;
                gone.map(drop)
            }
        }
    }

    async fn read_file(
        &self,
        mut connection: Connection,
        run: RunId,
        path: &str,
        entry: &Entry,
    ) -> io::Result<()> {
        let client = match self.lookup.client(run).await {
            Ok(client) => client,
            Err(failure) => return fail(&mut connection, failure, entry).await,
        };
        let (sink, mut source) = tokio::io::duplex(CHUNK);
        let forward = async {
            let mut buffer = vec![0; CHUNK];
            loop {
                let length = source.read(&mut buffer).await?;
                let Some(data) = buffer.get(..length).filter(|data| !data.is_empty()) else {
                    return Ok(());
                };
                let data = Bytes::copy_from_slice(data);
                protocol::send(&mut connection, &Reply::Data(data)).await?;
            }
        };
        // A peer that goes away ends the reading at once.
        let read = async { Ok::<_, io::Error>(client.read_file(path, sink).await) };
        let (read, ()) = tokio::try_join!(read, forward)?;
        match read {
            Ok(_) => {
                entry.set(Outcome::ok());
                protocol::send(&mut connection, &Reply::Done).await
            }
            Err(error) => fail(&mut connection, error.into(), entry).await,
        }
    }

    async fn write_file(
        &self,
        mut connection: Connection,
        run: RunId,
        file: FileSpec,
        entry: &Entry,
    ) -> io::Result<()> {
        let client = match self.lookup.client(run).await {
            Ok(client) => client,
            Err(failure) => return fail(&mut connection, failure, entry).await,
        };
        // The source fails, rather than ends, when the peer goes away: then the guest's file must not appear.
        let (mut sink, source) = tokio::io::duplex(CHUNK);
        let (complete, completed) = tokio::sync::oneshot::channel();
        let receive = async {
            loop {
                match protocol::receive(&mut connection).await? {
                    // After a failure of the guest the rest is read and dropped, so that the answer gets through.
                    Some(Input::Stdin(data)) => drop(sink.write_all(&data).await),
                    Some(Input::EndOfStdin) => {
                        let _ = complete.send(());
                        drop(sink);
                        return Ok(());
                    }
                    Some(_) => return Err(out_of_place()),
                    None => return Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
        };
        let source = super::source::Whole::new(source, completed);
        let (written, received) = tokio::join!(client.write_file(file, source), receive);
        received?;
        match written {
            Ok(_) => {
                entry.set(Outcome::ok());
                protocol::send(&mut connection, &Reply::Done).await
            }
            Err(error) => fail(&mut connection, error.into(), entry).await,
        }
    }
}

/// Serves a client that is attached to a session until one of the three ends.
async fn attached(connection: Connection, session: &Session, entry: &Entry) -> io::Result<End> {
    let (sink, stream) = connection.split();
    // The window bounds what is queued, so the channels need no bound of their own.
    let outstanding = AtomicUsize::new(0);
    let (stdin, queued) = mpsc::unbounded_channel();
    let (taken, confirmed) = mpsc::unbounded_channel();
    tokio::select! {
        end = forward_output(session, sink, confirmed, entry) => end,
        end = accept_input(session, stream, stdin, &outstanding) => end,
        never = feed_stdin(session, queued, &taken, &outstanding) => match never {},
    }
}

async fn forward_output(
    session: &Session,
    mut sink: SplitSink<Connection, Bytes>,
    mut confirmed: mpsc::UnboundedReceiver<usize>,
    entry: &Entry,
) -> io::Result<End> {
    let mut output = session.attach(0, true);
    let mut expected = 0;
    loop {
        tokio::select! {
            biased;
            Some(bytes) = confirmed.recv() => {
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                protocol::send(&mut sink, &Reply::StdinTaken(bytes)).await?;
            }
            chunk = output.next() => {
                let Some(chunk) = chunk else { break };
                if chunk.offset > expected {
                    let bytes = chunk.offset - expected;
                    protocol::send(&mut sink, &Reply::Lost { bytes }).await?;
                }
                expected = chunk.offset + chunk.data.len() as u64;
                let stderr = chunk.stream == Stream::Stderr;
                let mut data = chunk.data;
                while !data.is_empty() {
                    let piece = data.split_to(data.len().min(CHUNK));
                    protocol::send(&mut sink, &Reply::Output { stderr, data: piece }).await?;
                }
            }
        }
    }
    let last = match session.wait().await {
        Ok(report) => {
            entry.set(Outcome::report(&report));
            Reply::Exited(report)
        }
        Err(error) => {
            entry.set(Outcome::failed(&error));
            Reply::Failed(error.into())
        }
    };
    protocol::send(&mut sink, &last).await?;
    sink.close().await?;
    Ok(End::Exited)
}

/// What is queued for stdin.
enum Stdin {
    Data(Bytes),
    End,
}

async fn accept_input(
    session: &Session,
    mut stream: SplitStream<Connection>,
    stdin: mpsc::UnboundedSender<Stdin>,
    outstanding: &AtomicUsize,
) -> io::Result<End> {
    loop {
        match protocol::receive(&mut stream).await? {
            Some(Input::Stdin(data)) => {
                let before = outstanding.fetch_add(data.len(), Ordering::Relaxed);
                if before.saturating_add(data.len()) > STDIN_WINDOW {
                    return Err(out_of_place());
                }
                let _ = stdin.send(Stdin::Data(data));
            }
            Some(Input::EndOfStdin) => {
                let _ = stdin.send(Stdin::End);
            }
            // A process that has just ended can neither be signalled nor resized; its exit report is under way.
            Some(Input::Signal(signal)) => drop(session.signal(signal).await),
            Some(Input::Resize(size)) => drop(session.resize(size).await),
            Some(Input::Detach) => return Ok(End::Detached),
            None => return Ok(End::PeerGone),
        }
    }
}

/// Passes stdin on as the guest takes it. Never returns: the others decide the end.
async fn feed_stdin(
    session: &Session,
    mut queued: mpsc::UnboundedReceiver<Stdin>,
    taken: &mpsc::UnboundedSender<usize>,
    outstanding: &AtomicUsize,
) -> Infallible {
    while let Some(item) = queued.recv().await {
        match item {
            Stdin::Data(data) => {
                let length = data.len();
                // A process that closed its stdin is no failure; what is left is dropped, like a closed pipe's.
                let _ = session.write_stdin(data).await;
                outstanding.fetch_sub(length, Ordering::Relaxed);
                let _ = taken.send(length);
            }
            Stdin::End => drop(session.close_stdin().await),
        }
    }
    std::future::pending().await
}

async fn kill(session: &Session) {
    // It fails only if the process or its VM has ended, which is what was wanted.
    let _ = session.kill().await;
}

async fn fail(connection: &mut Connection, failure: Failure, entry: &Entry) -> io::Result<()> {
    entry.set(Outcome::failed(&failure.message));
    protocol::send(connection, &Reply::Failed(failure)).await
}

fn out_of_place() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a frame out of place")
}
