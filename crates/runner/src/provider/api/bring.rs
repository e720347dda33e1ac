//! Bringing what a run says and how it ended: its logs as they grow, and last its answer.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api_types::runner::{Complete, LeaseRef, Upload, UploadKind};
use api_types::{ProblemKind, RunId, RunnerId};
use host::fs::{Access, Dir};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::client::CallError;
use super::feed::Tail;
use super::{Inner, Pause};
use crate::home::rel;
use crate::queue::JobResult;

/// How often the logs are looked at while a run runs.
const LOOK: Duration = Duration::from_millis(300);

/// How long the run's logs were when it was claimed: what an earlier claim wrote at this home is not brought again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LogStarts {
    output: u64,
    network: u64,
}

impl LogStarts {
    /// As long as they are now.
    pub(super) fn now(home: &Dir, run: RunId) -> Self {
        let length = |path: PathBuf| {
            let found = home.metadata(path).ok().flatten();
            found.map_or(0, |meta| meta.len())
        };
        Self {
            output: length(rel::system_log(&run)),
            network: length(rel::network_log(&run)),
        }
    }
}

/// One log of the run.
struct Log {
    kind: UploadKind,
    path: PathBuf,
    file: Option<File>,
    tail: Tail,
    /// The API takes no more of it.
    closed: bool,
}

/// Who speaks of which claim.
#[derive(Clone, Copy)]
struct Speaker {
    lease: LeaseRef,
    runner: RunnerId,
}

/// Brings everything of one claim, and ends when its answer is taken or never will be.
pub(super) async fn run(
    inner: Arc<Inner>,
    lease: LeaseRef,
    runner: RunnerId,
    starts: LogStarts,
    mut answer: watch::Receiver<Option<JobResult>>,
) {
    let speaker = Speaker { lease, runner };
    let log = |kind, path, start| Log {
        kind,
        path,
        file: None,
        tail: Tail::behind(start),
        closed: false,
    };
    let mut logs = [
        log(
            UploadKind::Output,
            rel::system_log(&lease.run_id),
            starts.output,
        ),
        log(
            UploadKind::Network,
            rel::network_log(&lease.run_id),
            starts.network,
        ),
    ];
    let mut pause = Pause::default();
    loop {
        // Looked at before the logs: an answer means that they are whole.
        let result = answer.borrow_and_update().clone();
        match bring(&inner, speaker, &mut logs, result.as_ref()).await {
            Ok(()) if result.is_some() => return inner.delivered(lease.run_id),
            Ok(()) => {
                pause = Pause::default();
                tokio::select! {
                    () = tokio::time::sleep(LOOK) => {}
                    changed = answer.changed() => if changed.is_err() {
                        // Forgotten: lost, or given back.
                        return;
                    },
                }
            }
            Err(error) => {
                tracing::debug!(run = %lease.run_id, %error, "not brought yet");
                tokio::select! {
                    () = pause.wait(Some(&error)) => {}
                    changed = answer.changed(), if result.is_none() => if changed.is_err() {
                        return;
                    },
                }
            }
        }
    }
}

/// Brings all that there is now. An error means that it is worth trying again.
async fn bring(
    inner: &Inner,
    speaker: Speaker,
    logs: &mut [Log],
    result: Option<&JobResult>,
) -> Result<(), CallError> {
    for log in logs.iter_mut() {
        while !log.closed {
            if !step(inner, speaker, log, result.is_some()).await? {
                break;
            }
        }
    }
    let Some(result) = result else {
        return Ok(());
    };
    let run = result.run_id;
    let body = Complete {
        runner_id: speaker.runner,
        epoch: speaker.lease.epoch,
        exit_code: result.exit_code,
        error: result.error.clone(),
    };
    match inner.api.complete(run, &body).await {
        Ok(()) => {
            tracing::info!(%run, "the API has the answer");
            Ok(())
        }
        Err(error) if error.may_pass() => Err(error),
        Err(error) => {
            tracing::warn!(%run, %error, "the API does not take the answer; it is dropped");
            Ok(())
        }
    }
}

/// Brings one piece; false if there is none.
async fn step(
    inner: &Inner,
    speaker: Speaker,
    log: &mut Log,
    ended: bool,
) -> Result<bool, CallError> {
    let run = speaker.lease.run_id;
    let file = match &log.file {
        Some(file) => file,
        None => match inner.home.open_file(&log.path, Access::Read) {
            Ok(file) => log.file.insert(file),
            Err(error) => {
                // It is made when the job starts.
                if ended && !error.is_not_found() {
                    tracing::warn!(%run, %error, "a log cannot be brought");
                }
                return Ok(false);
            }
        },
    };
    let piece = match log.tail.next(file, ended) {
        Ok(Some(piece)) => piece,
        Ok(None) => return Ok(false),
        Err(error) => {
            tracing::warn!(%run, %error, "a log cannot be read; the rest of it is not brought");
            log.closed = true;
            return Ok(false);
        }
    };
    let body = Upload {
        runner_id: speaker.runner,
        epoch: speaker.lease.epoch,
        kind: log.kind,
        start: piece.start,
        text: piece.text.clone(),
    };
    let wanted = match inner.api.upload(run, &body).await {
        Ok(uploaded) if uploaded.next == piece.end() => {
            log.tail.brought(&piece);
            return Ok(true);
        }
        // It had some of it, from a process before us.
        Ok(uploaded) => uploaded.next,
        Err(CallError::Refused(problem)) if problem.code == ProblemKind::Gap => {
            problem.next.unwrap_or_default()
        }
        Err(error) if error.may_pass() => return Err(error),
        Err(error) => {
            if !error.is_over() {
                tracing::warn!(%run, %error, "the API takes no more of a log");
            }
            log.closed = true;
            return Ok(false);
        }
    };
    if let Err(error) = log.tail.go_to(file, wanted) {
        tracing::warn!(%run, %error, "a log does not fit to what the API has of it; the rest is not brought");
        log.closed = true;
        return Ok(false);
    }
    Ok(true)
}
