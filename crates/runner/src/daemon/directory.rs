//! What the control socket may look at: a copy of what the owner knows, behind a lock that is held for moments.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use guest_control::Client;

use super::event::Event;
use super::watchers::Mailbox;
use crate::control::protocol::{Failure, RunInfo};
use crate::control::server::RunLookup;
use crate::names::RunId;
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
}

impl Directory {
    pub(super) fn new(mailbox: Mailbox) -> Self {
        Self {
            contents: Mutex::default(),
            mailbox,
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

    async fn status(&self) -> String {
        let contents = self.lock();
        let text = contents.status.as_ref().map(serde_json::to_string_pretty);
        text.and_then(Result::ok).unwrap_or_default()
    }
}
