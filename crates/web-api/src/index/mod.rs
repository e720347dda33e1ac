//! What this replica knows of runs that are not done: an index over the bucket's watch, with no truth of its own.
//!
//! It answers two questions at once: which waiting run to offer to which runner, and which leases have been silent for
//! too long. Whatever it says is proved by compare-and-set afterwards, so being behind costs a try, never correctness.

mod offers;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use api_types::runner::{Offer, QueueDepth};
use api_types::{GroupName, ProfileName, RunId, RunnerId, SessionId};
use tokio::sync::oneshot;

use crate::run::{Entry, State};
use offers::Offers;

/// What a runner that asks could start.
#[derive(Clone, Debug)]
pub struct Wants {
    /// Who asks.
    pub runner: RunnerId,
    /// Of which group.
    pub group: GroupName,
    /// Which profiles.
    pub profiles: Vec<ProfileName>,
    /// Sessions whose VM it keeps.
    pub held: Vec<SessionId>,
}

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// An offered run is kept from others for so long.
    pub offer: Duration,
    /// A run of a session is kept for the runner that has the session's VM for so long.
    pub affinity: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            offer: Duration::from_secs(2),
            affinity: Duration::from_secs(2),
        }
    }
}

struct Seen {
    entry: Entry,
    revision: u64,
    /// When this revision came to this replica's notice, by its steady clock.
    at: Instant,
}

struct Waiter {
    wants: Wants,
    answer: oneshot::Sender<Offer>,
}

struct Inner {
    /// Runs that are not done, and those whose end the watch has yet to tell: it may be behind with their beginning.
    live: HashMap<RunId, Seen>,
    /// The newest revision of an entry that the watch has brought.
    heard: u64,
    offers: Offers,
    waiters: HashMap<GroupName, Vec<Waiter>>,
}

/// The index.
pub struct Index {
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Index")
    }
}

/// A lease that is silent.
#[derive(Clone, Debug)]
pub struct Silent {
    /// The run as it was last seen.
    pub entry: Entry,
    /// Its revision then.
    pub revision: u64,
}

impl Index {
    /// Knows nothing yet.
    pub fn new(timing: Timing) -> Self {
        Self {
            inner: Mutex::new(Inner {
                live: HashMap::new(),
                heard: 0,
                offers: Offers::new(timing),
                waiters: HashMap::new(),
            }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an entry that this replica wrote itself, or found. Older news than what are known are ignored. Says
    /// whether it was news.
    pub fn note(&self, entry: &Entry, revision: u64, now: Instant) -> bool {
        self.lock().note(entry, revision, now)
    }

    /// Takes note of an entry that the watch brought. It brings all changes in the order of their revisions.
    pub fn heard(&self, entry: &Entry, revision: u64, now: Instant) {
        let mut inner = self.lock();
        inner.heard = inner.heard.max(revision);
        if inner.note(entry, revision, now) {
            return;
        }
        // An end that was noted before is news no more, and need not be kept in mind any longer.
        let known = inner.live.get(&entry.run);
        if known.is_some_and(|seen| seen.entry.is_done() && seen.revision <= revision) {
            inner.live.remove(&entry.run);
        }
    }

    /// The run is no more.
    pub fn forget(&self, run: RunId) {
        let mut inner = self.lock();
        inner.offers.remove(run);
        inner.live.remove(&run);
    }

    /// It was looked for and is no more; unless something has come to notice since it was known to be at `before`.
    pub fn forget_if(&self, run: RunId, before: Option<u64>) {
        let mut inner = self.lock();
        if inner.live.get(&run).map(|seen| seen.revision) == before {
            inner.offers.remove(run);
            inner.live.remove(&run);
        }
    }

    /// At which revision it was last seen.
    pub fn revision(&self, run: RunId) -> Option<u64> {
        self.lock().live.get(&run).map(|seen| seen.revision)
    }

    /// The run as it was last seen, if it is not done.
    pub fn hint(&self, run: RunId) -> Option<(Entry, u64)> {
        let inner = self.lock();
        inner
            .live
            .get(&run)
            .filter(|seen| !seen.entry.is_done())
            .map(|seen| (seen.entry.clone(), seen.revision))
    }

    /// A run for this runner, if one waits.
    pub fn offer(&self, wants: &Wants, now: Instant) -> Option<Offer> {
        self.lock().offers.take(wants, now)
    }

    /// A run for this runner, as soon as there is one. Dropping the receiver gives the place up.
    pub fn wait(&self, wants: Wants, now: Instant) -> oneshot::Receiver<Offer> {
        let (answer, receiver) = oneshot::channel();
        let mut inner = self.lock();
        if let Some(offer) = inner.offers.take(&wants, now) {
            let _ = answer.send(offer);
        } else {
            inner
                .waiters
                .entry(wants.group.clone())
                .or_default()
                .push(Waiter { wants, answer });
        }
        receiver
    }

    /// The offer did not reach its runner, or the runner lost the claim: others may have it at once.
    pub fn take_back(&self, run: RunId, now: Instant) {
        let mut inner = self.lock();
        if let Some(group) = inner.offers.take_back(run) {
            inner.serve(&group, now);
        }
    }

    /// What time brings: offers that nobody took and sessions whose runner did not come are for all again.
    pub fn tick(&self, now: Instant) {
        let mut inner = self.lock();
        inner.offers.expire(now);
        let groups: Vec<GroupName> = inner.waiters.keys().cloned().collect();
        for group in groups {
            inner.serve(&group, now);
        }
    }

    /// Sessions that a runner says to keep.
    pub fn holds(&self, group: &GroupName, runner: RunnerId, sessions: &[SessionId]) {
        self.lock().offers.holds(group, runner, sessions);
    }

    /// Running leases of which nothing was seen for so long, counted from `floor` at the earliest.
    pub fn silent(&self, limit: Duration, floor: Instant, now: Instant) -> Vec<Silent> {
        let inner = self.lock();
        inner
            .live
            .values()
            .filter(|seen| matches!(seen.entry.state, State::Running(_)))
            .filter(|seen| now.saturating_duration_since(seen.at.max(floor)) >= limit)
            .map(|seen| Silent {
                entry: seen.entry.clone(),
                revision: seen.revision,
            })
            .collect()
    }

    /// How many runs wait, by group and profile.
    pub fn depths(&self) -> Vec<QueueDepth> {
        self.lock().offers.depths()
    }

    /// How many runs of a group wait.
    pub fn queued(&self, group: &GroupName) -> u64 {
        self.lock()
            .offers
            .depths()
            .into_iter()
            .filter(|depth| depth.group == *group)
            .map(|depth| depth.runs)
            .fold(0, u64::saturating_add)
    }
}

impl Inner {
    fn note(&mut self, entry: &Entry, revision: u64, now: Instant) -> bool {
        if let Some(seen) = self.live.get(&entry.run)
            && seen.revision >= revision
        {
            return false;
        }
        match &entry.state {
            State::Queued => self.offers.add(entry, revision, now),
            State::Running(_) => self.offers.remove(entry.run),
            State::Done { .. } => {
                self.offers.remove(entry.run);
                if revision <= self.heard {
                    self.live.remove(&entry.run);
                    return true;
                }
            }
        }
        self.live.insert(
            entry.run,
            Seen {
                entry: entry.clone(),
                revision,
                at: now,
            },
        );
        if entry.state == State::Queued {
            self.serve(&entry.group, now);
        }
        true
    }

    /// Gives what waits to those who wait, the one who has waited longest first.
    fn serve(&mut self, group: &GroupName, now: Instant) {
        let Some(waiters) = self.waiters.remove(group) else {
            return;
        };
        let mut left = Vec::with_capacity(waiters.len());
        let mut waiters = waiters.into_iter();
        while let Some(waiter) = waiters.next() {
            if waiter.answer.is_closed() {
                continue;
            }
            if !self.offers.any(group) {
                left.push(waiter);
                left.extend(waiters.by_ref().filter(|w| !w.answer.is_closed()));
                break;
            }
            match self.offers.take(&waiter.wants, now) {
                None => left.push(waiter),
                Some(offer) => {
                    // Gone in this very moment.
                    if let Err(offer) = waiter.answer.send(offer) {
                        let _ = self.offers.take_back(offer.run_id);
                    }
                }
            }
        }
        if !left.is_empty() {
            self.waiters.insert(group.clone(), left);
        }
    }
}

#[cfg(test)]
mod tests;
