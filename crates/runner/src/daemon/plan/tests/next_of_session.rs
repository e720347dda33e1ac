//! The next job of a session that comes before the VM of the last one is kept.

use super::*;

/// A session's job whose end is to be told; the job after it, which is there already; and the VM.
fn two_jobs() -> (Bench, RunId, RunId, SlotId) {
    let mut bench = Bench::new();
    let first = bench.submit_with("vm0/small", Some("s"));
    let run = first.job.run_id;
    let slot = bench.start(first);
    let result = JobResult::exited(run, 0);
    let reusable = true;
    bench.tell(Event::Ended { result, reusable });
    // The answer is written, and read at once, before we hear that it was.
    let next = bench.submit_with("vm0/small", Some("s"));
    (bench, run, next.job.run_id, slot)
}

fn admits(bench: &Bench) -> bool {
    let mut asked = bench.asked.iter();
    asked.any(|action| matches!(action, Action::Admit { .. }))
}

#[test]
fn it_waits_for_the_vm_of_the_last_job() {
    let (mut bench, run, next, slot) = two_jobs();
    assert!(!admits(&bench));
    // Nobody else waits for it.
    let other = bench.submit_with("vm0/small", Some("t"));
    assert_eq!(bench.admit().0, other.job.run_id);
    bench.tell(Event::Lost(other.job.run_id));
    bench.complete(run);
    assert!(!admits(&bench));
    assert_eq!(bench.parked(), slot);
    assert_eq!(bench.admit(), (next, slot, true));
}

#[test]
fn it_gets_another_vm_when_the_last_one_cannot_be_kept() {
    let (mut bench, run, next, slot) = two_jobs();
    bench.complete(run);
    bench.take(|a| matches!(a, Action::Park(_)).then_some(()));
    let parked = false;
    bench.tell(Event::Parked { slot, parked });
    assert_eq!(bench.destroyed(), slot);
    let (admitted, _, existing) = bench.admit();
    assert_eq!((admitted, existing), (next, false));
}
