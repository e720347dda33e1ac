//! What clients tell an agent while it works.

use std::sync::Arc;

use api_types::client::{Input, InputAccepted};
use api_types::{ProblemKind, RunId};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::Problems;
use super::auth::Client;
use super::error::{ApiResult, problem};
use super::extract::{Json, RunPath};
use super::runners::gap;
use super::runs::{announce, invalid};
use crate::engine::Appended;
use crate::run::Entry;
use crate::service::Service;

/// Longest input, bytes.
const MAX_BYTES: usize = 64 << 10;
/// Most inputs of one run.
const MAX_INPUTS: u64 = 1000;

/// Tells the agent something, now or as soon as it runs.
///
/// Only a run made with `acceptsInput` takes any, at most 1000 (then: 413). It is a further message of the agent's user: read
/// during the turn that it is at or answered in a turn after it, and repeated among the run's events (`isReplay`) when it is
/// read. The run ends with an answer after which no input waits in its VM; what is sent shortly before can come too late, and
/// is among no events then. A run that is queued again gets its inputs again.
///
/// After an answer that is no success the input may be there all the same: with `sequence`, it can be sent until it is taken.
#[utoipa::path(post, path = "/api/runs/{run}/input", tag = "runs", operation_id = "sendInput",
    params(("run" = RunId, Path, description = "Its id")), request_body = Input,
    responses((status = 202, description = "It is kept with the run and given to its agent", body = InputAccepted), Problems),
    security(("apiKey" = [])))]
pub(super) async fn send(
    State(service): State<Arc<Service>>,
    client: Client,
    RunPath(run): RunPath,
    Json(body): Json<Input>,
) -> ApiResult<Response> {
    let (entry, _) = client.run(&service, run).await?;
    if entry.is_done() {
        return Err(crate::run::Refusal::Finished.into());
    }
    if !entry.accepts_input {
        return Err(problem(
            ProblemKind::NoInput,
            "the run was made without \"acceptsInput\": true",
        ));
    }
    let start = check(&body, &entry)?;
    let appended = service
        .engine
        .append_input(run, start, entry.inputs, &body.text)
        .await?;
    let there = match appended {
        Appended::Next(there) => there,
        Appended::Full => return Err(problem(ProblemKind::TooLarge, "the run has too much input")),
        Appended::Gap(there) => {
            let next = there.saturating_add(1);
            return Err(gap(next, format!("the next input is number {next}")));
        }
        Appended::Fenced => {
            return Err(problem(
                ProblemKind::Internal,
                "the inputs are of another claim",
            ));
        }
    };
    announce(&service, run, 0, there).await?;
    let sequence = body.sequence.unwrap_or(there);
    Ok((StatusCode::ACCEPTED, axum::Json(InputAccepted { sequence })).into_response())
}

/// Behind how many others it is to be, if it says so.
fn check(input: &Input, entry: &Entry) -> ApiResult<Option<u64>> {
    if input.text.is_empty() || input.text.len() > MAX_BYTES || input.text.contains('\0') {
        return Err(invalid(
            "text",
            "it has 1 byte to 64 KiB and no NUL character",
        ));
    }
    match input.sequence {
        Some(sequence) if (1..=MAX_INPUTS).contains(&sequence) => {
            Ok(Some(sequence.saturating_sub(1)))
        }
        Some(_) => Err(invalid("sequence", "it is 1 to 1000")),
        None if entry.inputs < MAX_INPUTS => Ok(None),
        None => Err(problem(
            ProblemKind::TooLarge,
            format!("the run has had {MAX_INPUTS} inputs"),
        )),
    }
}
