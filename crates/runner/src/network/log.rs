//! `logs/network-<run>.jsonl`: one line for each exchange of a job, as it ends. The daemon is its only writer.

use std::fs::File;
use std::io::Write;

use host::fs::{Access, Dir, FsError};
use policy::log::Line;

use crate::home::rel;
use crate::names::RunId;

/// The open log of one run.
#[derive(Debug)]
pub(crate) struct NetworkLog {
    file: File,
    run: RunId,
    /// Bytes of whole lines, where that is known.
    length: Option<u64>,
    /// Bytes that may still be written.
    room: u64,
    /// Lines beyond the cap, or that the disk refused.
    lost: u64,
}

impl NetworkLog {
    /// Opens the log of `run` in the home, making it where it is missing. `cap` is in bytes.
    pub(crate) fn create(home: &Dir, run: RunId, cap: u64) -> Result<Self, FsError> {
        let file = home.open_file(rel::network_log(&run), Access::Append { mode: 0o600 })?;
        let length = file.metadata().ok().map(|metadata| metadata.len());
        Ok(Self {
            file,
            run,
            length,
            room: cap,
            lost: 0,
        })
    }

    /// Appends a line, in one piece.
    pub(crate) fn write(&mut self, line: &Line) {
        let text = line.to_json_line();
        let length = text.len() as u64;
        if length > self.room {
            // Shorter ones may still fit, but a log with holes is worse than one that ends.
            self.room = 0;
            if self.lost == 0 {
                tracing::warn!(run = %self.run, "the job's network log is full, and lacks what the job does from now on");
            }
            self.lost = self.lost.saturating_add(1);
            return;
        }
        match self.file.write_all(text.as_bytes()) {
            Ok(()) => {
                self.length = self.length.and_then(|whole| whole.checked_add(length));
                self.room = self.room.saturating_sub(length);
            }
            Err(error) => {
                // Half a line, on a disk that is full, would spoil the next one.
                let mended = self
                    .length
                    .is_some_and(|whole| self.file.set_len(whole).is_ok());
                if self.lost == 0 {
                    tracing::error!(run = %self.run, %error, mended, "the job's network log cannot be written");
                }
                self.lost = self.lost.saturating_add(1);
            }
        }
    }

    /// How many lines are missing.
    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"timestamp":"2026-01-31T12:00:00.000Z","type":"tcp","action":"ALLOW","rule":null,"host":"a.example.com","port":443,"latency_ms":1,"request_size":2,"response_size":3,"error":null}"#;

    #[test]
    fn lines_are_in_the_file_at_once_and_the_cap_ends_it() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("logs")).unwrap();
        let home = Dir::open(root.path()).unwrap();
        let run = RunId::random();
        let line = Line::parse(LINE).unwrap();
        let cap = 2 * line.to_json_line().len() as u64 + 10;
        let mut log = NetworkLog::create(&home, run, cap).unwrap();
        for _ in 0..4 {
            log.write(&line);
        }
        let text = std::fs::read_to_string(root.path().join(rel::network_log(&run))).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().all(|text| Line::parse(text).unwrap() == line));
        assert_eq!(log.lost(), 2);
    }
}
