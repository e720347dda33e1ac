//! One exec session in the guest: pumps output to the host and input to the process until both are done.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

use super::fd::watch;
use super::flow::Flow;
use super::os::{Os, Process, Stdio};
use super::state::Shared;
use crate::types::{ExitReport, ExitStatus, Stream};
use crate::wire::{self, MAX_PAYLOAD, OpId, ToHost, WINDOW};

/// How long output is waited for once the process itself has ended: a background child may keep the pipe open for ever.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// Output still taken when that time is over: what a pipe can hold at most without privileges.
const LAST_BYTES: usize = 1024 * 1024;
/// End of transmission: what a terminal in canonical mode takes for the end of input.
const EOT: &[u8] = &[4];

/// A process's descriptors, registered with the event loop.
pub(super) enum Ends {
    Pipes {
        stdin: Option<AsyncFd<OwnedFd>>,
        stdout: AsyncFd<OwnedFd>,
        stderr: AsyncFd<OwnedFd>,
    },
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

impl Ends {
    pub(super) fn new(stdio: Stdio) -> io::Result<Self> {
        Ok(match stdio {
            Stdio::Pipes {
                stdin,
                stdout,
                stderr,
            } => Ends::Pipes {
                stdin: match stdin {
                    Some(fd) => Some(watch(fd, Interest::WRITABLE)?),
                    None => None,
                },
                stdout: watch(stdout, Interest::READABLE)?,
                stderr: watch(stderr, Interest::READABLE)?,
            },
            Stdio::Terminal(master) => Ends::Terminal(Arc::new(watch(
                master,
                Interest::READABLE | Interest::WRITABLE,
            )?)),
        })
    }
}

/// What a read shorter than the buffer says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reads {
    /// Nothing more is there (a pipe).
    ShortMeansEmpty,
    /// Nothing (a terminal).
    MayBeShort,
}

/// Limits and wishes of the session.
pub(super) struct Wishes {
    pub(super) timeout: Option<Duration>,
    pub(super) kill_group_on_exit: bool,
}

/// Runs the session to its end and queues its exit report.
pub(super) async fn run<O: Os>(
    shared: Arc<Shared<O>>,
    op: OpId,
    flow: Arc<Flow>,
    process: Arc<O::Process>,
    ends: Ends,
    wishes: Wishes,
) {
    let pump = Pump {
        shared: &shared,
        op,
        flow: &flow,
    };
    let report = match ends {
        Ends::Pipes {
            stdin,
            stdout,
            stderr,
        } => {
            let output = async {
                tokio::join!(
                    pump.output(&stdout, Stream::Stdout, Reads::ShortMeansEmpty),
                    pump.output(&stderr, Stream::Stderr, Reads::ShortMeansEmpty)
                );
            };
            let input = async {
                // Dropped at the end of the input: that is how the process sees it.
                if let Some(stdin) = stdin {
                    pump.input(&stdin).await;
                }
            };
            attend(&*process, &flow, &wishes, output, input).await
        }
        Ends::Terminal(master) => {
            let output = pump.output(&master, Stream::Stdout, Reads::MayBeShort);
            let input = async {
                pump.input(&master).await;
                // A terminal that nobody holds any more needs no end of input.
                let _ = write_all(&master, EOT).await;
            };
            attend(&*process, &flow, &wishes, output, input).await
        }
    };
    shared.finish(op, &ToHost::Exit { op, report });
}

/// Waits for the process's end and its output, in whatever order they come.
async fn attend<P: Process>(
    process: &P,
    flow: &Flow,
    wishes: &Wishes,
    output: impl Future<Output = ()>,
    input: impl Future<Output = ()>,
) -> ExitReport {
    tokio::pin!(output, input);
    let ended = wait(process, wishes.timeout);
    tokio::pin!(ended);
    let (mut output_done, mut input_done) = (false, false);
    let status = loop {
        tokio::select! {
            status = &mut ended => break status,
            () = &mut output, if !output_done => output_done = true,
            () = &mut input, if !input_done => input_done = true,
        }
    };
    let report = process.report(status);
    if wishes.kill_group_on_exit {
        process.kill_rest().await;
    }
    if !output_done
        && tokio::time::timeout(DRAIN_LIMIT, &mut output)
            .await
            .is_err()
    {
        flow.end_output();
        output.await;
    }
    report
}

async fn wait<P: Process>(process: &P, timeout: Option<Duration>) -> ExitStatus {
    let Some(timeout) = timeout else {
        return process.wait().await;
    };
    match tokio::time::timeout(timeout, process.wait()).await {
        Ok(status) => status,
        Err(_) => {
            process.kill();
            process.wait().await;
            ExitStatus::TimedOut
        }
    }
}

struct Pump<'a, O: Os> {
    shared: &'a Shared<O>,
    op: OpId,
    flow: &'a Flow,
}

impl<O: Os> Pump<'_, O> {
    /// Sends what `fd` yields until its end.
    async fn output(&self, fd: &AsyncFd<OwnedFd>, stream: Stream, reads: Reads) {
        // Once output is over, what is in the pipe is still sent, but nothing is waited for.
        let mut last = None;
        loop {
            let guard = if last.is_none() {
                tokio::select! {
                    biased;
                    ready = fd.readable() => match ready {
                        Ok(guard) => Some(guard),
                        Err(_) => return,
                    },
                    () = self.flow.output_over() => {
                        last = Some(LAST_BYTES);
                        None
                    }
                }
            } else {
                None
            };
            let wanted = MAX_PAYLOAD.min(last.unwrap_or(MAX_PAYLOAD));
            if wanted == 0 {
                return;
            }
            let Ok(room) = self
                .flow
                .room(u32::try_from(wanted).unwrap_or(WINDOW))
                .await
            else {
                return;
            };
            let result = self
                .shared
                .read(fd.as_fd(), room, |data| self.frame(stream, data));
            match result {
                Ok((0, _)) => {
                    self.flow.unused(room);
                    return;
                }
                Ok((length, frame)) => {
                    self.flow.unused(room - length);
                    self.shared.send(|outbox| outbox.bulk(self.op, frame));
                    if let Some(left) = &mut last {
                        *left -= wanted.min(length as usize);
                    } else if reads == Reads::ShortMeansEmpty
                        && length < room
                        && let Some(mut guard) = guard
                    {
                        // Saves a read that would find nothing. A later write raises readiness again, and that the
                        // writers are gone is remembered apart from it.
                        guard.clear_ready_matching(Ready::READABLE);
                    }
                }
                Err(error) => {
                    self.flow.unused(room);
                    match error {
                        Errno::AGAIN if last.is_none() => {
                            if let Some(mut guard) = guard {
                                guard.clear_ready();
                            }
                        }
                        Errno::INTR => {}
                        // EIO is how a terminal ends.
                        _ => return,
                    }
                }
            }
        }
    }

    fn frame(&self, stream: Stream, data: &[u8]) -> Bytes {
        let mut frame = BytesMut::with_capacity(16 + data.len());
        wire::encode_into(
            &ToHost::Data {
                op: self.op,
                stream,
            },
            &mut frame,
        );
        frame.extend_from_slice(data);
        frame.freeze()
    }

    /// Writes the host's input to `fd` until its end.
    async fn input(&self, fd: &AsyncFd<OwnedFd>) {
        let mut owed = 0u32;
        while let Ok(Some(piece)) = self.flow.input().await {
            if write_all(fd, &piece).await.is_err() {
                let frame = wire::encode(&ToHost::InputClosed { op: self.op }, &[]);
                self.shared.send(|outbox| outbox.control(frame));
                return;
            }
            owed += u32::try_from(piece.len()).unwrap_or(WINDOW);
            if owed >= WINDOW / 4 {
                self.flow.consumed(owed);
                self.shared.send(|outbox| outbox.credit(self.op, owed));
                owed = 0;
            }
        }
    }
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let mut guard = fd.writable().await?;
        match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
            Ok(Ok(written)) => data = data.get(written..).unwrap_or_default(),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}
