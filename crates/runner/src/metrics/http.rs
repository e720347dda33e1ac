//! `GET /metrics`, for a Prometheus on this host or, where its address says so, on others.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// The format, as its specification names it (OpenMetrics 1.0.0).
const FORMAT: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
/// Connections served at once.
const MOST: usize = 16;
/// Longest life of a connection: who scrapes takes milliseconds.
const LIFE: Duration = Duration::from_secs(30);

/// Binds the address.
pub(crate) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until the future is dropped; `text` gives what stands behind `/metrics`.
pub(crate) async fn serve(
    listener: TcpListener,
    text: impl Fn() -> Option<String> + Send + Sync + 'static,
) {
    let text = Arc::new(text);
    let room = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let text = Arc::clone(&text);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(&request, text.as_ref());
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(5))
                .serve_connection(TokioIo::new(stream), service);
            // Whoever goes away, or stays too long, is no failure of ours.
            let _ = tokio::time::timeout(LIFE, connection).await;
            drop(permit);
        });
    }
}

fn answer(
    request: &Request<Incoming>,
    text: &(impl Fn() -> Option<String> + ?Sized),
) -> Response<Full<Bytes>> {
    let refuse = |status: StatusCode| {
        let mut response = Response::new(Full::from("only GET /metrics\n"));
        *response.status_mut() = status;
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => match text() {
            Some(text) => {
                let mut response = Response::new(Full::from(text));
                response.headers_mut().insert(CONTENT_TYPE, FORMAT);
                response
            }
            None => refuse(StatusCode::SERVICE_UNAVAILABLE),
        },
        (_, "/metrics") => refuse(StatusCode::METHOD_NOT_ALLOWED),
        _ => refuse(StatusCode::NOT_FOUND),
    }
}
