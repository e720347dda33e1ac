//! `logs/system-<run>.log`: what the agent printed, as it prints it.
//!
//! Every piece is written at once, so that `tail -f` and `runner logs --follow` see it while the job runs. The file
//! has a cap; what comes beyond it is counted and the cut is marked, so that a guest which floods its output fills
//! neither the disk nor anybody's patience. A disk that is full does not fail the job: the log says what is missing
//! as soon as it can, and the daemon's own log says why.

use std::fs::File;
use std::io::Write;

use host::fs::{Access, Dir, FsError};

use crate::home::rel;
use crate::names::RunId;

/// The open log of one run. Written by one task.
#[derive(Debug)]
pub(crate) struct RunLog {
    file: File,
    run: RunId,
    /// Bytes that may still be written.
    room: u64,
    /// Bytes beyond the cap.
    cut: u64,
    /// Bytes the disk refused.
    lost: u64,
}

impl RunLog {
    /// Opens the log of `run` in the home, making it where it is missing. `cap` is in bytes.
    pub(crate) fn create(home: &Dir, run: RunId, cap: u64) -> Result<Self, FsError> {
        let file = home.open_file(rel::system_log(&run), Access::Append { mode: 0o600 })?;
        Ok(Self {
            file,
            run,
            room: cap,
            cut: 0,
            lost: 0,
        })
    }

    /// Appends a piece of output.
    pub(crate) fn write(&mut self, data: &[u8]) {
        let length = data.len() as u64;
        let (kept, beyond) =
            match data.split_at_checked(usize::try_from(self.room).unwrap_or(usize::MAX)) {
                Some((kept, beyond)) => (kept, beyond.len() as u64),
                None => (data, 0),
            };
        self.cut = self.cut.saturating_add(beyond);
        self.room = self.room.saturating_sub(length);
        if kept.is_empty() {
            return;
        }
        if let Err(error) = self.file.write_all(kept) {
            if self.lost == 0 {
                tracing::error!(run = %self.run, %error, "the job's system log cannot be written");
            }
            self.lost = self.lost.saturating_add(kept.len() as u64);
        }
    }

    /// Adds a line of the runner's own, such as why the job was ended; never cut.
    pub(crate) fn note(&mut self, text: &str) {
        if let Err(error) = writeln!(self.file, "[runner] {text}") {
            tracing::error!(run = %self.run, %error, "the job's system log cannot be written");
        }
    }

    /// Marks what is missing. Everything written is in the kernel's hands: readers see it before the result.
    pub(crate) fn finish(mut self) {
        if self.cut > 0 {
            self.note(&format!(
                "output cut here: {} more bytes were beyond the log's limit",
                self.cut
            ));
        }
        if self.lost > 0 {
            self.note(&format!(
                "{} bytes of output could not be written to this log",
                self.lost
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Dir) {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("logs")).unwrap();
        let dir = Dir::open(root.path()).unwrap();
        (root, dir)
    }

    fn text(root: &tempfile::TempDir, run: RunId) -> String {
        std::fs::read_to_string(root.path().join(rel::system_log(&run))).unwrap()
    }

    #[test]
    fn output_is_in_the_file_as_soon_as_it_is_written() {
        let (root, dir) = home();
        let run = RunId::random();
        let mut log = RunLog::create(&dir, run, 1 << 20).unwrap();
        log.write(b"one\n");
        assert_eq!(text(&root, run), "one\n");
        log.finish();
        assert_eq!(text(&root, run), "one\n");
    }

    #[test]
    fn output_beyond_the_cap_is_counted_and_the_cut_marked() {
        let (root, dir) = home();
        let run = RunId::random();
        let mut log = RunLog::create(&dir, run, 6).unwrap();
        log.write(b"1234");
        log.write(b"5678");
        log.write(b"9");
        log.finish();
        assert_eq!(
            text(&root, run),
            "123456[runner] output cut here: 3 more bytes were beyond the log's limit\n"
        );
    }

    #[test]
    fn a_link_planted_where_the_log_goes_is_refused() {
        let (root, dir) = home();
        let run = RunId::random();
        let victim = root.path().join("victim");
        std::fs::write(&victim, "kept").unwrap();
        std::os::unix::fs::symlink(&victim, root.path().join(rel::system_log(&run))).unwrap();
        assert!(RunLog::create(&dir, run, 6).is_err());
        assert_eq!(std::fs::read_to_string(victim).unwrap(), "kept");
    }
}
