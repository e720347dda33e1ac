//! Traces of jobs that a real daemon runs, as a collector gets them.

use std::cell::Cell;

use opentelemetry_proto::tonic::trace::v1::{Span, status::StatusCode};

use super::*;
use crate::telemetry::tests::{Got, Mood, attribute, collector, sender};
use crate::telemetry::{FLUSH_LIMIT, Flush};

/// Jobs run by a daemon whose collector is like this; `story` also gets what the collector gets.
fn traced<F>(
    mood: Mood,
    story: impl FnOnce(
        Arc<TestQueue>,
        mpsc::UnboundedReceiver<JobResult>,
        mpsc::UnboundedReceiver<Got>,
        Flush,
    ) -> F,
) where
    F: Future<Output = ()>,
{
    let cell = Cell::new(None);
    with_telemetry(
        || {
            let (settings, got) = collector(mood);
            let (telemetry, flush) = Telemetry::start(&settings, &sender()).unwrap();
            cell.set(Some((got, flush)));
            telemetry
        },
        |queue, answers| {
            let (got, flush) = cell.take().unwrap();
            story(queue, answers, got, flush)
        },
    );
}

/// Spans until those of so many jobs are there.
async fn spans(got: &mut mpsc::UnboundedReceiver<Got>, jobs: usize) -> Vec<Span> {
    let mut spans = Vec::new();
    while spans
        .iter()
        .filter(|span: &&Span| span.name == "job")
        .count()
        < jobs
    {
        let got = got.recv().await.unwrap();
        let text = String::from_utf8_lossy(&got.body).into_owned();
        assert!(!text.contains("hunter2"), "a prompt or a secret: {text}");
        let (resource, more) = got.decode();
        for (key, value) in [
            ("service.name", "vm0-runner"),
            ("service.version", "1.2.3"),
            ("vm0.runner.name", "demo"),
            ("vm0.engine", "fake"),
        ] {
            assert_eq!(attribute(&resource, key).as_deref(), Some(value), "{key}");
        }
        assert!(attribute(&resource, "host.name").is_some());
        spans.extend(more);
    }
    spans
}

fn of_run(spans: &[Span], run: RunId) -> (&Span, Vec<&Span>) {
    let is = |span: &&Span| {
        span.name == "job" && attribute(&span.attributes, "vm0.run.id") == Some(run.to_string())
    };
    let root = spans.iter().find(is).unwrap();
    let mut below: Vec<&Span> = spans
        .iter()
        .filter(|span| span.parent_span_id == root.span_id)
        .collect();
    assert!(below.iter().all(|span| span.trace_id == root.trace_id));
    below.sort_by_key(|span| (span.start_time_unix_nano, span.end_time_unix_nano));
    (root, below)
}

fn names(spans: &[&Span]) -> Vec<String> {
    let mut names: Vec<String> = spans.iter().map(|span| span.name.clone()).collect();
    names.sort();
    names
}

#[test]
fn a_job_s_trace_has_a_span_for_each_step_in_its_order_below_the_submitter_s() {
    traced(Mood::Takes, async |queue, mut answers, mut got, flush| {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let run = queue.submit(|fields| {
            fields.prompt = "echo hunter2 https://example.com/?key=hunter2".to_owned();
            fields
                .environment
                .insert("KEY".to_owned(), "hunter2".to_owned());
            fields.session_id = Some("s".parse().unwrap());
            fields.traceparent = Some(parent.parse().unwrap());
        });
        assert_eq!(answers.recv().await.unwrap(), JobResult::exited(run, 0));
        let spans = spans(&mut got, 1).await;
        let (root, below) = of_run(&spans, run);
        assert_eq!(
            hex::encode(&root.trace_id),
            "4bf92f3577b34da6a3ce929d0e0e4736"
        );
        assert_eq!(hex::encode(&root.parent_span_id), "00f067aa0ba902b7");
        assert_eq!(root.status.as_ref().unwrap().code(), StatusCode::Ok);
        let source = attribute(&root.attributes, "vm0.vm.source").unwrap();
        let vm = match source.as_str() {
            "warm" => "vm.resume",
            "restored" => "vm.restore",
            other => panic!("{other}"),
        };
        let mut expected = [
            "agent",
            "answer",
            "claim",
            "queue.wait",
            "reserve",
            "vm.park",
            vm,
        ];
        expected.sort_unstable();
        assert_eq!(names(&below), expected);
        // One begins when the one before has ended; the first with the job.
        let order = [
            "queue.wait",
            "reserve",
            "claim",
            vm,
            "agent",
            "answer",
            "vm.park",
        ];
        let steps = order.map(|name| below.iter().find(|span| span.name == name).unwrap());
        assert_eq!(steps[0].start_time_unix_nano, root.start_time_unix_nano);
        for pair in steps.windows(2) {
            assert!(
                pair[0].end_time_unix_nano <= pair[1].start_time_unix_nano,
                "{} {}",
                pair[0].name,
                pair[1].name
            );
        }
        assert!(
            below
                .iter()
                .all(|span| span.start_time_unix_nano <= span.end_time_unix_nano)
        );
        // The answer ends the job; that its VM is parked afterwards is no part of its time.
        assert_eq!(steps[5].end_time_unix_nano, root.end_time_unix_nano);
        for (key, value) in [
            ("vm0.profile", "vm0/small"),
            ("vm0.session.id", "s"),
            ("vm0.agent.type", "claude-code"),
            ("vm0.result", "ok"),
            ("vm0.exit_code", "0"),
        ] {
            assert_eq!(
                attribute(&root.attributes, key).as_deref(),
                Some(value),
                "{key}"
            );
        }
        flush.finish().await;
    });
}

#[test]
fn a_job_that_fails_is_an_error_that_names_its_step_and_quotes_nothing() {
    traced(Mood::Takes, async |queue, mut answers, mut got, flush| {
        // The panic waits in `collect_dir`.
        let run = queue.submit(|fields| fields.collect = vec!["/hunter2".to_owned()]);
        assert_eq!(answers.recv().await.unwrap().exit_code, 1);
        let spans = spans(&mut got, 1).await;
        let (root, below) = of_run(&spans, run);
        let status = root.status.as_ref().unwrap();
        assert_eq!(status.code(), StatusCode::Error);
        assert_eq!(status.message, "the job failed at collect, with status 1");
        assert_eq!(
            attribute(&root.attributes, "error.type").as_deref(),
            Some("failed")
        );
        let collect = below.iter().find(|span| span.name == "collect").unwrap();
        assert_eq!(collect.status.as_ref().unwrap().code(), StatusCode::Error);
        assert!(below.iter().any(|span| span.name == "vm.destroy"));
        flush.finish().await;
    });
}

#[test]
fn jobs_are_answered_while_the_collector_hangs_and_the_end_waits_for_it_no_longer_than_it_may() {
    traced(Mood::Hangs, async |queue, mut answers, mut got, flush| {
        for _ in 0..5 {
            let run = queue.submit(|_| ());
            assert_eq!(answers.recv().await.unwrap(), JobResult::exited(run, 0));
        }
        got.recv().await.unwrap();
        let began = Instant::now();
        flush.finish().await;
        let took = began.elapsed();
        assert!(took < FLUSH_LIMIT + Duration::from_secs(1), "{took:?}");
    });
}
