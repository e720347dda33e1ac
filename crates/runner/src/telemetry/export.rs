//! The way of spans to the collector: a bounded queue, and one task that empties it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use opentelemetry::Context;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    Protocol, RetryPolicy, SpanExporter as OtlpExporter, WithExportConfig as _, WithHttpConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter as _, SpanProcessor};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Settings, SettingsError};
use crate::http::{self, causes};
use crate::metrics::Counters;

/// Spans that wait for the collector; more are dropped. The default of OpenTelemetry's own batch processor.
pub(super) const QUEUE: usize = 2048;
/// Spans of one request.
const BATCH: usize = 512;
/// Waits before a batch is tried again, where the collector may take it later.
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
/// Most of an answer that is read, bytes: it says how many spans were refused.
const ANSWER_MAX: usize = 64 << 10;

/// What became of spans.
#[derive(Clone, Debug)]
struct Tally {
    counters: Counters,
    queued: Arc<Counter>,
    sent: Counter,
    dropped: Counter,
    failing: Arc<AtomicBool>,
}

impl Tally {
    fn new() -> Self {
        let counters = Counters::default();
        // Both exist from the start.
        let of = |result: &str| {
            counters
                .get_or_create(&vec![("result", result.to_owned())])
                .clone()
        };
        let (sent, dropped) = (of("sent"), of("dropped"));
        Self {
            counters,
            queued: Arc::default(),
            sent,
            dropped,
            failing: Arc::default(),
        }
    }

    fn dropped(&self, spans: usize, why: &str) {
        self.dropped.inc_by(spans as u64);
        if !self.failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                why,
                "spans for the OpenTelemetry collector are dropped; they are counted in vm0_runner_telemetry_spans_total, and this is not said again until it takes some"
            );
        }
    }

    fn sent(&self, spans: usize) {
        self.sent.inc_by(spans as u64);
        if self.failing.swap(false, Ordering::Relaxed) {
            tracing::info!("the OpenTelemetry collector takes spans again");
        }
    }
}

/// The near end of the queue.
#[derive(Debug)]
pub(super) struct Queue {
    sender: mpsc::Sender<SpanData>,
    tally: Tally,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        match self.sender.try_send(span) {
            Ok(()) => {
                self.tally.queued.inc();
            }
            Err(_) => self.tally.dropped(1, "the queue is full"),
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// The task at the far end.
#[derive(Debug)]
pub(super) struct Exporting {
    task: JoinHandle<()>,
    closing: CancellationToken,
    tally: Tally,
}

impl Exporting {
    pub(super) fn counters(&self) -> Counters {
        self.tally.counters.clone()
    }

    /// Sends what is there, for at most `limit`.
    pub(super) async fn finish(mut self, limit: Duration) {
        self.closing.cancel();
        if tokio::time::timeout(limit, &mut self.task).await.is_err() {
            self.task.abort();
            let _ = self.task.await;
        }
        // What was dropped for want of room was never in the queue, so this may err on the small side only.
        let gone = self
            .tally
            .sent
            .get()
            .saturating_add(self.tally.dropped.get());
        let left = self.tally.queued.get().saturating_sub(gone);
        if left > 0 {
            tracing::warn!(
                left,
                "the OpenTelemetry collector did not take the last spans in time"
            );
        }
    }
}

/// Begins to export to what the settings say.
pub(super) fn start(
    settings: &Settings,
    resource: &Resource,
) -> Result<(Queue, Exporting), SettingsError> {
    let client = Client::new(settings.timeout)?;
    let status = Arc::clone(&client.status);
    let mut exporter = OtlpExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(settings.traces.url().as_str())
        .with_timeout(settings.timeout)
        .with_headers(settings.headers.iter().cloned().collect())
        // Its own way to wait would block the daemon's only thread.
        .with_retry_policy(RetryPolicy::disabled())
        .build()
        .map_err(|error| SettingsError::Exporter(error.to_string()))?;
    exporter.set_resource(resource);
    let (sender, receiver) = mpsc::channel(QUEUE);
    let tally = Tally::new();
    let closing = CancellationToken::new();
    let work = Work {
        exporter,
        status,
        limit: settings.timeout,
        closing: closing.clone(),
        tally: tally.clone(),
    };
    let queue = Queue {
        sender,
        tally: tally.clone(),
    };
    let exporting = Exporting {
        task: tokio::spawn(work.run(receiver)),
        closing,
        tally,
    };
    Ok((queue, exporting))
}

struct Work {
    exporter: OtlpExporter,
    /// Of the last answer; 0: there was none.
    status: Arc<AtomicU16>,
    limit: Duration,
    closing: CancellationToken,
    tally: Tally,
}

impl Work {
    async fn run(self, mut spans: mpsc::Receiver<SpanData>) {
        let mut batch = Vec::new();
        loop {
            let got = tokio::select! {
                biased;
                got = spans.recv_many(&mut batch, BATCH) => got,
                () = self.closing.cancelled() => {
                    spans.close();
                    spans.recv_many(&mut batch, BATCH).await
                }
            };
            if got == 0 {
                return;
            }
            self.deliver(std::mem::take(&mut batch)).await;
        }
    }

    async fn deliver(&self, batch: Vec<SpanData>) {
        let count = batch.len();
        let mut waits = AGAIN.into_iter();
        loop {
            self.status.store(0, Ordering::Relaxed);
            let export = self.exporter.export(batch.clone());
            let why = match tokio::time::timeout(self.limit, export).await {
                Ok(Ok(())) => return self.tally.sent(count),
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {} ms", self.limit.as_millis()),
            };
            // Those that the OTLP specification has tried again; any other answer is final.
            let status = self.status.load(Ordering::Relaxed);
            let again = matches!(status, 0 | 429 | 502 | 503 | 504);
            match waits.next() {
                Some(wait) if again && !self.closing.is_cancelled() => {
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = self.closing.cancelled() => {}
                    }
                }
                _ => return self.tally.dropped(count, &why),
            }
        }
    }
}

/// The runner's HTTP client, for the exporter.
#[derive(Debug)]
struct Client {
    http: reqwest::Client,
    status: Arc<AtomicU16>,
}

impl Client {
    fn new(timeout: Duration) -> Result<Self, SettingsError> {
        let http = http::client()
            .timeout(timeout)
            .build()
            .map_err(|error| SettingsError::Exporter(causes(&error)))?;
        Ok(Self {
            http,
            status: Arc::default(),
        })
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let request = reqwest::Request::try_from(request)?;
        let mut answer = match self.http.execute(request).await {
            Ok(answer) => answer,
            // Without the address, and with the reason below it.
            Err(error) => return Err(causes(&error.without_url()).into()),
        };
        let status = answer.status();
        self.status.store(status.as_u16(), Ordering::Relaxed);
        if !status.is_success() {
            return Err(format!("the collector answered {status}").into());
        }
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await? {
            if body.len().saturating_add(chunk.len()) > ANSWER_MAX {
                return Err("the collector's answer is too long".into());
            }
            body.extend_from_slice(&chunk);
        }
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = status;
        Ok(response)
    }
}
