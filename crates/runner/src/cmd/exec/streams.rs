//! Threads that read stdin and write stdout, so that neither a slow reader nor a silent writer holds up signals.
//!
//! They use blocking calls on purpose: making the shared descriptors non-blocking would change them for the
//! user's shell too.

use std::io::{self, Read, Write};
use std::thread::JoinHandle;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::context::CliError;
use crate::control::protocol::CHUNK;

/// Read from stdin.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Bytes.
    Data(Bytes),
    /// It cannot be read.
    Failed(io::Error),
}

/// Starts reading stdin; the channel closes at its end. The thread lives until its read returns, at most until the
/// process ends.
pub(crate) fn read_stdin() -> mpsc::Receiver<Piece> {
    let (sender, receiver) = mpsc::channel(2);
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            let piece = match io::stdin().lock().read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => Piece::Data(Bytes::copy_from_slice(
                    buffer.get(..length).unwrap_or_default(),
                )),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Piece::Failed(error),
            };
            let last = matches!(piece, Piece::Failed(_));
            if sender.blocking_send(piece).is_err() || last {
                return;
            }
        }
    });
    receiver
}

/// Writes output in the order it came.
#[derive(Debug)]
pub(crate) struct Printer {
    pieces: mpsc::Sender<(bool, Bytes)>,
    thread: JoinHandle<io::Result<()>>,
}

impl Printer {
    /// Starts it.
    pub(crate) fn start() -> Self {
        let (pieces, mut queue) = mpsc::channel::<(bool, Bytes)>(8);
        let thread = std::thread::spawn(move || {
            while let Some((stderr, data)) = queue.blocking_recv() {
                if stderr {
                    io::stderr().lock().write_all(&data)?;
                } else {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(&data)?;
                    stdout.flush()?;
                }
            }
            Ok(())
        });
        Self { pieces, thread }
    }

    /// Queues a piece; waits when the reader of our output is slow. Fails when it is gone.
    pub(crate) async fn print(&self, stderr: bool, data: Bytes) -> Result<(), CliError> {
        self.pieces
            .send((stderr, data))
            .await
            .map_err(|_| CliError::stdout(io::ErrorKind::BrokenPipe.into()))
    }

    /// Waits until everything is written.
    pub(crate) fn finish(self) -> Result<(), CliError> {
        drop(self.pieces);
        match self.thread.join() {
            Ok(result) => result.map_err(CliError::stdout),
            Err(_) => Err(CliError::failed("the thread that prints output panicked")),
        }
    }
}
