//! What travels over the control socket.
//!
//! ```text
//! client                         server
//!   Request::Runs          ──▶
//!                          ◀──   Reply::Runs
//!   Request::Exec          ──▶
//!                          ◀──   Reply::Started
//!   Input::Stdin … Signal  ──▶
//!                          ◀──   Reply::Output … StdinTaken …
//!                          ◀──   Reply::Exited            (or Failed, at any point)
//! ```
//!
//! Stdin is windowed: a client has at most [`STDIN_WINDOW`] bytes under way, and the server says what the guest has
//! taken. So a process that does not read its stdin never keeps a signal or a resize from getting through.

use std::io;

use bytes::{Bytes, BytesMut};
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use guest_control::{ExecSpec, ExitReport, FileSpec, PtySize};
use policy::RuleArgument;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use crate::names::{ProfileName, RunId};

/// Largest frame: an exec's command line and environment (each string at most 128 KiB, as execve limits them).
const MAX_FRAME: usize = 8 << 20;

/// Most bytes of data in one frame.
pub(crate) const CHUNK: usize = 64 << 10;

/// Most bytes of stdin under way that the guest has not taken yet.
pub(crate) const STDIN_WINDOW: usize = 256 << 10;

/// First frame of a connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Which runs are active? Answered with [`Reply::Runs`].
    Runs,
    /// The daemon's status. Answered with [`Reply::Status`].
    Status,
    /// Starts a process in a run's VM; [`Input`] frames follow.
    Exec {
        /// Which run.
        run: RunId,
        /// What to start.
        spec: ExecSpec,
        /// Leave it running and only say its session number.
        detach: bool,
    },
    /// Attaches to a session that was detached; [`Input`] frames follow.
    Attach {
        /// Which run.
        run: RunId,
        /// The number [`Reply::Started`] told.
        session: u32,
        /// Terminal size of the new reader.
        size: Option<PtySize>,
    },
    /// Reads a file out of a run's VM: [`Reply::Data`] until [`Reply::Done`].
    ReadFile {
        /// Which run.
        run: RunId,
        /// Absolute path in the guest.
        path: String,
    },
    /// Writes a file into a run's VM; [`Input::Stdin`] frames until [`Input::EndOfStdin`] follow.
    WriteFile {
        /// Which run.
        run: RunId,
        /// Where to and how.
        file: FileSpec,
    },
    /// Cancels a run.
    Cancel {
        /// Which run.
        run: RunId,
    },
    // Added later: an older daemon ends the connection at what it does not know.
    /// What may a run reach? Answered with [`Reply::Policy`].
    Policy {
        /// Which run.
        run: RunId,
    },
    /// Puts rules before a run's others, denials first. Answered with [`Reply::Policy`] when they hold.
    ChangePolicy {
        /// Which run.
        run: RunId,
        /// What it is kept from.
        deny: Vec<RuleArgument>,
        /// What it may reach.
        allow: Vec<RuleArgument>,
    },
    /// Another instance of this runner takes the jobs from now on: this one finishes what it has and leaves. Answered
    /// with [`Reply::Done`] when the runner's name is free.
    Retire {
        /// The other instance's process.
        successor: u32,
    },
}

/// Later frames of the client.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Input {
    /// Bytes for stdin, or of a file; at most [`CHUNK`].
    Stdin(Bytes),
    /// No more of them.
    EndOfStdin,
    /// Sends a signal to the process's group.
    Signal(i32),
    /// The terminal has a new size.
    Resize(PtySize),
    /// Leaves the process running. (Without this, the end of the connection kills it.)
    Detach,
}

/// Frames of the server.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// The active runs.
    Runs(Vec<RunInfo>),
    /// `status.json`'s text.
    Status(String),
    /// The process runs.
    Started {
        /// Number by which it can be attached to again.
        session: u32,
        /// Its process id in the guest.
        pid: u32,
    },
    /// Output.
    Output {
        /// True: stderr.
        stderr: bool,
        /// The bytes.
        data: Bytes,
    },
    /// Output was lost because the ring overwrote it before this reader came.
    Lost {
        /// How many bytes.
        bytes: u64,
    },
    /// The guest has taken this many more bytes of stdin.
    StdinTaken(u32),
    /// The process has ended; last frame.
    Exited(ExitReport),
    /// Bytes of a file.
    Data(Bytes),
    /// The operation is complete; last frame.
    Done,
    /// The operation failed; last frame.
    Failed(Failure),
    /// The run's policy in its canonical form, JSON.
    Policy(String),
    /// The operation was refused or failed, and somebody can act; last frame.
    Refused(Refusal),
}

/// A failure with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// A sentence; control characters are escaped.
    pub(crate) message: String,
    /// What to do.
    pub(crate) hint: String,
}

impl Refusal {
    /// Says why, and what to do.
    pub(crate) fn new(message: impl std::fmt::Display, hint: impl std::fmt::Display) -> Self {
        let escaped = |text: String| crate::terminal::escape(&text);
        Self {
            message: escaped(message.to_string()),
            hint: escaped(hint.to_string()),
        }
    }
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// A sentence; control characters are escaped.
    pub(crate) message: String,
    /// errno of the guest, if it was the guest's answer.
    pub(crate) errno: Option<i32>,
}

impl Failure {
    /// A failure that is not the guest's.
    pub(crate) fn new(message: impl std::fmt::Display) -> Self {
        Self {
            message: crate::terminal::escape(&message.to_string()),
            errno: None,
        }
    }
}

impl From<guest_control::ControlError> for Failure {
    fn from(error: guest_control::ControlError) -> Self {
        let errno = match &error {
            guest_control::ControlError::Guest { errno, .. } => *errno,
            _ => None,
        };
        Self {
            errno,
            ..Self::new(error)
        }
    }
}

/// An active run, as people are shown it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunInfo {
    /// Its id.
    pub(crate) run_id: RunId,
    /// Its profile.
    pub(crate) profile: ProfileName,
    /// What it is at, such as `running`.
    pub(crate) phase: String,
    /// Since when, seconds since the Unix epoch.
    pub(crate) since_unix: u64,
}

/// One end of a control connection.
pub(crate) type Connection = Framed<UnixStream, LengthDelimitedCodec>;

/// Frames a connected socket.
pub(crate) fn frame(stream: UnixStream) -> Connection {
    LengthDelimitedCodec::builder()
        .max_frame_length(MAX_FRAME)
        .new_framed(stream)
}

/// Sends one frame.
pub(crate) async fn send<S>(sink: &mut S, frame: &impl Serialize) -> io::Result<()>
where
    S: Sink<Bytes, Error = io::Error> + Unpin,
{
    let bytes = postcard::to_stdvec(frame).map_err(io::Error::other)?;
    sink.send(bytes.into()).await
}

/// Receives one frame; `None` at the end of the connection.
pub(crate) async fn receive<T, S>(stream: &mut S) -> io::Result<Option<T>>
where
    T: DeserializeOwned,
    S: Stream<Item = io::Result<BytesMut>> + Unpin,
{
    match stream.next().await {
        None => Ok(None),
        Some(bytes) => match postcard::from_bytes(&bytes?) {
            Ok(frame) => Ok(Some(frame)),
            Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_ids_and_names_survive_the_binary_format() {
        let info = RunInfo {
            run_id: RunId::random(),
            profile: "vm0/small".parse().unwrap(),
            phase: "running".to_owned(),
            since_unix: 1,
        };
        let bytes = postcard::to_stdvec(&info).unwrap();
        assert_eq!(postcard::from_bytes::<RunInfo>(&bytes).unwrap(), info);
    }

    proptest::proptest! {
        #[test]
        fn garbage_is_an_error_and_never_a_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..512)) {
            let _ = postcard::from_bytes::<Request>(&bytes);
            let _ = postcard::from_bytes::<Input>(&bytes);
            let _ = postcard::from_bytes::<Reply>(&bytes);
        }
    }
}
