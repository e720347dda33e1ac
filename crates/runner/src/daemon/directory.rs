//! What the control socket may look at: a copy of what the owner knows, behind a lock that is held for moments.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use guest_control::Client;
use host::fs::Lock;
use policy::{MergeError, RuleArgument};

use super::event::Event;
use super::watchers::Mailbox;
use crate::control::protocol::{Failure, Refusal, RunInfo};
use crate::control::server::RunLookup;
use crate::names::RunId;
use crate::network::{JobNetworks, NetworkError};
use crate::notify;
use crate::status::Status;

#[derive(Default)]
struct Contents {
    status: Option<Status>,
    clients: HashMap<RunId, Client>,
}

/// The copy.
pub(super) struct Directory {
    contents: Mutex<Contents>,
    mailbox: Mailbox,
    networks: Option<Arc<JobNetworks>>,
    /// What makes us the one daemon of our name, until a successor is.
    name: Mutex<Option<Lock>>,
}

impl Directory {
    pub(super) fn new(
        mailbox: Mailbox,
        networks: Option<Arc<JobNetworks>>,
        name: Option<Lock>,
    ) -> Self {
        Self {
            contents: Mutex::default(),
            mailbox,
            networks,
            name: Mutex::new(name),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        // Every change leaves the contents whole.
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The owner knows something new. Runs that are no longer active lose their channel.
    pub(super) fn update(&self, status: Status) {
        let mut contents = self.lock();
        let active = |run: &RunId| status.active_runs.iter().any(|a| a.run_id == *run);
        contents.clients.retain(|run, _| active(run));
        contents.status = Some(status);
    }

    /// A run's VM is up.
    pub(super) fn add_client(&self, run: RunId, client: Client) {
        self.lock().clients.insert(run, client);
    }

    fn is_active(&self, run: RunId) -> bool {
        let contents = self.lock();
        let status = contents.status.as_ref();
        status.is_some_and(|status| status.active_runs.iter().any(|a| a.run_id == run))
    }

    /// The networks, for a run that is active.
    fn networks_for(&self, run: RunId) -> Result<&Arc<JobNetworks>, Refusal> {
        if !self.is_active(run) {
            return Err(Refusal::new(
                format_args!("run {run} is not active"),
                "only a running job has a policy that can be changed; `runner local list` shows them",
            ));
        }
        self.networks
            .as_ref()
            .ok_or_else(|| refusal(run, &NetworkError::NoRun))
    }
}

/// Why a run's policy cannot be told or changed.
fn refusal(run: RunId, error: &NetworkError) -> Refusal {
    match error {
        NetworkError::NoRun => Refusal::new(
            format_args!("run {run} has no network now"),
            "its VM is still being prepared, or its job is ending: try again in a moment",
        ),
        NetworkError::Policy(MergeError::Policy(error)) => Refusal::new(
            format_args!("the policy of run {run} cannot be changed: {error}"),
            "name fewer hosts, or several by one pattern such as *.example.com",
        ),
        NetworkError::NoSecret(name) => Refusal::new(
            format_args!(
                "the policy of run {run} names the secret {name}, which its job does not have"
            ),
            format_args!("submit the job with --secret {name}=env:VARIABLE"),
        ),
        // The registration has the new policy already; whoever fell will be told it, or the run has to go.
        NetworkError::Proxy(_) | NetworkError::Launcher(_) => Refusal::new(
            format_args!(
                "the policy of run {run} was changed, but it may not hold everywhere yet: {error}"
            ),
            format_args!("try again, or end the job with `runner kill {run}`"),
        ),
        error => Refusal::new(
            format_args!("the policy of run {run} cannot be changed: {error}"),
            "the runner's log says more: logs/runner-<name>.log in the home",
        ),
    }
}

#[async_trait]
impl RunLookup for Directory {
    async fn runs(&self) -> Vec<RunInfo> {
        let contents = self.lock();
        let runs = contents
            .status
            .iter()
            .flat_map(|status| &status.active_runs);
        runs.map(|run| RunInfo {
            run_id: run.run_id,
            profile: run.profile.clone(),
            phase: run.phase.to_string(),
            since_unix: run.phase_started_at.unix_secs(),
        })
        .collect()
    }

    async fn client(&self, run: RunId) -> Result<Client, Failure> {
        let client = self.lock().clients.get(&run).cloned();
        client.ok_or_else(|| {
            Failure::new(if self.is_active(run) {
                format!("the VM of run {run} is still being prepared; try again in a moment")
            } else {
                format!("run {run} is not active")
            })
        })
    }

    async fn cancel(&self, run: RunId) -> Result<(), Failure> {
        if !self.is_active(run) {
            return Err(Failure::new(format!("run {run} is not active")));
        }
        self.mailbox.event(Event::Cancel(run));
        Ok(())
    }

    fn snapshot(&self) -> Option<Status> {
        self.lock().status.clone()
    }

    fn blot(&self, run: RunId, text: String) -> String {
        match &self.networks {
            Some(networks) => networks.blot(run, text),
            None => text,
        }
    }

    async fn policy(&self, run: RunId) -> Result<String, Refusal> {
        let policy = self.networks_for(run)?.policy(run);
        let policy = policy.ok_or_else(|| refusal(run, &NetworkError::NoRun))?;
        Ok(policy.to_json())
    }

    async fn change_policy(
        &self,
        run: RunId,
        deny: &[RuleArgument],
        allow: &[RuleArgument],
    ) -> Result<String, Refusal> {
        let networks = self.networks_for(run)?;
        let denied = deny.iter().map(RuleArgument::deny);
        let allowed = allow.iter().map(RuleArgument::allow);
        let changed = networks.update(run, denied.chain(allowed).collect()).await;
        let policy = changed.map_err(|error| refusal(run, &error))?;
        tracing::info!(%run, denied = deny.len(), allowed = allow.len(), "a policy was changed");
        Ok(policy.to_json())
    }

    async fn retire(&self, successor: u32) {
        self.mailbox.event(Event::Retire);
        let held = self
            .name
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if held.is_some() {
            tracing::info!(successor, "handing over");
            notify::hand_over(successor);
        }
    }

    async fn status(&self) -> String {
        let contents = self.lock();
        let text = contents.status.as_ref().map(serde_json::to_string_pretty);
        text.and_then(Result::ok).unwrap_or_default()
    }
}
