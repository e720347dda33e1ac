//! A job starts: its executor, and what it tells the owner.

use std::sync::Arc;

use host::slot::SlotId;
use sandbox::{DeviceStats, Sandbox};
use tokio::sync::watch;

use super::Owner;
use crate::daemon::event::Event;
use crate::daemon::message::Message;
use crate::daemon::watchers::Mailbox;
use crate::executor::{self, Ended, Progress, VmSource, Work};
use crate::metrics::Metrics;
use crate::names::{ProfileName, RunId};
use crate::queue::{ClaimedJob, JobResult};
use crate::status::Phase;

impl Owner {
    pub(super) fn start(&mut self, slot: SlotId, profile: &ProfileName, job: Box<ClaimedJob>) {
        let run = job.job.run_id;
        let (cancel, cancelled) = watch::channel(None);
        self.cancels.insert(run, cancel);
        let source = match (self.sandbox(slot), self.templates.get(profile)) {
            (Some(sandbox), _) => VmSource::Paused(sandbox),
            (None, Some(template)) => VmSource::Restore(Arc::clone(template), self.vm_place(slot)),
            // Jobs of other profiles are never admitted.
            (None, None) => {
                let result = JobResult::failed(run, 1, "internal error: the profile is not open");
                let ended = Event::Ended {
                    result,
                    reusable: false,
                };
                return self.mailbox.event(ended);
            }
        };
        self.balloons.remove(&slot);
        let from = match (&source, self.parked.remove(&slot)) {
            (VmSource::Restore(..), _) => "restored",
            (VmSource::Paused(_), true) => "idle",
            (VmSource::Paused(_), false) => "warm",
        };
        self.metrics.started(from);
        let steps = self.traces.starts(run, slot, from);
        tracing::info!(
            %run, %profile, slot = slot.0, submitter = job.submitter,
            ready = matches!(source, VmSource::Paused(_)), "job starts"
        );
        let setting = self.setting.clone();
        let told = Told {
            mailbox: self.mailbox.clone(),
            metrics: Arc::clone(&self.metrics),
            run,
        };
        let network = self.vm_place(slot).network;
        let task = tokio::spawn(async move {
            let work = Work {
                job: &job.job,
                submitter: job.submitter,
                api: job.api.as_deref(),
                source,
                network,
                steps: &steps,
            };
            executor::execute(&setting, work, cancelled, &told).await
        });
        let (mailbox, metrics) = (self.mailbox.clone(), Arc::clone(&self.metrics));
        // A claim is answered whatever becomes of the executor.
        tokio::spawn(async move {
            let ended = task.await.unwrap_or_else(|error| {
                tracing::error!(%run, %error, "the executor fell");
                Ended {
                    result: JobResult::failed(run, 1, "internal error: the executor fell"),
                    reusable: false,
                    fault: true,
                }
            });
            if ended.fault {
                metrics.fault();
            }
            mailbox.event(Event::Ended {
                result: ended.result,
                reusable: ended.reusable,
            });
        });
    }
}

/// An executor's way of telling the owner how far it is.
struct Told {
    mailbox: Mailbox,
    metrics: Arc<Metrics>,
    run: RunId,
}

impl Progress for Told {
    fn phase(&self, phase: Phase) {
        self.mailbox.event(Event::Progress {
            run: self.run,
            phase,
        });
    }
    fn vm(&self, sandbox: &Sandbox) {
        self.mailbox.send(Message::VmUp {
            run: self.run,
            sandbox: sandbox.clone(),
        });
    }
    fn devices(&self, stats: DeviceStats) {
        self.metrics.devices(stats);
    }
}
