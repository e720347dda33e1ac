//! Heartbeats: what we are up to, which leases we hold, and what the API wants of them.

use std::sync::Arc;
use std::time::Duration;

use api_types::runner::{Heartbeat, LeaseAnswer, LeaseRef, LeaseVerdict, RunnerMode};
use policy::Draft;
use tokio::time::Instant;

use super::{Inner, inputs};
use crate::provider::ProviderEvent;
use crate::status::Mode;

/// Most time between two heartbeats, and for one.
const PERIOD: Duration = Duration::from_secs(10);
/// Least time for one: on a slow way shorter ones would all fail.
const LEAST_LIMIT: Duration = Duration::from_secs(2);
/// Most leases and sessions that one heartbeat names.
const MAX_LIST: usize = 1024;

/// Which policy a run has, and which it is to have.
#[derive(Debug)]
pub(super) struct PolicyState {
    /// Revision of the one that holds.
    pub(super) set: u64,
    /// The newest that was announced.
    announced: u64,
    /// Somebody is setting one. One at a time, or an answer that is late would put an older policy over a newer one.
    busy: bool,
}

impl PolicyState {
    pub(super) fn of(set: u64) -> Self {
        Self {
            set,
            announced: set,
            busy: false,
        }
    }

    /// There is at least this revision. True: whoever is told so sets it, and says what came of it.
    fn announce(&mut self, revision: u64) -> bool {
        self.announced = self.announced.max(revision);
        let begins = !self.busy && self.announced > self.set;
        self.busy |= begins;
        begins
    }

    /// What a replica that is behind answers with is none.
    fn is_news(&self, revision: u64) -> bool {
        revision > self.set
    }

    /// What came of it: this revision holds now, or none but the last. True: a newer one was announced meanwhile.
    fn came(&mut self, revision: Option<u64>) -> bool {
        self.set = revision.map_or(self.set, |revision| revision.max(self.set));
        self.busy = revision.is_some() && self.announced > self.set;
        self.busy
    }
}

/// Beats for ever.
pub(super) async fn run(inner: Arc<Inner>) {
    let (mut period, mut limit) = (PERIOD, PERIOD);
    loop {
        let began = Instant::now();
        match inner.api.heartbeat(&heartbeat(&inner, None), limit).await {
            Ok(answer) => {
                {
                    let mut state = inner.lock();
                    state.last_contact = Some(Instant::now());
                    state.error = None;
                }
                // Each time, or who looks at a runner without work sees a contact of long ago, or none at all.
                (inner.tell)(ProviderEvent::Changed);
                // An instance that we replaced may have ended while the API was away. Now it is there.
                inner.adopt();
                (period, limit) = pace(answer.lease_secs);
                for lease in &answer.leases {
                    heed(&inner, lease);
                }
            }
            Err(error) => {
                let text = error.to_string();
                let before = inner.lock().error.replace(text.clone());
                if before.as_ref() != Some(&text) {
                    tracing::warn!(%error, "the heartbeat was not taken; runs go on, and their answers are kept");
                    (inner.tell)(ProviderEvent::Changed);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep_until(began + period) => {}
            () = inner.beat.notified() => {}
        }
    }
}

/// The time between two heartbeats and the limit of one, for leases that last so long. Two may hang until their limit:
/// the third is answered before a lease ends.
fn pace(lease_secs: u64) -> (Duration, Duration) {
    let quarter = Duration::from_secs(lease_secs) / 4;
    (
        quarter.clamp(Duration::from_secs(1), PERIOD),
        quarter.clamp(LEAST_LIMIT, PERIOD),
    )
}

/// The last one.
pub(super) async fn goodbye(inner: &Inner) {
    let last = heartbeat(inner, Some(RunnerMode::Stopped));
    if let Err(error) = inner.api.heartbeat(&last, PERIOD).await {
        tracing::debug!(%error, "nobody heard that we leave");
    }
}

fn heartbeat(inner: &Inner, mode: Option<RunnerMode>) -> Heartbeat {
    let view = inner.view.borrow().clone();
    let state = inner.lock();
    // Answers of a process before us are not ours to renew; they are on their way.
    let ours = state.held.iter();
    let ours = ours.filter(|(_, held)| held.runner == inner.id && !held.lost);
    let leases = ours.map(|(run, held)| LeaseRef {
        run_id: *run,
        epoch: held.epoch,
    });
    Heartbeat {
        runner_id: inner.id,
        runner_name: inner.runner.name.clone(),
        group: inner.runner.group.clone(),
        profiles: inner
            .runner
            .profiles
            .iter()
            .map(|(name, _)| name.clone())
            .collect(),
        total_vcpu: view.total.vcpu,
        total_memory_mb: view.total.memory_mb,
        max_concurrent: inner.runner.max_concurrent,
        allocated_vcpu: view.allocated.vcpu,
        allocated_memory_mb: view.allocated.memory_mb,
        running_count: view.active,
        held_sessions: view.held.into_iter().take(MAX_LIST).collect(),
        mode: mode.unwrap_or(match view.mode {
            None | Some(Mode::Starting | Mode::Running) => RunnerMode::Running,
            Some(Mode::Draining | Mode::Stopping) => RunnerMode::Draining,
            Some(Mode::Stopped) => RunnerMode::Stopped,
        }),
        version: Some(crate::cli::VERSION.to_owned()),
        leases: leases.take(MAX_LIST).collect(),
    }
}

/// Does what the API says about a lease.
fn heed(inner: &Arc<Inner>, answer: &LeaseAnswer) {
    let run = answer.run_id;
    let mut state = inner.lock();
    let Some(held) = state
        .held
        .get_mut(&run)
        .filter(|held| held.epoch == answer.epoch)
    else {
        return;
    };
    if held.answer.borrow().is_some() {
        // It is over; whether its answer is taken is found out by bringing it.
        return;
    }
    let lost = answer.verdict == LeaseVerdict::Lost;
    let renewed = answer.verdict == LeaseVerdict::Renewed;
    if lost {
        held.lost = true;
        tracing::warn!(%run, "its lease is lost: it is ended, and its result dropped");
    }
    let cancel = (lost || (renewed && answer.cancel_requested)) && !held.cancelled;
    held.cancelled |= cancel;
    let newer = renewed && held.policy.announce(answer.policy_revision);
    if let (true, Some(inputs)) = (renewed, &held.inputs) {
        inputs::announce(inputs, answer.inputs);
    }
    let lease = LeaseRef {
        run_id: run,
        epoch: held.epoch,
    };
    drop(state);
    if cancel {
        (inner.tell)(ProviderEvent::Cancelled(run));
    }
    if newer {
        inner.spawn(new_policy(Arc::clone(inner), lease));
    }
}

/// Fetches a run's new policy and sets it, until it has the newest that was announced.
async fn new_policy(inner: Arc<Inner>, lease: LeaseRef) {
    let run = lease.run_id;
    loop {
        let set = try_new_policy(&inner, lease).await;
        if let Err(error) = &set {
            tracing::warn!(%run, error, "the run's new policy cannot be set; trying again at the next heartbeat");
        }
        let more = of_claim(&inner, lease, |policy| policy.came(set.ok()));
        if more != Some(true) {
            return;
        }
    }
}

fn of_claim<T>(
    inner: &Inner,
    lease: LeaseRef,
    what: impl FnOnce(&mut PolicyState) -> T,
) -> Option<T> {
    let mut state = inner.lock();
    let held = state.held.get_mut(&lease.run_id)?;
    (held.epoch == lease.epoch).then(|| what(&mut held.policy))
}

/// Gives the revision of the policy that holds now.
async fn try_new_policy(inner: &Inner, lease: LeaseRef) -> Result<u64, String> {
    let found = inner.api.policy(inner.id, lease).await;
    let found = found.map_err(|error| error.to_string())?;
    let is_news = |policy: &mut PolicyState| policy.is_news(found.policy_revision);
    if of_claim(inner, lease, is_news) != Some(true) {
        return Err("what the API answers with is no newer".to_owned());
    }
    let draft = match found.policy {
        Some(value) => Draft::from_json(&value.to_string()).map_err(|error| error.to_string())?,
        None => Draft::default(),
    };
    if let Some(networks) = &inner.runner.networks {
        let set = networks.replace(lease.run_id, draft).await;
        set.map_err(|error| error.to_string())?;
    }
    Ok(found.policy_revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_heartbeats_may_hang_before_a_lease_ends() {
        for lease_secs in [8, 30, 60, 3600] {
            let (period, limit) = pace(lease_secs);
            assert!(
                period >= limit,
                "one that hangs delays the next: {lease_secs}"
            );
            let third_is_answered = period * 3 + limit;
            assert!(third_is_answered <= Duration::from_secs(lease_secs));
        }
        assert_eq!(pace(60), (PERIOD, PERIOD));
        assert_eq!(pace(1), (Duration::from_secs(1), LEAST_LIMIT));
    }

    #[test]
    fn one_policy_is_set_at_a_time_and_the_newest_last() {
        let mut policy = PolicyState::of(4);
        assert!(!policy.announce(4), "it holds already");
        assert!(policy.announce(5));
        assert!(!policy.announce(6), "somebody is at it");
        assert!(policy.came(Some(5)), "6 is still to come");
        assert!(!policy.came(Some(6)));
        assert!(!policy.announce(5), "a late heartbeat");
        assert!(policy.announce(7));
        assert!(!policy.is_news(5) && !policy.is_news(6) && policy.is_news(7));
        assert!(!policy.came(None), "the next heartbeat tries again");
        assert!(policy.announce(7));
        assert!(!policy.came(Some(8)), "it was changed meanwhile");
        assert!(!policy.announce(8));
    }
}
