//! Jobs that were found and are not admitted yet, and which of them is next.
//!
//! In the order in which they were found, which no clock has a say in. A job that does not fit may be overtaken by ones that need less, so that a host is not idle behind a
//! giant; but only [`MAX_OVERTAKES`] times: then everybody behind waits until it fits, which it does at the latest
//! when the host is empty (the first job is always admitted).

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::names::{ProfileName, RunId};
use crate::queue::JobHead;

/// How many younger jobs may start before one that does not fit.
pub(super) const MAX_OVERTAKES: u32 = 8;

#[derive(Debug)]
struct Entry {
    head: JobHead,
    /// It did not fit when it was last tried, and no room has come free since.
    blocked: bool,
    overtaken: u32,
}

/// The waiting jobs.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    jobs: BTreeMap<u64, Entry>,
    keys: HashMap<RunId, u64>,
    /// How many there have ever been.
    found: u64,
}

impl Waiting {
    /// Adds a job, once.
    pub(super) fn add(&mut self, head: JobHead) {
        if self.keys.contains_key(&head.run_id) {
            return;
        }
        self.found = self.found.saturating_add(1);
        self.keys.insert(head.run_id, self.found);
        let entry = Entry {
            blocked: false,
            overtaken: 0,
            head,
        };
        self.jobs.insert(self.found, entry);
    }

    /// Forgets a job.
    pub(super) fn remove(&mut self, id: RunId) -> Option<JobHead> {
        let place = self.keys.remove(&id)?;
        Some(self.jobs.remove(&place)?.head)
    }

    /// Those that may be admitted now, in the order in which they should be tried.
    pub(super) fn candidates(&self) -> impl Iterator<Item = &JobHead> {
        let mut too_large: HashSet<&ProfileName> = HashSet::new();
        let mut barrier = false;
        self.jobs.values().filter_map(move |entry| {
            if entry.blocked {
                barrier |= entry.overtaken >= MAX_OVERTAKES;
                too_large.insert(&entry.head.profile);
                None
            } else if barrier || too_large.contains(&entry.head.profile) {
                None
            } else {
                Some(&entry.head)
            }
        })
    }

    /// It was tried and did not fit.
    pub(super) fn block(&mut self, id: RunId) {
        if let Some(place) = self.keys.get(&id)
            && let Some(entry) = self.jobs.get_mut(place)
        {
            entry.blocked = true;
        }
    }

    /// It was admitted: takes it out, and counts against those it overtook.
    pub(super) fn admit(&mut self, id: RunId) -> Option<JobHead> {
        let place = *self.keys.get(&id)?;
        for (_, older) in self.jobs.range_mut(..place) {
            older.overtaken = older.overtaken.saturating_add(1);
        }
        self.remove(id)
    }

    /// Room has come free: everybody may be tried again.
    pub(super) fn unblock(&mut self) {
        for entry in self.jobs.values_mut() {
            entry.blocked = false;
        }
    }

    /// Whether somebody waits for room.
    pub(super) fn is_blocked(&self) -> bool {
        self.jobs.values().any(|entry| entry.blocked)
    }

    /// Whether a job of this profile waits.
    pub(super) fn wants(&self, profile: &ProfileName) -> bool {
        self.jobs
            .values()
            .any(|entry| entry.head.profile == *profile)
    }

    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::VariableNames;
    use std::time::{Duration, SystemTime};

    fn head(profile: &str, second: u64) -> JobHead {
        JobHead {
            run_id: RunId::random(),
            profile: profile.parse().unwrap(),
            session_id: None,
            variables: VariableNames::none(),
            submitter: 0,
            submitted: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
        }
    }

    fn first(waiting: &Waiting) -> Option<RunId> {
        waiting.candidates().next().map(|head| head.run_id)
    }

    #[test]
    fn who_was_found_first_is_next_whatever_the_clock_said() {
        let mut waiting = Waiting::default();
        // Between the two the host's clock was set back, or somebody gave his job an old date.
        let (first_found, second_found) = (head("vm0/small", 3600), head("vm0/small", 2));
        waiting.add(first_found.clone());
        waiting.add(second_found.clone());
        waiting.add(first_found.clone());
        assert_eq!(waiting.len(), 2);
        assert_eq!(first(&waiting).unwrap(), first_found.run_id);
        waiting.admit(first_found.run_id).unwrap();
        assert_eq!(first(&waiting).unwrap(), second_found.run_id);
    }

    #[test]
    fn a_job_that_does_not_fit_is_overtaken_by_smaller_ones_but_not_for_ever() {
        let mut waiting = Waiting::default();
        let big = head("vm0/big", 1);
        let second_big = head("vm0/big", 2);
        waiting.add(big.clone());
        waiting.add(second_big);
        for second in 0..u64::from(MAX_OVERTAKES) {
            waiting.block(big.run_id);
            let small = head("vm0/small", 10 + second);
            waiting.add(small.clone());
            // Not the second big one: it would not fit either.
            assert_eq!(first(&waiting).unwrap(), small.run_id);
            waiting.admit(small.run_id).unwrap();
            waiting.unblock();
            assert_eq!(first(&waiting).unwrap(), big.run_id);
        }
        waiting.block(big.run_id);
        waiting.add(head("vm0/small", 99));
        assert!(first(&waiting).is_none());
        waiting.unblock();
        assert_eq!(first(&waiting).unwrap(), big.run_id);
    }
}
