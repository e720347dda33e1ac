//! One file over HTTP: resumed after a cut, and nothing but a `.part` until its hash is the pinned one.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use host::fs::{Access, Dir};
use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use sha2::{Digest, Sha256};

use super::FirecrackerError;
use super::pins::Sha256Hex;
use crate::http::{self, causes};
use crate::image::Steps;

/// How patient a download is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Largest file, bytes. The guest kernel has 45 MB, the archive less.
    pub(super) max_bytes: u64,
    /// How long a server may say nothing, while connecting and between two pieces.
    pub(super) stall: Duration,
    /// How many attempts in a row may bring nothing new.
    pub(super) attempts: u32,
    /// Pause before the second attempt; it grows with each.
    pub(super) pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_bytes: 256 << 20,
            stall: Duration::from_secs(30),
            attempts: 5,
            pause: Duration::from_secs(1),
        }
    }
}

/// Most redirections in a row; a GitHub release takes one.
const MAX_REDIRECTS: usize = 5;

/// What fetches.
pub(super) struct Downloader<'a> {
    client: Client,
    limits: Limits,
    /// Where `.part` files are, which outlive an interrupted set-up.
    parts: &'a Dir,
    steps: &'a Steps,
}

/// How an attempt ended that did not bring the file.
enum Cut {
    /// Another one may.
    Transient(String),
    /// None will.
    Final(FirecrackerError),
}

impl<E: Into<FirecrackerError>> From<E> for Cut {
    fn from(error: E) -> Self {
        Self::Final(error.into())
    }
}

impl<'a> Downloader<'a> {
    pub(super) fn new(
        parts: &'a Dir,
        steps: &'a Steps,
        limits: Limits,
    ) -> Result<Self, FirecrackerError> {
        // An address that was https stays so: what is fetched is verified anyway, but nobody need know what it is.
        let policy = redirect::Policy::custom(|attempt| {
            let secure = attempt
                .previous()
                .last()
                .is_some_and(|from| from.scheme() == "https");
            if attempt.previous().len() > MAX_REDIRECTS {
                attempt.error("too many redirections")
            } else if secure && attempt.url().scheme() != "https" {
                attempt.error("a redirection from https to http")
            } else {
                attempt.follow()
            }
        });
        let client = http::client()
            .connect_timeout(limits.stall)
            .redirect(policy)
            .build()
            .map_err(|error| FirecrackerError::Client(causes(&error)))?;
        Ok(Self {
            client,
            limits,
            parts,
            steps,
        })
    }

    /// The file at `url`, open and whole: its hash is `expected`. It is still called `<expected>.part`.
    pub(super) async fn fetch(
        &self,
        url: &Url,
        expected: &Sha256Hex,
    ) -> Result<File, FirecrackerError> {
        let name = part_name(expected);
        let mut idle = 0;
        loop {
            let mut part = self
                .parts
                .open_file(&name, Access::OpenOrCreate { mode: 0o600 })?;
            let before = length(&part, &self.path(&name))?;
            let attempt = tokio::select! {
                attempt = self.attempt(url, expected, &mut part, before) => attempt,
                () = self.steps.interrupted() => return Err(FirecrackerError::Interrupted),
            };
            let reason = match attempt {
                Ok(()) => return Ok(part),
                Err(Cut::Final(error)) => {
                    if !worth_keeping(&error) {
                        self.parts.remove_file(&name)?;
                    }
                    return Err(error);
                }
                Err(Cut::Transient(reason)) => reason,
            };
            idle = match length(&part, &self.path(&name))? > before {
                true => 0,
                false => idle + 1,
            };
            if idle >= self.limits.attempts {
                return Err(FirecrackerError::Unreachable {
                    url: url.to_string(),
                    attempts: idle,
                    reason,
                });
            }
            self.steps.note(&format!("{url}: {reason}; trying again"));
            tokio::select! {
                () = tokio::time::sleep(self.limits.pause.saturating_mul(idle)) => {}
                () = self.steps.interrupted() => return Err(FirecrackerError::Interrupted),
            }
        }
    }

    async fn attempt(
        &self,
        url: &Url,
        expected: &Sha256Hex,
        part: &mut File,
        before: u64,
    ) -> Result<(), Cut> {
        let path = self.path(&part_name(expected));
        if before > 0 && hash(part, &path)? == expected.as_str() {
            return Ok(());
        }
        let mut request = self.client.get(url.clone());
        if before > 0 {
            request = request.header(RANGE, format!("bytes={before}-"));
        }
        let answer = self.within(request.send()).await?;
        let mut answer = answer.map_err(|error| Cut::Transient(causes(&error)))?;
        let mut have = match answer.status() {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT if starts_at(&answer, before) => before,
            // What is there is not the beginning of what the server has.
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                truncate(part, &path)?;
                return Err(Cut::Transient(format!(
                    "the server cannot go on from byte {before}"
                )));
            }
            status if passes(status) => {
                return Err(Cut::Transient(format!("the server answers {status}")));
            }
            status => {
                return Err(Cut::Final(FirecrackerError::Refused {
                    url: url.to_string(),
                    status: status.to_string(),
                }));
            }
        };
        if have == 0 {
            truncate(part, &path)?;
        }
        let resumed = have > 0;
        part.seek(SeekFrom::Start(have))
            .map_err(FirecrackerError::write(path.clone()))?;
        let total = answer
            .content_length()
            .map(|rest| rest.saturating_add(have));
        while let Some(chunk) = self
            .within(answer.chunk())
            .await?
            .map_err(|error| Cut::Transient(causes(&error)))?
        {
            have = have.saturating_add(chunk.len() as u64);
            if have > self.limits.max_bytes {
                return Err(Cut::Final(FirecrackerError::TooLarge {
                    what: url.to_string(),
                    max_mb: self.limits.max_bytes >> 20,
                }));
            }
            part.write_all(&chunk)
                .map_err(FirecrackerError::write(path.clone()))?;
            self.steps.progress(have, total);
        }
        let found = hash(part, &path)?;
        if found == expected.as_str() {
            return Ok(());
        }
        if resumed {
            // The beginning may be another file's, or of somebody who had it before.
            truncate(part, &path)?;
            return Err(Cut::Transient(
                "what was there before does not go with what the server has".to_owned(),
            ));
        }
        Err(Cut::Final(FirecrackerError::Tampered {
            what: url.to_string(),
            found,
            expected: expected.to_string(),
        }))
    }

    /// What a server says within the time it has.
    async fn within<T>(&self, answer: impl Future<Output = T>) -> Result<T, Cut> {
        let stall = self.limits.stall;
        tokio::time::timeout(stall, answer)
            .await
            .map_err(|_| Cut::Transient(FirecrackerError::Stalled(stall).to_string()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.parts.display_path(name)
    }
}

/// Name of an unfinished file.
pub(super) fn part_name(expected: &Sha256Hex) -> String {
    format!("{expected}.part")
}

/// A copy of a local file that has the pinned content.
pub(super) fn copy(
    from: &std::path::Path,
    expected: &Sha256Hex,
    parts: &Dir,
    limits: Limits,
) -> Result<File, FirecrackerError> {
    let local = |source| FirecrackerError::Local {
        path: from.to_owned(),
        source,
    };
    let name = part_name(expected);
    parts.remove_file(&name)?;
    let mut target = parts.open_file(&name, Access::CreateNew { mode: 0o600 })?;
    let path = parts.display_path(&name);
    let mut source = File::open(from).map_err(local)?.take(limits.max_bytes + 1);
    let mut buffer = vec![0; 1 << 16];
    let mut hasher = Sha256::new();
    loop {
        let read = source.read(&mut buffer).map_err(local)?;
        let Some(chunk) = buffer.get(..read).filter(|chunk| !chunk.is_empty()) else {
            break;
        };
        hasher.update(chunk);
        if let Err(error) = target.write_all(chunk) {
            parts.remove_file(&name)?;
            return Err(FirecrackerError::write(path)(error));
        }
    }
    let found = hex::encode(hasher.finalize());
    if found == expected.as_str() {
        return Ok(target);
    }
    parts.remove_file(&name)?;
    Err(match source.limit() {
        0 => FirecrackerError::TooLarge {
            what: from.display().to_string(),
            max_mb: limits.max_bytes >> 20,
        },
        _ => FirecrackerError::Tampered {
            what: from.display().to_string(),
            found,
            expected: expected.to_string(),
        },
    })
}

/// SHA-256 of a whole open file.
pub(super) fn hash(file: &File, path: &std::path::Path) -> Result<String, FirecrackerError> {
    let read = |source| FirecrackerError::Local {
        path: path.to_owned(),
        source,
    };
    crate::image::sha256_of(file).map_err(read)
}

fn length(file: &File, path: &std::path::Path) -> Result<u64, FirecrackerError> {
    let metadata = file.metadata().map_err(|source| FirecrackerError::Local {
        path: path.to_owned(),
        source,
    })?;
    Ok(metadata.len())
}

fn truncate(part: &File, path: &std::path::Path) -> Result<(), FirecrackerError> {
    part.set_len(0)
        .map_err(FirecrackerError::write(path.to_owned()))
}

/// A full disk gets its room back, and what is wrong is not looked at again; everything else can be gone on from.
fn worth_keeping(error: &FirecrackerError) -> bool {
    !matches!(
        error,
        FirecrackerError::DiskFull(_)
            | FirecrackerError::Tampered { .. }
            | FirecrackerError::TooLarge { .. }
    )
}

/// Whether a status passes by itself (RFC 9110, 15.5 and 15.6; RFC 6585, 4).
fn passes(status: StatusCode) -> bool {
    status.is_server_error()
        || status == StatusCode::REQUEST_TIMEOUT
        || status == StatusCode::TOO_MANY_REQUESTS
}

/// Whether a partial answer goes on from `offset`: `Content-Range: bytes 100-999/1000` (RFC 9110, 14.4).
fn starts_at(answer: &Response, offset: u64) -> bool {
    let value = answer.headers().get(CONTENT_RANGE);
    value
        .and_then(|value| value.to_str().ok()?.strip_prefix("bytes ")?.split_once('-'))
        .is_some_and(|(start, _)| start.parse() == Ok(offset))
}

#[cfg(test)]
#[path = "download_tests.rs"]
mod tests;
