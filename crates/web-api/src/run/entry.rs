//! The entry of a run in the key-value bucket: its only truth.

use api_types::client::{Holder, OnRunnerLost, Run, RunResult, RunState};
use api_types::{ClaimId, Epoch, GroupName, ProfileName, RunId, RunnerId, SessionId, UnixMillis};
use serde::{Deserialize, Serialize};

/// How much of a prompt is kept as a run's title, characters.
pub const TITLE_CHARS: usize = 120;

/// Where the run's specification is: what never changes and can be large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecAt {
    /// In the bucket of specifications.
    Bucket,
    /// In the object store: it is too large for one message.
    Objects,
}

/// Who has the run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The runner.
    pub holder: Holder,
    /// The attempt by which it got the run.
    pub claim: ClaimId,
    /// Somebody wants the run ended.
    pub cancel_requested: bool,
    /// How often it was renewed. Each renewal is a new revision of the entry, from which every replica counts anew.
    pub renewals: u64,
}

/// What the guest says came of the run: no more than a hint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// Of which claim.
    pub epoch: Epoch,
    /// The CLI's exit code.
    pub exit_code: i32,
    /// What happened, when something did.
    pub error: Option<String>,
}

/// Where the run is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It waits.
    Queued,
    /// A runner has it.
    Running(Lease),
    /// It is answered.
    Done {
        /// How.
        result: RunResult,
        /// The runner and claim that completed it, if one did.
        by: Option<(RunnerId, Epoch)>,
    },
}

/// The entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The run; the key says the same.
    pub run: RunId,
    /// Whose runners take it.
    pub group: GroupName,
    /// What VM it wants.
    pub profile: ProfileName,
    /// Its session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionId>,
    /// The beginning of its prompt.
    pub title: String,
    /// Id of the API key that made it.
    pub owner: String,
    /// When.
    pub created_at: UnixMillis,
    /// SHA-256 of the request, so that the same one sent again is told from another.
    pub fingerprint: String,
    /// Where the rest is.
    pub spec: SpecAt,
    /// What if its runner is lost.
    pub on_lost: OnRunnerLost,
    /// Its place in the queue: the revision at which it was first queued. Known from the first change on, which is a claim,
    /// an input or a policy; until then the entry's own revision is it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<u64>,
    /// How often it has been claimed.
    pub epoch: Epoch,
    /// Where it is.
    pub state: State,
    /// Who had it last, when nobody has it now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_holder: Option<Holder>,
    /// Revision of the policy that a client gave it after it was made; 0: none.
    #[serde(default)]
    pub policy_revision: u64,
    /// Whether it may be given input. Written only where it is so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accepts_input: bool,
    /// How many inputs it was given.
    #[serde(default)]
    pub inputs: u64,
    /// What the guest said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<Advice>,
}

impl Entry {
    /// Where it is.
    pub fn run_state(&self) -> RunState {
        match self.state {
            State::Queued => RunState::Queued,
            State::Running(_) => RunState::Running,
            State::Done { .. } => RunState::Done,
        }
    }

    /// Whether it is answered.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done { .. })
    }

    /// As clients see it.
    pub fn view(&self) -> Run {
        let (holder, cancel_requested, result) = match &self.state {
            State::Queued => (self.last_holder.clone(), false, None),
            State::Running(lease) => (Some(lease.holder.clone()), lease.cancel_requested, None),
            State::Done { result, .. } => (self.last_holder.clone(), false, Some(result.clone())),
        };
        Run {
            run_id: self.run,
            group: self.group.clone(),
            profile: self.profile.clone(),
            state: self.run_state(),
            session_id: self.session.clone(),
            title: self.title.clone(),
            created_at: self.created_at,
            epoch: self.epoch,
            holder,
            cancel_requested,
            accepts_input: self.accepts_input,
            inputs: self.inputs,
            result,
        }
    }
}
