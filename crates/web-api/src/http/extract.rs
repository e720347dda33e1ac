//! What comes in, parsed once: bodies, path and query parameters.

use std::sync::Arc;

use api_types::{ProblemKind, RunId};
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::error::{ApiError, no_such_run, problem};
use crate::service::Service;

/// Most of a deserializer's text that is repeated to the sender, characters.
const MAX_SHOWN: usize = 300;

/// What a parser says, without control characters and bounded: it may repeat what was sent.
fn shown(error: &dyn std::fmt::Display) -> String {
    error
        .to_string()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_SHOWN)
        .collect()
}

/// A JSON body.
#[derive(Debug)]
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<Service>> for Json<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &Arc<Service>) -> Result<Self, ApiError> {
        let json = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .map(|value| value.split(';').next().unwrap_or_default().trim())
            .is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"));
        if !json {
            return Err(problem(
                ProblemKind::UnsupportedMediaType,
                "the Content-Type must be application/json",
            ));
        }
        let bytes =
            Bytes::from_request(request, state)
                .await
                .map_err(|rejection| match rejection {
                    BytesRejection::FailedToBufferBody(error)
                        if error.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE =>
                    {
                        problem(
                            ProblemKind::TooLarge,
                            "the body is larger than this path takes",
                        )
                    }
                    _ => problem(ProblemKind::Malformed, "the body did not arrive whole"),
                })?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| {
            use serde_json::error::Category;
            let kind = match error.classify() {
                Category::Data => ProblemKind::Invalid,
                Category::Io | Category::Syntax | Category::Eof => ProblemKind::Malformed,
            };
            problem(kind, format!("the body is not usable: {}", shown(&error)))
        })
    }
}

/// The run of the path.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunPath(pub(super) RunId);

impl<S: Send + Sync> FromRequestParts<S> for RunPath {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        // What is no run id is no run's.
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|_| no_such_run())?;
        text.parse().map(Self).map_err(|_| no_such_run())
    }
}

/// Query parameters.
#[derive(Debug)]
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        Query::<T>::from_request_parts(parts, state)
            .await
            .map(|Query(value)| Self(value))
            .map_err(|error| {
                problem(
                    ProblemKind::Malformed,
                    format!("a query parameter is not usable: {}", shown(&error)),
                )
            })
    }
}
