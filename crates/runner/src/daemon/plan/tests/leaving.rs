//! Jobs that are on their way when the daemon is told to leave.

use super::*;

/// A job whose claim is under way.
fn claiming(bench: &mut Bench) -> (Box<ClaimedJob>, RunId) {
    let job = bench.submit("vm0/small");
    let (run, _, _) = bench.admit();
    assert_eq!(run, job.job.run_id);
    (job, run)
}

#[test]
fn a_cancel_that_comes_while_a_job_is_claimed_is_kept_until_it_is_ours() {
    let mut bench = Bench::new();
    let (job, run) = claiming(&mut bench);
    bench.tell(Event::Cancel(run));
    bench.claim(job);
    bench.complete(run);
    assert_eq!(bench.answered, [JobResult::cancelled(run)]);
    bench.destroyed();
    bench.nothing_asked();
}

fn is_cancelled_unstarted(bench: &mut Bench, run: RunId) {
    bench.complete(run);
    assert_eq!(bench.answered, [CancelReason::Stopping.result(run)]);
    bench.destroyed();
    bench.nothing_asked();
    assert_eq!(bench.plan.exit(), Some(0));
}

#[test]
fn a_job_that_becomes_ours_after_the_stop_s_limit_is_cancelled_unstarted() {
    let mut bench = Bench::new();
    let (job, run) = claiming(&mut bench);
    bench.tell(Event::Stop);
    bench.pass(Duration::from_secs(30));
    assert_eq!(bench.plan.exit(), None);
    bench.claim(job);
    is_cancelled_unstarted(&mut bench, run);
}

#[test]
fn a_job_that_becomes_ours_after_a_second_signal_or_without_any_limit_is_cancelled_unstarted() {
    let mut bench = Bench::new();
    let (job, run) = claiming(&mut bench);
    bench.tell(Event::Stop);
    bench.tell(Event::Stop);
    bench.claim(job);
    is_cancelled_unstarted(&mut bench, run);

    let mut bench = Bench::with(|rules| rules.stop_timeout = Duration::ZERO);
    let (job, run) = claiming(&mut bench);
    bench.tell(Event::Stop);
    bench.claim(job);
    is_cancelled_unstarted(&mut bench, run);
}

#[test]
fn a_job_that_is_admitted_to_a_draining_runner_waits_on_and_its_vm_goes() {
    let mut bench = Bench::warm(1, 1);
    bench.tell(Event::Time);
    let warm = bench.warmed();
    let job = bench.submit("vm0/small");
    bench.tell(Event::Drain);
    let (run, slot, _) = bench.admit();
    assert_eq!((run, slot), (job.job.run_id, warm));
    // Its lease was made firm, and is what it was before it is given up.
    bench.take(|a| matches!(a, Action::Demote(_)).then_some(()));
    bench.tell(Event::Demoted { slot });
    assert_eq!(bench.destroyed(), warm);
    bench.nothing_asked();
    assert_eq!(bench.plan.waiting(), 1);
    bench.tell(Event::Resume);
    assert_eq!(bench.admit().0, run);
}

#[test]
fn who_waits_for_a_draining_runner_sees_what_may_still_become_its_own() {
    let mut bench = Bench::new();
    let (_job, run) = claiming(&mut bench);
    assert!(bench.runs().is_empty());
    bench.tell(Event::Drain);
    assert_eq!(bench.runs()[0].run_id, run);
    bench.tell(Event::Lost(run));
    assert!(bench.runs().is_empty());
}
