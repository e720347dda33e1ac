//! Who asks. Each kind of token opens its own paths and no others.

use std::collections::BTreeSet;
use std::sync::Arc;

use api_types::runner::LeaseRef;
use api_types::{Epoch, GroupName, ProblemKind, RunId};
use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;

use super::error::{ApiError, ApiResult, busy, no_such_run, problem};
use super::limits::{Counted, Seat};
use crate::run::{Entry, Lease, State};
use crate::service::Service;
use crate::tokens::{Bearer, BearerKind, SandboxRefusal, read};

fn token(parts: &Parts) -> ApiResult<&str> {
    let mut values = parts.headers.get_all(header::AUTHORIZATION).iter();
    let value = match (values.next(), values.next()) {
        (Some(value), None) => value,
        (None, _) => {
            return Err(problem(
                ProblemKind::Unauthorized,
                "there is no Authorization header; send `Authorization: Bearer <token>`",
            ));
        }
        (Some(_), Some(_)) => {
            return Err(problem(
                ProblemKind::Unauthorized,
                "there is more than one Authorization header",
            ));
        }
    };
    value
        .to_str()
        .ok()
        .and_then(|text| text.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim())
        .ok_or_else(|| {
            problem(
                ProblemKind::Unauthorized,
                "the Authorization header is not `Bearer <token>`",
            )
        })
}

async fn bearer(parts: &Parts, service: &Service, kinds: &[BearerKind]) -> ApiResult<Bearer> {
    let found = service.bearers.recognise(token(parts)?).await?;
    match found {
        Some(bearer) if kinds.contains(&bearer.kind) => {
            if let Some(seat) = parts.extensions.get::<Arc<Seat>>() {
                let counted = service.limits.token(&bearer.id);
                seat.count(
                    counted.ok_or_else(|| busy("the token has too many requests under way", 1))?,
                );
            }
            Ok(bearer)
        }
        Some(_) => Err(problem(
            ProblemKind::Forbidden,
            match kinds {
                [BearerKind::Runner] => "this path takes runner tokens",
                [BearerKind::Operator] => "this path takes API keys of operators",
                _ => "this path takes API keys",
            },
        )),
        None => Err(problem(
            ProblemKind::Unauthorized,
            "the token is not one that this path takes: unknown, revoked, or of another kind",
        )),
    }
}

fn in_group(bearer: &Bearer, group: &GroupName) -> ApiResult<()> {
    if bearer.groups.contains(group) {
        Ok(())
    } else {
        Err(problem(
            ProblemKind::Forbidden,
            format!("the token is not for the group {group}"),
        ))
    }
}

macro_rules! bearer_extractor {
    ($(#[$doc:meta])* $name:ident, $kinds:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name(Bearer);

        impl FromRequestParts<Arc<Service>> for $name {
            type Rejection = ApiError;
            async fn from_request_parts(parts: &mut Parts, service: &Arc<Service>) -> Result<Self, ApiError> {
                bearer(parts, service, &$kinds).await.map(Self)
            }
        }

        impl $name {
            /// Refuses another group.
            pub fn group(&self, group: &GroupName) -> ApiResult<()> {
                in_group(&self.0, group)
            }

            /// Whether the token has not been revoked since: for what goes on for longer than a request.
            pub async fn stands(&self, service: &Service) -> bool {
                service.bearers.stands(&self.0.id).await
            }
        }
    };
}

bearer_extractor!(
    /// A client with its API key.
    Client,
    [BearerKind::Client, BearerKind::Operator]
);
bearer_extractor!(
    /// An operator: a client that may do more.
    Operator,
    [BearerKind::Operator]
);
bearer_extractor!(
    /// A runner with its token.
    Runner,
    [BearerKind::Runner]
);

macro_rules! sees_runs {
    ($($name:ident),+) => {
        $(impl $name {
            /// The run, if it is of one of its groups.
            pub async fn run(&self, service: &Service, run: RunId) -> ApiResult<(Entry, u64)> {
                match service.engine.run(run).await? {
                    Some((entry, revision)) if self.0.groups.contains(&entry.group) => Ok((entry, revision)),
                    _ => Err(no_such_run()),
                }
            }
        })+
    };
}

sees_runs!(Client, Runner);

impl Client {
    /// Its groups.
    pub fn groups(&self) -> &BTreeSet<GroupName> {
        &self.0.groups
    }

    /// Id of its key.
    pub fn id(&self) -> &str {
        &self.0.id
    }
}

impl Runner {
    /// The run as it was last seen here, if it is of one of its groups and not done; what it is for others, the
    /// compare-and-set finds out.
    pub async fn hint(&self, service: &Service, run: RunId) -> ApiResult<Option<(Entry, u64)>> {
        match service.index.hint(run) {
            Some((entry, revision)) if self.0.groups.contains(&entry.group) => {
                Ok(Some((entry, revision)))
            }
            Some(_) => Err(no_such_run()),
            None => self.run(service, run).await.map(Some),
        }
    }
}

/// A guest with its token. That the token is good says that a claim was granted; whether the run still has that claim is
/// asked by [`Guest::lease`].
#[derive(Debug)]
pub struct Guest {
    /// Its run.
    pub run: RunId,
    /// Its claim.
    pub epoch: Epoch,
    _place: Counted,
}

impl FromRequestParts<Arc<Service>> for Guest {
    type Rejection = ApiError;
    async fn from_request_parts(
        parts: &mut Parts,
        service: &Arc<Service>,
    ) -> Result<Self, ApiError> {
        let now = service.clock.now() / 1000;
        let claims = match read(&service.keyring, token(parts)?, now).await {
            Ok(claims) => claims,
            Err(SandboxRefusal::Keyring(error)) => return Err(error.into()),
            Err(refusal) => {
                return Err(problem(ProblemKind::Unauthorized, refusal.to_string()));
            }
        };
        let place = service
            .limits
            .guest(&claims.sub.to_string())
            .ok_or_else(|| busy("the guest has too many requests under way", 1))?;
        Ok(Self {
            run: claims.sub,
            epoch: claims.epoch,
            _place: place,
        })
    }
}

impl Guest {
    /// The run, if it still has the token's claim, as the storage's leader knows it at this moment.
    pub async fn lease(&self, service: &Service, said: RunId) -> ApiResult<(Entry, Lease)> {
        if said != self.run {
            return Err(problem(
                ProblemKind::Forbidden,
                "the token is another run's",
            ));
        }
        let (entry, _) = service.engine.run(self.run).await?.ok_or_else(over)?;
        match &entry.state {
            State::Running(lease) if entry.epoch == self.epoch => {
                let lease = lease.clone();
                Ok((entry, lease))
            }
            _ => Err(over()),
        }
    }
}

fn over() -> ApiError {
    problem(
        ProblemKind::Unauthorized,
        "the token is no longer good: the run is finished, or its claim was lost",
    )
}

/// Refuses a runner that does not have this claim now.
pub fn holds(entry: &Entry, runner: api_types::RunnerId, lease: LeaseRef) -> ApiResult<()> {
    match &entry.state {
        State::Running(held) if entry.epoch == lease.epoch && held.holder.runner_id == runner => {
            Ok(())
        }
        _ => Err(crate::run::Refusal::LeaseLost.into()),
    }
}
