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
