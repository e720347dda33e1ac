//! What comes in, parsed once: bodies, path and query parameters.

use std::sync::Arc;
use std::time::Duration;

use api_types::{ProblemKind, RunId};
use axum::RequestExt as _;
use axum::body::HttpBody as _;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header;
use axum::http::request::Parts;
use http_body_util::{BodyExt as _, LengthLimitError};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::MAX_BODY_BYTES;
use super::error::{ApiError, busy, no_such_run, problem, too_many};
use super::limits::Seat;
use crate::service::Service;

/// Most of a deserializer's text that is repeated to the sender, characters.
const MAX_SHOWN: usize = 300;

/// Longest time for a body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

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
    async fn from_request(request: Request, _: &Arc<Service>) -> Result<Self, ApiError> {
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
        let seat = request.extensions().get::<Arc<Seat>>().cloned();
        if let Some(seat) = &seat {
            seat.leave();
        }
        let body = request.into_limited_body();
        // Of one that does not say how long it is, the most that its path takes.
        let most = body.size_hint().upper().unwrap_or(u64::MAX);
        if let Some(seat) = &seat
            && most > u64::try_from(MAX_BODY_BYTES).unwrap_or(u64::MAX)
            && !seat.spread(most)
        {
            return Err(busy("the server has too many large bodies under way", 1));
        }
        let bytes = tokio::time::timeout(BODY_TIMEOUT, body.collect())
            .await
            .map_err(|_| problem(ProblemKind::Malformed, "the body came too slowly"))?
            .map_err(|error| match error.into_inner().is::<LengthLimitError>() {
                true => problem(
                    ProblemKind::TooLarge,
                    "the body is larger than this path takes",
                ),
                false => problem(ProblemKind::Malformed, "the body did not arrive whole"),
            })?
            .to_bytes();
        if seat.is_some_and(|seat| !seat.come_back()) {
            return Err(too_many());
        }
        parse(&bytes).map(Self).map_err(|error| {
            use serde_json::error::Category;
            let kind = match error.classify() {
                Category::Data => ProblemKind::Invalid,
                Category::Io | Category::Syntax | Category::Eof => ProblemKind::Malformed,
            };
            problem(kind, format!("the body is not usable: {}", shown(&error)))
        })
    }
}

/// Reads JSON. In JSON `1.0` is the integer 1, which only a second look takes for one.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    let first = match serde_json::from_slice(bytes) {
        Ok(value) => return Ok(value),
        Err(error) if error.is_data() => error,
        Err(error) => return Err(error),
    };
    let Ok(mut value) = serde_json::from_slice::<Value>(bytes) else {
        return Err(first);
    };
    if whole(&mut value) {
        serde_json::from_value(value)
    } else {
        Err(first)
    }
}

/// Writes whole numbers as such; tells whether there were some that were not.
fn whole(value: &mut Value) -> bool {
    match value {
        Value::Number(number) => {
            let Some(float) = number.as_f64().filter(|_| number.is_f64()) else {
                return false;
            };
            // 2^64 and 2^63: what is below is one of the integers, and converts to it.
            const UNSIGNED: f64 = 18_446_744_073_709_551_616.0;
            const SIGNED: f64 = 9_223_372_036_854_775_808.0;
            if float.fract() != 0.0 || !(-SIGNED..UNSIGNED).contains(&float) {
                return false;
            }
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "whole, and within the type's range"
            )]
            let integer = match float < 0.0 {
                true => Value::from(float as i64),
                false => Value::from(float as u64),
            };
            *value = integer;
            true
        }
        Value::Array(items) => items.iter_mut().fold(false, |any, item| whole(item) | any),
        Value::Object(members) => members
            .values_mut()
            .fold(false, |any, item| whole(item) | any),
        _ => false,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_number_is_one_however_it_is_written() {
        assert_eq!(parse::<Vec<u64>>(b"[1, 2.0, 3e2]").unwrap(), [1, 2, 300]);
        assert_eq!(parse::<i32>(b"-5.0").unwrap(), -5);
        assert_eq!(parse::<i64>(b"-9223372036854775808.0").unwrap(), i64::MIN);
        assert_eq!(parse::<u64>(b"1e19").unwrap(), 10_u64.pow(19));
        for bad in [
            "1.5",
            "-1.0",
            "1e30",
            "18446744073709551616.0",
            "true",
            "[1.0",
        ] {
            assert!(parse::<u64>(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
