//! Every order of events we could think of, without a VM, a file or a clock.

mod any_order;
mod leaving;
mod next_of_session;
mod offered_again;
mod set_aside;

use std::collections::BTreeMap;
use std::time::SystemTime;

use jiff::Timestamp;

use super::*;
use crate::daemon::event::Warmed;
use crate::queue::Job;
use crate::queue::test_support::fields;
use crate::status::{ActiveRun, Clock, IdleVm};

const SMALL: Resources = Resources {
    vcpu: 1,
    memory_mb: 256,
    disk_mb: 100,
};
const BIG: Resources = Resources {
    vcpu: 4,
    memory_mb: 2048,
    disk_mb: 100,
};

/// A plan, a clock, and the launcher's part of the world.
struct Bench {
    plan: Plan,
    now: Instant,
    slots: u16,
    submitted: u64,
    /// Everything the plan asked for and that was not looked at yet.
    asked: Vec<Action>,
    answered: Vec<JobResult>,
}

impl Bench {
    fn with(change: impl FnOnce(&mut Rules)) -> Self {
        let profile = |shape| ProfilePlan {
            shape,
            image: "image".to_owned(),
            warm: WarmConfig { low: 0, high: 0 },
        };
        let mut rules = Rules {
            group: "vm0/test".parse().unwrap(),
            profiles: BTreeMap::from([
                ("vm0/small".parse().unwrap(), profile(SMALL)),
                ("vm0/big".parse().unwrap(), profile(BIG)),
            ]),
            limits: HostLimits {
                total: Resources {
                    vcpu: 4,
                    memory_mb: 4096,
                    disk_mb: 10_000,
                },
            },
            max_concurrent: 0,
            idle_timeout: Duration::from_secs(60),
            idle_max: 2,
            stop_timeout: Duration::from_secs(30),
            parallel: 2,
        };
        change(&mut rules);
        let now = Instant::now();
        Self {
            plan: Plan::new(rules, now),
            now,
            slots: 0,
            submitted: 0,
            asked: Vec::new(),
            answered: Vec::new(),
        }
    }

    fn new() -> Self {
        Self::with(|_| ())
    }

    fn warm(low: u32, high: u32) -> Self {
        Self::with(|rules| {
            let small = rules.profiles.get_mut(&"vm0/small".parse().unwrap());
            small.unwrap().warm = WarmConfig { low, high };
        })
    }

    fn tell(&mut self, event: Event) {
        let actions = self.plan.handle(event, self.now);
        for action in &actions {
            if let Action::Complete(result) = action {
                self.answered.push(result.clone());
            }
        }
        self.asked.extend(actions);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.tell(Event::Time);
    }

    fn take<T>(&mut self, which: impl Fn(&Action) -> Option<T>) -> T {
        let found = self.asked.iter().position(|action| which(action).is_some());
        let Some(found) = found else {
            panic!("not asked; asked were {:?}", self.asked)
        };
        which(&self.asked.remove(found)).unwrap()
    }

    fn clock(&self) -> Clock {
        Clock::new(self.now, Timestamp::UNIX_EPOCH)
    }

    fn runs(&self) -> Vec<ActiveRun> {
        self.plan.active_runs(&self.clock())
    }

    fn idle_vms(&self) -> Vec<IdleVm> {
        self.plan.idle_vms(&self.clock())
    }

    fn nothing_asked(&self) {
        assert!(self.asked.is_empty(), "{:?}", self.asked);
    }

    fn submit_with(&mut self, profile: &str, session: Option<&str>) -> Box<ClaimedJob> {
        self.submitted += 1;
        let mut fields = fields(RunId::random());
        fields.profile = profile.parse().unwrap();
        fields.session_id = session.map(|s| s.parse().unwrap());
        let job = ClaimedJob {
            job: Job::new(fields).unwrap(),
            submitter: 1000,
            submitted: SystemTime::UNIX_EPOCH + Duration::from_secs(self.submitted),
            api: None,
        };
        let head = JobHead::of(&job.job, job.submitter, job.submitted);
        self.tell(Event::Found(head));
        Box::new(job)
    }

    fn submit(&mut self, profile: &str) -> Box<ClaimedJob> {
        self.submit_with(profile, None)
    }

    /// The launcher says yes. Returns the slot, and whether it is a VM that was there.
    fn admit(&mut self) -> (RunId, SlotId, bool) {
        let (run, asked) = self.take(|action| match action {
            Action::Admit { run, slot, .. } => Some((*run, *slot)),
            _ => None,
        });
        let slot = asked.unwrap_or_else(|| self.new_slot());
        let usage = asked.is_none().then(HostUsage::default);
        self.tell(Event::Admitted { run, slot, usage });
        (run, slot, asked.is_some())
    }

    fn refuse(&mut self) -> RunId {
        let run = self.take(|action| match action {
            Action::Admit { run, .. } => Some(*run),
            _ => None,
        });
        let usage = Some(HostUsage::default());
        self.tell(Event::Refused { run, usage });
        run
    }

    fn new_slot(&mut self) -> SlotId {
        self.slots += 1;
        SlotId(self.slots)
    }

    /// From a job in the queue to its executor at work.
    fn start(&mut self, job: Box<ClaimedJob>) -> SlotId {
        let run = job.job.run_id;
        let (admitted, slot, _) = self.admit();
        assert_eq!(admitted, run);
        self.claim(job);
        self.started(run);
        slot
    }

    fn claim(&mut self, job: Box<ClaimedJob>) {
        let run = job.job.run_id;
        let claim = |a: &Action| matches!(a, Action::Claim(r) if *r == run).then_some(());
        self.take(claim);
        self.tell(Event::Claimed(job));
    }

    fn started(&mut self, run: RunId) -> SlotId {
        self.take(|action| match action {
            Action::Start { slot, job, .. } if job.job.run_id == run => Some(*slot),
            _ => None,
        })
    }

    fn end(&mut self, run: RunId, reusable: bool) {
        let result = JobResult::exited(run, 0);
        self.tell(Event::Ended { result, reusable });
        self.complete(run);
    }

    fn complete(&mut self, run: RunId) {
        self.take(|action| match action {
            Action::Complete(result) if result.run_id == run => Some(()),
            _ => None,
        });
        self.tell(Event::Completed(run));
    }

    fn destroyed(&mut self) -> SlotId {
        let slot = self.take(|action| match action {
            Action::Destroy(slot) => Some(*slot),
            _ => None,
        });
        self.tell(Event::Released(slot));
        slot
    }

    fn warmed(&mut self) -> SlotId {
        let profile = self.take(|action| match action {
            Action::Warm(profile) => Some(profile.clone()),
            _ => None,
        });
        let slot = self.new_slot();
        let outcome = Warmed::Ready(slot);
        self.tell(Event::Warmed { profile, outcome });
        slot
    }

    fn parked(&mut self) -> SlotId {
        let slot = self.take(|action| match action {
            Action::Park(slot) => Some(*slot),
            _ => None,
        });
        self.tell(Event::Parked { slot, parked: true });
        slot
    }

    fn cancels(&mut self) -> (RunId, CancelReason) {
        self.take(|action| match action {
            Action::Cancel { run, why } => Some((*run, *why)),
            _ => None,
        })
    }
}

#[test]
fn a_job_is_admitted_claimed_started_answered_and_its_vm_destroyed_in_this_order() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/small");
    let run = job.job.run_id;
    let slot = bench.start(job);
    assert_eq!(bench.runs().len(), 1);
    bench.nothing_asked();
    bench.end(run, true);
    // Without a session nobody could use the VM again.
    assert_eq!(bench.destroyed(), slot);
    bench.nothing_asked();
    assert!(bench.runs().is_empty());
}

#[test]
fn every_claim_is_answered_exactly_once_whatever_is_said_twice() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/small");
    let run = job.job.run_id;
    bench.start(job);
    bench.tell(Event::Cancel(run));
    bench.tell(Event::Cancel(run));
    bench.tell(Event::Ended {
        result: JobResult::cancelled(run),
        reusable: false,
    });
    bench.tell(Event::Ended {
        result: JobResult::exited(run, 0),
        reusable: true,
    });
    bench.tell(Event::Cancel(run));
    bench.tell(Event::LauncherGone);
    assert_eq!(bench.answered, [JobResult::cancelled(run)]);
}

#[test]
fn jobs_are_admitted_one_at_a_time_and_oldest_first() {
    let mut bench = Bench::new();
    let first = bench.submit("vm0/small");
    let second = bench.submit("vm0/small");
    let (run, _, _) = bench.admit();
    assert_eq!(run, first.job.run_id);
    let (run, _, _) = bench.admit();
    assert_eq!(run, second.job.run_id);
}

#[test]
fn a_refused_job_is_tried_again_when_room_comes_free_and_never_claimed_before() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/big");
    bench.refuse();
    bench.nothing_asked();
    bench.tell(Event::Usage(HostUsage::default()));
    let (run, _, _) = bench.admit();
    assert_eq!(run, job.job.run_id);
}

#[test]
fn a_job_refused_while_room_came_free_is_tried_again_at_once() {
    for free in [
        Event::Released(SlotId(99)),
        Event::Usage(HostUsage::default()),
    ] {
        let mut bench = Bench::new();
        let job = bench.submit("vm0/small");
        // The launcher has said no already, and its answer is on its way.
        bench.tell(free);
        assert_eq!(bench.refuse(), job.job.run_id);
        assert_eq!(bench.admit().0, job.job.run_id);
    }
}

#[test]
fn a_job_that_the_launcher_failed_to_reserve_for_is_tried_again_after_a_while() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/small");
    let run = job.job.run_id;
    bench.take(|a| matches!(a, Action::Admit { .. }).then_some(()));
    bench.tell(Event::Refused { run, usage: None });
    bench.nothing_asked();
    assert_eq!(bench.plan.deadline(bench.now), Some(bench.now + RETRY));
    bench.pass(RETRY);
    assert_eq!(bench.admit().0, run);
}

#[test]
fn max_concurrent_counts_the_jobs_of_this_runner() {
    let mut bench = Bench::with(|rules| rules.max_concurrent = 1);
    let first = bench.submit("vm0/small");
    let run = first.job.run_id;
    bench.submit("vm0/small");
    bench.start(first);
    bench.nothing_asked();
    bench.end(run, false);
    bench.admit();
}

#[test]
fn a_job_that_is_withdrawn_while_its_lease_comes_gives_the_lease_back() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/small");
    bench.tell(Event::Gone(job.job.run_id));
    let (_, slot, _) = bench.admit();
    assert_eq!(bench.destroyed(), slot);
    bench.nothing_asked();
}

#[test]
fn a_lost_claim_returns_a_warm_vm_to_the_pool_and_destroys_a_new_slot() {
    let mut bench = Bench::warm(1, 1);
    bench.tell(Event::Time);
    let warm = bench.warmed();
    let job = bench.submit("vm0/small");
    let (run, slot, existing) = bench.admit();
    assert!(existing);
    assert_eq!(slot, warm);
    bench.take(|a| matches!(a, Action::Claim(_)).then_some(()));
    bench.tell(Event::Lost(run));
    bench.take(|a| matches!(a, Action::Demote(_)).then_some(()));
    bench.tell(Event::Demoted { slot });
    assert_eq!(bench.plan.warm_pools()[1].ready, 1);
    assert!(bench.runs().is_empty());
    drop(job);

    let big = bench.submit("vm0/big");
    let (_, slot, existing) = bench.admit();
    assert!(!existing);
    bench.tell(Event::Lost(big.job.run_id));
    assert_eq!(bench.destroyed(), slot);
}

#[test]
fn a_job_that_was_rewritten_between_its_discovery_and_its_claim_is_refused() {
    let mut bench = Bench::new();
    let mut job = bench.submit_with("vm0/small", Some("s"));
    let run = job.job.run_id;
    bench.admit();
    let mut changed = fields(run);
    changed.session_id = Some("s".parse().unwrap());
    changed.environment.insert("NEW".to_owned(), String::new());
    job.job = Job::new(changed).unwrap();
    bench.claim(job);
    bench.complete(run);
    assert_eq!(bench.answered[0].exit_code, 1);
    bench.destroyed();
    bench.nothing_asked();
}

#[test]
fn a_new_vm_is_made_only_when_the_revoked_ones_are_reaped() {
    let mut bench = Bench::warm(2, 2);
    bench.tell(Event::Time);
    let (old, young) = (bench.warmed(), bench.warmed());
    let job = bench.submit("vm0/big");
    let run = job.job.run_id;
    bench.take(|a| matches!(a, Action::Admit { .. }).then_some(()));
    let slot = bench.new_slot();
    // 256 MiB too much: one of the two has to go.
    let usage = HostUsage {
        firm: Resources {
            memory_mb: 4096 - 256,
            ..BIG
        },
        firm_count: 1,
        revocable: Resources {
            vcpu: 0,
            memory_mb: 512,
            disk_mb: 200,
        },
        revocable_count: 2,
    };
    bench.tell(Event::Admitted {
        run,
        slot,
        usage: Some(usage),
    });
    bench.claim(job);
    assert!(
        !bench
            .asked
            .iter()
            .any(|a| matches!(a, Action::Start { .. }))
    );
    assert_eq!(bench.destroyed(), old);
    assert_eq!(bench.started(run), slot);
    assert!(
        !bench
            .asked
            .iter()
            .any(|a| matches!(a, Action::Destroy(s) if *s == young))
    );
}

#[test]
fn pressure_of_another_runner_takes_our_paused_vms_once_and_not_the_whole_pool() {
    let mut bench = Bench::warm(2, 2);
    bench.tell(Event::Time);
    let old = bench.warmed();
    bench.warmed();
    let pressed = HostUsage {
        firm: Resources {
            vcpu: 4,
            memory_mb: 3700,
            disk_mb: 0,
        },
        firm_count: 1,
        revocable: Resources {
            vcpu: 0,
            memory_mb: 512,
            disk_mb: 200,
        },
        revocable_count: 2,
    };
    bench.tell(Event::Usage(pressed));
    // The same figures again, while the first one is being reaped: nothing more is taken.
    bench.tell(Event::Usage(pressed));
    assert_eq!(bench.destroyed(), old);
    assert!(!bench.asked.iter().any(|a| matches!(a, Action::Destroy(_))));
}

#[test]
fn a_vm_is_reused_only_when_everything_about_the_next_job_is_the_same() {
    let mut bench = Bench::new();
    let first = bench.submit_with("vm0/small", Some("s"));
    let run = first.job.run_id;
    bench.start(first);
    bench.end(run, true);
    let idle = bench.parked();
    assert_eq!(bench.idle_vms().len(), 1);

    let other_session = bench.submit_with("vm0/small", Some("t"));
    assert!(!bench.admit().2);
    bench.tell(Event::Lost(other_session.job.run_id));
    let other_profile = bench.submit_with("vm0/big", Some("s"));
    assert!(!bench.admit().2);
    bench.tell(Event::Lost(other_profile.job.run_id));

    for change in [
        (|head: &mut JobHead| head.submitter = 1001) as fn(&mut JobHead),
        |head| head.variables = VariableNames::of(["SECRET"].into_iter()),
    ] {
        let mut fields = fields(RunId::random());
        fields.session_id = Some("s".parse().unwrap());
        let job = Job::new(fields).unwrap();
        let mut head = JobHead::of(&job, 1000, SystemTime::UNIX_EPOCH);
        change(&mut head);
        let run = head.run_id;
        bench.tell(Event::Found(head));
        assert!(!bench.admit().2);
        bench.tell(Event::Lost(run));
    }

    let same = bench.submit_with("vm0/small", Some("s"));
    let (_, slot, existing) = bench.admit();
    assert!(existing);
    assert_eq!(slot, idle);
    assert_eq!(same.job.session_id.as_ref().unwrap().to_string(), "s");
}

#[test]
fn idle_vms_expire_and_the_oldest_goes_when_there_are_too_many() {
    let mut bench = Bench::new();
    let mut idle = Vec::new();
    for session in ["a", "b", "c"] {
        let job = bench.submit_with("vm0/small", Some(session));
        let run = job.job.run_id;
        bench.start(job);
        bench.end(run, true);
        idle.push(bench.parked());
        bench.pass(Duration::from_secs(1));
    }
    assert_eq!(bench.destroyed(), idle[0]);
    bench.nothing_asked();
    bench.pass(Duration::from_secs(60));
    assert_eq!([bench.destroyed(), bench.destroyed()], idle[1..]);
    assert!(bench.idle_vms().is_empty());
}

#[test]
fn a_failed_job_s_vm_and_a_vm_that_could_not_be_parked_are_destroyed() {
    let mut bench = Bench::new();
    let job = bench.submit_with("vm0/small", Some("a"));
    let run = job.job.run_id;
    bench.start(job);
    bench.end(run, false);
    bench.destroyed();

    let job = bench.submit_with("vm0/small", Some("a"));
    let run = job.job.run_id;
    let slot = bench.start(job);
    bench.end(run, true);
    bench.take(|a| matches!(a, Action::Park(_)).then_some(()));
    let parked = false;
    bench.tell(Event::Parked { slot, parked });
    assert_eq!(bench.destroyed(), slot);
}

#[test]
fn a_pool_is_filled_to_its_mark_grows_with_misses_and_waits_while_a_job_starts() {
    let mut bench = Bench::warm(1, 2);
    bench.tell(Event::Time);
    bench.warmed();
    bench.nothing_asked();
    let (first, second) = (bench.submit("vm0/small"), bench.submit("vm0/small"));
    bench.start(first);
    let (_, _, existing) = bench.admit();
    assert!(!existing);
    bench.claim(second);
    bench.asked.retain(|a| !matches!(a, Action::Start { .. }));
    bench.nothing_asked();
    let deadline = bench.plan.deadline(bench.now);
    assert_eq!(deadline, Some(bench.now + REFILL_QUIET));
    bench.pass(REFILL_QUIET);
    bench.warmed();
    bench.warmed();
    bench.nothing_asked();
    assert_eq!(bench.plan.warm_pools()[1].target, 2);
}

#[test]
fn a_pool_waits_longer_the_more_jobs_start_together_and_never_for_ever() {
    let mut bench = Bench::warm(0, 2);
    for (jobs, turns) in [(1, 1), (1, 1), (1, 2), (5, 4), (92, 20)] {
        for _ in 0..jobs {
            let job = bench.submit("vm0/small");
            bench.start(job);
        }
        let until = bench.plan.quiet_until();
        assert_eq!(until, Some(bench.now + REFILL_QUIET * turns));
    }
    assert_eq!(REFILL_QUIET * 20, LONGEST_QUIET);
}

#[test]
fn a_job_waits_for_the_vm_that_is_being_prepared_rather_than_making_another() {
    let mut bench = Bench::warm(1, 2);
    bench.tell(Event::Time);
    let job = bench.submit("vm0/small");
    assert!(
        !bench
            .asked
            .iter()
            .any(|a| matches!(a, Action::Admit { .. }))
    );
    // A second one has nothing to wait for.
    let second = bench.submit("vm0/small");
    assert_eq!(bench.admit().0, second.job.run_id);
    let warm = bench.warmed();
    let (run, slot, existing) = bench.admit();
    assert_eq!((run, slot, existing), (job.job.run_id, warm, true));
}

#[test]
fn a_preparation_that_fails_does_not_keep_the_job_that_waited_for_it() {
    let mut bench = Bench::warm(1, 1);
    bench.tell(Event::Time);
    let job = bench.submit("vm0/small");
    bench.take(|a| matches!(a, Action::Warm(_)).then_some(()));
    bench.tell(Event::Warmed {
        profile: "vm0/small".parse().unwrap(),
        outcome: Warmed::Failed("no".to_owned()),
    });
    assert_eq!(bench.admit().0, job.job.run_id);
    assert_eq!(bench.plan.warm_pools()[1].last_error.as_deref(), Some("no"));
}

#[test]
fn a_warm_vm_that_dies_is_replaced_later_and_one_that_dies_in_use_is_left_to_its_executor() {
    let mut bench = Bench::warm(1, 1);
    bench.tell(Event::Time);
    let slot = bench.warmed();
    let reason = "killed".to_owned();
    bench.tell(Event::VmDied { slot, reason });
    assert_eq!(bench.destroyed(), slot);
    bench.nothing_asked();
    bench.pass(Duration::from_secs(1));
    let slot = bench.warmed();
    let job = bench.submit("vm0/small");
    bench.start(job);
    let reason = "killed".to_owned();
    bench.tell(Event::VmDied { slot, reason });
    bench.nothing_asked();
}

#[test]
fn draining_keeps_runs_drops_paused_vms_claims_nothing_and_can_be_resumed() {
    let mut bench = Bench::warm(1, 1);
    bench.tell(Event::Time);
    bench.warmed();
    let running = bench.submit_with("vm0/big", Some("s"));
    let run = running.job.run_id;
    bench.start(running);
    bench.tell(Event::Drain);
    bench.destroyed();
    bench.submit("vm0/small");
    bench.pass(Duration::from_secs(3600));
    bench.nothing_asked();
    // Cancelling works while draining, and nothing is parked.
    bench.tell(Event::Cancel(run));
    assert_eq!(bench.cancels(), (run, CancelReason::User));
    bench.end(run, true);
    bench.destroyed();
    assert_eq!(bench.plan.mode(), Mode::Draining);
    bench.tell(Event::Resume);
    assert_eq!(bench.plan.mode(), Mode::Running);
    bench.admit();
}

#[test]
fn a_retiring_runner_takes_nothing_finishes_what_it_has_and_leaves() {
    let mut bench = Bench::warm(1, 1);
    bench.tell(Event::Time);
    bench.warmed();
    let job = bench.submit("vm0/big");
    let run = job.job.run_id;
    bench.start(job);
    bench.tell(Event::Retire);
    bench.destroyed();
    bench.submit("vm0/small");
    // A successor has the name: there is no way back.
    bench.tell(Event::Resume);
    bench.pass(Duration::from_secs(3600));
    bench.nothing_asked();
    assert_eq!(bench.plan.mode(), Mode::Draining);
    assert_eq!(bench.plan.exit(), None);
    bench.end(run, true);
    assert_eq!(bench.plan.exit(), None);
    bench.destroyed();
    assert_eq!(bench.plan.exit(), Some(0));
}

#[test]
fn stopping_finishes_runs_cancels_them_at_the_limit_and_leaves_when_all_is_reaped() {
    let mut bench = Bench::new();
    let (first, second) = (bench.submit("vm0/small"), bench.submit("vm0/small"));
    bench.submit("vm0/small");
    let runs = [first.job.run_id, second.job.run_id];
    bench.start(first);
    bench.start(second);
    // The third is being admitted when the signal comes: its lease is given back.
    bench.tell(Event::Stop);
    bench.admit();
    bench.destroyed();
    bench.nothing_asked();
    bench.end(runs[0], true);
    bench.destroyed();
    bench.nothing_asked();
    bench.pass(Duration::from_secs(30));
    assert_eq!(bench.cancels(), (runs[1], CancelReason::Stopping));
    assert_eq!(bench.plan.exit(), None);
    bench.end(runs[1], true);
    assert_eq!(bench.plan.exit(), None);
    bench.destroyed();
    assert_eq!(bench.plan.exit(), Some(0));
    assert_eq!(bench.plan.mode(), Mode::Stopped);
}

#[test]
fn a_second_signal_cancels_at_once() {
    let mut bench = Bench::new();
    let job = bench.submit("vm0/small");
    let run = job.job.run_id;
    bench.start(job);
    bench.tell(Event::Stop);
    bench.nothing_asked();
    bench.tell(Event::Stop);
    assert_eq!(bench.cancels(), (run, CancelReason::Stopping));
}

#[test]
fn without_its_launcher_the_daemon_answers_every_run_and_fails() {
    let mut bench = Bench::new();
    let (running, claiming) = (bench.submit("vm0/small"), bench.submit("vm0/small"));
    let (first, second) = (running.job.run_id, claiming.job.run_id);
    bench.start(running);
    bench.admit();
    bench.tell(Event::LauncherGone);
    assert_eq!(bench.plan.exit(), None);
    // The second was on its way to being claimed: it is answered as soon as it is ours.
    bench.tell(Event::Claimed(claiming));
    bench.complete(first);
    bench.complete(second);
    assert_eq!(bench.plan.exit(), Some(1));
    assert_eq!(bench.answered.len(), 2);
    assert!(bench.answered.iter().all(|r| r.exit_code == 1));
    assert!(
        bench.answered[0]
            .error
            .as_ref()
            .unwrap()
            .contains("launcher")
    );
}

#[test]
fn a_job_cancelled_while_room_is_made_for_it_never_starts() {
    let mut bench = Bench::warm(1, 1);
    bench.tell(Event::Time);
    bench.warmed();
    let job = bench.submit("vm0/big");
    let run = job.job.run_id;
    bench.take(|a| matches!(a, Action::Admit { .. }).then_some(()));
    let slot = bench.new_slot();
    let usage = HostUsage {
        firm: Resources {
            memory_mb: 4096,
            ..BIG
        },
        revocable: SMALL,
        ..HostUsage::default()
    };
    bench.tell(Event::Admitted {
        run,
        slot,
        usage: Some(usage),
    });
    bench.claim(job);
    bench.tell(Event::Cancel(run));
    bench.complete(run);
    bench.destroyed();
    bench.destroyed();
    assert!(
        !bench
            .asked
            .iter()
            .any(|a| matches!(a, Action::Start { .. }))
    );
    assert_eq!(bench.answered, [JobResult::cancelled(run)]);
}
