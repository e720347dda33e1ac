//! Files streamed out of and into the guest.
//!
//! Reads and writes of regular files never wait for another process, so they are done in place, a frame's worth at a
//! time with other work in between.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::flow::{Aborted, Flow};
use super::os::{Os, OsError};
use super::state::Shared;
use crate::types::{FileSpec, Stream};
use crate::wire::{self, MAX_PAYLOAD, OpId, Reply, ToHost, WINDOW};

/// Sends a file to the host.
pub(super) async fn send<O: Os>(shared: Arc<Shared<O>>, op: OpId, flow: Arc<Flow>, path: String) {
    let result = match shared.os.open(&path) {
        Ok(file) => send_open(&shared, op, &flow, &file, &path).await,
        Err(error) => Err(error),
    };
    shared.reply(op, result);
}

async fn send_open<O: Os>(
    shared: &Shared<O>,
    op: OpId,
    flow: &Flow,
    file: &File,
    path: &str,
) -> Result<Reply, OsError> {
    let mut sent = 0u64;
    let wanted = u32::try_from(MAX_PAYLOAD).unwrap_or(WINDOW);
    loop {
        let room = flow.room_unless_aborted(wanted).await.map_err(aborted)?;
        let message = ToHost::Data {
            op,
            stream: Stream::Stdout,
        };
        let (length, frame) =
            match shared.read(file.as_fd(), room, |data| wire::encode(&message, data)) {
                Ok(read) => read,
                Err(error) => return Err(OsError::new(format_args!("reading {path:?}"), error)),
            };
        flow.unused(room - length);
        if length == 0 {
            return Ok(Reply::Length(sent));
        }
        sent += u64::from(length);
        shared.send(|outbox| outbox.bulk(op, frame));
        tokio::task::yield_now().await;
    }
}

/// Takes a file from the host.
pub(super) async fn receive<O: Os>(
    shared: Arc<Shared<O>>,
    op: OpId,
    flow: Arc<Flow>,
    spec: FileSpec,
) {
    let result = match shared.os.create(&spec) {
        Ok(file) => receive_open(&shared, op, &flow, file, &spec.path).await,
        Err(error) => Err(error),
    };
    shared.reply(op, result);
}

async fn receive_open<O: Os>(
    shared: &Shared<O>,
    op: OpId,
    flow: &Flow,
    mut file: O::NewFile,
    path: &str,
) -> Result<Reply, OsError> {
    let mut taken = 0u64;
    let mut owed = 0u32;
    while let Some(piece) = flow.input().await.map_err(aborted)? {
        file.write_all(&piece)
            .map_err(|error| OsError::new(format_args!("writing {path:?}"), error))?;
        taken += piece.len() as u64;
        owed += u32::try_from(piece.len()).unwrap_or(WINDOW);
        if owed >= WINDOW / 4 {
            flow.consumed(owed);
            shared.send(|outbox| outbox.credit(op, owed));
            owed = 0;
        }
        tokio::task::yield_now().await;
    }
    shared.os.commit(file)?;
    Ok(Reply::Length(taken))
}

fn aborted(_: Aborted) -> OsError {
    OsError::new("the transfer was given up", Errno::CANCELED)
}
