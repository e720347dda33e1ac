//! Runs, for clients.

use std::sync::Arc;

use api_types::client::{CreateRun, OnRunnerLost, Run, RunPage, RunState, Secret};
use api_types::runner::RunPolicy;
use api_types::{GroupName, ProblemKind, ProfileName, RunId, SessionId};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Deserialize;

use super::Problems;
use super::auth::Client;
use super::error::{ApiError, ApiResult, busy, problem};
use super::extract::{Json, Params, RunPath};
use crate::engine::{Created, Spec, run_policy};
use crate::read_model::Filter;
use crate::run::{Command, Entry, State as RunStateOf, TITLE_CHARS};
use crate::service::Service;

const MAX_PROMPT_BYTES: usize = 4 << 20;
const MAX_PATH_BYTES: usize = 4095;
const MAX_TIMEOUT_SECS: u64 = 7 * 24 * 3600;
const MAX_SECRETS: usize = 64;
const MAX_VALUE_BYTES: usize = 96 << 10;
const MAX_ENVIRONMENT_BYTES: usize = 1 << 20;
const MAX_KEY_BYTES: usize = 255;
/// Runs on one page, at most.
const MAX_PAGE: u32 = 200;

pub(super) fn invalid(field: &str, reason: &str) -> ApiError {
    problem(
        ProblemKind::Invalid,
        format!("`{field}` is not usable: {reason}"),
    )
}

/// What the runner would refuse is refused here already: the same limits as those of a job file.
fn check(run: &CreateRun) -> ApiResult<()> {
    if run.prompt.is_empty() || run.prompt.len() > MAX_PROMPT_BYTES || run.prompt.contains('\0') {
        return Err(invalid(
            "prompt",
            "it has 1 byte to 4 MiB and no NUL character",
        ));
    }
    let path = &run.working_dir;
    if !path.starts_with('/')
        || path.len() > MAX_PATH_BYTES
        || path.chars().any(char::is_control)
        || path.split('/').any(|part| part == "..")
    {
        return Err(invalid(
            "workingDir",
            "it is an absolute path of the guest without `..` and control characters",
        ));
    }
    if let Some(secs) = run.timeout_secs
        && !(1..=MAX_TIMEOUT_SECS).contains(&secs)
    {
        return Err(invalid("timeoutSecs", "it is 1 to 604800"));
    }
    if let OnRunnerLost::Retry { max_attempts } = run.on_runner_lost
        && !(2..=10).contains(&max_attempts)
    {
        return Err(invalid("onRunnerLost.maxAttempts", "it is 2 to 10"));
    }
    check_environment(run)?;
    check_secrets(run)
}

fn is_reserved(name: &str) -> bool {
    name.starts_with("VM0_") || matches!(name, "CLI_AGENT_TYPE" | "USE_MOCK_CLAUDE")
}

fn check_environment(run: &CreateRun) -> ApiResult<()> {
    let mut total = 0_usize;
    for (name, value) in &run.environment {
        let first = name
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        let rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !first || !rest || name.len() > 256 {
            return Err(invalid(
                "environment",
                "a name is up to 256 letters, digits and underscores and does not start with a digit",
            ));
        }
        if is_reserved(name) {
            return Err(invalid(
                "environment",
                "VM0_*, CLI_AGENT_TYPE and USE_MOCK_CLAUDE are set by the runner",
            ));
        }
        if value.contains('\0') || value.len() > MAX_VALUE_BYTES {
            return Err(invalid(
                "environment",
                "a value has up to 96 KiB and no NUL character",
            ));
        }
        total = total
            .saturating_add(name.len())
            .saturating_add(value.len())
            .saturating_add(2);
    }
    if total > MAX_ENVIRONMENT_BYTES {
        return Err(invalid("environment", "it is larger than 1 MiB in all"));
    }
    Ok(())
}

fn check_secrets(run: &CreateRun) -> ApiResult<()> {
    if run.secrets.len() > MAX_SECRETS {
        return Err(invalid("secrets", "there are more than 64"));
    }
    let mut names = std::collections::BTreeSet::new();
    for secret in &run.secrets {
        let name = secret.name.as_str();
        if is_reserved(name) || run.environment.contains_key(name) || !names.insert(name) {
            return Err(invalid(
                "secrets",
                "a name occurs once, is no variable of the environment and none that the runner sets",
            ));
        }
        check_secret(secret).map_err(|reason| invalid("secrets", &reason))?;
    }
    Ok(())
}

/// As the proxy will want it. No text repeats the value.
fn check_secret(secret: &Secret) -> Result<(), String> {
    policy::SecretValue::new(secret.value.clone()).map_err(|error| error.to_string())?;
    if secret.hosts.len() > 100 {
        return Err("a secret names more than 100 hosts".to_owned());
    }
    for host in &secret.hosts {
        host.parse::<policy::HostPattern>()
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// A policy in its canonical form.
pub(super) fn canonical(policy: &serde_json::Value) -> ApiResult<serde_json::Value> {
    let draft = policy::Draft::from_json(&policy.to_string())
        .map_err(|error| problem(ProblemKind::Invalid, error.to_string()))?;
    serde_json::to_value(draft).map_err(|error| problem(ProblemKind::Invalid, error.to_string()))
}

fn idempotency_key(headers: &HeaderMap) -> ApiResult<Option<&str>> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(text) if (1..=MAX_KEY_BYTES).contains(&text.len()) => Ok(Some(text)),
        _ => Err(problem(
            ProblemKind::Malformed,
            "the Idempotency-Key is 1 to 255 printable ASCII characters",
        )),
    }
}

fn title(prompt: &str) -> String {
    let line = prompt.lines().find(|line| !line.trim().is_empty());
    line.unwrap_or_default()
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(TITLE_CHARS)
        .collect()
}

/// Makes a run.
///
/// With `Idempotency-Key`, the same request sent again by the same API key gives the same run, for as long as the run is
/// kept; another request under the key is refused. A run that was answered with 201 is never lost.
#[utoipa::path(post, path = "/api/runs", tag = "runs", operation_id = "createRun", request_body = CreateRun,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 printable ASCII characters",
        max_length = 255, pattern = "^[!-~]([ -~]*[!-~])?$")),
    responses((status = 201, description = "The run waits", body = Run),
        (status = 200, description = "It was made by an earlier request under this key", body = Run), Problems),
    security(("apiKey" = [])))]
pub(super) async fn create(
    State(service): State<Arc<Service>>,
    client: Client,
    headers: HeaderMap,
    Json(body): Json<CreateRun>,
) -> ApiResult<Response> {
    client.group(&body.group)?;
    check(&body)?;
    let policy = body.policy.as_ref().map(canonical).transpose()?;
    let key = idempotency_key(&headers)?;
    let request = serde_json::to_vec(&body)
        .map_err(|error| problem(ProblemKind::Invalid, error.to_string()))?;
    let fingerprint = service.keyring.fingerprint("request", &request);
    let run = match key {
        None => RunId::random(),
        Some(key) => {
            let hash = service
                .keyring
                .fingerprint(&format!("key {}", client.id()), key.as_bytes());
            let mut bytes = [0_u8; 16];
            hex::decode_to_slice(hash.get(..32).unwrap_or_default(), &mut bytes)
                .map_err(|error| problem(ProblemKind::Internal, error.to_string()))?;
            RunId::from_hash(bytes)
        }
    };
    if key.is_some()
        && let Some((entry, _)) = service.engine.run(run).await?
    {
        return existing(&entry, &fingerprint);
    }
    if service.index.queued(&body.group) >= service.config.max_queued {
        return Err(busy("too many runs of the group wait", 10));
    }
    let sealed = if body.secrets.is_empty() {
        None
    } else {
        let plain = zeroize::Zeroizing::new(
            serde_json::to_vec(&body.secrets)
                .map_err(|error| problem(ProblemKind::Invalid, error.to_string()))?,
        );
        Some(service.keyring.seal(&run.to_string(), &plain).await?)
    };
    let title = title(&body.prompt);
    let spec = Spec {
        prompt: body.prompt,
        working_dir: body.working_dir,
        cli_agent_type: body.cli_agent_type,
        environment: body.environment,
        timeout_secs: body.timeout_secs,
        policy,
        secrets: body.secrets.iter().map(|s| s.name.clone()).collect(),
        sealed,
    };
    let entry = Entry {
        run,
        group: body.group,
        profile: body.profile,
        session: body.session_id,
        title,
        owner: client.id().to_owned(),
        created_at: service.clock.now(),
        spec: service.engine.put_spec(run, &fingerprint, &spec).await?,
        fingerprint,
        on_lost: body.on_runner_lost,
        order: None,
        epoch: 0,
        state: RunStateOf::Queued,
        last_holder: None,
        policy_revision: 0,
        accepts_input: body.accepts_input,
        inputs: 0,
        advice: None,
    };
    match service.engine.create_run(&entry).await? {
        Created::New(revision) => {
            service
                .index
                .note(&entry, revision, std::time::Instant::now());
            let location = format!("/api/runs/{run}");
            let view = axum::Json(entry.view());
            Ok((StatusCode::CREATED, [(header::LOCATION, location)], view).into_response())
        }
        // Our own first try, whose acknowledgement was lost, or the same request beside us.
        Created::Existing(found, _) => existing(&found, &entry.fingerprint),
    }
}

fn existing(entry: &Entry, fingerprint: &str) -> ApiResult<Response> {
    if entry.fingerprint == fingerprint {
        Ok((StatusCode::OK, axum::Json(entry.view())).into_response())
    } else {
        Err(problem(
            ProblemKind::KeyReused,
            format!(
                "the idempotency key was used for run {}, by another request",
                entry.run
            ),
        ))
    }
}

/// Which runs to list.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListParams {
    /// Only of this group; otherwise of all groups of the API key.
    group: Option<GroupName>,
    /// Only in this state.
    state: Option<RunState>,
    /// Only of this profile.
    profile: Option<ProfileName>,
    /// Only of this session.
    session_id: Option<SessionId>,
    /// Only whose prompt's beginning holds this, or whose id begins with it.
    #[param(max_length = 200)]
    q: Option<String>,
    /// Only accepted at or after this, milliseconds since the Unix epoch.
    since: Option<u64>,
    /// Only accepted before this, milliseconds since the Unix epoch.
    until: Option<u64>,
    /// `next` of the page before.
    #[param(
        max_length = 100,
        pattern = "^(0|[1-9][0-9]{0,15})\\.[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
    )]
    cursor: Option<String>,
    /// So many at most.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
}

/// Lists runs, newest first. A run that was made a moment ago may be missing still.
#[utoipa::path(get, path = "/api/runs", tag = "runs", operation_id = "listRuns", params(ListParams),
    responses((status = 200, description = "Some of them", body = RunPage), Problems),
    security(("apiKey" = [])))]
pub(super) async fn list(
    State(service): State<Arc<Service>>,
    client: Client,
    Params(params): Params<ListParams>,
) -> ApiResult<axum::Json<RunPage>> {
    let groups = match params.group {
        Some(group) => {
            client.group(&group)?;
            vec![group]
        }
        None => client.groups().iter().cloned().collect(),
    };
    let limit = params.limit.unwrap_or(50);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(problem(ProblemKind::Malformed, "`limit` is 1 to 200"));
    }
    if params
        .q
        .as_ref()
        .is_some_and(|q| q.chars().count() > 200 || q.contains('\0'))
    {
        return Err(problem(
            ProblemKind::Malformed,
            "`q` has at most 200 characters and no NUL",
        ));
    }
    let filter = Filter {
        groups,
        state: params.state,
        profile: params.profile,
        session: params.session_id,
        search: params.q,
        since: params.since,
        until: params.until,
        cursor: params.cursor,
        limit,
    };
    let model = Arc::clone(&service.read_model);
    let page = tokio::task::spawn_blocking(move || model.list(&filter))
        .await
        .map_err(|error| problem(ProblemKind::Internal, error.to_string()))??;
    Ok(axum::Json(page))
}

/// A run as it is now.
#[utoipa::path(get, path = "/api/runs/{run}", tag = "runs", operation_id = "getRun",
    params(("run" = RunId, Path, description = "Its id")),
    responses((status = 200, description = "The run", body = Run), Problems), security(("apiKey" = [])))]
pub(super) async fn get(
    State(service): State<Arc<Service>>,
    client: Client,
    RunPath(run): RunPath,
) -> ApiResult<axum::Json<Run>> {
    let (entry, _) = client.run(&service, run).await?;
    Ok(axum::Json(entry.view()))
}

/// Wants a run ended. One that waits is ended at once, one that runs by its runner; one that is done stays as it is.
#[utoipa::path(post, path = "/api/runs/{run}/cancel", tag = "runs", operation_id = "cancelRun",
    params(("run" = RunId, Path, description = "Its id")),
    responses((status = 200, description = "The run as it is now", body = Run), Problems), security(("apiKey" = [])))]
pub(super) async fn cancel(
    State(service): State<Arc<Service>>,
    client: Client,
    RunPath(run): RunPath,
) -> ApiResult<axum::Json<Run>> {
    client.run(&service, run).await?;
    let now = service.clock.now();
    let applied = service
        .engine
        .apply(run, None, now, |_| Command::Cancel)
        .await?;
    service.note(&applied);
    service.push_look(&applied.entry).await;
    Ok(axum::Json(applied.entry.view()))
}

/// Tells the run's runner that there is something new for it.
pub(super) async fn announce(
    service: &Service,
    run: RunId,
    policy_revision: u64,
    inputs: u64,
) -> ApiResult<()> {
    let command = |revision| Command::Announce {
        policy_revision,
        inputs,
        revision,
    };
    let applied = service
        .engine
        .apply(run, None, service.clock.now(), command)
        .await?;
    service.note(&applied);
    service.push_look(&applied.entry).await;
    Ok(())
}

/// Changes what a run may reach, also while it runs. The group's and the profile's policies stay above it.
#[utoipa::path(put, path = "/api/runs/{run}/policy", tag = "runs", operation_id = "setRunPolicy",
    params(("run" = RunId, Path, description = "Its id")), request_body = api_types::policy::Policy,
    responses((status = 200, description = "The policy that its runner will get", body = RunPolicy), Problems),
    security(("apiKey" = [])))]
pub(super) async fn set_policy(
    State(service): State<Arc<Service>>,
    client: Client,
    RunPath(run): RunPath,
    Json(body): Json<serde_json::Value>,
) -> ApiResult<axum::Json<RunPolicy>> {
    let (entry, _) = client.run(&service, run).await?;
    if entry.is_done() {
        return Err(crate::run::Refusal::Finished.into());
    }
    let policy = canonical(&body)?;
    let bytes = Bytes::from(policy.to_string());
    let policy_revision = service.engine.policies.put(&run_policy(run), bytes).await?;
    announce(&service, run, policy_revision, 0).await?;
    Ok(axum::Json(RunPolicy {
        policy: Some(policy),
        policy_revision,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_is_the_first_line_with_text_cut_and_clean() {
        assert_eq!(title("\n\n  fix \u{1b}[31mit\nnow"), "fix [31mit");
        assert_eq!(title(&"é".repeat(500)).chars().count(), TITLE_CHARS);
        assert_eq!(title("\n"), "");
    }
}
