//! One webhook call, and what became of it.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use api_types::Problem;
use api_types::guest::WEBHOOKS;
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

/// The system's list of authorities, in which the image has the proxy's; `SSL_CERT_FILE` names another.
const SYSTEM_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const CONNECT: Duration = Duration::from_secs(10);
/// Longest that one call takes, whatever the server does.
const CALL: Duration = Duration::from_secs(30);
/// Longest time between two attempts, whatever the server asks for.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Most bytes of an answer.
const MAX_ANSWER: u64 = 64 * 1024;

/// Why a call was not answered well.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// Nothing there, or not now: worth another attempt, after so long if the server says when.
    #[error("{reason}")]
    Again {
        reason: String,
        after: Option<Duration>,
    },
    /// The server wants another position.
    #[error("the server wants position {0}")]
    Gap(u64),
    /// This body will never be taken.
    #[error("{0}")]
    Unacceptable(String),
    /// The token opens nothing: the run is over or somebody else's.
    #[error("{0}")]
    Refused(String),
}

/// The API as this run's token opens it.
pub(crate) struct Client {
    agent: Agent,
    base: String,
    authorization: String,
}

impl Client {
    /// Makes no connection yet.
    pub(crate) fn new(url: &str, token: &str) -> Result<Self, String> {
        let base = url.trim_end_matches('/');
        let mut tls = TlsConfig::builder();
        if base.starts_with("https://") {
            tls = tls
                .root_certs(RootCerts::Specific(Arc::new(authorities()?)))
                .unversioned_rustls_crypto_provider(Arc::new(
                    rustls::crypto::ring::default_provider(),
                ));
        } else if !base.starts_with("http://") {
            return Err(format!(
                "VM0_API_URL is {url:?}, which is not an http or https address"
            ));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // A redirect could carry the token to another host.
            .max_redirects(0)
            .max_redirects_will_error(false)
            // The network's own proxy is transparent.
            .proxy(None)
            .user_agent(concat!("guest-agent/", env!("CARGO_PKG_VERSION")))
            .timeout_global(Some(CALL))
            .timeout_connect(Some(CONNECT))
            .tls_config(tls.build())
            .build();
        Ok(Self {
            agent: config.new_agent(),
            base: format!("{base}{WEBHOOKS}"),
            authorization: format!("Bearer {token}"),
        })
    }

    /// Posts to a webhook; [`CALL`] at most.
    pub(crate) fn post<T: DeserializeOwned>(
        &self,
        webhook: &str,
        body: &impl Serialize,
    ) -> Result<T, CallError> {
        let body =
            serde_json::to_vec(body).map_err(|error| CallError::Unacceptable(error.to_string()))?;
        let sent = self
            .agent
            .post(format!("{}/{webhook}", self.base))
            .header("Authorization", &self.authorization)
            .header("Content-Type", "application/json")
            .send(&body[..]);
        let again = |error: ureq::Error| CallError::Again {
            reason: error.to_string(),
            after: None,
        };
        let mut response = sent.map_err(again)?;
        let status = response.status().as_u16();
        let retry_after = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_ANSWER)
            .read_to_vec()
            .map_err(again)?;
        judge(status, retry_after, &text)
    }
}

/// What a status and a body mean.
fn judge<T: DeserializeOwned>(
    status: u16,
    retry_after: Option<Duration>,
    body: &[u8],
) -> Result<T, CallError> {
    // An answer without content is that of `complete`.
    let body = if status == 204 { b"null" } else { body };
    if (200..300).contains(&status) {
        return serde_json::from_slice(body).map_err(|_| CallError::Again {
            reason: format!("HTTP {status} with a body that is none of the API's"),
            after: None,
        });
    }
    let problem: Option<Problem> = serde_json::from_slice(body).ok();
    let reason = match &problem {
        Some(problem) => format!("HTTP {status}: {}", problem.detail),
        None => format!("HTTP {status}"),
    };
    Err(
        match (status, problem.as_ref().and_then(|problem| problem.next)) {
            (409, Some(next)) => CallError::Gap(next),
            (401 | 403 | 404 | 409 | 410, _) => CallError::Refused(reason),
            (408 | 425 | 429 | 500.., _) => CallError::Again {
                reason,
                after: retry_after.map(|after| after.min(MAX_PAUSE)),
            },
            _ => CallError::Unacceptable(reason),
        },
    )
}

/// Every certificate of the system's list that can be read.
fn authorities() -> Result<Vec<ureq::tls::Certificate<'static>>, String> {
    let path = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty());
    let path = path.unwrap_or_else(|| SYSTEM_BUNDLE.into());
    let bundle = fs::read(&path)
        .map_err(|error| format!("the list of authorities {path:?} cannot be read: {error}"))?;
    let certificates: Vec<_> = parse_pem(&bundle)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(format!("there is no certificate in {path:?}"));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_types::guest::{Accepted, Alive};

    #[test]
    fn every_kind_of_answer_has_one_meaning() {
        let after = Some(Duration::from_secs(3));
        let judge = |status, body: &str| judge::<Accepted>(status, after, body.as_bytes());
        assert_eq!(judge(200, r#"{"next":4}"#), Ok(Accepted { next: 4 }));
        let gap = Problem {
            next: Some(7),
            ..Problem::new(api_types::ProblemKind::Gap, "a gap")
        };
        let gap = serde_json::to_string(&gap).unwrap();
        assert_eq!(judge(409, &gap), Err(CallError::Gap(7)));
        for status in [401, 403, 404, 409] {
            let refused = judge(status, "");
            assert!(
                matches!(refused, Err(CallError::Refused(_))),
                "{status} {refused:?}"
            );
        }
        for status in [429, 500, 502, 503, 200] {
            let again = judge(status, "<html>");
            assert!(
                matches!(again, Err(CallError::Again { .. })),
                "{status} {again:?}"
            );
        }
        for status in [400, 413, 422, 302] {
            let never = judge(status, "{}");
            assert!(
                matches!(never, Err(CallError::Unacceptable(_))),
                "{status} {never:?}"
            );
        }
        assert_eq!(super::judge::<()>(204, None, b""), Ok(()));
    }

    #[test]
    fn a_server_cannot_make_the_agent_wait_for_ever() {
        let hour = Some(Duration::from_secs(3600));
        let answer = judge::<Alive>(429, hour, b"");
        let Err(CallError::Again { after, .. }) = answer else {
            panic!("{answer:?}");
        };
        assert_eq!(after, Some(MAX_PAUSE));
    }

    #[test]
    fn other_schemes_are_no_api() {
        assert!(Client::new("http://127.0.0.1:1/", "t").is_ok());
        for url in ["", "example.com", "ftp://example.com"] {
            assert!(Client::new(url, "t").is_err(), "{url}");
        }
    }
}
