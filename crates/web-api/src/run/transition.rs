//! What may become of an entry.

use api_types::client::{EndReason, Holder, OnRunnerLost, RunResult};
use api_types::{ClaimId, Epoch, RunnerId, UnixMillis};

use super::entry::{Advice, Entry, Lease, State};

/// Longest error text kept, bytes.
pub const MAX_ERROR_BYTES: usize = 4 << 10;
/// Exit code of a run that somebody cancelled: that of a process killed by SIGKILL.
const CANCELLED: i32 = 137;
/// Exit code where the runner, not the agent, failed.
const FAILED: i32 = 1;

/// What somebody wants done to a run.
#[derive(Clone, Debug)]
pub enum Command {
    /// A runner takes it.
    Claim {
        /// Who.
        holder: Holder,
        /// The attempt.
        claim: ClaimId,
        /// The entry's revision, from which an unclaimed run has its place in the queue.
        revision: u64,
    },
    /// Its runner is alive.
    Renew {
        /// Who says so.
        runner: RunnerId,
        /// Of which claim.
        epoch: Epoch,
    },
    /// Its runner gives it back unstarted.
    Release {
        /// Who.
        runner: RunnerId,
        /// Of which claim.
        epoch: Epoch,
    },
    /// Its runner answers it.
    Complete {
        /// Who.
        runner: RunnerId,
        /// Of which claim.
        epoch: Epoch,
        /// The agent's exit code.
        exit_code: i32,
        /// What happened.
        error: Option<String>,
    },
    /// A client wants it ended.
    Cancel,
    /// Its lease was not renewed in time. Whoever says so saw the very revision that it writes over for as long as a
    /// lease lasts, by its own steady clock.
    Expire {
        /// Of which claim.
        epoch: Epoch,
    },
    /// The guest believes to be done.
    Advise(Advice),
    /// A client gave it a policy or an input, which stands elsewhere: whoever has the run is to look.
    Announce {
        /// At least this revision of its policy.
        policy_revision: u64,
        /// At least so many inputs.
        inputs: u64,
        /// The entry's revision: the place of a run to which nothing has happened yet.
        revision: u64,
    },
}

/// Why a command is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another claim was faster, or nobody may have it any more.
    #[error("the run is not waiting: another runner has it, or it is finished")]
    ClaimLost,
    /// It is spoken of a claim that is not the run's.
    #[error("the lease is no longer the run's: it expired, was given back or completed")]
    LeaseLost,
    /// It is over.
    #[error("the run is finished")]
    Finished,
}

/// What a command does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The entry becomes this.
    Write(Box<Entry>),
    /// It is so already.
    Same,
}

/// Applies a command at a time (for people's eyes only). Pure: the same arguments give the same outcome.
pub fn transition(entry: &Entry, command: &Command, now: UnixMillis) -> Result<Step, Refusal> {
    let mut next = entry.clone();
    match (&entry.state, command) {
        (
            State::Queued,
            Command::Claim {
                holder,
                claim,
                revision,
            },
        ) => {
            next.order = Some(entry.order.unwrap_or(*revision));
            next.epoch = entry.epoch.saturating_add(1);
            next.advice = None;
            next.last_holder = None;
            next.state = State::Running(Lease {
                holder: holder.clone(),
                claim: *claim,
                cancel_requested: false,
                renewals: 0,
            });
        }
        // The answer to the first attempt got lost on its way.
        (State::Running(lease), Command::Claim { holder, claim, .. })
            if lease.claim == *claim && lease.holder.runner_id == holder.runner_id =>
        {
            return Ok(Step::Same);
        }
        (_, Command::Claim { .. }) => return Err(Refusal::ClaimLost),

        (State::Running(lease), Command::Renew { runner, epoch }) => {
            holds(entry, lease, *runner, *epoch)?;
            next.state = State::Running(Lease {
                renewals: lease.renewals.saturating_add(1),
                ..lease.clone()
            });
        }
        (State::Running(lease), Command::Release { runner, epoch }) => {
            holds(entry, lease, *runner, *epoch)?;
            next.last_holder = Some(lease.holder.clone());
            next.state = if lease.cancel_requested {
                cancelled(now)
            } else {
                State::Queued
            };
        }
        (
            State::Running(lease),
            Command::Complete {
                runner,
                epoch,
                exit_code,
                error,
            },
        ) => {
            holds(entry, lease, *runner, *epoch)?;
            next.last_holder = Some(lease.holder.clone());
            next.state = State::Done {
                result: RunResult {
                    exit_code: *exit_code,
                    error: error.as_deref().map(presentable),
                    reason: EndReason::Completed,
                    at: now,
                },
                by: Some((*runner, *epoch)),
            };
        }
        (State::Done { by, .. }, Command::Complete { runner, epoch, .. })
            if *by == Some((*runner, *epoch)) =>
        {
            return Ok(Step::Same);
        }
        (
            State::Queued | State::Done { .. },
            Command::Renew { .. } | Command::Release { .. } | Command::Complete { .. },
        ) => return Err(Refusal::LeaseLost),

        (State::Queued, Command::Cancel) => next.state = cancelled(now),
        (State::Running(lease), Command::Cancel) if !lease.cancel_requested => {
            next.state = State::Running(Lease {
                cancel_requested: true,
                ..lease.clone()
            });
        }
        (State::Running(_) | State::Done { .. }, Command::Cancel) => return Ok(Step::Same),

        (State::Running(lease), Command::Expire { epoch }) => {
            if *epoch != entry.epoch {
                return Err(Refusal::LeaseLost);
            }
            next.last_holder = Some(lease.holder.clone());
            next.state = expired(entry, lease, now);
        }
        (State::Queued | State::Done { .. }, Command::Expire { .. }) => {
            return Err(Refusal::LeaseLost);
        }

        (State::Running(_), Command::Advise(advice)) => {
            if advice.epoch != entry.epoch {
                return Err(Refusal::LeaseLost);
            }
            if entry.advice.is_some() {
                return Ok(Step::Same);
            }
            next.advice = Some(Advice {
                error: advice.error.as_deref().map(presentable),
                ..advice.clone()
            });
        }
        (State::Done { .. }, Command::Announce { .. }) => return Err(Refusal::Finished),
        (
            State::Queued | State::Running(_),
            Command::Announce {
                policy_revision,
                inputs,
                revision,
            },
        ) => {
            next.policy_revision = entry.policy_revision.max(*policy_revision);
            next.inputs = entry.inputs.max(*inputs);
            if next == *entry {
                return Ok(Step::Same);
            }
            // Or being spoken to would send a run that waits to the back of the queue.
            if entry.state == State::Queued {
                next.order = Some(entry.order.unwrap_or(*revision));
            }
        }
        (State::Queued, Command::Advise(_)) => return Err(Refusal::LeaseLost),
        (State::Done { .. }, Command::Advise(_)) => return Err(Refusal::Finished),
    }
    Ok(Step::Write(Box::new(next)))
}

fn holds(entry: &Entry, lease: &Lease, runner: RunnerId, epoch: Epoch) -> Result<(), Refusal> {
    if entry.epoch == epoch && lease.holder.runner_id == runner {
        Ok(())
    } else {
        Err(Refusal::LeaseLost)
    }
}

fn cancelled(now: UnixMillis) -> State {
    State::Done {
        result: RunResult {
            exit_code: CANCELLED,
            error: Some("cancelled by user".to_owned()),
            reason: EndReason::Cancelled,
            at: now,
        },
        by: None,
    }
}

fn expired(entry: &Entry, lease: &Lease, now: UnixMillis) -> State {
    if lease.cancel_requested {
        return cancelled(now);
    }
    if let OnRunnerLost::Retry { max_attempts } = entry.on_lost
        && entry.epoch < Epoch::from(max_attempts)
    {
        return State::Queued;
    }
    let who = match &lease.holder.runner_name {
        Some(name) => name.to_string(),
        None => lease.holder.runner_id.to_string(),
    };
    State::Done {
        result: RunResult {
            exit_code: FAILED,
            error: Some(format!(
                "runner lost: {who} stopped renewing its lease; what the run did until then may have had effects"
            )),
            reason: EndReason::RunnerLost,
            at: now,
        },
        by: None,
    }
}

/// Without control characters (it is shown on terminals) and excess length.
fn presentable(error: &str) -> String {
    let mut text = String::new();
    for c in error.chars() {
        if text.len() > MAX_ERROR_BYTES {
            text.push('…');
            break;
        }
        if c.is_control() {
            text.extend(c.escape_default());
        } else {
            text.push(c);
        }
    }
    text
}

#[cfg(test)]
mod tests;
