use api_types::ClaimId;
use api_types::client::Holder;

use super::*;
use crate::run::{Lease, fixture};

fn entry(profile: &str, session: Option<&str>) -> Entry {
    Entry {
        profile: profile.parse().unwrap(),
        session: session.map(|s| s.parse().unwrap()),
        ..fixture::entry()
    }
}

fn running(entry: &Entry) -> Entry {
    Entry {
        epoch: entry.epoch + 1,
        state: State::Running(Lease {
            holder: Holder {
                runner_id: RunnerId::random(),
                runner_name: None,
                claimed_at: 0,
            },
            claim: ClaimId::random(),
            cancel_requested: false,
            renewals: 0,
        }),
        ..entry.clone()
    }
}

fn wants(profiles: &[&str]) -> Wants {
    Wants {
        runner: RunnerId::random(),
        group: "vm0/demo".parse().unwrap(),
        profiles: profiles.iter().map(|p| p.parse().unwrap()).collect(),
        held: Vec::new(),
    }
}

fn index() -> (Index, Instant) {
    (Index::new(Timing::default()), Instant::now())
}

#[test]
fn runs_are_offered_in_their_order_each_to_one_runner() {
    let (index, now) = index();
    let entries: Vec<Entry> = (0..5).map(|_| entry("vm0/small", None)).collect();
    for (n, entry) in entries.iter().enumerate().rev() {
        index.note(entry, n as u64 + 1, now);
    }
    let offered: Vec<RunId> = std::iter::from_fn(|| index.offer(&wants(&["vm0/small"]), now))
        .map(|offer| offer.run_id)
        .collect();
    let expected: Vec<RunId> = entries.iter().map(|entry| entry.run).collect();
    assert_eq!(offered, expected);
}

#[test]
fn an_offer_that_nobody_took_is_made_again_and_one_that_was_taken_is_not() {
    let (index, now) = index();
    let (a, b) = (entry("vm0/small", None), entry("vm0/small", None));
    index.note(&a, 1, now);
    index.note(&b, 2, now);
    let small = wants(&["vm0/small"]);
    assert_eq!(index.offer(&small, now).unwrap().run_id, a.run);
    assert_eq!(index.offer(&small, now).unwrap().run_id, b.run);
    index.note(&running(&b), 3, now);
    assert!(index.offer(&small, now).is_none());
    let later = now + Timing::default().offer;
    index.tick(later);
    assert_eq!(index.offer(&small, later).unwrap().run_id, a.run);
    assert!(index.offer(&small, later).is_none());
}

#[test]
fn news_that_come_late_change_nothing() {
    let (index, now) = index();
    let queued = entry("vm0/small", None);
    let claimed = running(&queued);
    assert!(index.note(&claimed, 2, now));
    assert!(!index.note(&queued, 1, now));
    assert!(index.offer(&wants(&["vm0/small"]), now).is_none());
}

#[test]
fn a_run_that_ended_here_is_not_offered_while_the_watch_is_behind() {
    let (index, now) = index();
    let queued = entry("vm0/small", None);
    let done = fixture::done(&queued, 0);
    index.note(&queued, 1, now);
    index.note(&done, 2, now);
    index.heard(&queued, 1, now);
    assert!(index.offer(&wants(&["vm0/small"]), now).is_none());
    assert!(index.hint(queued.run).is_none());
    assert_eq!(index.lock().live.len(), 1);
    index.heard(&done, 2, now);
    assert_eq!(index.lock().live.len(), 0);
    // Found again later by somebody who believed what a slow handler had noted.
    index.note(&queued, 1, now);
    index.note(&done, 2, now);
    assert!(index.offer(&wants(&["vm0/small"]), now).is_none());
    assert_eq!(index.lock().live.len(), 0);
}

#[test]
fn what_is_said_to_a_waiting_run_neither_moves_it_nor_offers_it_twice() {
    let (index, now) = index();
    let (a, b) = (entry("vm0/small", None), entry("vm0/small", None));
    index.note(&a, 1, now);
    index.note(&b, 2, now);
    let said = Entry {
        order: Some(1),
        inputs: 1,
        ..a.clone()
    };
    index.note(&said, 3, now);
    let small = wants(&["vm0/small"]);
    assert_eq!(index.offer(&small, now).unwrap().run_id, a.run);
    let again = Entry { inputs: 2, ..said };
    index.note(&again, 4, now);
    assert_eq!(index.offer(&small, now).unwrap().run_id, b.run);
}

#[test]
fn who_waits_gets_the_next_fitting_run_and_who_left_does_not_keep_it() {
    let (index, now) = index();
    let gone = index.wait(wants(&["vm0/small"]), now);
    drop(gone);
    let mut other = index.wait(wants(&["vm0/big"]), now);
    let mut small = index.wait(wants(&["vm0/small"]), now);
    let run = entry("vm0/small", None);
    index.note(&run, 1, now);
    assert_eq!(small.try_recv().unwrap().run_id, run.run);
    assert!(other.try_recv().is_err());
}

#[test]
fn a_sessions_run_is_kept_for_the_runner_with_its_vm_for_a_while() {
    let (index, now) = index();
    let keeper = Wants {
        held: vec!["s-1".parse().unwrap()],
        ..wants(&["vm0/small"])
    };
    index.holds(&keeper.group, keeper.runner, &keeper.held);
    let (first, mine) = (entry("vm0/small", None), entry("vm0/small", Some("s-1")));
    index.note(&first, 1, now);
    index.note(&mine, 2, now);
    // The keeper gets its own before the one that has waited longer.
    let stranger = wants(&["vm0/small"]);
    assert_eq!(index.offer(&stranger, now).unwrap().run_id, first.run);
    assert!(index.offer(&stranger, now).is_none());
    assert_eq!(index.offer(&keeper, now).unwrap().run_id, mine.run);
    index.take_back(mine.run, now);
    let later = now + Timing::default().affinity;
    assert_eq!(index.offer(&stranger, later).unwrap().run_id, mine.run);
}

#[test]
fn a_lease_is_silent_when_its_revision_stands_still_and_no_outage_explains_it() {
    let (index, now) = index();
    let claimed = running(&entry("vm0/small", None));
    index.note(&claimed, 1, now);
    let limit = Duration::from_secs(60);
    let after = |secs| now + Duration::from_secs(secs);
    assert!(index.silent(limit, now, after(59)).is_empty());
    assert_eq!(index.silent(limit, now, after(60)).len(), 1);
    assert!(
        index.silent(limit, after(30), after(60)).is_empty(),
        "an outage"
    );
    index.note(&claimed, 2, after(50));
    assert!(index.silent(limit, now, after(100)).is_empty(), "renewed");
}
