//! Random jobs and random events in any order.

use super::*;
use proptest::prelude::*;

proptest! {
    /// Random jobs and random events in any order: every claimed job is answered once, no slot is used by two
    /// runs, none is destroyed twice, and stopping ends.
    #[test]
    fn claims_are_paired_with_answers_and_slots_with_releases(
        steps in proptest::collection::vec((0u8..16, any::<u8>()), 1..200)
    ) {
        let mut bench = Bench::warm(1, 3);
        bench.plan.rules.max_concurrent = 4;
        let mut jobs: HashMap<RunId, Box<ClaimedJob>> = HashMap::new();
        let mut world = World::default();
        for (step, pick) in steps {
            match step {
                0 | 1 => {
                    let profile = if pick.is_multiple_of(4) { "vm0/big" } else { "vm0/small" };
                    let session = (pick.is_multiple_of(3)).then_some("s");
                    let job = bench.submit_with(profile, session);
                    jobs.insert(job.job.run_id, job);
                }
                2 => {
                    if let Some(run) = world.any(pick) { bench.tell(Event::Cancel(run)); }
                }
                3 => bench.pass(Duration::from_millis(u64::from(pick) * 300)),
                4 if pick < 30 => bench.tell(Event::Drain),
                4 => bench.tell(Event::Resume),
                // The API may offer a run again that is ours by now.
                6 if pick < 128 => {
                    if let Some(head) = active(&bench, pick) { bench.tell(Event::Found(head)); }
                }
                // Somebody takes a job back, whatever is on its way for it, and may submit it again.
                6 => {
                    if let Some(job) = jobs.values().min_by_key(|job| job.submitted) {
                        let head = JobHead::of(&job.job, job.submitter, job.submitted);
                        bench.tell(Event::Gone(head.run_id));
                        if pick.is_multiple_of(2) { bench.tell(Event::Found(head)); }
                    }
                }
                5 => bench.tell(Event::Usage(HostUsage {
                    firm: Resources { vcpu: 0, memory_mb: u64::from(pick) * 20, disk_mb: 0 },
                    ..HostUsage::default()
                })),
                _ => world.step(&mut bench, &mut jobs, pick)?,
            }
        }
        bench.tell(Event::Stop);
        bench.tell(Event::Stop);
        for _ in 0..2000 {
            if bench.plan.exit().is_some() { break; }
            if bench.asked.is_empty() {
                // Whatever ran or was about to is cancelled by the second signal.
                prop_assert!(world.executing.is_empty(), "{:?}", world.executing);
                bench.pass(Duration::from_secs(1));
            } else {
                // One that wins claims.
                world.step(&mut bench, &mut jobs, 254)?;
            }
        }
        prop_assert_eq!(bench.plan.exit(), Some(0));
        prop_assert!(world.slots.is_empty(), "{:?}", world.slots);
        let mut answered: Vec<RunId> = bench.answered.iter().map(|r| r.run_id).collect();
        answered.sort();
        world.claimed.sort();
        prop_assert_eq!(answered, world.claimed);
    }
}

/// What was offered of one of the active runs.
fn active(bench: &Bench, pick: u8) -> Option<JobHead> {
    let mut runs: Vec<&Run> = bench.plan.runs.values().collect();
    runs.sort_by_key(|run| run.admitted_at);
    let count = runs.len().max(1);
    runs.get(usize::from(pick) % count)
        .map(|run| run.head.clone())
}

#[derive(Debug, Default)]
struct World {
    slots: BTreeSet<SlotId>,
    executing: Vec<(RunId, SlotId)>,
    claimed: Vec<RunId>,
}

impl World {
    fn any(&self, pick: u8) -> Option<RunId> {
        let count = self.executing.len().max(1);
        self.executing.get(usize::from(pick) % count).map(|e| e.0)
    }

    fn end(&mut self, bench: &mut Bench, run: RunId, reusable: bool) {
        self.executing.retain(|(r, _)| *r != run);
        let result = JobResult::exited(run, 0);
        bench.tell(Event::Ended { result, reusable });
    }

    /// Does one of the things that were asked for, or ends a job.
    fn step(
        &mut self,
        bench: &mut Bench,
        jobs: &mut HashMap<RunId, Box<ClaimedJob>>,
        pick: u8,
    ) -> Result<(), TestCaseError> {
        if bench.asked.is_empty() {
            if let Some(run) = self.any(pick) {
                self.end(bench, run, pick.is_multiple_of(2));
            }
            return Ok(());
        }
        let mut chosen = usize::from(pick) % bench.asked.len();
        if let Action::Cancel { run, .. } = bench.asked[chosen] {
            // The owner keeps the order of these two.
            let starts = |action: &Action| matches!(action, Action::Start { job, .. } if job.job.run_id == run);
            chosen = bench.asked.iter().position(starts).unwrap_or(chosen);
        }
        match bench.asked.remove(chosen) {
            Action::Admit { run, slot, .. } => {
                if pick.is_multiple_of(7) {
                    bench.tell(Event::Refused {
                        run,
                        usage: Some(HostUsage::default()),
                    });
                    return Ok(());
                }
                let usage = slot.is_none().then(HostUsage::default);
                let slot = slot.unwrap_or_else(|| bench.new_slot());
                self.slots.insert(slot);
                bench.tell(Event::Admitted { run, slot, usage });
            }
            Action::Claim(run) => match jobs.remove(&run) {
                Some(job) if !pick.is_multiple_of(5) => {
                    self.claimed.push(run);
                    bench.tell(Event::Claimed(job));
                }
                _ => bench.tell(Event::Lost(run)),
            },
            Action::Start { slot, job, .. } => {
                prop_assert!(self.slots.contains(&slot));
                prop_assert!(
                    !self.executing.iter().any(|(_, s)| *s == slot),
                    "{slot:?} twice"
                );
                self.executing.push((job.job.run_id, slot));
            }
            Action::Cancel { run, why } => {
                if self.executing.iter().any(|(r, _)| *r == run) {
                    self.executing.retain(|(r, _)| *r != run);
                    let result = why.result(run);
                    bench.tell(Event::Ended {
                        result,
                        reusable: false,
                    });
                }
            }
            Action::Complete(result) => bench.tell(Event::Completed(result.run_id)),
            Action::Warm(profile) => {
                let outcome = match pick % 4 {
                    0 => Warmed::NoRoom,
                    1 => Warmed::Failed("no".to_owned()),
                    _ => {
                        let slot = bench.new_slot();
                        self.slots.insert(slot);
                        Warmed::Ready(slot)
                    }
                };
                bench.tell(Event::Warmed { profile, outcome });
            }
            Action::Park(slot) => bench.tell(Event::Parked {
                slot,
                parked: !pick.is_multiple_of(3),
            }),
            Action::Demote(slot) => bench.tell(Event::Demoted { slot }),
            Action::Destroy(slot) => {
                prop_assert!(self.slots.remove(&slot), "{slot:?} destroyed twice");
                prop_assert!(
                    !self.executing.iter().any(|(_, s)| *s == slot),
                    "{slot:?} in use"
                );
                bench.tell(Event::Released(slot));
            }
        }
        Ok(())
    }
}
