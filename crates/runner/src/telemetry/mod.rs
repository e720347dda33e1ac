//! Traces of jobs for an OpenTelemetry collector (`telemetry:` in `runner.yaml`, or the standard variables).
//!
//! A job's spans are made when all of it is over, from times that were noted meanwhile, and go into a bounded queue: a
//! collector that is slow or gone costs a job nothing. They say what a job was and how long its steps took, and
//! never what it said: prompts, output, addresses and the texts of errors stay in the runner's logs.

mod export;
mod job;
mod parent;
mod settings;
mod steps;

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};

use crate::metrics::Counters;

pub(crate) use job::JobTrace;
pub(crate) use parent::TraceParent;
pub(crate) use settings::{HEADER_VARIABLES, Settings, SettingsError};
pub(crate) use steps::{Step, Steps};

/// How long a daemon that ends waits for the collector to take the last spans.
pub(crate) const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Who sends: the resource of every span.
#[derive(Clone, Debug)]
pub(crate) struct Sender {
    /// `runner --version`.
    pub(crate) version: String,
    /// The runner's name.
    pub(crate) runner: String,
    /// Its group.
    pub(crate) group: String,
    /// This process of it.
    pub(crate) instance: String,
    /// The engine of its VMs.
    pub(crate) engine: String,
}

/// Where traces of jobs go. Clones are cheap and mean the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Telemetry(Option<SdkTracer>);

/// Ends the export.
#[derive(Debug)]
pub(crate) struct Flush {
    provider: SdkTracerProvider,
    exporting: export::Exporting,
}

impl Telemetry {
    /// Starts to export, on the runtime of the caller.
    pub(crate) fn start(
        settings: &Settings,
        sender: &Sender,
    ) -> Result<(Self, Flush), SettingsError> {
        let resource = resource(settings, sender);
        let (queue, exporting) = export::start(settings, &resource)?;
        let provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
                settings.sample_ratio,
            ))))
            .with_span_processor(queue)
            .build();
        let tracer = provider.tracer("vm0-runner");
        let flush = Flush {
            provider,
            exporting,
        };
        Ok((Self(Some(tracer)), flush))
    }

    /// Whether traces are wanted at all.
    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// A job is over. Never waits.
    pub(crate) fn job(&self, trace: &JobTrace) {
        if let Some(tracer) = &self.0 {
            trace.emit(tracer);
        }
    }
}

impl Flush {
    /// What became of the spans, for the metrics.
    pub(crate) fn counters(&self) -> Counters {
        self.exporting.counters()
    }

    /// Sends what is still there, for at most [`FLUSH_LIMIT`].
    pub(crate) async fn finish(self) {
        self.exporting.finish(FLUSH_LIMIT).await;
        // Nothing is left that could fail: the queue is closed.
        let _ = self.provider.shutdown();
    }
}

fn resource(settings: &Settings, sender: &Sender) -> Resource {
    let system = rustix::system::uname();
    let host = system.nodename().to_string_lossy().into_owned();
    // Names as in OpenTelemetry's semantic conventions, where those have one.
    Resource::builder()
        .with_service_name(settings.service_name.clone())
        .with_attributes([
            KeyValue::new("service.version", sender.version.clone()),
            KeyValue::new("service.instance.id", sender.instance.clone()),
            KeyValue::new("host.name", host),
            KeyValue::new("vm0.runner.name", sender.runner.clone()),
            KeyValue::new("vm0.runner.group", sender.group.clone()),
            KeyValue::new("vm0.engine", sender.engine.clone()),
        ])
        .build()
}

#[cfg(test)]
#[path = "tests.rs"]
pub(crate) mod tests;
