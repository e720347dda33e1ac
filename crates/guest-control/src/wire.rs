//! The bytes on the stream.
//!
//! A frame is a big-endian `u32` length ([`LengthDelimitedCodec`]) and that many bytes: one postcard-encoded
//! [`ToGuest`] or [`ToHost`], and, for the kinds that say so, raw payload up to the end of the frame. Payload stays
//! outside postcard so that bulk data is copied, never walked byte by byte.
//!
//! Every operation has an id chosen by the host and used once. Data in either direction is limited by a window: the
//! sender starts with [`WINDOW`] bytes and gets more by `Credit` messages, so what a receiver must hold is bounded
//! whatever the other end does.

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio_util::codec::LengthDelimitedCodec;

use crate::types::{
    ExecSpec, ExitReport, FileSpec, GuestStats, MountSource, PtySize, Stream, Wake,
};

/// Longest frame, without its length prefix.
pub(crate) const MAX_FRAME: usize = 64 * 1024;
/// Longest payload in a frame; the rest is room for the message before it.
pub(crate) const MAX_PAYLOAD: usize = MAX_FRAME - 1024;
/// Bytes of data an operation may have in flight in one direction before the receiver grants more.
pub(crate) const WINDOW: u32 = 256 * 1024;
/// Longest encoded request; a request longer than a frame travels in fragments. Twice what an exec may carry
/// (2 MiB of environment), so that the limit that users meet is a speaking one.
pub(crate) const MAX_REQUEST: usize = 4 * 1024 * 1024;
/// First bytes of a handshake.
pub(crate) const MAGIC: [u8; 4] = *b"vm0c";
/// Version of everything in this module. Both ends come from one build, so there is no negotiation: a mismatch means
/// an image built by another version.
pub const VERSION: u16 = 1;

/// Names an operation. Chosen by the host, never reused within a connection.
pub(crate) type OpId = u32;
/// The host's random challenge, echoed by the guest.
pub(crate) type Nonce = [u8; 16];

/// Messages from host to guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToGuest {
    /// Begins a connection.
    Hello {
        magic: [u8; 4],
        version: u16,
        nonce: Nonce,
    },
    /// Answered by `Pong` ahead of everything else.
    Ping { op: OpId },
    /// Payload: a piece of an encoded [`Request`].
    Part { op: OpId, last: bool },
    /// Payload: stdin or file contents.
    Data { op: OpId },
    /// End of stdin or file.
    End { op: OpId },
    /// The host has room for so many bytes more.
    Credit { op: OpId, bytes: u32 },
    /// Signal for a session's process group.
    Signal { op: OpId, signal: i32 },
    /// New size of a session's terminal.
    Resize { op: OpId, size: PtySize },
    /// Kills a session's cgroup, abandons a file transfer.
    Abort { op: OpId },
}

/// Messages from guest to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToHost {
    /// Answer to the handshake.
    Hello { version: u16, nonce: Nonce },
    /// Answer to a ping.
    Pong { op: OpId },
    /// Answer to a request; ends the operation, except for [`Reply::Started`].
    Reply {
        op: OpId,
        result: Result<Reply, Failure>,
    },
    /// Payload: output or file contents.
    Data { op: OpId, stream: Stream },
    /// The process does not read its stdin any more.
    InputClosed { op: OpId },
    /// The guest has room for so many bytes more.
    Credit { op: OpId, bytes: u32 },
    /// A session's process ended; all its output was sent before. Ends the operation.
    Exit { op: OpId, report: ExitReport },
}

/// What the host asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Exec(ExecSpec),
    Wake(Wake),
    Mount(MountSource),
    Unmount,
    KillAll,
    Quiesce,
    Shutdown,
    Stats,
    ReadFile { path: String },
    WriteFile(FileSpec),
}

/// Successful answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply {
    Done,
    /// The session's process runs.
    Started {
        pid: u32,
    },
    Stats(GuestStats),
    /// A file was transferred whole.
    Length(u64),
}

/// Unsuccessful answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) errno: Option<i32>,
    pub(crate) message: String,
}

/// What is wrong with bytes that are not the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a frame is longer than 64 KiB")]
    FrameTooLong,
    #[error("a frame does not hold a message")]
    NotAMessage,
    #[error("a message is followed by {0} bytes that do not belong to it")]
    TrailingBytes(usize),
}

/// The codec both ends use.
pub(crate) fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder()
        .max_frame_length(MAX_FRAME)
        .new_codec()
}

/// Encodes a message and its payload as one frame's contents.
pub(crate) fn encode<M: Serialize>(message: &M, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(32 + payload.len());
    encode_into(message, &mut frame);
    frame.extend_from_slice(payload);
    frame.freeze()
}

/// Appends an encoded message to `frame`.
pub(crate) fn encode_into<M: Serialize>(message: &M, frame: &mut BytesMut) {
    // Writing to memory cannot fail and our message types serialise without errors of their own; were that ever to
    // change, the other end would see an empty frame and report it.
    if let Ok(bytes) = postcard::to_stdvec(message) {
        frame.extend_from_slice(&bytes);
    }
}

/// Decodes what the guest sent; the second value is the payload.
pub(crate) fn decode_to_host(frame: &[u8]) -> Result<(ToHost, &[u8]), WireError> {
    let (message, payload) =
        postcard::take_from_bytes::<ToHost>(frame).map_err(|_| WireError::NotAMessage)?;
    if !matches!(message, ToHost::Data { .. }) && !payload.is_empty() {
        return Err(WireError::TrailingBytes(payload.len()));
    }
    Ok((message, payload))
}

/// Decodes what the host sent; the second value is the payload.
pub(crate) fn decode_to_guest(frame: &[u8]) -> Result<(ToGuest, &[u8]), WireError> {
    let (message, payload) =
        postcard::take_from_bytes::<ToGuest>(frame).map_err(|_| WireError::NotAMessage)?;
    let carries = matches!(message, ToGuest::Data { .. } | ToGuest::Part { .. });
    if !carries && !payload.is_empty() {
        return Err(WireError::TrailingBytes(payload.len()));
    }
    Ok((message, payload))
}

/// Decodes an assembled request.
pub(crate) fn decode_request(bytes: &[u8]) -> Result<Request, WireError> {
    match postcard::take_from_bytes::<Request>(bytes) {
        Ok((request, [])) => Ok(request),
        Ok((_, rest)) => Err(WireError::TrailingBytes(rest.len())),
        Err(_) => Err(WireError::NotAMessage),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::ExitStatus;

    fn to_guest() -> impl Strategy<Value = ToGuest> {
        prop_oneof![
            any::<Nonce>().prop_map(|nonce| ToGuest::Hello {
                magic: MAGIC,
                version: VERSION,
                nonce
            }),
            any::<u32>().prop_map(|op| ToGuest::Ping { op }),
            any::<u32>().prop_map(|op| ToGuest::End { op }),
            (any::<u32>(), any::<u32>()).prop_map(|(op, bytes)| ToGuest::Credit { op, bytes }),
            (any::<u32>(), any::<i32>()).prop_map(|(op, signal)| ToGuest::Signal { op, signal }),
            (any::<u32>(), any::<u16>(), any::<u16>()).prop_map(|(op, rows, cols)| {
                ToGuest::Resize {
                    op,
                    size: PtySize { rows, cols },
                }
            }),
            any::<u32>().prop_map(|op| ToGuest::Abort { op }),
        ]
    }

    fn to_host() -> impl Strategy<Value = ToHost> {
        let failure = (any::<Option<i32>>(), ".{0,40}")
            .prop_map(|(errno, message)| Failure { errno, message });
        prop_oneof![
            any::<u32>().prop_map(|op| ToHost::Pong { op }),
            (any::<u32>(), failure).prop_map(|(op, failure)| ToHost::Reply {
                op,
                result: Err(failure)
            }),
            (any::<u32>(), any::<u32>()).prop_map(|(op, pid)| ToHost::Reply {
                op,
                result: Ok(Reply::Started { pid })
            }),
            any::<u32>().prop_map(|op| ToHost::InputClosed { op }),
            (any::<u32>(), any::<i32>(), any::<u64>()).prop_map(|(op, code, free)| ToHost::Exit {
                op,
                report: ExitReport {
                    status: ExitStatus::Exited(code),
                    oom_kills: 1,
                    pids_limit_hits: 2,
                    disk_free_bytes: free,
                }
            }),
        ]
    }

    proptest! {
        #[test]
        fn messages_survive_the_journey(guest in to_guest(), host in to_host()) {
            let frame = encode(&guest, &[]);
            prop_assert_eq!(decode_to_guest(&frame), Ok((guest, &[][..])));
            let frame = encode(&host, &[]);
            prop_assert_eq!(decode_to_host(&frame), Ok((host, &[][..])));
        }

        #[test]
        fn payload_comes_out_as_it_went_in(op in any::<u32>(), data in prop::collection::vec(any::<u8>(), 0..500)) {
            let frame = encode(&ToGuest::Data { op }, &data);
            prop_assert_eq!(decode_to_guest(&frame), Ok((ToGuest::Data { op }, &data[..])));
            let message = ToHost::Data { op, stream: Stream::Stderr };
            let frame = encode(&message, &data);
            prop_assert_eq!(decode_to_host(&frame), Ok((message, &data[..])));
        }

        #[test]
        fn a_message_cut_short_or_with_something_behind_is_refused(guest in to_guest(), cut in 0usize..4, more in 1usize..4) {
            let frame = encode(&guest, &[]);
            let short = frame.len().saturating_sub(cut + 1);
            prop_assert_eq!(decode_to_guest(&frame[..short]), Err(WireError::NotAMessage));
            let mut long = frame.to_vec();
            long.extend(vec![0; more]);
            prop_assert_eq!(decode_to_guest(&long), Err(WireError::TrailingBytes(more)));
        }

        #[test]
        fn any_bytes_decode_to_something_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_to_host(&bytes);
            let _ = decode_to_guest(&bytes);
            let _ = decode_request(&bytes);
        }
    }
}
