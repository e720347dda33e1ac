//! Waiting runs in their order, and who is offered which.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use api_types::runner::{Offer, QueueDepth};
use api_types::{GroupName, ProfileName, RunId, RunnerId, SessionId};

use super::{Timing, Wants};
use crate::run::Entry;

/// A run's place: runs are taken in the order in which they were accepted.
type Place = (u64, RunId);
type QueueKey = (GroupName, ProfileName);

/// Places that one look for a run passes over because they wait for another runner's session.
const MAX_PASSED: usize = 256;

struct Waiting {
    queue: QueueKey,
    place: Place,
    session: Option<SessionId>,
    since: Instant,
    /// Somebody was offered it then.
    offered: Option<Instant>,
}

pub(super) struct Offers {
    timing: Timing,
    waiting: HashMap<RunId, Waiting>,
    /// What may be offered, by place.
    open: HashMap<QueueKey, BTreeSet<Place>>,
    by_session: HashMap<SessionId, BTreeSet<Place>>,
    sessions: HashMap<(GroupName, SessionId), RunnerId>,
    held: HashMap<(GroupName, RunnerId), Vec<SessionId>>,
    /// Runs that are offered, to find the forgotten ones.
    offered: BTreeSet<RunId>,
}

impl Offers {
    pub(super) fn new(timing: Timing) -> Self {
        Self {
            timing,
            waiting: HashMap::new(),
            open: HashMap::new(),
            by_session: HashMap::new(),
            sessions: HashMap::new(),
            held: HashMap::new(),
            offered: BTreeSet::new(),
        }
    }

    pub(super) fn add(&mut self, entry: &Entry, revision: u64, now: Instant) {
        let place = (entry.order.unwrap_or(revision), entry.run);
        // What is new of a run that keeps its place has nothing to do with whom it is offered to.
        if self
            .waiting
            .get(&entry.run)
            .is_some_and(|waiting| waiting.place == place)
        {
            return;
        }
        self.remove(entry.run);
        let waiting = Waiting {
            queue: (entry.group.clone(), entry.profile.clone()),
            place,
            session: entry.session.clone(),
            since: now,
            offered: None,
        };
        self.waiting.insert(entry.run, waiting);
        self.open_again(entry.run);
    }

    fn open_again(&mut self, run: RunId) {
        let Some(waiting) = self.waiting.get_mut(&run) else {
            return;
        };
        waiting.offered = None;
        self.offered.remove(&run);
        self.open
            .entry(waiting.queue.clone())
            .or_default()
            .insert(waiting.place);
        if let Some(session) = &waiting.session {
            self.by_session
                .entry(session.clone())
                .or_default()
                .insert(waiting.place);
        }
    }

    fn close(&mut self, run: RunId) {
        let Some(waiting) = self.waiting.get(&run) else {
            return;
        };
        if let Some(open) = self.open.get_mut(&waiting.queue) {
            open.remove(&waiting.place);
            if open.is_empty() {
                self.open.remove(&waiting.queue);
            }
        }
        if let Some(session) = &waiting.session
            && let Some(places) = self.by_session.get_mut(session)
        {
            places.remove(&waiting.place);
            if places.is_empty() {
                self.by_session.remove(session);
            }
        }
    }

    pub(super) fn remove(&mut self, run: RunId) {
        self.close(run);
        self.waiting.remove(&run);
        self.offered.remove(&run);
    }

    /// Whether the group has anything to offer.
    pub(super) fn any(&self, group: &GroupName) -> bool {
        self.open.keys().any(|(of, _)| of == group)
    }

    /// A run for this runner: of a session that it keeps, or else the first that waits and is not kept for another.
    pub(super) fn take(&mut self, wants: &Wants, now: Instant) -> Option<Offer> {
        let run = self.of_session(wants).or_else(|| self.first(wants, now))?.1;
        self.close(run);
        self.offered.insert(run);
        let waiting = self.waiting.get_mut(&run)?;
        waiting.offered = Some(now);
        Some(Offer {
            run_id: run,
            profile: waiting.queue.1.clone(),
            session_id: waiting.session.clone(),
        })
    }

    fn of_session(&self, wants: &Wants) -> Option<Place> {
        let fits = |place: &&Place| {
            self.waiting.get(&place.1).is_some_and(|waiting| {
                waiting.queue.0 == wants.group && wants.profiles.contains(&waiting.queue.1)
            })
        };
        wants
            .held
            .iter()
            .filter_map(|session| self.by_session.get(session)?.iter().find(fits))
            .min()
            .copied()
    }

    fn first(&self, wants: &Wants, now: Instant) -> Option<Place> {
        let free = |place: &&Place| {
            self.waiting.get(&place.1).is_some_and(|waiting| {
                let session = waiting.session.clone().map(|s| (wants.group.clone(), s));
                let holder = session.and_then(|key| self.sessions.get(&key));
                match holder {
                    Some(holder) if *holder != wants.runner => {
                        now.saturating_duration_since(waiting.since) >= self.timing.affinity
                    }
                    _ => true,
                }
            })
        };
        wants
            .profiles
            .iter()
            .filter_map(|profile| {
                self.open
                    .get(&(wants.group.clone(), profile.clone()))?
                    .iter()
                    .take(MAX_PASSED)
                    .find(free)
            })
            .min()
            .copied()
    }

    /// Opens an offered run again; its group.
    pub(super) fn take_back(&mut self, run: RunId) -> Option<GroupName> {
        let waiting = self.waiting.get(&run)?;
        waiting.offered?;
        let group = waiting.queue.0.clone();
        self.open_again(run);
        Some(group)
    }

    pub(super) fn expire(&mut self, now: Instant) {
        let forgotten: Vec<RunId> = self
            .offered
            .iter()
            .filter(|run| {
                self.waiting
                    .get(run)
                    .and_then(|waiting| waiting.offered)
                    .is_none_or(|at| now.saturating_duration_since(at) >= self.timing.offer)
            })
            .copied()
            .collect();
        for run in forgotten {
            self.offered.remove(&run);
            self.open_again(run);
        }
    }

    pub(super) fn holds(&mut self, group: &GroupName, runner: RunnerId, sessions: &[SessionId]) {
        let holder = (group.clone(), runner);
        for session in self.held.remove(&holder).unwrap_or_default() {
            let key = (group.clone(), session);
            if self.sessions.get(&key) == Some(&runner) {
                self.sessions.remove(&key);
            }
        }
        if sessions.is_empty() {
            return;
        }
        for session in sessions {
            self.sessions
                .insert((group.clone(), session.clone()), runner);
        }
        self.held.insert(holder, sessions.to_vec());
    }

    pub(super) fn depths(&self) -> Vec<QueueDepth> {
        let mut depths: BTreeMap<&QueueKey, u64> = BTreeMap::new();
        for waiting in self.waiting.values() {
            let depth = depths.entry(&waiting.queue).or_default();
            *depth = depth.saturating_add(1);
        }
        depths
            .into_iter()
            .map(|((group, profile), runs)| QueueDepth {
                group: group.clone(),
                profile: profile.clone(),
                runs,
            })
            .collect()
    }
}
