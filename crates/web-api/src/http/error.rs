//! Answers that are no success: always a problem document.

use api_types::{NameError, PROBLEM_JSON, Problem, ProblemKind};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::engine::{ApplyError, EngineError};
use crate::read_model::ReadModelError;
use crate::run::Refusal;
use crate::tokens::KeyringError;

/// A problem on its way out.
#[derive(Clone, Debug)]
pub struct ApiError(pub Box<Problem>);

/// Shorthand.
pub type ApiResult<T> = Result<T, ApiError>;

/// A problem of this kind.
pub fn problem(kind: ProblemKind, detail: impl Into<String>) -> ApiError {
    ApiError(Box::new(Problem::new(kind, detail)))
}

/// Come back later.
pub fn busy(detail: &str, retry_after: u64) -> ApiError {
    let mut problem = Problem::new(ProblemKind::TooManyRequests, detail);
    problem.retry_after = Some(retry_after);
    ApiError(Box::new(problem))
}

/// There is no place for the request.
pub fn too_many() -> ApiError {
    busy("the server has too many requests under way", 1)
}

/// There is no such run, or none that the token may see.
pub fn no_such_run() -> ApiError {
    problem(
        ProblemKind::NotFound,
        "there is no such run, or the token does not see its group",
    )
}

impl IntoResponse for ApiError {
    fn into_response(mut self) -> Response {
        let status =
            StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status == StatusCode::SERVICE_UNAVAILABLE && self.0.retry_after.is_none() {
            self.0.retry_after = Some(1);
        }
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if let Some(seconds) = self.0.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UPGRADE_REQUIRED {
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Logs what happened; the client learns that it is our fault and no more.
fn internal(error: &dyn std::fmt::Display) -> ApiError {
    tracing::error!(%error, "a request failed");
    problem(ProblemKind::Internal, "the server failed; its log says why")
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Unavailable(why) => {
                tracing::warn!(%why, "NATS does not answer");
                problem(
                    ProblemKind::Unavailable,
                    "the storage does not answer; what was asked may or may not have been done: ask again",
                )
            }
            EngineError::Corrupt(_) => internal(&error),
        }
    }
}

impl From<KeyringError> for ApiError {
    fn from(error: KeyringError) -> Self {
        match error {
            KeyringError::Engine(error) => error.into(),
            error => internal(&error),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let kind = match refusal {
            Refusal::ClaimLost => ProblemKind::ClaimLost,
            Refusal::LeaseLost => ProblemKind::LeaseLost,
            Refusal::Finished => ProblemKind::RunFinished,
        };
        problem(kind, refusal.to_string())
    }
}

impl From<ApplyError> for ApiError {
    fn from(error: ApplyError) -> Self {
        match error {
            ApplyError::Unknown => no_such_run(),
            ApplyError::Refused(refusal) => refusal.into(),
            ApplyError::Engine(error) => error.into(),
        }
    }
}

impl From<ReadModelError> for ApiError {
    fn from(error: ReadModelError) -> Self {
        match error {
            ReadModelError::Cursor => problem(ProblemKind::Malformed, error.to_string()),
            error => internal(&error),
        }
    }
}

impl From<NameError> for ApiError {
    fn from(error: NameError) -> Self {
        problem(ProblemKind::Malformed, error.to_string())
    }
}
