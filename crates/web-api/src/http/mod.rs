//! The HTTP API: routes, their description, and what all requests pass.

pub mod auth;
mod context;
mod describe;
pub mod error;
mod exec;
mod extract;
mod follow;
mod guest;
mod input;
pub mod limits;
mod linger;
mod outbox;
mod policies;
mod push;
mod runners;
mod runs;

use std::sync::Arc;
use std::time::Duration;

use api_types::{PROBLEM_JSON, Problem, ProblemKind};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi as _;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ContentBuilder, OpenApi, RefOr, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::service::Service;
use error::{problem, too_many};
use limits::{Room, Seat};

/// Largest body where nothing else is said, bytes. Larger ones share what room there is.
const MAX_BODY_BYTES: usize = 2 << 20;
/// Largest body of a creation: a prompt of 4 MiB whose characters are escaped, and the rest.
const MAX_CREATE_BYTES: usize = 12 << 20;
/// Largest body of a checkpoint, bytes.
const MAX_CHECKPOINT_BYTES: usize = 40 << 20;
/// Longest time for a request that neither waits nor streams.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// The problem documents that any path may answer with.
pub(crate) struct Problems;

impl utoipa::IntoResponses for Problems {
    fn responses() -> std::collections::BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let all = [
            (400, "It cannot be understood"),
            (401, "A valid token is needed"),
            (403, "The token does not open this"),
            (404, "There is no such thing"),
            (409, "It does not fit to what is"),
            (413, "It is too large"),
            (415, "The body must be JSON"),
            (422, "A value is not usable"),
            (429, "Too much at once; Retry-After says when to come back"),
            (500, "The server failed"),
            (503, "The storage does not answer"),
        ];
        // Answered before there is a request that could be understood.
        let bare =
            ResponseBuilder::new().description("The URL is longer than 64 KiB; no body says so");
        all.into_iter()
            .map(|(status, text)| (status.to_string(), RefOr::T(described_problem(text))))
            .chain([("414".to_owned(), RefOr::T(bare.build()))])
            .collect()
    }
}

/// A problem document.
fn described_problem(text: &str) -> utoipa::openapi::Response {
    let content = ContentBuilder::new()
        .schema(Some(utoipa::openapi::Ref::from_schema_name("Problem")))
        .build();
    ResponseBuilder::new()
        .description(text)
        .content(PROBLEM_JSON, content)
        .build()
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "vm0-api", description = "Runs of coding agents, and the runners that take them."),
    components(schemas(Problem, ProblemKind)),
    modifiers(&Security),
    tags(
        (name = "runs", description = "For clients, with an API key."),
        (name = "fleet", description = "For clients, with an API key."),
        (name = "policies", description = "To set them: for operators, with an operator's API key."),
        (name = "runners", description = "For runners, with a runner token."),
        (name = "webhooks", description = "For guest agents, with the sandbox token of their claim."),
        (name = "operations", description = "For whoever operates a replica; without a token.")
    )
)]
struct Description;

struct Security;

impl utoipa::Modify for Security {
    fn modify(&self, openapi: &mut OpenApi) {
        let components = openapi.components.get_or_insert_with(Default::default);
        let schemes = [
            ("apiKey", "vm0_key_…", "An API key"),
            ("operatorKey", "vm0_operator_…", "An operator's API key"),
            ("runnerToken", "vm0_runner_…", "A runner's token"),
            ("sandboxToken", "JWT", "A claim's token, made by the server"),
        ];
        for (name, format, text) in schemes {
            let scheme = HttpBuilder::new()
                .scheme(HttpAuthScheme::Bearer)
                .bearer_format(format)
                .description(Some(text))
                .build();
            components.add_security_scheme(name, SecurityScheme::Http(scheme));
        }
    }
}

/// Requests of clients that are over soon.
fn of_clients() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(runs::list))
        .routes(routes!(runs::get))
        .routes(routes!(runs::cancel))
        .routes(routes!(input::send))
        .routes(routes!(runs::set_policy))
        .routes(routes!(policies::get, policies::put, policies::delete))
        .routes(routes!(runners::fleet))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .merge(
            OpenApiRouter::new()
                .routes(routes!(runs::create))
                .layer(DefaultBodyLimit::max(MAX_CREATE_BYTES)),
        )
}

/// Requests of runners that are over soon.
fn of_runners() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(runners::claim))
        .routes(routes!(runners::heartbeat))
        .routes(routes!(runners::renew))
        .routes(routes!(runners::release))
        .routes(routes!(runners::complete))
        .routes(routes!(runners::upload))
        .routes(routes!(runners::policy))
        .routes(routes!(runners::inputs))
        .routes(routes!(guest::firewall_auth))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
}

/// Requests of guests.
fn of_guests() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(guest::heartbeat))
        .routes(routes!(guest::events))
        .routes(routes!(guest::telemetry))
        .routes(routes!(guest::complete))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .merge(
            OpenApiRouter::new()
                .routes(routes!(guest::checkpoints))
                .layer(DefaultBodyLimit::max(MAX_CHECKPOINT_BYTES)),
        )
}

/// Requests that wait or stream, each with a limit of its own.
fn long() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(runners::poll))
        .routes(routes!(push::connect))
        .routes(routes!(exec::exec))
        .routes(routes!(follow::events))
        .routes(routes!(follow::output))
        .routes(routes!(follow::logs))
        .routes(routes!(follow::network_log))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
}

fn unlimited() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .routes(routes!(openapi_json))
}

fn described() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .merge(of_clients())
        .merge(of_runners())
        .merge(of_guests())
        .merge(long())
        .merge(unlimited())
}

/// The description of the API, OpenAPI 3.1.
pub fn openapi() -> Result<serde_json::Value, serde_json::Error> {
    let mut document = serde_json::to_value(described().split_for_parts().1)?;
    describe::complete(&mut document);
    Ok(document)
}

/// The whole API.
pub fn router(service: Arc<Service>) -> Router {
    let gated = |room: &Room| {
        middleware::from_fn_with_state::<_, _, (State<_>, Request)>(room.clone(), gate)
    };
    let limits = &service.limits;
    let (router, _) = OpenApiRouter::new()
        .merge(of_clients().layer(gated(&limits.clients)))
        .merge(of_runners().layer(gated(&limits.runners)))
        .merge(of_guests().layer(gated(&limits.guests)))
        .merge(long())
        .merge(unlimited())
        .split_for_parts();
    router
        .fallback(|| async { problem(ProblemKind::NotFound, "there is no such path") })
        .method_not_allowed_fallback(|| async {
            problem(ProblemKind::MethodNotAllowed, "the path has no such method")
        })
        .layer(middleware::map_response(harden))
        .layer(middleware::from_fn(linger::linger))
        .with_state(service)
}

/// Lets in what there is room for, and ends what takes too long.
async fn gate(State(room): State<Room>, mut request: Request, next: Next) -> Response {
    let Some(seat) = Seat::take(room).map(Arc::new) else {
        return too_many().into_response();
    };
    // Held by this function until there is an answer.
    request.extensions_mut().insert(Arc::clone(&seat));
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => problem(
            ProblemKind::Unavailable,
            "it took too long; what was asked may or may not have been done: ask again",
        )
        .into_response(),
    }
}

/// Nothing here is for a browser to keep or to guess about.
async fn harden(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    response
}

/// The process answers.
#[utoipa::path(get, path = "/healthz", tag = "operations", responses((status = 200, description = "It does")))]
async fn healthz() -> &'static str {
    "ok\n"
}

/// The replica knows all runs and reaches its storage.
#[utoipa::path(get, path = "/readyz", tag = "operations",
    responses((status = 200, description = "It does"), (status = 503, description = "Not now", body = Problem,
        content_type = "application/problem+json")))]
async fn readyz(State(service): State<Arc<Service>>) -> Response {
    let connected =
        service.engine.client().connection_state() == async_nats::connection::State::Connected;
    if service.is_ready() && connected {
        "ready\n".into_response()
    } else {
        let detail = if connected {
            "the replica is still reading the runs"
        } else {
            "NATS cannot be reached"
        };
        problem(ProblemKind::Unavailable, detail).into_response()
    }
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "operations",
    responses((status = 200, description = "OpenAPI 3.1", body = Object)))]
async fn openapi_json() -> Response {
    match openapi() {
        Ok(document) => axum::Json(document).into_response(),
        Err(error) => problem(ProblemKind::Internal, error.to_string()).into_response(),
    }
}
