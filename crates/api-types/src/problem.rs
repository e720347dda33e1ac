//! Errors as RFC 9457 problem documents.

use serde::{Deserialize, Serialize};

/// Media type of a problem document (RFC 9457, section 6.1).
pub const PROBLEM_JSON: &str = "application/problem+json";

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $status:literal, $title:literal;)+) => {
        /// What went wrong, for programs: they decide by this, never by the text.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum ProblemKind {
            $($(#[$doc])* #[serde(rename = $code)] $name,)+
            /// One of a later server.
            #[serde(other, rename = "other")]
            Other,
        }

        impl ProblemKind {
            /// The codes of all kinds, as they stand in documents.
            pub const CODES: &[&str] = &[$($code),+];

            /// Its HTTP status.
            pub fn status(self) -> u16 {
                match self { $(Self::$name => $status,)+ Self::Other => 500 }
            }

            /// The last part of its URI, and the member `code`.
            pub fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)+ Self::Other => "other" }
            }

            /// Its summary, the same for every occurrence.
            pub fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)+ Self::Other => "Other" }
            }
        }
    };
}

kinds! {
    /// The body, a parameter or a header cannot be understood.
    Malformed = "malformed", 400, "The request cannot be understood";
    /// No token, or none that is known.
    Unauthorized = "unauthorized", 401, "A valid token is needed";
    /// The token does not open this.
    Forbidden = "forbidden", 403, "The token does not open this";
    /// No such thing, or none that the token may see.
    NotFound = "not-found", 404, "There is no such thing";
    /// The method is not one of the path's.
    MethodNotAllowed = "method-not-allowed", 405, "The path has no such method";
    /// Somebody else has the run, or nobody may have it any more.
    ClaimLost = "claim-lost", 409, "The run is not to be had";
    /// The lease that was spoken of is not the run's.
    LeaseLost = "lease-lost", 409, "The lease is no longer the run's";
    /// The run has been answered.
    RunFinished = "run-finished", 409, "The run is finished";
    /// It makes no sense while the run waits.
    NotRunning = "not-running", 409, "The run is not running";
    /// It was made without `acceptsInput`.
    NoInput = "no-input", 409, "The run takes no input";
    /// Something between what is there and what was sent is missing; `next` says where to go on.
    Gap = "gap", 409, "Something before it is missing";
    /// Only a WebSocket is to be had here.
    UpgradeRequired = "upgrade-required", 426, "A WebSocket is needed";
    /// Larger than the server takes.
    TooLarge = "too-large", 413, "The request is too large";
    /// Not JSON.
    UnsupportedMediaType = "unsupported-media-type", 415, "The body must be JSON";
    /// Understood, but a value makes no sense.
    Invalid = "invalid", 422, "A value is not usable";
    /// The idempotency key was used for another request.
    KeyReused = "key-reused", 422, "The idempotency key belongs to another request";
    /// Under pressure; `Retry-After` says when to come back.
    TooManyRequests = "too-many-requests", 429, "Too many requests";
    /// A fault of the server's.
    Internal = "internal", 500, "The server failed";
    /// What the server stands on does not answer.
    Unavailable = "unavailable", 503, "The storage does not answer";
}

// By hand: the derive does not see through `rename` in a macro.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for ProblemKind {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::schema::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .description(Some(
                "What went wrong, for programs: they decide by this, never by the text.",
            ))
            .enum_values(Some(Self::CODES.iter().copied()))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for ProblemKind {}

/// The document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Problem {
    /// `/problems/<code>`.
    #[serde(rename = "type")]
    pub kind_uri: String,
    /// The same for all of its kind.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened here, for people.
    pub detail: String,
    /// What happened, for programs.
    pub code: ProblemKind,
    /// For [`ProblemKind::Gap`]: the position that is wanted next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
    /// Seconds after which to try again, as `Retry-After` says too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<u64>,
}

impl Problem {
    /// A problem of this kind.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self {
            kind_uri: format!("/problems/{}", kind.code()),
            title: kind.title().to_owned(),
            status: kind.status(),
            detail: detail.into(),
            code: kind,
            next: None,
            retry_after: None,
        }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.title, self.detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_servers_kind_is_understood_as_other() {
        let text =
            r#"{"type":"/problems/x","title":"t","status":418,"detail":"d","code":"brand-new"}"#;
        let problem: Problem = serde_json::from_str(text).unwrap();
        assert_eq!(problem.code, ProblemKind::Other);
    }

    #[test]
    fn a_problem_has_the_members_of_the_standard() {
        let value = serde_json::to_value(Problem::new(ProblemKind::LeaseLost, "x")).unwrap();
        assert_eq!(value["type"], "/problems/lease-lost");
        assert_eq!(value["status"], 409);
        assert_eq!(value["code"], "lease-lost");
    }
}
