//! Entries of runs: created once, then changed by compare-and-set only.

use std::time::Instant;

use api_types::{RunId, UnixMillis};
use bytes::Bytes;

use super::bucket::Swap;
use super::{Engine, EngineError, PATIENCE, PAUSE};
use crate::run::{Command, Entry, Refusal, Step, transition};

/// A key that is no run's.
const PROBE: &str = "probe";

/// Why a command did not change a run.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ApplyError {
    /// There is no such run.
    #[error("there is no such run")]
    Unknown,
    /// It makes no sense now.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The storage.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// What came of a command.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The run as it is now.
    pub entry: Entry,
    /// Its revision.
    pub revision: u64,
    /// Whether this call wrote it.
    pub changed: bool,
}

/// What came of a creation.
#[derive(Clone, Debug)]
pub enum Created {
    /// It is new, and this is its revision.
    New(u64),
    /// It was there.
    Existing(Box<Entry>, u64),
}

fn bytes(entry: &Entry) -> Result<Bytes, EngineError> {
    serde_json::to_vec(entry)
        .map(Bytes::from)
        .map_err(|error| EngineError::Corrupt(error.to_string()))
}

/// Reads an entry.
pub fn parse(value: &[u8]) -> Result<Entry, EngineError> {
    serde_json::from_slice(value).map_err(|error| EngineError::Corrupt(error.to_string()))
}

/// Key of a run's own policy, where a client has changed it.
pub fn run_policy(run: RunId) -> String {
    format!("run.{run}")
}

impl Engine {
    /// The run, as the leader knows it.
    pub async fn run(&self, run: RunId) -> Result<Option<(Entry, u64)>, EngineError> {
        let key = run.to_string();
        let begin = Instant::now();
        loop {
            match self.runs.get(&key).await {
                Ok(None) => return Ok(None),
                Ok(Some(found)) => return Ok(Some((parse(&found.value)?, found.revision))),
                Err(error) if begin.elapsed() >= PATIENCE => return Err(error),
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    /// Makes a run, unless one with its id is there.
    pub async fn create_run(&self, entry: &Entry) -> Result<Created, EngineError> {
        let (key, value) = (entry.run.to_string(), bytes(entry)?);
        let begin = Instant::now();
        loop {
            let failed = match self.runs.create(&key, value.clone()).await {
                Ok(Swap::Done(revision)) => return Ok(Created::New(revision)),
                Ok(Swap::Conflict) => match self.run(entry.run).await? {
                    Some((found, revision)) => {
                        return Ok(Created::Existing(Box::new(found), revision));
                    }
                    // Removed in between.
                    None => EngineError::Unavailable("the run was removed meanwhile".to_owned()),
                },
                // It may have been written all the same: the next try finds out.
                Err(error) => error,
            };
            if begin.elapsed() >= PATIENCE {
                return Err(failed);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Applies a command. `hint` is what the caller believes the run to be: it saves reading, and is not trusted when
    /// it leads to a refusal.
    pub async fn apply(
        &self,
        run: RunId,
        hint: Option<(Entry, u64)>,
        now: UnixMillis,
        command: impl Fn(u64) -> Command,
    ) -> Result<Applied, ApplyError> {
        let key = run.to_string();
        let begin = Instant::now();
        let mut known = hint;
        loop {
            let hinted = known.is_some();
            let (entry, revision) = match known.take() {
                Some(known) => known,
                None => self.run(run).await?.ok_or(ApplyError::Unknown)?,
            };
            let next = match transition(&entry, &command(revision), now) {
                Ok(Step::Write(next)) => *next,
                Ok(Step::Same) if hinted => continue,
                Err(_) if hinted => continue,
                Ok(Step::Same) => {
                    return Ok(Applied {
                        entry,
                        revision,
                        changed: false,
                    });
                }
                Err(refusal) => return Err(refusal.into()),
            };
            match self.runs.update(&key, bytes(&next)?, revision).await {
                Ok(Swap::Done(revision)) => {
                    return Ok(Applied {
                        entry: next,
                        revision,
                        changed: true,
                    });
                }
                Ok(Swap::Conflict) => {}
                // It may have been written all the same. Every command said again by the same one is answered as the
                // first time or changes nothing that matters, so reading and trying again settles it.
                Err(error) if begin.elapsed() >= PATIENCE => return Err(error.into()),
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    /// Writes over this very revision, or not at all.
    pub async fn apply_to(
        &self,
        entry: &Entry,
        revision: u64,
        now: UnixMillis,
        command: &Command,
    ) -> Result<Option<Applied>, ApplyError> {
        let Step::Write(next) = transition(entry, command, now)? else {
            return Ok(None);
        };
        let swap = self
            .runs
            .update(&entry.run.to_string(), bytes(&next)?, revision)
            .await?;
        Ok(match swap {
            Swap::Done(revision) => Some(Applied {
                entry: *next,
                revision,
                changed: true,
            }),
            Swap::Conflict => None,
        })
    }

    /// Removes a run and all that was kept of it, if it is finished; whether it is gone. Its entry goes last: what is
    /// killed in between is done again. Another replica may do the same, and a client make the run anew in between, which
    /// is then another one that stays.
    pub async fn remove_run(&self, run: RunId) -> Result<bool, EngineError> {
        let Some((entry, revision)) = self.run(run).await? else {
            return Ok(true);
        };
        if !entry.is_done() {
            return Ok(false);
        }
        // Whoever makes it anew writes the specification first. So it is this entry's where this entry still stands now.
        let spec = self.spec_revision(&entry).await?;
        let policy = self.policies.get(&run_policy(run)).await?;
        match self.run(run).await? {
            None => return Ok(true),
            Some((_, now)) if now != revision => return Ok(false),
            Some(_) => {}
        }
        self.remove_feeds(run).await?;
        self.remove_spec(&entry, spec).await?;
        if let Some(policy) = policy {
            let key = run_policy(run);
            self.policies.remove_at(&key, policy.revision).await?;
        }
        if self.runs.remove_at(&run.to_string(), revision).await? {
            return Ok(true);
        }
        // Another replica has removed it, or a client made it anew.
        Ok(self.run(run).await?.is_none())
    }

    /// When the oldest run was made that is still there. Fails where one entry cannot be read: it may be that one.
    pub async fn oldest_run(&self) -> Result<Option<UnixMillis>, EngineError> {
        let mut oldest: Option<UnixMillis> = None;
        let look = |found: &async_nats::jetstream::kv::Entry| {
            let made = parse(&found.value)?.created_at;
            oldest = Some(oldest.map_or(made, |known| known.min(made)));
            Ok(())
        };
        self.runs.scan(look).await?;
        Ok(oldest)
    }

    /// Whether the storage takes renewals now: in a cluster each bucket has a leader of its own, so it is asked where runs
    /// are. It writes the mark of a removal, which is no run to anybody and goes by itself.
    pub async fn probe(&self) -> Result<(), EngineError> {
        self.runs.remove(PROBE).await
    }
}
