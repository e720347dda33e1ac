//! What a claim is answered with.

use api_types::SessionId;
use api_types::runner::{ExecutionContext, ResumeSession};

use super::error::ApiResult;
use super::policies;
use crate::engine::{EngineError, dotted, run_policy};
use crate::run::Entry;
use crate::service::Service;
use crate::tokens::mint;

/// How much longer than its run a guest's token lasts, seconds: the runner's own grace.
const TOKEN_SLACK_SECS: u64 = 600;

/// What the runner needs. Where it cannot be had now, the claim stands and is sent again under the same id.
pub(super) async fn context(
    service: &Service,
    entry: &Entry,
    now: u64,
) -> ApiResult<ExecutionContext> {
    let (spec, group_policy, policy, resume_session) = tokio::join!(
        service.engine.spec(entry),
        policies::of_group(service, &entry.group),
        newer_policy(service, entry),
        checkpoint(service, entry),
    );
    let spec = spec?;
    let timeout = spec
        .timeout_secs
        .unwrap_or(service.config.default_timeout_secs);
    let sandbox_token = mint(
        &service.keyring,
        entry.run,
        entry.epoch,
        now / 1000,
        timeout.saturating_add(TOKEN_SLACK_SECS),
    )
    .await?;
    Ok(ExecutionContext {
        run_id: entry.run,
        epoch: entry.epoch,
        lease_secs: service.config.lease.as_secs(),
        sandbox_token,
        profile: entry.profile.clone(),
        prompt: spec.prompt,
        working_dir: spec.working_dir,
        cli_agent_type: spec.cli_agent_type,
        environment: spec.environment,
        session_id: entry.session.clone(),
        resume_session: resume_session?,
        timeout_secs: spec.timeout_secs,
        policy: policy?.or(spec.policy),
        group_policy: group_policy?.map(|p| p.policy),
        secrets: spec.secrets,
        api_start_time: entry.created_at,
        policy_revision: entry.policy_revision,
        accepts_input: entry.accepts_input,
        inputs: entry.inputs,
    })
}

/// The policy that a client gave the run after it was made.
pub(super) async fn newer_policy(
    service: &Service,
    entry: &Entry,
) -> ApiResult<Option<serde_json::Value>> {
    if entry.policy_revision == 0 {
        return Ok(None);
    }
    let found = service.engine.policies.get(&run_policy(entry.run)).await?;
    Ok(match found {
        Some(found) => Some(
            serde_json::from_slice(&found.value)
                .map_err(|error| EngineError::Corrupt(error.to_string()))?,
        ),
        None => None,
    })
}

/// Key of a session: sessions of two groups are two sessions.
pub(super) fn session_key(entry: &Entry, session: &SessionId) -> String {
    // A session id may hold dots, but neither two in a row at its ends nor anything that NATS gives a meaning.
    format!("{}.{}", dotted(&entry.group), hex::encode(session.as_str()))
}

async fn checkpoint(service: &Service, entry: &Entry) -> ApiResult<Option<ResumeSession>> {
    let Some(session) = &entry.session else {
        return Ok(None);
    };
    let key = session_key(entry, session);
    let Some(found) = service.engine.checkpoint(&key).await? else {
        return Ok(None);
    };
    let session_history = String::from_utf8(found.history)
        .map_err(|error| EngineError::Corrupt(error.to_string()))?;
    Ok(Some(ResumeSession {
        session_id: found.cli_session,
        session_history,
    }))
}
