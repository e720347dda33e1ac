//! A typed client for QEMU's machine protocol, over one end of a socketpair.
//!
//! One line of JSON a message. Commands carry an id and are answered in order; events come in between. A reader task
//! sorts them, so that events are seen while nobody waits for an answer. QEMU is the process a malicious guest would
//! take over first, so what it sends is bounded and anything unexpected ends the connection.

use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::Interest;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// No answer we ask for is longer; `query-migrate`, the longest, has under 2 KiB.
const LINE_LIMIT: u64 = 64 * 1024;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    /// End of file: the process is gone or going.
    #[error("QEMU closed its control socket")]
    Closed,
    /// It understood and said no.
    #[error("QEMU refused {command}: {message}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// Its words.
        message: String,
    },
    /// Not the protocol.
    #[error("QEMU sent something that is not its protocol: {0}")]
    Protocol(String),
    /// A migration, asked for and begun, failed.
    #[error("QEMU could not {0} the device state")]
    Migration(&'static str),
}

/// The commands this engine uses.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "execute", content = "arguments", rename_all = "kebab-case")]
pub(crate) enum Command {
    /// Leaves negotiation mode.
    #[serde(rename = "qmp_capabilities")]
    Negotiate,
    /// Stops the virtual CPUs.
    Stop,
    /// Starts them.
    Cont,
    /// Turns migration features on.
    MigrateSetCapabilities { capabilities: Vec<Feature> },
    /// Names the descriptor that travels with the command.
    Getfd { fdname: &'static str },
    /// Saves device state.
    Migrate { uri: String },
    /// Loads it.
    MigrateIncoming { uri: String },
}

impl Command {
    fn name(&self) -> &'static str {
        match self {
            Command::Negotiate => "qmp_capabilities",
            Command::Stop => "stop",
            Command::Cont => "cont",
            Command::MigrateSetCapabilities { .. } => "migrate-set-capabilities",
            Command::Getfd { .. } => "getfd",
            Command::Migrate { .. } => "migrate",
            Command::MigrateIncoming { .. } => "migrate-incoming",
        }
    }
}

/// A migration feature to turn on.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Feature {
    capability: &'static str,
    state: bool,
}

impl Feature {
    fn on(capability: &'static str) -> Feature {
        Feature {
            capability,
            state: true,
        }
    }
}

/// How a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Migration {
    Completed,
    Failed,
}

/// Why QEMU said it shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shutdown {
    /// The guest asked for power off.
    GuestPoweredOff,
    /// The guest reset the machine, which `-no-reboot` turns into an end; a panic does that.
    GuestReset,
    /// Somebody sent the process a signal.
    Signal,
    /// Anything else.
    Other,
}

/// What events have said so far.
#[derive(Clone, Copy, Debug, Default)]
struct Observed {
    migration: Option<Migration>,
    shutdown: Option<Shutdown>,
    port: Port,
    /// Whether the connection is over.
    ended: bool,
}

/// The guest's end of its one virtio-serial port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Port {
    #[default]
    NotYetOpen,
    Open,
    /// Whoever opens it again is not who had it.
    Closed,
}

impl Port {
    fn changed(&mut self, open: bool) {
        *self = match (*self, open) {
            (Port::NotYetOpen, true) => Port::Open,
            // QEMU sends at most one such event a second, with the newest state: a second "open" hides a "closed".
            _ => Port::Closed,
        };
    }
}

#[derive(Serialize)]
struct Request<'a> {
    #[serde(flatten)]
    command: &'a Command,
    id: u64,
}

/// Every message QEMU sends has one of these shapes.
#[derive(Debug, Default, Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    #[serde(rename = "return")]
    success: Option<Value>,
    error: Option<Refusal>,
    id: Option<u64>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

#[derive(Debug)]
struct Answer {
    id: u64,
    outcome: Result<(), String>,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    writer: OwnedWriteHalf,
    answers: mpsc::Receiver<Result<Answer, QmpError>>,
    observed: watch::Receiver<Observed>,
    reader: JoinHandle<()>,
    last_id: u64,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qmp {
    /// Waits for the greeting and leaves negotiation mode.
    pub(crate) async fn connect(stream: UnixStream) -> Result<Qmp, QmpError> {
        let (read, writer) = stream.into_split();
        let mut lines = Lines(BufReader::new(read));
        let greeting = lines.next().await?;
        if greeting.greeting.is_none() {
            return Err(QmpError::Protocol("no greeting".to_owned()));
        }
        // One command at a time is in flight, so one answer at most is waiting, or the connection's end.
        let (answers_tx, answers) = mpsc::channel(2);
        let (observed_tx, observed) = watch::channel(Observed::default());
        let mut qmp = Qmp {
            writer,
            answers,
            observed,
            reader: tokio::spawn(sort(lines, answers_tx, observed_tx)),
            last_id: 0,
        };
        qmp.run(Command::Negotiate).await?;
        Ok(qmp)
    }

    /// Sends a command and waits for its answer. Not to be used again after it was cancelled half-way.
    pub(crate) async fn run(&mut self, command: Command) -> Result<(), QmpError> {
        self.run_with(command, None).await
    }

    async fn run_with(
        &mut self,
        command: Command,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), QmpError> {
        self.last_id += 1;
        let id = self.last_id;
        let mut line = serde_json::to_vec(&Request {
            command: &command,
            id,
        })
        .map_err(|error| QmpError::Protocol(error.to_string()))?;
        line.push(b'\n');
        match descriptor {
            Some(descriptor) => self.send_with(&line, descriptor).await,
            None => self.writer.write_all(&line).await,
        }
        .map_err(|_| QmpError::Closed)?;
        let answer = self.answers.recv().await.ok_or(QmpError::Closed)??;
        if answer.id != id {
            return Err(QmpError::Protocol(format!(
                "an answer to command {} instead of {id}",
                answer.id
            )));
        }
        answer.outcome.map_err(|message| QmpError::Refused {
            command: command.name(),
            message,
        })
    }

    /// Prepares for saving or loading state without memory, with progress told by events.
    pub(crate) async fn prepare_migration(&mut self) -> Result<(), QmpError> {
        self.run(Command::MigrateSetCapabilities {
            capabilities: vec![Feature::on("x-ignore-shared"), Feature::on("events")],
        })
        .await
    }

    /// Sends a line together with a descriptor.
    async fn send_with(&self, line: &[u8], descriptor: BorrowedFd<'_>) -> std::io::Result<()> {
        let stream = self.writer.as_ref();
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                let descriptors = [descriptor];
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
                Ok(rustix::net::sendmsg(
                    stream,
                    &[std::io::IoSlice::new(line)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )?)
            })
            .await?;
        if sent < line.len() {
            // The socket's buffer holds thousands of such lines.
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// Saves the device state to `file` and waits until it is done. The file is handed over by name, as QEMU saves to
    /// no descriptor it merely inherited.
    pub(crate) async fn save(&mut self, file: BorrowedFd<'_>) -> Result<(), QmpError> {
        const NAME: &str = "state";
        self.run_with(Command::Getfd { fdname: NAME }, Some(file))
            .await?;
        self.run(Command::Migrate {
            uri: format!("fd:{NAME}"),
        })
        .await?;
        self.migrated("save").await
    }

    /// Loads device state from the inherited descriptor `fd` and waits until it is done.
    pub(crate) async fn load(&mut self, fd: i32) -> Result<(), QmpError> {
        self.run(Command::MigrateIncoming {
            uri: format!("fd:{fd}"),
        })
        .await?;
        self.migrated("load").await
    }

    async fn migrated(&mut self, verb: &'static str) -> Result<(), QmpError> {
        let seen = self
            .observed
            .wait_for(|seen| seen.migration.is_some() || seen.ended)
            .await
            .map_err(|_| QmpError::Closed)?;
        match seen.migration {
            Some(Migration::Completed) => Ok(()),
            Some(Migration::Failed) => Err(QmpError::Migration(verb)),
            None => Err(QmpError::Closed),
        }
    }

    /// Resolves to true when the guest has closed its port, and to false when the connection has ended before that.
    pub(crate) fn port_closed(&self) -> impl Future<Output = bool> + Send + use<> {
        let mut observed = self.observed.clone();
        async move {
            let over = |seen: &Observed| seen.port == Port::Closed || seen.ended;
            let seen = observed.wait_for(over).await;
            seen.is_ok_and(|seen| seen.port == Port::Closed)
        }
    }

    /// Why QEMU said it was shutting down, once the connection has ended; waits `grace` for what is still in it.
    pub(crate) async fn last_words(&mut self, grace: Duration) -> Option<Shutdown> {
        let _ = tokio::time::timeout(grace, self.observed.wait_for(|seen| seen.ended)).await;
        self.observed.borrow().shutdown
    }
}

/// Reads until the end, handing answers and events to whom they concern.
async fn sort(
    mut lines: Lines,
    answers: mpsc::Sender<Result<Answer, QmpError>>,
    observed: watch::Sender<Observed>,
) {
    let error = loop {
        let message = match lines.next().await {
            Ok(message) => message,
            Err(error) => break error,
        };
        if let Some(event) = &message.event {
            observed.send_modify(|seen| note(seen, event, &message.data));
            continue;
        }
        let (outcome, id) = match message {
            Message {
                error: Some(refusal),
                id: Some(id),
                ..
            } => (Err(refusal.desc), id),
            Message {
                success: Some(_),
                id: Some(id),
                ..
            } => (Ok(()), id),
            // An error without an id answers a line QEMU could not parse.
            other => break QmpError::Protocol(format!("{other:?}")),
        };
        if answers.send(Ok(Answer { id, outcome })).await.is_err() {
            return;
        }
    };
    observed.send_modify(|seen| seen.ended = true);
    let _ = answers.send(Err(error)).await;
}

fn note(seen: &mut Observed, event: &str, data: &Value) {
    let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default();
    match event {
        "MIGRATION" => match text("status") {
            "completed" => seen.migration = Some(Migration::Completed),
            "failed" | "cancelled" => seen.migration = Some(Migration::Failed),
            _ => {}
        },
        "VSERPORT_CHANGE" => {
            let open = data.get("open").and_then(Value::as_bool);
            seen.port.changed(open.unwrap_or_default());
        }
        "SHUTDOWN" => {
            seen.shutdown = Some(match text("reason") {
                "guest-shutdown" => Shutdown::GuestPoweredOff,
                "guest-reset" | "guest-panic" => Shutdown::GuestReset,
                "host-signal" => Shutdown::Signal,
                _ => Shutdown::Other,
            });
        }
        _ => {}
    }
}

/// Messages of the stream.
struct Lines(BufReader<OwnedReadHalf>);

impl Lines {
    async fn next(&mut self) -> Result<Message, QmpError> {
        let mut line = Vec::new();
        let read = (&mut self.0)
            .take(LINE_LIMIT)
            .read_until(b'\n', &mut line)
            .await
            .map_err(|_| QmpError::Closed)?;
        if read == 0 {
            return Err(QmpError::Closed);
        }
        if line.last() != Some(&b'\n') {
            return Err(if u64::try_from(read).unwrap_or(LINE_LIMIT) < LINE_LIMIT {
                QmpError::Closed
            } else {
                QmpError::Protocol("a line that does not end".to_owned())
            });
        }
        serde_json::from_slice(&line).map_err(|error| QmpError::Protocol(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// Plays QEMU: sends each line when the client has sent one, after the greeting.
    async fn with(script: &[&str]) -> (Result<Qmp, QmpError>, JoinHandle<String>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let script: Vec<String> = script.iter().map(|line| format!("{line}\n")).collect();
        let qemu = tokio::spawn(async move {
            let (read, mut write) = theirs.into_split();
            let mut read = BufReader::new(read);
            let mut heard = String::new();
            write.write_all(b"{\"QMP\":{}}\n").await.unwrap();
            for line in script {
                read.read_line(&mut heard).await.unwrap();
                write.write_all(line.as_bytes()).await.unwrap();
            }
            heard
        });
        (Qmp::connect(ours).await, qemu)
    }

    #[tokio::test]
    async fn saves_and_waits_for_the_event() {
        let (qmp, qemu) = with(&[
            r#"{"return":{},"id":1}"#,
            r#"{"return":{},"id":2}"#,
            concat!(
                r#"{"event":"MIGRATION","data":{"status":"setup"},"timestamp":{}}"#,
                "\n",
                r#"{"return":{},"id":3}"#,
                "\n",
                r#"{"event":"MIGRATION","data":{"status":"completed"},"timestamp":{}}"#
            ),
        ])
        .await;
        let file = tempfile::tempfile().unwrap();
        qmp.unwrap().save(file.as_fd()).await.unwrap();
        assert_eq!(
            qemu.await.unwrap(),
            "{\"execute\":\"qmp_capabilities\",\"id\":1}\n\
             {\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"state\"},\"id\":2}\n\
             {\"execute\":\"migrate\",\"arguments\":{\"uri\":\"fd:state\"},\"id\":3}\n"
        );
    }

    #[tokio::test]
    async fn a_failed_load_and_a_refusal_are_errors() {
        let (qmp, _qemu) = with(&[
            r#"{"return":{},"id":1}"#,
            concat!(
                r#"{"return":{},"id":2}"#,
                "\n",
                r#"{"event":"MIGRATION","data":{"status":"failed"},"timestamp":{}}"#
            ),
            r#"{"error":{"class":"GenericError","desc":"no"},"id":3}"#,
        ])
        .await;
        let mut qmp = qmp.unwrap();
        let error = qmp.load(12).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU could not load the device state");
        let error = qmp.run(Command::Cont).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused cont: no");
    }

    #[tokio::test]
    async fn the_end_while_waiting_is_told_apart_and_keeps_the_reason() {
        let (qmp, _qemu) = with(&[
            r#"{"return":{},"id":1}"#,
            concat!(
                r#"{"return":{},"id":2}"#,
                "\n",
                r#"{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-reset"}}"#
            ),
        ])
        .await;
        let mut qmp = qmp.unwrap();
        assert!(matches!(qmp.load(12).await, Err(QmpError::Closed)));
        assert_eq!(
            qmp.last_words(Duration::from_secs(5)).await,
            Some(Shutdown::GuestReset)
        );
    }

    #[tokio::test]
    async fn a_port_closed_by_the_guest_is_told_also_when_it_is_open_again() {
        let change = |open: &str| {
            format!(r#"{{"event":"VSERPORT_CHANGE","data":{{"open":{open},"id":"agent"}}}}"#)
        };
        for (events, closed) in [
            (vec!["true"], false),
            (vec!["true", "false"], true),
            (vec!["true", "true"], true),
        ] {
            let mut answer = r#"{"return":{},"id":1}"#.to_owned();
            for open in &events {
                answer += "\n";
                answer += &change(open);
            }
            let (qmp, qemu) = with(&[&answer]).await;
            let told = qmp.unwrap().port_closed();
            qemu.await.unwrap();
            assert_eq!(told.await, closed, "{events:?}");
        }
    }

    #[tokio::test]
    async fn garbage_and_endless_lines_end_the_connection() {
        for garbage in ["\u{7f}ELF".to_owned(), "x".repeat(100_000)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            tokio::spawn(async move { theirs.write_all(format!("{garbage}\n").as_bytes()).await });
            assert!(matches!(
                Qmp::connect(ours).await,
                Err(QmpError::Protocol(_))
            ));
        }
    }
}
