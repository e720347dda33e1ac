//! The export against a collector of the test's own: real HTTP, real protobuf.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::HeaderMap;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use tokio::sync::mpsc;

use super::*;
use crate::config::TelemetryConfig;
use crate::queue::Verdict;

/// How the collector answers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mood {
    /// It takes everything.
    Takes,
    /// It answers this to the first so many requests, and takes the others.
    Refuses(StatusCode, usize),
    /// It reads and never answers.
    Hangs,
}

/// What came with one request.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) taken: bool,
}

impl Got {
    /// The resource's attributes, and the spans.
    pub(crate) fn decode(&self) -> (Vec<KeyValue>, Vec<Span>) {
        let request = ExportTraceServiceRequest::decode(self.body.clone()).unwrap();
        let [resource] = <[_; 1]>::try_from(request.resource_spans).unwrap();
        let scopes = resource.scope_spans.into_iter();
        let spans = scopes.flat_map(|scope| scope.spans).collect();
        (resource.resource.unwrap().attributes, spans)
    }
}

pub(crate) fn attribute(attributes: &[KeyValue], key: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    match found.value.clone()?.value? {
        Value::StringValue(text) => Some(text),
        Value::IntValue(number) => Some(number.to_string()),
        other => panic!("{key} is {other:?}"),
    }
}

/// A collector on the loopback, on the runtime of the caller.
pub(crate) fn collector(mood: Mood) -> (Settings, mpsc::UnboundedReceiver<Got>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let (sender, receiver) = mpsc::unbounded_channel();
    let seen = Arc::new(AtomicUsize::new(0));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (sender, seen) = (sender.clone(), Arc::clone(&seen));
            let service = service_fn(move |request| {
                let (sender, seen) = (sender.clone(), Arc::clone(&seen));
                async move { Ok::<_, Infallible>(answer(request, mood, &seen, &sender).await) }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    let config = TelemetryConfig {
        otlp_endpoint: Some(format!("http://{address}").try_into().unwrap()),
        ..TelemetryConfig::default()
    };
    let file = Some("Authorization: Bearer hunter2\n");
    let settings = Settings::settle(&config, file, |_| None).unwrap().unwrap();
    (settings, receiver)
}

async fn answer(
    request: Request<Incoming>,
    mood: Mood,
    seen: &AtomicUsize,
    sender: &mpsc::UnboundedSender<Got>,
) -> Response<Full<Bytes>> {
    assert_eq!(request.method(), Method::POST);
    assert_eq!(request.uri().path(), "/v1/traces");
    let headers = request.headers().clone();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let number = seen.fetch_add(1, Ordering::Relaxed);
    let status = match mood {
        Mood::Refuses(status, times) if number < times => status,
        _ => StatusCode::OK,
    };
    let got = Got {
        headers,
        body,
        taken: status == StatusCode::OK,
    };
    // The test may be over.
    let _ = sender.send(got);
    if matches!(mood, Mood::Hangs) {
        std::future::pending::<()>().await;
    }
    let message = ExportTraceServiceResponse::default().encode_to_vec();
    let mut response = Response::new(Full::from(message));
    *response.status_mut() = status;
    response
}

pub(crate) fn sender() -> Sender {
    Sender {
        version: "1.2.3".to_owned(),
        runner: "demo".to_owned(),
        group: "vm0/demo".to_owned(),
        instance: "i".to_owned(),
        engine: "fake".to_owned(),
    }
}

/// A job of a second that went well.
fn trace() -> JobTrace {
    let began = Instant::now();
    let ended = began + Duration::from_secs(1);
    JobTrace {
        parent: None,
        run: "run".to_owned(),
        profile: "vm0/small".to_owned(),
        session: None,
        agent: "claude-code".to_owned(),
        vm_source: Some("warm"),
        refused: 0,
        submitted: SystemTime::now() - Duration::from_millis(500),
        ended,
        verdict: Verdict::Ok,
        exit_code: 0,
        steps: vec![Step {
            name: "agent",
            began,
            ended,
            ok: true,
        }],
        clock: (began, SystemTime::now()),
    }
}

/// Spans of [`trace`].
const SPANS: usize = 3;

fn counted(counters: &Counters, result: &str) -> u64 {
    let labels = vec![("result", result.to_owned())];
    counters.get_or_create(&labels).get()
}

#[tokio::test]
async fn a_collector_that_is_busy_is_asked_again_and_gets_everything_once() {
    let (settings, mut got) = collector(Mood::Refuses(StatusCode::SERVICE_UNAVAILABLE, 1));
    let (telemetry, flush) = Telemetry::start(&settings, &sender()).unwrap();
    let counters = flush.counters();
    telemetry.job(&trace());
    assert!(!got.recv().await.unwrap().taken);
    let second = got.recv().await.unwrap();
    assert!(second.taken);
    assert_eq!(second.headers["content-type"], "application/x-protobuf");
    assert_eq!(second.headers["authorization"], "Bearer hunter2");
    assert_eq!(second.decode().1.len(), SPANS);
    flush.finish().await;
    assert_eq!(counted(&counters, "sent"), SPANS as u64);
    assert_eq!(counted(&counters, "dropped"), 0);
    assert!(got.try_recv().is_err());
}

#[tokio::test]
async fn what_a_collector_refuses_for_good_is_dropped_and_counted_and_not_sent_again() {
    let (settings, mut got) = collector(Mood::Refuses(StatusCode::BAD_REQUEST, 1));
    let (telemetry, flush) = Telemetry::start(&settings, &sender()).unwrap();
    let counters = flush.counters();
    telemetry.job(&trace());
    assert!(!got.recv().await.unwrap().taken);
    telemetry.job(&trace());
    assert!(got.recv().await.unwrap().taken);
    flush.finish().await;
    assert_eq!(counted(&counters, "dropped"), SPANS as u64);
    assert_eq!(counted(&counters, "sent"), SPANS as u64);
}

#[tokio::test]
async fn a_collector_that_hangs_holds_nobody_up_and_what_is_too_much_is_counted() {
    let (settings, mut got) = collector(Mood::Hangs);
    let (telemetry, flush) = Telemetry::start(&settings, &sender()).unwrap();
    let counters = flush.counters();
    telemetry.job(&trace());
    got.recv().await.unwrap();
    // The collector has the first job's spans and holds them: these fill the queue, and more.
    let jobs = export::QUEUE / SPANS + 100;
    for _ in 0..jobs {
        telemetry.job(&trace());
    }
    let too_many = jobs * SPANS - export::QUEUE;
    assert_eq!(counted(&counters, "dropped"), too_many as u64);
    let began = Instant::now();
    flush.finish().await;
    let took = began.elapsed();
    assert!(took < FLUSH_LIMIT + Duration::from_secs(1), "{took:?}");
    assert_eq!(counted(&counters, "sent"), 0);
}

#[tokio::test]
async fn what_is_still_there_at_the_end_is_sent() {
    let (settings, mut got) = collector(Mood::Takes);
    let (telemetry, flush) = Telemetry::start(&settings, &sender()).unwrap();
    let counters = flush.counters();
    for _ in 0..400 {
        telemetry.job(&trace());
    }
    flush.finish().await;
    assert_eq!(counted(&counters, "sent"), 400 * SPANS as u64);
    let mut spans = 0;
    while let Ok(got) = got.try_recv() {
        spans += got.decode().1.len();
    }
    assert_eq!(spans, 400 * SPANS);
}

#[tokio::test]
async fn the_submitter_decides_whether_its_job_is_traced_and_the_ratio_otherwise() {
    let (mut settings, mut got) = collector(Mood::Takes);
    settings.sample_ratio = 0.0;
    let (telemetry, flush) = Telemetry::start(&settings, &sender()).unwrap();
    let ids = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
    for parent in [None, Some(format!("{ids}-00")), Some(format!("{ids}-01"))] {
        telemetry.job(&JobTrace {
            parent: parent.map(|parent| parent.parse().unwrap()),
            ..trace()
        });
    }
    flush.finish().await;
    let (_, spans) = got.try_recv().unwrap().decode();
    assert!(got.try_recv().is_err());
    assert_eq!(spans.len(), SPANS);
    let root = spans.iter().find(|span| span.name == "job").unwrap();
    assert_eq!(
        hex::encode(&root.trace_id),
        "4bf92f3577b34da6a3ce929d0e0e4736"
    );
    assert_eq!(hex::encode(&root.parent_span_id), "00f067aa0ba902b7");
}
