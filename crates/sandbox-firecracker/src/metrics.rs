//! What Firecracker counts of a VM's devices: a line of JSON every minute, and whenever it is asked, into a named pipe in
//! its directory of sockets.
//!
//! Each line tells what was added since the line before (`SharedIncMetric` of Firecracker's `logger::metrics`), so all of
//! them are read. What comes out of the pipe is a jailed process's word and is taken as such: a line that is too long or
//! is no such JSON counts nothing.

use std::io;
use std::os::fd::OwnedFd;

use host::launcher::METRICS_PIPE;
use rustix::fs::{FileType, Mode, OFlags, fstat, openat};
use rustix::io::{Errno, read};
use sandbox::DeviceStats;
use serde::Deserialize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The pipe's path as the process knows it.
pub(crate) const METRICS_PATH: &str = "/control/metrics";
/// Longest line that is understood, bytes; Firecracker 1.16 with our devices writes about 12 000.
const MAX_LINE: usize = 64 * 1024;

/// The reading end, and the sum of what was read.
#[derive(Debug)]
pub(crate) struct Metrics {
    pipe: AsyncFd<OwnedFd>,
    lines: Lines,
    sum: DeviceStats,
}

impl Metrics {
    /// Opens the pipe in the directory `control`.
    pub(crate) fn open(control: &OwnedFd) -> io::Result<Metrics> {
        // Both ends: a pipe without a writer would say that it is at its end until Firecracker opens it.
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let pipe = openat(control, METRICS_PIPE, flags, Mode::empty())?;
        // The directory is the process's, which may have put anything there already.
        if FileType::from_raw_mode(fstat(&pipe)?.st_mode) != FileType::Fifo {
            return Err(io::Error::other(
                "the VM's process replaced its metrics pipe",
            ));
        }
        // SAFETY: an `OwnedFd` names the same open file until it is dropped, and the `AsyncFd` owns it until then.
        let pipe = unsafe { AsyncFd::register_with_interest(pipe, Interest::READABLE) }?;
        Ok(Metrics {
            pipe,
            lines: Lines::default(),
            sum: DeviceStats::default(),
        })
    }

    /// Reads what comes, and does not end. Cancel-safe.
    pub(crate) async fn follow(&mut self) -> io::Error {
        loop {
            match self.pipe.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => return error,
            }
            if let Err(error) = self.drain() {
                return error;
            }
        }
    }

    /// Reads what is there.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        let mut buffer = [0_u8; 4096];
        loop {
            match read(self.pipe.get_ref(), &mut buffer) {
                // Cannot be, while this holds a writing end.
                Ok(0) => return Ok(()),
                Ok(length) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    self.lines.feed(bytes, |line| self.sum += parse(line));
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The sum since this was last called.
    pub(crate) fn take(&mut self) -> DeviceStats {
        std::mem::take(&mut self.sum)
    }
}

/// Puts lines together, of bounded length.
#[derive(Debug, Default)]
struct Lines {
    begun: Vec<u8>,
    too_long: bool,
}

impl Lines {
    fn feed(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            self.too_long |= self.begun.len().saturating_add(text.len()) > MAX_LINE;
            if !self.too_long {
                self.begun.extend_from_slice(text);
            }
            if ended {
                if !std::mem::take(&mut self.too_long) {
                    line(&self.begun);
                }
                self.begun.clear();
            }
        }
    }
}

fn parse(line: &[u8]) -> DeviceStats {
    // A line that lost its end to a full pipe is told by the next one's being whole.
    let Counted { block, net } = serde_json::from_slice(line).unwrap_or_default();
    DeviceStats {
        disk_read_bytes: block.read_bytes,
        disk_written_bytes: block.write_bytes,
        disk_throttled: block.rate_limiter_throttled_events,
        network_sent_bytes: net.tx_bytes_count,
        network_received_bytes: net.rx_bytes_count,
        network_throttled: net
            .rx_rate_limiter_throttled
            .saturating_add(net.tx_rate_limiter_throttled),
    }
}

/// What is read of a line: the sums over all disks and all cards.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Counted {
    block: Block,
    net: Net,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Block {
    read_bytes: u64,
    write_bytes: u64,
    rate_limiter_throttled_events: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Net {
    rx_bytes_count: u64,
    tx_bytes_count: u64,
    rx_rate_limiter_throttled: u64,
    tx_rate_limiter_throttled: u64,
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::Write;

    use super::*;

    fn directory() -> (tempfile::TempDir, OwnedFd) {
        let root = tempfile::tempdir().unwrap();
        let directory = File::open(root.path()).unwrap();
        (root, directory.into())
    }

    /// The pipe's reader, and Firecracker's end of it.
    fn pipe() -> (Metrics, File) {
        let (root, control) = directory();
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(&control, METRICS_PIPE, FileType::Fifo, mode, 0).unwrap();
        let metrics = Metrics::open(&control).unwrap();
        let mut options = OpenOptions::new();
        let writer = options.read(true).write(true);
        let writer = writer.open(root.path().join(METRICS_PIPE)).unwrap();
        (metrics, writer)
    }

    #[tokio::test]
    async fn lines_add_up_until_they_are_taken() {
        let (mut metrics, mut firecracker) = pipe();
        firecracker
            .write_all(
                br#"{"utc_timestamp_ms":1,"block":{"read_bytes":5,"write_bytes":7,"rate_limiter_throttled_events":2},"net":{"tx_bytes_count":3}}
{"block":{"read_bytes":1},"net":{"rx_bytes_count":9,"rx_rate_limiter_throttled":4,"tx_rate_limiter_throttled":1}}
{"block":{"read_"#,
            )
            .unwrap();
        metrics.drain().unwrap();
        let seen = metrics.take();
        let expected = DeviceStats {
            disk_read_bytes: 6,
            disk_written_bytes: 7,
            disk_throttled: 2,
            network_sent_bytes: 3,
            network_received_bytes: 9,
            network_throttled: 5,
        };
        assert_eq!(seen, expected);
        firecracker.write_all(b"bytes\":1}}\n").unwrap();
        // The other way of reading: until something else happens.
        let rest = tokio::time::timeout(std::time::Duration::from_millis(200), metrics.follow());
        rest.await.unwrap_err();
        assert_eq!(metrics.take().disk_read_bytes, 1);
        assert_eq!(metrics.take(), DeviceStats::default());
    }

    #[tokio::test]
    async fn what_is_no_such_line_counts_nothing_and_takes_no_memory() {
        let (mut metrics, mut firecracker) = pipe();
        let long = vec![b'x'; 16 * 1024];
        for _ in 0..20 {
            firecracker.write_all(&long).unwrap();
            metrics.drain().unwrap();
        }
        assert!(metrics.lines.begun.len() <= MAX_LINE);
        firecracker
            .write_all(b"\nnonsense\n{\"block\":3}\n{\"block\":{\"read_bytes\":-1}}\n{\"block\":{\"read_bytes\":2}}\n")
            .unwrap();
        metrics.drain().unwrap();
        assert_eq!(metrics.take().disk_read_bytes, 2);
    }

    #[tokio::test]
    async fn what_the_process_put_in_the_pipe_s_place_is_not_read() {
        let (root, control) = directory();
        let place = root.path().join(METRICS_PIPE);
        std::os::unix::fs::symlink("/etc/hostname", &place).unwrap();
        assert!(Metrics::open(&control).is_err());
        std::fs::remove_file(&place).unwrap();
        std::fs::write(&place, "no pipe").unwrap();
        let error = Metrics::open(&control).unwrap_err();
        assert!(error.to_string().contains("replaced"), "{error}");
    }
}
