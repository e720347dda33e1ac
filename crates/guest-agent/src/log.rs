//! The agent's standard output, written only when that does not block.

use std::fmt;
use std::fs::File;
use std::io::{self, Write as _};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _};

use crate::api::Reporter;

/// Bytes that a pipe which polls writable takes without blocking (`PIPE_BUF`).
const CHUNK: usize = 4096;

/// Bytes that wait for a reader at most; what is printed beyond is dropped and counted.
const MAX_PENDING: usize = 64 * 1024 * 1024;

/// Text on its way to standard output.
///
/// The descriptor stays in blocking mode, as others may share it: writing no more than [`CHUNK`] after `poll`
/// said writable does not block either.
pub(crate) struct Log {
    stdout: ManuallyDrop<File>,
    pending: Vec<u8>,
    /// Bytes at the start of `pending` that are written already.
    written: usize,
    dropped: u64,
    /// Gets a copy of everything.
    reporter: Reporter,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self {
            // SAFETY: descriptor 1 is open for the whole life of the process (the runtime opens /dev/null there
            // if the parent left it closed), and ManuallyDrop keeps this borrow of it from closing it.
            stdout: ManuallyDrop::new(unsafe { File::from_raw_fd(1) }),
            pending: Vec::with_capacity(1024),
            written: 0,
            dropped: 0,
            reporter: Reporter::default(),
        }
    }

    /// The API gets a copy of what waits, and of everything from now on.
    pub(crate) fn report_to(&mut self, reporter: Reporter) {
        let waiting = self.pending.get(self.written..).unwrap_or_default();
        reporter.log(&String::from_utf8_lossy(waiting));
        self.reporter = reporter;
    }

    /// Adds one line of our own.
    pub(crate) fn line(&mut self, text: fmt::Arguments<'_>) {
        let start = self.pending.len();
        // Writing into a Vec cannot fail.
        let _infallible = writeln!(self.pending, "{text}");
        let line = self.pending.get(start..).unwrap_or_default();
        if let Ok(line) = std::str::from_utf8(line) {
            self.reporter.log(line);
        }
    }

    /// Adds text of the CLI's, ended by a newline if it has none.
    pub(crate) fn text(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        self.reporter.log(text);
        if !text.ends_with('\n') {
            self.reporter.log("\n");
        }
        if self.pending.len() - self.written + text.len() > MAX_PENDING {
            self.dropped += text.len() as u64;
            return;
        }
        if self.dropped > 0 {
            let dropped = std::mem::take(&mut self.dropped);
            self.line(format_args!("[{dropped} bytes were not read in time]"));
        }
        self.pending.extend_from_slice(text.as_bytes());
        if !text.ends_with('\n') {
            self.pending.push(b'\n');
        }
    }

    /// The descriptor to poll for writing, while there is something to write.
    pub(crate) fn wants_to_write(&self) -> Option<BorrowedFd<'_>> {
        (self.written < self.pending.len()).then(|| self.stdout.as_fd())
    }

    /// Writes one chunk. Call it when the descriptor is writable.
    pub(crate) fn write_some(&mut self) {
        let rest = self.pending.get(self.written..).unwrap_or_default();
        let chunk = rest.get(..CHUNK).unwrap_or(rest);
        match self.stdout.write(chunk) {
            Ok(n) => self.written += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Nobody reads any more. The job itself goes on.
            Err(_) => self.written = self.pending.len(),
        }
        if self.written == self.pending.len() {
            self.pending.clear();
            self.written = 0;
        }
    }

    /// Writes what is left, however long the reader takes.
    pub(crate) fn flush(&mut self) {
        if self.dropped > 0 {
            let dropped = std::mem::take(&mut self.dropped);
            self.line(format_args!("[{dropped} bytes were not read in time]"));
        }
        let rest = self.pending.get(self.written..).unwrap_or_default();
        // A reader that went away is not the job's failure.
        let _reader_gone = self.stdout.write_all(rest);
        self.pending.clear();
        self.written = 0;
    }
}
