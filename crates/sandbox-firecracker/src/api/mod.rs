//! The client of one Firecracker process's API socket (HTTP/1.1 over a Unix socket, one request at a time).

mod request;
mod types;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

pub(crate) use request::Request;
pub(crate) use types::*;

/// Longest answer that is read, bytes: errors are a few lines, statistics less.
const MAX_ANSWER: usize = 64 * 1024;

/// What can go wrong with a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// It said no.
    #[error("{request} was refused: {message}")]
    Refused {
        request: String,
        /// Its own words.
        message: String,
    },
    /// It answered something else than its description says.
    #[error("{request} was answered with {what}")]
    Nonsense { request: String, what: String },
    /// Its socket closed or broke.
    #[error("{request} was not answered: {source}")]
    Broken {
        request: String,
        source: hyper::Error,
    },
    /// It took too long.
    #[error("{request} was not answered within {limit:?}")]
    Hung { request: String, limit: Duration },
    /// There is no connection.
    #[error("its socket {path} cannot be used: {source}")]
    Connect {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Api {
    path: PathBuf,
    sender: SendRequest<Full<Bytes>>,
    connection: JoinHandle<()>,
}

impl Api {
    /// Connects to a socket that listens.
    pub(crate) async fn connect(path: &Path) -> Result<Api, ApiError> {
        let failed = |source| ApiError::Connect {
            path: path.to_owned(),
            source,
        };
        let stream = UnixStream::connect(path).await.map_err(failed)?;
        let (sender, connection) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| failed(std::io::Error::other(error)))?;
        let connection = tokio::spawn(async move {
            // How it ended shows in the requests.
            let _ = connection.await;
        });
        Ok(Api {
            path: path.to_owned(),
            sender,
            connection,
        })
    }

    /// Sends a request that is answered with nothing but success.
    pub(crate) async fn send(
        &mut self,
        request: &Request,
        limit: Duration,
    ) -> Result<(), ApiError> {
        self.exchange(request, limit).await.map(drop)
    }

    /// Sends a request for something.
    pub(crate) async fn get<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        limit: Duration,
    ) -> Result<T, ApiError> {
        let body = self.exchange(request, limit).await?;
        serde_json::from_slice(&body).map_err(|error| ApiError::Nonsense {
            request: request.to_string(),
            what: format!("a body that cannot be read ({error})"),
        })
    }

    async fn exchange(&mut self, request: &Request, limit: Duration) -> Result<Bytes, ApiError> {
        tokio::time::timeout(limit, self.ask(request))
            .await
            .unwrap_or_else(|_| {
                Err(ApiError::Hung {
                    request: request.to_string(),
                    limit,
                })
            })
    }

    async fn ask(&mut self, request: &Request) -> Result<Bytes, ApiError> {
        let broken = |source| ApiError::Broken {
            request: request.to_string(),
            source,
        };
        let nonsense = |what: String| ApiError::Nonsense {
            request: request.to_string(),
            what,
        };
        let body = request
            .body()
            .map_err(|error| nonsense(error.to_string()))?;
        let message = hyper::Request::builder()
            .method(request.method())
            .uri(request.path())
            .header(HOST, "localhost")
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body.map(Bytes::from).unwrap_or_default()))
            .map_err(|error| nonsense(error.to_string()))?;
        if self.sender.ready().await.is_err() {
            // Whoever gave up a request, by a limit or for something else, broke its connection.
            *self = Api::connect(&self.path.clone()).await?;
            self.sender.ready().await.map_err(broken)?;
        }
        let response = self.sender.send_request(message).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| nonsense(format!("a body that ended early ({error})")))?
            .to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_slice::<Fault>(&body) {
            Ok(fault) => Err(ApiError::Refused {
                request: request.to_string(),
                message: fault.fault_message,
            }),
            Err(_) => Err(nonsense(format!(
                "status {status} and no reason: {:?}",
                String::from_utf8_lossy(body.get(..200).unwrap_or(&body))
            ))),
        }
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

#[cfg(test)]
mod tests;
