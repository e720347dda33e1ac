//! Copying files out of a guest when its job has ended.

use guest_control::Client;
use host::fs::Access;

use super::Setting;
use crate::queue::Job;

/// Most of one file copied out of the guest, bytes.
const MAX_COLLECTED: u64 = 1 << 30;

/// Copies the files the job named to where its submitter finds them.
pub(super) async fn collect(setting: &Setting, job: &Job, client: &Client) -> Result<(), String> {
    let dir = setting
        .provider
        .collect_dir(job.run_id)
        .map_err(|error| format!("cannot collect files: {error}"))?;
    let mut failures = Vec::new();
    for (number, path) in job.collect.iter().enumerate() {
        let name = number.to_string();
        let file = match dir.open_file(&name, Access::CreateNew { mode: 0o644 }) {
            Ok(file) => file,
            Err(error) => return Err(format!("cannot collect {path}: {error}")),
        };
        let mut sink = BoundedFile {
            file,
            room: MAX_COLLECTED,
        };
        if let Err(error) = client.read_file(path, &mut sink).await {
            let _ = dir.remove_file(&name);
            failures.push(format!("cannot collect {path}: {error}"));
        }
    }
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("; "))
    }
}

/// Writes to the host's page cache; refuses what is beyond its room.
struct BoundedFile {
    file: std::fs::File,
    room: u64,
}

impl tokio::io::AsyncWrite for BoundedFile {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        data: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let written = if length > self.room {
            Err(std::io::Error::other(format!(
                "the file is larger than {MAX_COLLECTED} bytes"
            )))
        } else {
            std::io::Write::write(&mut self.file, data)
        };
        self.room = self.room.saturating_sub(length);
        std::task::Poll::Ready(written)
    }
    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }
    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }
}
