//! What the owner notes of each job for its trace (see [`crate::telemetry`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use host::slot::SlotId;

use super::event::{Action, Event};
use crate::names::RunId;
use crate::queue::{ClaimedJob, JobResult};
use crate::telemetry::{JobTrace, Step, Steps, Telemetry, TraceParent};

/// Jobs whose trace is not complete.
#[derive(Debug)]
pub(super) struct Traces {
    telemetry: Telemetry,
    jobs: HashMap<RunId, Noted>,
    /// Whose VM is in which slot, until it is parked or destroyed.
    slots: HashMap<SlotId, RunId>,
    /// Whose answer was heard to be durable, before it was decided what becomes of its VM.
    completed: Option<RunId>,
}

#[derive(Debug, Default)]
struct Noted {
    steps: Arc<Steps>,
    open: Option<Open>,
    /// Parks or destroys the VM after the job.
    cleanup: Option<Open>,
    refused: u32,
    vm_source: Option<&'static str>,
    claimed: Option<Claimed>,
    result: Option<(JobResult, Instant)>,
    completed: Option<Instant>,
}

/// A step of the owner's that goes on.
#[derive(Clone, Copy, Debug)]
struct Open {
    name: &'static str,
    began: Instant,
}

#[derive(Debug)]
struct Claimed {
    parent: Option<TraceParent>,
    profile: String,
    session: Option<String>,
    agent: String,
    submitted: SystemTime,
}

impl Noted {
    fn begin(&mut self, name: &'static str, began: Instant) {
        self.open = Some(Open { name, began });
    }

    fn end(&mut self, ended: Instant, ok: bool) {
        if let Some(open) = self.open.take() {
            self.over(open, ended, ok);
        }
    }

    fn over(&self, open: Open, ended: Instant, ok: bool) {
        let Open { name, began } = open;
        self.steps.add(Step {
            name,
            began,
            ended,
            ok,
        });
    }
}

impl Traces {
    pub(super) fn new(telemetry: Telemetry) -> Self {
        Self {
            telemetry,
            jobs: HashMap::new(),
            slots: HashMap::new(),
            completed: None,
        }
    }

    /// The owner is about to do this.
    pub(super) fn action(&mut self, action: &Action, now: Instant) {
        if !self.telemetry.is_on() {
            return;
        }
        match action {
            Action::Admit { run, .. } => {
                self.jobs.entry(*run).or_default().begin("reserve", now);
            }
            Action::Claim(run) => {
                if let Some(job) = self.jobs.get_mut(run) {
                    job.begin("claim", now);
                }
            }
            Action::Complete(result) => {
                if let Some(job) = self.jobs.get_mut(&result.run_id) {
                    job.result = Some((result.clone(), now));
                }
            }
            Action::Park(slot) => self.cleanup("vm.park", *slot, now),
            Action::Destroy(slot) => self.cleanup("vm.destroy", *slot, now),
            Action::Start { .. } | Action::Cancel { .. } | Action::Warm(_) | Action::Demote(_) => {}
        }
    }

    /// The owner has heard this.
    pub(super) fn event(&mut self, event: &Event, now: Instant) {
        if !self.telemetry.is_on() {
            return;
        }
        match event {
            Event::Admitted { run, .. } => {
                if let Some(job) = self.jobs.get_mut(run) {
                    job.end(now, true);
                }
            }
            Event::Refused { run, .. } => {
                if let Some(job) = self.jobs.get_mut(run) {
                    // It waits on: what counts is the one that succeeds.
                    job.open = None;
                    job.refused = job.refused.saturating_add(1);
                }
            }
            Event::Claimed(job) => {
                if let Some(noted) = self.jobs.get_mut(&job.job.run_id) {
                    noted.end(now, true);
                    noted.claimed = Some(Claimed::of(job));
                }
            }
            Event::Lost(run) | Event::Gone(run) => {
                self.jobs
                    .retain(|of, job| of != run || job.claimed.is_some());
            }
            Event::Completed(run) => {
                if let Some(job) = self.jobs.get_mut(run) {
                    job.completed = Some(now);
                    if let Some((_, began)) = &job.result {
                        let name = "answer";
                        let began = *began;
                        job.over(Open { name, began }, now, true);
                    }
                    self.completed = Some(*run);
                }
            }
            Event::Parked { slot, parked } => self.cleaned(*slot, *parked, now),
            Event::Released(slot) => self.cleaned(*slot, true, now),
            _ => {}
        }
    }

    /// The owner has done all that came of what it heard.
    pub(super) fn settled(&mut self, now: Instant) {
        if let Some(run) = self.completed.take() {
            self.close(run, now);
        }
    }

    /// The executor begins; it notes its own steps in what this gives.
    pub(super) fn starts(&mut self, run: RunId, slot: SlotId, source: &'static str) -> Arc<Steps> {
        if !self.telemetry.is_on() {
            return Arc::default();
        }
        self.slots.insert(slot, run);
        let job = self.jobs.entry(run).or_default();
        job.vm_source = Some(source);
        Arc::clone(&job.steps)
    }

    fn cleanup(&mut self, name: &'static str, slot: SlotId, began: Instant) {
        let job = self.slots.get(&slot).and_then(|run| self.jobs.get_mut(run));
        if let Some(job) = job
            && job.cleanup.is_none()
        {
            job.cleanup = Some(Open { name, began });
        }
    }

    fn cleaned(&mut self, slot: SlotId, ok: bool, now: Instant) {
        if let Some(run) = self.slots.remove(&slot)
            && let Some(job) = self.jobs.get_mut(&run)
        {
            if let Some(open) = job.cleanup.take() {
                job.over(open, now, ok);
            }
            self.close(run, now);
        }
    }

    /// Sends the trace, if all of the job is over.
    fn close(&mut self, run: RunId, now: Instant) {
        let over = |job: &Noted| job.completed.is_some() && job.cleanup.is_none();
        if !self.jobs.get(&run).is_some_and(over) {
            return;
        }
        self.slots.retain(|_, of| *of != run);
        if let Some(job) = self.jobs.remove(&run)
            && let (Some(claimed), Some((result, at))) = (job.claimed, job.result)
        {
            self.telemetry.job(&JobTrace {
                parent: claimed.parent,
                run: run.to_string(),
                profile: claimed.profile,
                session: claimed.session,
                agent: claimed.agent,
                vm_source: job.vm_source,
                refused: job.refused,
                submitted: claimed.submitted,
                ended: job.completed.unwrap_or(at),
                verdict: result.verdict(),
                exit_code: result.exit_code,
                steps: job.steps.all(),
                clock: (now, SystemTime::now()),
            });
        }
    }
}

impl Claimed {
    fn of(job: &ClaimedJob) -> Self {
        let fields = &job.job;
        Self {
            parent: fields.traceparent,
            profile: fields.profile.to_string(),
            session: fields.session_id.as_ref().map(ToString::to_string),
            agent: fields.cli_agent_type.clone(),
            submitted: job.submitted,
        }
    }
}
