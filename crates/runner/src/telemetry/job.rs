//! A job's trace: one span for all of it, and below it one for each step.

use std::time::{Instant, SystemTime};

use opentelemetry::trace::{Span as _, SpanBuilder, SpanKind, Status, TraceContextExt as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::SdkTracer;

use super::{Step, TraceParent};
use crate::queue::Verdict;

/// All that is known of a job that is over.
#[derive(Clone, Debug)]
pub(crate) struct JobTrace {
    /// The submitter's span.
    pub(crate) parent: Option<TraceParent>,
    /// Which run.
    pub(crate) run: String,
    /// In which profile.
    pub(crate) profile: String,
    /// Of which session.
    pub(crate) session: Option<String>,
    /// Which agent CLI.
    pub(crate) agent: String,
    /// Where its VM came from: warm, idle, restored.
    pub(crate) vm_source: Option<&'static str>,
    /// How often there was no room for it before it was admitted.
    pub(crate) refused: u32,
    /// When it was submitted.
    pub(crate) submitted: SystemTime,
    /// When its answer was durable.
    pub(crate) ended: Instant,
    /// How. What an agent or a guest said of it may hold anything, and is not told.
    pub(crate) verdict: Verdict,
    /// Exit status.
    pub(crate) exit_code: i32,
    /// The steps.
    pub(crate) steps: Vec<Step>,
    /// An instant and the time then, for all the others.
    pub(crate) clock: (Instant, SystemTime),
}

impl JobTrace {
    fn time(&self, at: Instant) -> SystemTime {
        let (instant, wall) = self.clock;
        let time = match at.checked_duration_since(instant) {
            Some(later) => wall.checked_add(later),
            None => wall.checked_sub(instant.saturating_duration_since(at)),
        };
        time.unwrap_or(wall)
    }

    /// Hands all spans to the tracer.
    pub(super) fn emit(&self, tracer: &SdkTracer) {
        let above = match self.parent {
            Some(parent) => Context::new().with_remote_span_context(parent.context()),
            None => Context::new(),
        };
        let ended = self.time(self.ended);
        // A file from the future has waited for no time.
        let first = self.steps.iter().map(|step| step.began).min();
        let began = self.submitted.min(self.time(first.unwrap_or(self.ended)));
        let mut attributes = vec![
            KeyValue::new("vm0.run.id", self.run.clone()),
            KeyValue::new("vm0.profile", self.profile.clone()),
            KeyValue::new("vm0.agent.type", self.agent.clone()),
            KeyValue::new("vm0.result", self.verdict.name()),
            KeyValue::new("vm0.exit_code", i64::from(self.exit_code)),
            KeyValue::new("vm0.admission.refused", i64::from(self.refused)),
        ];
        if let Some(session) = &self.session {
            attributes.push(KeyValue::new("vm0.session.id", session.clone()));
        }
        if let Some(source) = self.vm_source {
            attributes.push(KeyValue::new("vm0.vm.source", source));
        }
        let failed_at = self.steps.iter().rev().find(|step| !step.ok);
        if self.verdict != Verdict::Ok {
            // The semantic conventions' name of the class of an error.
            attributes.push(KeyValue::new("error.type", self.verdict.name()));
        }
        let mut root = SpanBuilder::from_name("job")
            .with_kind(SpanKind::Consumer)
            .with_start_time(began)
            .with_attributes(attributes)
            .start_with_context(tracer, &above);
        root.set_status(match (self.verdict, failed_at) {
            (Verdict::Ok, _) => Status::Ok,
            (Verdict::Cancelled, _) => Status::error("the job was cancelled"),
            (Verdict::TimedOut, _) => Status::error("the job's time ran out"),
            (Verdict::Failed, None) => {
                Status::error(format!("the job ended with status {}", self.exit_code))
            }
            (Verdict::Failed, Some(step)) => Status::error(format!(
                "the job failed at {}, with status {}",
                step.name, self.exit_code
            )),
        });
        let below = Context::new().with_remote_span_context(root.span_context().clone());
        for step in &self.steps {
            let mut span = SpanBuilder::from_name(step.name)
                .with_start_time(self.time(step.began))
                .start_with_context(tracer, &below);
            if !step.ok {
                span.set_status(Status::error(format!("{} did not succeed", step.name)));
            }
            span.end_with_timestamp(self.time(step.ended));
        }
        if let Some(first) = first {
            let span = SpanBuilder::from_name("queue.wait").with_start_time(began);
            let mut span = span.start_with_context(tracer, &below);
            span.end_with_timestamp(self.time(first));
        }
        root.end_with_timestamp(ended);
    }
}
