//! VMs that die while they are set aside for a job that does not become ours.

use super::*;

/// A warm VM, set aside for a job.
fn set_aside() -> (Bench, RunId, SlotId) {
    let mut bench = Bench::warm(1, 1);
    bench.tell(Event::Time);
    let warm = bench.warmed();
    let job = bench.submit("vm0/small");
    (bench, job.job.run_id, warm)
}

fn dies(bench: &mut Bench, slot: SlotId) {
    let reason = "killed".to_owned();
    bench.tell(Event::VmDied { slot, reason });
}

#[test]
fn a_vm_that_dies_while_its_lease_is_asked_for_and_refused_is_nobody_s() {
    let (mut bench, _, warm) = set_aside();
    dies(&mut bench, warm);
    assert!(!bench.asked.iter().any(|a| matches!(a, Action::Destroy(_))));
    bench.refuse();
    assert_eq!(bench.destroyed(), warm);
    assert_eq!(bench.plan.warm_pools()[1].ready, 0);
}

#[test]
fn a_vm_that_dies_while_its_job_is_claimed_and_lost_is_nobody_s() {
    let (mut bench, run, warm) = set_aside();
    assert_eq!(bench.admit(), (run, warm, true));
    dies(&mut bench, warm);
    bench.tell(Event::Lost(run));
    bench.take(|a| matches!(a, Action::Demote(_)).then_some(()));
    bench.tell(Event::Demoted { slot: warm });
    assert_eq!(bench.destroyed(), warm);
    assert_eq!(bench.plan.warm_pools()[1].ready, 0);
}
