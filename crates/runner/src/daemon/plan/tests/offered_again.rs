//! Runs that are found once more while they are ours.

use super::*;

fn head(job: &ClaimedJob) -> JobHead {
    JobHead::of(&job.job, job.submitter, job.submitted)
}

#[test]
fn a_run_that_is_offered_again_while_it_is_claimed_is_admitted_once() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/small");
    let (run, again) = (job.job.run_id, head(&job));
    let (_, slot, _) = bench.admit();
    bench.tell(Event::Found(again.clone()));
    assert!(
        !bench
            .asked
            .iter()
            .any(|a| matches!(a, Action::Admit { .. }))
    );
    bench.claim(job);
    bench.tell(Event::Found(again.clone()));
    assert_eq!(bench.started(run), slot);
    bench.tell(Event::Found(again));
    bench.end(run, false);
    assert_eq!(bench.destroyed(), slot);
    bench.nothing_asked();
    assert_eq!(bench.plan.waiting(), 0);
}

#[test]
fn a_run_that_is_lost_may_be_found_again() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/small");
    bench.admit();
    bench.tell(Event::Lost(job.job.run_id));
    bench.destroyed();
    bench.asked.clear();
    bench.tell(Event::Found(head(&job)));
    bench.start(job);
}

#[test]
fn a_run_that_is_ours_keeps_its_vm_whatever_is_admitted() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/small");
    let (run, again) = (job.job.run_id, head(&job));
    let first = bench.start(job);
    // However it got there.
    bench.plan.waiting.add(again);
    bench.tell(Event::Time);
    let (admitted, second, _) = bench.admit();
    assert_eq!(admitted, run);
    assert_eq!(bench.destroyed(), second);
    bench.end(run, false);
    assert_eq!(bench.destroyed(), first);
    bench.nothing_asked();
}

#[test]
fn a_lease_is_good_for_a_job_whose_offer_was_given_up_and_came_again() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/small");
    let run = job.job.run_id;
    bench.tell(Event::Gone(run));
    bench.tell(Event::Found(head(&job)));
    let (admitted, slot, _) = bench.admit();
    assert_eq!(admitted, run);
    bench.claim(job);
    assert_eq!(bench.started(run), slot);
}

#[test]
fn a_lease_that_is_asked_for_a_job_that_was_taken_back_is_not_the_next_one_s_of_its_name() {
    for refused in [false, true] {
        let mut bench = Bench::new();
        let small = bench.submit("vm0/small");
        let run = small.job.run_id;
        let mut fields = fields(run);
        fields.profile = "vm0/big".parse().unwrap();
        let big = ClaimedJob {
            job: Job::new(fields).unwrap(),
            ..*small
        };
        bench.tell(Event::Gone(run));
        bench.tell(Event::Found(head(&big)));
        if refused {
            assert_eq!(bench.refuse(), run);
        } else {
            let (_, slot, _) = bench.admit();
            assert_eq!(bench.destroyed(), slot);
        }
        let is_big = |a: &Action| matches!(a, Action::Admit { profile, .. } if profile.as_str() == "vm0/big");
        assert!(bench.asked.iter().any(is_big), "{:?}", bench.asked);
        bench.start(Box::new(big));
    }
}
