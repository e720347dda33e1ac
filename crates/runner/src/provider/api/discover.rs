//! Finding runs: one offer at a time, and only while there is room for one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api_types::runner::{Offer, Poll};
use host::slot::Resources;

use super::{Inner, Pause, View};
use crate::names::{ProfileName, RunId};
use crate::provider::ProviderEvent;
use crate::queue::{JobHead, VariableNames};
use crate::status::Mode;

/// How long the API waits for a run, seconds.
const WAIT_SECS: u64 = 30;
/// An offer that the daemon has no room for after all is given up after this: another runner may have room.
const OFFER_LIFE: Duration = Duration::from_secs(5);
/// Most runs that are known for what they are. Those that are offered again are so at once; others have got the rest.
const MAX_KNOWN: usize = 64;

/// What runs turned out to be when they were claimed, the newest last: an offer does not say everything.
#[derive(Debug, Default)]
pub(super) struct Known(VecDeque<JobHead>);

impl Known {
    pub(super) fn add(&mut self, head: JobHead) {
        self.remove(head.run_id);
        self.0.push_back(head);
        if self.0.len() > MAX_KNOWN {
            self.0.pop_front();
        }
    }

    fn remove(&mut self, run: RunId) -> Option<JobHead> {
        let place = self.0.iter().position(|head| head.run_id == run)?;
        self.0.remove(place)
    }
}

/// Polls for ever.
pub(super) async fn run(inner: Arc<Inner>) {
    let mut view = inner.view.subscribe();
    let mut pause = Pause::default();
    loop {
        let profiles = startable(&inner, &view.borrow_and_update());
        if profiles.is_empty() {
            if view.changed().await.is_err() {
                return;
            }
            continue;
        }
        let poll = Poll {
            runner_id: inner.id,
            group: inner.runner.group.clone(),
            held_sessions: view.borrow().held.clone(),
            profiles: profiles.clone(),
            wait_secs: WAIT_SECS,
        };
        // A poll may be dropped at any time, and is when it would ask for what there is no room for any more.
        let answer = tokio::select! {
            answer = inner.api.poll(&poll) => answer,
            () = differs(&inner, &mut view, &profiles) => continue,
        };
        match answer {
            Ok(polled) => {
                pause = Pause::default();
                if let Some(offer) = polled.job {
                    offered(&inner, offer).await;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "no offer");
                pause.wait(Some(&error)).await;
            }
        }
    }
}

async fn differs(
    inner: &Inner,
    view: &mut tokio::sync::watch::Receiver<View>,
    profiles: &[ProfileName],
) {
    while view.changed().await.is_ok() {
        if startable(inner, &view.borrow_and_update()) != profiles {
            return;
        }
    }
}

/// What could be started now, as far as can be told from outside: the daemon decides.
fn startable(inner: &Inner, view: &View) -> Vec<ProfileName> {
    let max = inner.runner.max_concurrent;
    if view.mode != Some(Mode::Running) || (max != 0 && view.active >= max) {
        return Vec::new();
    }
    let fits =
        |shape: &Resources| view.active == 0 || (view.allocated + *shape).fits_in(view.total);
    let profiles = inner.runner.profiles.iter();
    profiles
        .filter(|(_, shape)| fits(shape))
        .map(|(name, _)| name.clone())
        .collect()
}

/// Shows the daemon an offer, and waits until it claims it or there is no point in waiting.
pub(super) async fn offered(inner: &Arc<Inner>, offer: Offer) {
    let run = offer.run_id;
    let head = {
        let mut state = inner.lock();
        // It is ours, or will be known not to be in a moment: a replica may not have heard of the claim yet.
        if state.held.contains_key(&run) || state.claiming.contains(&run) {
            return;
        }
        let head = state.known.remove(run).unwrap_or_else(|| JobHead {
            run_id: run,
            profile: offer.profile,
            session_id: offer.session_id,
            variables: VariableNames::none(),
            submitter: inner.runner.submitter,
            submitted: now(),
        });
        state.offered.insert(run, head.clone());
        head
    };
    (inner.tell)(ProviderEvent::Found(head));
    let claimed = async {
        while inner.lock().offered.contains_key(&run) {
            inner.settled.notified().await;
        }
    };
    if tokio::time::timeout(OFFER_LIFE, claimed).await.is_err()
        && inner.lock().offered.remove(&run).is_some()
    {
        (inner.tell)(ProviderEvent::Gone(run));
    }
}

/// When an offer came: what orders runs that wait here.
pub(super) fn now() -> SystemTime {
    SystemTime::now().max(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::super::tests::head;
    use super::*;

    #[test]
    fn what_is_known_of_runs_that_others_took_does_not_add_up() {
        let mut known = Known::default();
        let runs: Vec<RunId> = (0..=MAX_KNOWN).map(|_| RunId::random()).collect();
        for run in &runs {
            known.add(head(*run));
            known.add(head(*run));
        }
        assert_eq!(known.0.len(), MAX_KNOWN);
        assert_eq!(known.remove(runs[0]), None, "the oldest goes first");
        let newest = known.remove(runs[MAX_KNOWN]);
        assert_eq!(newest.map(|head| head.run_id), runs.last().copied());
        assert_eq!(known.remove(runs[MAX_KNOWN]), None, "it is taken once");
    }
}
