//! Policies of groups: what none of a group's runs may lift.

use std::sync::Arc;

use api_types::client::GroupPolicy;
use api_types::{GroupName, ProblemKind};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use bytes::Bytes;

use super::Problems;
use super::auth::{Client, Operator};
use super::error::{ApiResult, problem};
use super::extract::Json;
use super::runs::canonical;
use crate::engine::{EngineError, dotted};
use crate::service::Service;

fn key(group: &GroupName) -> String {
    format!("group.{}", dotted(group))
}

/// The group's policy, for a claim.
pub(super) async fn of_group(
    service: &Service,
    group: &GroupName,
) -> ApiResult<Option<GroupPolicy>> {
    let Some(found) = service.engine.policies.get(&key(group)).await? else {
        return Ok(None);
    };
    let policy = serde_json::from_slice(&found.value)
        .map_err(|error| EngineError::Corrupt(error.to_string()))?;
    Ok(Some(GroupPolicy {
        group: group.clone(),
        policy,
        revision: found.revision,
    }))
}

fn parse((org, name): (String, String)) -> ApiResult<GroupName> {
    format!("{org}/{name}")
        .parse()
        .map_err(|_| problem(ProblemKind::NotFound, "there is no such group"))
}

/// The policy of a group.
#[utoipa::path(get, path = "/api/policies/{org}/{name}", tag = "policies", operation_id = "getGroupPolicy",
    params(("org" = String, Path, description = "First part of the group's name"),
        ("name" = String, Path, description = "Second part of the group's name")),
    responses((status = 200, description = "It", body = GroupPolicy), Problems), security(("apiKey" = [])))]
pub(super) async fn get(
    State(service): State<Arc<Service>>,
    client: Client,
    Path(path): Path<(String, String)>,
) -> ApiResult<axum::Json<GroupPolicy>> {
    let group = parse(path)?;
    client.group(&group)?;
    of_group(&service, &group)
        .await?
        .map(axum::Json)
        .ok_or_else(|| problem(ProblemKind::NotFound, "the group has no policy"))
}

/// Sets the policy of a group, for runs that are claimed from now on.
#[utoipa::path(put, path = "/api/policies/{org}/{name}", tag = "policies", operation_id = "setGroupPolicy",
    params(("org" = String, Path, description = "First part of the group's name"),
        ("name" = String, Path, description = "Second part of the group's name")),
    request_body = api_types::policy::Policy,
    responses((status = 200, description = "It", body = GroupPolicy), Problems), security(("operatorKey" = [])))]
pub(super) async fn put(
    State(service): State<Arc<Service>>,
    operator: Operator,
    Path(path): Path<(String, String)>,
    Json(body): Json<serde_json::Value>,
) -> ApiResult<axum::Json<GroupPolicy>> {
    let group = parse(path)?;
    operator.group(&group)?;
    let policy = canonical(&body)?;
    let revision = service
        .engine
        .policies
        .put(&key(&group), Bytes::from(policy.to_string()))
        .await?;
    Ok(axum::Json(GroupPolicy {
        group,
        policy,
        revision,
    }))
}

/// Removes the policy of a group.
#[utoipa::path(delete, path = "/api/policies/{org}/{name}", tag = "policies", operation_id = "deleteGroupPolicy",
    params(("org" = String, Path, description = "First part of the group's name"),
        ("name" = String, Path, description = "Second part of the group's name")),
    responses((status = 204, description = "There is none now"), Problems), security(("operatorKey" = [])))]
pub(super) async fn delete(
    State(service): State<Arc<Service>>,
    operator: Operator,
    Path(path): Path<(String, String)>,
) -> ApiResult<StatusCode> {
    let group = parse(path)?;
    operator.group(&group)?;
    service.engine.policies.remove(&key(&group)).await?;
    Ok(StatusCode::NO_CONTENT)
}
