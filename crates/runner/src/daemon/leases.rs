//! What the owner has tasks do with leases: getting them, and making VMs ready to wait with them.

use std::sync::Arc;

use host::launcher::LauncherError;
use host::slot::{LeaseKind, SlotId};

use super::event::{Event, Warmed};
use super::message::Message;
use super::owner::Owner;
use crate::executor;
use crate::names::{ProfileName, RunId};

impl Owner {
    pub(super) fn admit(&mut self, run: RunId, profile: &ProfileName, slot: Option<SlotId>) {
        let mailbox = self.mailbox.clone();
        let budget = self.budget.clone();
        if let Some(mut lease) = slot.and_then(|slot| self.take_lease(slot)) {
            tokio::spawn(async move {
                mailbox.send(match lease.make_firm(run).await {
                    Ok(true) => Message::Admitted {
                        run,
                        lease,
                        usage: None,
                    },
                    Ok(false) => Message::Refused {
                        run,
                        lease: Some(lease),
                        usage: budget.usage().await.ok(),
                    },
                    Err(error) => {
                        tell_refusal(run, &error);
                        Message::Refused {
                            run,
                            lease: Some(lease),
                            usage: None,
                        }
                    }
                });
            });
            return;
        }
        let resources = self.shapes.get(profile).copied().unwrap_or_default();
        tokio::spawn(async move {
            let reserved = budget
                .try_reserve(resources, LeaseKind::Firm, Some(run))
                .await;
            let usage = budget.usage().await.ok();
            mailbox.send(match reserved {
                Ok(Some(lease)) => Message::Admitted { run, lease, usage },
                Ok(None) => Message::Refused {
                    run,
                    lease: None,
                    usage,
                },
                Err(error) => {
                    tell_refusal(run, &error);
                    Message::Refused {
                        run,
                        lease: None,
                        usage: None,
                    }
                }
            });
        });
    }

    pub(super) fn warm(&mut self, profile: ProfileName) {
        let mailbox = self.mailbox.clone();
        let budget = self.budget.clone();
        let restores = Arc::clone(&self.setting.restores);
        let Some(template) = self.templates.get(&profile).cloned() else {
            return;
        };
        let resources = self.shapes.get(&profile).copied().unwrap_or_default();
        tokio::spawn(async move {
            let making = async {
                let _turn = restores.acquire().await;
                let lease = match budget
                    .try_reserve(resources, LeaseKind::Revocable, None)
                    .await
                {
                    Ok(Some(lease)) => lease,
                    Ok(None) => return Err(Warmed::NoRoom),
                    Err(error) => return Err(Warmed::Failed(error.to_string())),
                };
                match executor::warm_up(&template, lease.vm_place()).await {
                    Ok(sandbox) => Ok((lease, sandbox)),
                    Err(error) => {
                        // What was started is reaped before another try.
                        if let Err(error) = lease.release().await {
                            tracing::warn!(%error, "the slot of a failed warm VM is not released");
                        }
                        Err(Warmed::Failed(error.to_string()))
                    }
                }
            };
            mailbox.send(match making.await {
                Ok((lease, sandbox)) => Message::Warm {
                    profile,
                    lease,
                    sandbox,
                },
                Err(outcome) => Message::Event(Event::Warmed { profile, outcome }),
            });
        });
    }

    pub(super) fn park(&mut self, slot: SlotId) {
        let mailbox = self.mailbox.clone();
        let (lease, sandbox) = (self.take_lease(slot), self.sandbox(slot));
        let Some(mut lease) = lease else {
            return;
        };
        tokio::spawn(async move {
            let parked = match &sandbox {
                Some(sandbox) => executor::park(sandbox).await.map_err(|e| e.to_string()),
                None => Err("it has no VM".to_owned()),
            };
            let parked = match parked {
                Ok(()) => lease.make_revocable().await.map_err(|e| e.to_string()),
                failed => failed,
            };
            if let Err(error) = &parked {
                tracing::warn!(
                    slot = slot.0,
                    error,
                    "a VM could not be kept for its session"
                );
            }
            let reclaim = sandbox.filter(|_| parked.is_ok());
            mailbox.send(Message::Parked {
                lease,
                parked: parked.is_ok(),
            });
            // It may be claimed from now on, and does not wait for this if it is.
            if let Some(sandbox) = reclaim {
                match executor::give_memory_back(&sandbox).await {
                    Ok(Some(balloon)) => mailbox.send(Message::Reclaimed {
                        slot,
                        pid: sandbox.pid(),
                        balloon,
                    }),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::debug!(slot = slot.0, %error, "an idle VM keeps its memory");
                    }
                }
            }
        });
    }
}

fn tell_refusal(run: RunId, error: &LauncherError) {
    tracing::error!(%run, %error, "a job's slot cannot be reserved");
}
