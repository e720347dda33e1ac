//! Hands what comes on the agent's standard input to the CLI, until the CLI has answered.
//!
//! It is the CLI's own `stream-json`, a message in each line: the prompt, then what clients say while the agent works. The
//! agent passes bytes and knows only where a line ends, so that the CLI never gets half a message.

use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::process::ChildStdin;

use rustix::io::Errno;

/// Bytes taken at once: what a pipe holds.
const PIECE: usize = 64 * 1024;

/// The way from our standard input to the CLI's. Dropping it closes the CLI's.
pub(crate) struct Inputs {
    cli: ChildStdin,
    /// Taken and not yet given on, beyond `given`.
    piece: Vec<u8>,
    given: usize,
    /// What was taken so far ends with a whole line.
    whole: bool,
    source_ended: bool,
}

impl Inputs {
    /// Writing to `cli` must not block: a CLI that does not read is watched all the same.
    pub(crate) fn new(cli: ChildStdin) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&cli, true)?;
        Ok(Self {
            cli,
            piece: Vec::new(),
            given: 0,
            whole: true,
            source_ended: false,
        })
    }

    /// Whether nothing is under way, not even a part of a message.
    pub(crate) fn is_idle(&self) -> bool {
        self.is_empty() && (self.whole || self.source_ended)
    }

    /// Whether everything was given that there will be.
    pub(crate) fn is_over(&self) -> bool {
        self.is_empty() && self.source_ended
    }

    /// Where more comes from, while more can be taken.
    pub(crate) fn wants_to_read(&self) -> Option<BorrowedFd<'static>> {
        (self.is_empty() && !self.source_ended).then(rustix::stdio::stdin)
    }

    /// Where it goes, while there is something.
    pub(crate) fn wants_to_write(&self) -> Option<BorrowedFd<'_>> {
        (!self.is_empty()).then(|| self.cli.as_fd())
    }

    fn is_empty(&self) -> bool {
        self.given == self.piece.len()
    }

    /// Takes what is there; blocks when nothing is. Gives how many messages began.
    pub(crate) fn read(&mut self) -> usize {
        self.piece.resize(PIECE, 0);
        // Not through `Stdin`, whose buffer `poll` cannot see.
        let count = rustix::io::read(rustix::stdio::stdin(), &mut self.piece);
        // What cannot be read is at its end; a signal is no reason.
        self.source_ended = !matches!(count, Ok(1..) | Err(Errno::INTR));
        self.piece.truncate(count.unwrap_or(0));
        self.given = 0;
        self.begun()
    }

    fn begun(&mut self) -> usize {
        let mut begun = 0;
        for byte in &self.piece {
            begun += usize::from(self.whole);
            self.whole = *byte == b'\n';
        }
        begun
    }

    /// Gives on what the CLI takes at once. `false`: it takes nothing any more.
    pub(crate) fn write(&mut self) -> bool {
        let rest = self.piece.get(self.given..).unwrap_or_default();
        match self.cli.write(rest) {
            Ok(count) => self.given = self.given.saturating_add(count),
            Err(error) => {
                return matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                );
            }
        }
        true
    }
}
