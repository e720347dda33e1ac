//! Entries for unit tests.

use api_types::client::{EndReason, OnRunnerLost, RunResult};
use api_types::{RunId, UnixMillis};

use super::{Entry, SpecAt, State};

/// A run that has just been made.
pub(crate) fn entry() -> Entry {
    Entry {
        run: RunId::random(),
        group: "vm0/demo".parse().unwrap(),
        profile: "vm0/small".parse().unwrap(),
        session: None,
        title: "true".to_owned(),
        owner: "k".to_owned(),
        created_at: 1,
        fingerprint: String::new(),
        spec: SpecAt::Bucket,
        on_lost: OnRunnerLost::Answer,
        order: None,
        epoch: 0,
        state: State::Queued,
        last_holder: None,
        policy_revision: 0,
        accepts_input: false,
        inputs: 0,
        advice: None,
    }
}

/// The same run, ended at a time.
pub(crate) fn done(entry: &Entry, at: UnixMillis) -> Entry {
    let result = RunResult {
        exit_code: 0,
        error: None,
        reason: EndReason::Completed,
        at,
    };
    Entry {
        state: State::Done { result, by: None },
        ..entry.clone()
    }
}

/// One of this group, made then.
pub(crate) fn entry_of(group: &str, created_at: UnixMillis) -> Entry {
    Entry {
        group: group.parse().unwrap(),
        title: format!("Title {created_at} 100%"),
        created_at,
        ..entry()
    }
}
