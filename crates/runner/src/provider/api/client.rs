//! The Web API, as a runner calls it: typed requests, typed answers, and of errors the one question that counts,
//! whether asking again can help.

use std::time::Duration;

use api_types::runner::{
    Claim, Complete, ExecutionContext, FirewallAuth, FirewallSecrets, Heartbeat, HeartbeatAnswer,
    Inputs, LeaseOf, LeaseRef, Poll, Polled, RunPolicy, Upload, Uploaded,
};
use api_types::{GroupName, Problem, ProblemKind, RunId, RunnerId};
use reqwest::{
    Client, ClientBuilder, Method, RequestBuilder, Response, StatusCode, Upgraded, Url, header,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use zeroize::Zeroizing;

use crate::http::{self, causes};

/// Limit on one request that does not wait: the server's own is 30 s.
const REQUEST_LIMIT: Duration = Duration::from_secs(40);
/// Limit on a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Largest answer, bytes: a prompt of 4 MiB and a session's history of 32 MiB, escaped.
const MAX_ANSWER: usize = 96 << 20;
/// Most characters of an answer that is none of ours which are repeated in an error.
const MAX_SHOWN: usize = 200;

/// Where the API is, and who we are to it.
#[derive(Clone)]
pub(crate) struct ApiSettings {
    /// Its address, without a path.
    pub(crate) url: Url,
    /// The runner token.
    pub(crate) token: Zeroizing<String>,
}

impl std::fmt::Debug for ApiSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiSettings({})", self.url)
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The API answered, and this is what it said.
    #[error("the API refused: {0}")]
    Refused(Box<Problem>),
    /// It did not, or what answered is not the API.
    #[error("the API cannot be reached: {0}")]
    Unreachable(String),
}

impl CallError {
    /// What the API said.
    pub(super) fn kind(&self) -> Option<ProblemKind> {
        match self {
            Self::Refused(problem) => Some(problem.code),
            Self::Unreachable(_) => None,
        }
    }

    /// The run, or our part in it, is over: nothing more can be said about it.
    pub(super) fn is_over(&self) -> bool {
        matches!(
            self.kind(),
            Some(
                ProblemKind::ClaimLost
                    | ProblemKind::LeaseLost
                    | ProblemKind::RunFinished
                    | ProblemKind::NotFound
                    | ProblemKind::NotRunning
            )
        )
    }

    /// Asking again later may help: the way there, the server or its storage is down or busy, or the token is not
    /// known (yet, or any more: it can be made again).
    pub(super) fn may_pass(&self) -> bool {
        match self.kind() {
            None => true,
            Some(kind) => matches!(
                kind,
                ProblemKind::Unauthorized
                    | ProblemKind::Forbidden
                    | ProblemKind::TooManyRequests
                    | ProblemKind::Internal
                    | ProblemKind::Unavailable
                    | ProblemKind::Other
            ),
        }
    }

    /// After how long the API wants to be asked again.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(problem) => problem.retry_after.map(Duration::from_secs),
            Self::Unreachable(_) => None,
        }
    }
}

/// The API.
#[derive(Clone)]
pub(super) struct Api {
    http: Client,
    /// For heartbeats: one connection, which no other call uses. Where it hangs, the next heartbeat has a new one.
    beats: Client,
    settings: ApiSettings,
}

impl Api {
    pub(super) fn new(settings: ApiSettings) -> Result<Self, CallError> {
        let client = || http::client().connect_timeout(CONNECT_LIMIT);
        let beats = client().pool_max_idle_per_host(1);
        let [http, beats] = [client(), beats].map(ClientBuilder::build);
        Ok(Self {
            http: http.map_err(unreachable)?,
            beats: beats.map_err(unreachable)?,
            settings,
        })
    }

    /// The API's address, as guests are told it.
    pub(super) fn url(&self) -> &str {
        self.settings.url.as_str().trim_end_matches('/')
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.request_by(&self.http, method, path)
    }

    fn request_by(&self, client: &Client, method: Method, path: &str) -> RequestBuilder {
        client
            .request(method, format!("{}{path}", self.url()))
            .bearer_auth(self.settings.token.as_str())
            .timeout(REQUEST_LIMIT)
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, CallError> {
        parse(answer(self.request(Method::POST, path).json(body)).await?).await
    }

    pub(super) async fn poll(&self, body: &Poll) -> Result<Polled, CallError> {
        let limit = Duration::from_secs(body.wait_secs).saturating_add(REQUEST_LIMIT);
        let request = self.request(Method::POST, "/api/runners/poll").json(body);
        parse(answer(request.timeout(limit)).await?).await
    }

    pub(super) async fn claim(
        &self,
        run: RunId,
        body: &Claim,
    ) -> Result<ExecutionContext, CallError> {
        self.post(&format!("/api/runners/jobs/{run}/claim"), body)
            .await
    }

    pub(super) async fn heartbeat(
        &self,
        body: &Heartbeat,
        limit: Duration,
    ) -> Result<HeartbeatAnswer, CallError> {
        let request = self.request_by(&self.beats, Method::POST, "/api/runners/heartbeat");
        parse(answer(request.json(body).timeout(limit)).await?).await
    }

    pub(super) async fn release(&self, run: RunId, body: &LeaseOf) -> Result<(), CallError> {
        let path = format!("/api/runners/jobs/{run}/release");
        let request = self.request(Method::POST, &path).json(body);
        answer(request).await.map(drop)
    }

    pub(super) async fn complete(&self, run: RunId, body: &Complete) -> Result<(), CallError> {
        let path = format!("/api/runners/jobs/{run}/complete");
        let request = self.request(Method::POST, &path).json(body);
        answer(request).await.map(drop)
    }

    pub(super) async fn upload(&self, run: RunId, body: &Upload) -> Result<Uploaded, CallError> {
        self.post(&format!("/api/runners/jobs/{run}/logs"), body)
            .await
    }

    pub(super) async fn policy(
        &self,
        runner: RunnerId,
        lease: LeaseRef,
    ) -> Result<RunPolicy, CallError> {
        let LeaseRef { run_id, epoch } = lease;
        let path = format!("/api/runners/jobs/{run_id}/policy?runnerId={runner}&epoch={epoch}");
        parse(answer(self.request(Method::GET, &path)).await?).await
    }

    /// Inputs behind the one of number `after`, read on from where the last answer ended.
    pub(super) async fn inputs(
        &self,
        runner: RunnerId,
        lease: LeaseRef,
        after: u64,
        cursor: u64,
    ) -> Result<Inputs, CallError> {
        let LeaseRef { run_id, epoch } = lease;
        let query = format!("runnerId={runner}&epoch={epoch}&after={after}&cursor={cursor}");
        let path = format!("/api/runners/jobs/{run_id}/inputs?{query}");
        parse(answer(self.request(Method::GET, &path)).await?).await
    }

    /// The WebSocket, by this client's own connection: its TLS is that of all other requests.
    pub(super) async fn connect(
        &self,
        runner: RunnerId,
        group: &GroupName,
    ) -> Result<WebSocketStream<Upgraded>, CallError> {
        let path = format!("/api/runners/connect?runnerId={runner}&group={group}");
        let key = generate_key();
        let request = self
            .request(Method::GET, &path)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, &key);
        let mut request = request.build().map_err(unreachable)?;
        // It lasts.
        *request.timeout_mut() = None;
        let answering = self.http.execute(request);
        let response = tokio::time::timeout(REQUEST_LIMIT, answering)
            .await
            .map_err(|_| CallError::Unreachable("it does not answer in time".to_owned()))?
            .map_err(unreachable)?;
        let accepted = response.headers().get(header::SEC_WEBSOCKET_ACCEPT);
        let ours = derive_accept_key(key.as_bytes());
        if response.status() != StatusCode::SWITCHING_PROTOCOLS
            || accepted.is_none_or(|accepted| accepted.as_bytes() != ours.as_bytes())
        {
            let status = response.status();
            return Err(CallError::Unreachable(format!(
                "no WebSocket can be had: {status}"
            )));
        }
        let upgraded = response.upgrade().await.map_err(unreachable)?;
        Ok(WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await)
    }

    pub(super) async fn secrets(&self, body: &FirewallAuth) -> Result<FirewallSecrets, CallError> {
        self.post("/api/webhooks/agent/firewall/auth", body).await
    }
}

/// Sends; an answer that is no success becomes an error.
async fn answer(request: RequestBuilder) -> Result<Response, CallError> {
    let response = request.send().await.map_err(unreachable)?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = body(response).await?;
    match serde_json::from_slice::<Problem>(&body) {
        Ok(problem) => Err(CallError::Refused(Box::new(problem))),
        // A load balancer's page, or somebody else's server.
        Err(_) => {
            let text = String::from_utf8_lossy(&body);
            let shown: String = text.chars().take(MAX_SHOWN).collect();
            let shown = shown.escape_debug();
            Err(CallError::Unreachable(format!(
                "what answers is not the API: {status}, {shown}"
            )))
        }
    }
}

async fn parse<T: DeserializeOwned>(response: Response) -> Result<T, CallError> {
    let body = body(response).await?;
    serde_json::from_slice(&body).map_err(|error| {
        CallError::Unreachable(format!("its answer cannot be understood: {error}"))
    })
}

async fn body(mut response: Response) -> Result<Vec<u8>, CallError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        if bytes.len().saturating_add(chunk.len()) > MAX_ANSWER {
            return Err(CallError::Unreachable(format!(
                "its answer is larger than {MAX_ANSWER} bytes"
            )));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn unreachable(error: reqwest::Error) -> CallError {
    CallError::Unreachable(causes(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(kind: ProblemKind) -> CallError {
        CallError::Refused(Box::new(Problem::new(kind, "x")))
    }

    #[test]
    fn what_is_over_is_not_asked_again_and_what_may_pass_is() {
        assert!(refused(ProblemKind::LeaseLost).is_over());
        assert!(!refused(ProblemKind::LeaseLost).may_pass());
        assert!(refused(ProblemKind::Unavailable).may_pass());
        assert!(!refused(ProblemKind::Unavailable).is_over());
        assert!(!refused(ProblemKind::Invalid).may_pass());
        assert!(CallError::Unreachable(String::new()).may_pass());
    }

    #[test]
    fn the_token_is_in_no_debug_text() {
        let settings = ApiSettings {
            url: "https://api.example.com".parse().unwrap(),
            token: Zeroizing::new("hunter22".to_owned()),
        };
        assert!(!format!("{settings:?}").contains("hunter22"));
        assert_eq!(Api::new(settings).unwrap().url(), "https://api.example.com");
    }
}
