//! Figures for Prometheus: what is counted, and how it is served (`metrics.listen` in `runner.yaml`).
//!
//! Counters and histograms are fed where things happen; gauges are taken from the daemon's status when somebody asks.
//! Names begin with `vm0_runner_` and follow the OpenMetrics conventions: base units, `_total` on counters.

mod http;
mod meter;

use std::sync::{Mutex, PoisonError};

use host::slot::Resources;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use sandbox::DeviceStats;

pub(crate) use http::{bind, serve};
pub(crate) use meter::Meter;

use crate::gc::Report;
use crate::queue::JobResult;
use crate::status::{Mode, Phase, Status, WorkerState};
use crate::sync::lock;

/// Names and values of a series' labels.
pub(crate) type Labels = Vec<(&'static str, String)>;

/// A counter for each combination of labels.
pub(crate) type Counters = Family<Labels, Counter>;
type Gauges = Family<Labels, Gauge>;
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// From a warm claim to the longest job: 10 ms to about three hours, by doubling.
fn durations() -> Histogram {
    Histogram::new((0..20).map(|n| 0.01 * f64::from(1_u32 << n)))
}

/// Everything that is counted.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Gauges are set and everything is written under this lock, so that two who ask see no mixture.
    registry: Mutex<Registry>,
    jobs: Counters,
    faults: Counter,
    phases: Histograms,
    starts: Counters,
    removed: Counters,
    removed_bytes: Counters,
    runs: Gauges,
    waiting: Gauge,
    vms: Gauges,
    balloons: Gauge,
    io_bytes: Counters,
    throttled: Counters,
    warm_target: Gauges,
    budget: Gauges,
    proxy: Gauges,
    mode: Gauges,
    api_up: Gauges,
    api_undelivered: Gauges,
}

impl Metrics {
    /// Nothing counted yet. `traffic` are the counters of what jobs do in the network.
    pub(crate) fn new(traffic: Option<Counters>, version: &str) -> Self {
        let mut registry = Registry::with_prefix("vm0_runner");
        let phases = Histograms::new_with_constructor(durations as fn() -> Histogram);
        let metrics = Self {
            registry: Mutex::default(),
            jobs: Counters::default(),
            faults: Counter::default(),
            phases,
            starts: Counters::default(),
            removed: Counters::default(),
            removed_bytes: Counters::default(),
            runs: Gauges::default(),
            waiting: Gauge::default(),
            vms: Gauges::default(),
            balloons: Gauge::default(),
            io_bytes: Counters::default(),
            throttled: Counters::default(),
            warm_target: Gauges::default(),
            budget: Gauges::default(),
            proxy: Gauges::default(),
            mode: Gauges::default(),
            api_up: Gauges::default(),
            api_undelivered: Gauges::default(),
        };
        let r = &mut registry;
        let m = &metrics;
        r.register("jobs", "Jobs that were answered, by result", m.jobs.clone());
        r.register(
            "faults",
            "Jobs that failed because of the runner and not of the agent: no VM, no network, VM died",
            m.faults.clone(),
        );
        r.register(
            "job_phase_seconds",
            "How long jobs were in each phase, in seconds",
            m.phases.clone(),
        );
        r.register(
            "vm_starts",
            "Jobs that got a VM, by where it came from: warm pool, idle VM of the session, restored for it",
            m.starts.clone(),
        );
        r.register(
            "reclaimed",
            "Leftovers and old files that were removed, by kind",
            m.removed.clone(),
        );
        r.register(
            "reclaimed_bytes",
            "What they took on the disk, in bytes",
            m.removed_bytes.clone(),
        );
        if let Some(traffic) = traffic {
            r.register(
                "network_events",
                "Requests, connections, queries and packets of jobs, by what became of them",
                traffic,
            );
        }
        r.register("runs", "Active runs by phase", m.runs.clone());
        r.register(
            "jobs_waiting",
            "Jobs that were seen and have no room yet",
            m.waiting.clone(),
        );
        r.register("vms", "VMs that wait for a job", m.vms.clone());
        r.register(
            "balloon_bytes",
            "Memory that idle VMs have given back, in bytes",
            m.balloons.clone(),
        );
        r.register(
            "vm_io_bytes",
            "What jobs read, wrote, received and sent through their VMs' devices, in bytes; absent where the engine does not count it",
            m.io_bytes.clone(),
        );
        r.register(
            "vm_throttled",
            "Times a VM's device waited because of the profile's io limits; absent where the engine does not count it",
            m.throttled.clone(),
        );
        r.register(
            "warm_target",
            "VMs that the warm pool tries to keep ready",
            m.warm_target.clone(),
        );
        r.register(
            "budget",
            "The host's budget: total, taken by jobs (firm), taken by waiting VMs (revocable); CPUs, MiB",
            m.budget.clone(),
        );
        r.register(
            "proxy_up",
            "Whether a process of the proxy carries traffic",
            m.proxy.clone(),
        );
        r.register(
            "mode",
            "What the runner is up to: 1 for its mode",
            m.mode.clone(),
        );
        r.register(
            "api_up",
            "Whether the Web API took the last heartbeat; absent where jobs come from the local queue",
            m.api_up.clone(),
        );
        r.register(
            "api_undelivered",
            "Answers on disk that the Web API does not have yet",
            m.api_undelivered.clone(),
        );
        let info = Gauges::default();
        let version = version.to_owned();
        info.get_or_create(&vec![("version", version)]).set(1);
        r.register("build_info", "The runner's version", info);
        // Series exist from the start: what is not there cannot be told from what never happened.
        for result in ["ok", "failed", "cancelled", "timed_out"] {
            let _ = m.jobs.get_or_create(&vec![("result", result.to_owned())]);
        }
        for source in ["warm", "idle", "restored"] {
            let _ = m.starts.get_or_create(&vec![("source", source.to_owned())]);
        }
        *metrics
            .registry
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = registry;
        metrics
    }

    /// Traces are exported: what became of their spans is served too.
    pub(crate) fn telemetry(&self, spans: Counters) {
        lock(&self.registry).register(
            "telemetry_spans",
            "Spans of jobs for the OpenTelemetry collector: sent, or dropped because it did not take them",
            spans,
        );
    }

    /// A job was answered.
    fn answered(&self, result: &JobResult) {
        let labels = vec![("result", result.verdict().name().to_owned())];
        self.jobs.get_or_create(&labels).inc();
    }

    /// A job failed because of us.
    pub(crate) fn fault(&self) {
        self.faults.inc();
    }

    /// A job has left a phase.
    fn phase(&self, phase: &'static str, profile: &str, seconds: f64) {
        let labels = vec![("phase", phase.to_owned()), ("profile", profile.to_owned())];
        self.phases.get_or_create(&labels).observe(seconds);
    }

    /// A job got its VM.
    pub(crate) fn started(&self, source: &'static str) {
        let labels = vec![("source", source.to_owned())];
        self.starts.get_or_create(&labels).inc();
    }

    /// A job's VM did this much.
    pub(crate) fn devices(&self, stats: DeviceStats) {
        for (device, direction, bytes) in [
            ("disk", "read", stats.disk_read_bytes),
            ("disk", "write", stats.disk_written_bytes),
            ("network", "receive", stats.network_received_bytes),
            ("network", "send", stats.network_sent_bytes),
        ] {
            let labels = vec![
                ("device", device.to_owned()),
                ("direction", direction.to_owned()),
            ];
            self.io_bytes.get_or_create(&labels).inc_by(bytes);
        }
        for (device, times) in [
            ("disk", stats.disk_throttled),
            ("network", stats.network_throttled),
        ] {
            let labels = vec![("device", device.to_owned())];
            self.throttled.get_or_create(&labels).inc_by(times);
        }
    }

    /// Something was cleaned up.
    pub(crate) fn cleaned(&self, report: &Report) {
        for removed in &report.removed {
            let labels = vec![("kind", removed.kind.name().to_owned())];
            self.removed.get_or_create(&labels).inc();
            self.removed_bytes
                .get_or_create(&labels)
                .inc_by(removed.bytes);
        }
    }

    /// Slots of dead runners were reclaimed.
    pub(crate) fn reclaimed(&self, slots: u32) {
        let labels = vec![("kind", "slot".to_owned())];
        self.removed.get_or_create(&labels).inc_by(slots.into());
    }

    /// Everything, in the text format.
    pub(crate) fn text(&self, status: &Status) -> Result<String, std::fmt::Error> {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.set(status);
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }

    fn set(&self, status: &Status) {
        for phase in [Phase::Preparing, Phase::Running, Phase::Finishing] {
            let runs = status.active_runs.iter();
            let count = runs.filter(|run| run.phase == phase).count();
            let labels = vec![("phase", phase.to_string())];
            self.runs.get_or_create(&labels).set(signed(count));
        }
        self.waiting.set(i64::from(status.waiting));
        let idle = vec![("kind", "idle".to_owned()), ("profile", String::new())];
        self.vms
            .get_or_create(&idle)
            .set(signed(status.idle_vms.len()));
        let balloons = status.idle_vms.iter().filter_map(|idle| idle.balloon);
        let held: u64 = balloons.map(|balloon| balloon.held_mb << 20).sum();
        self.balloons.set(i64::try_from(held).unwrap_or(i64::MAX));
        for pool in &status.warm {
            let profile = pool.profile.to_string();
            for (kind, count) in [("warm", pool.ready), ("preparing", pool.preparing)] {
                let labels = vec![("kind", kind.to_owned()), ("profile", profile.clone())];
                self.vms.get_or_create(&labels).set(i64::from(count));
            }
            let labels = vec![("profile", profile)];
            self.warm_target
                .get_or_create(&labels)
                .set(i64::from(pool.target));
        }
        for (kind, resources) in [
            ("total", status.budget.total),
            ("firm", status.budget.host.firm),
            ("revocable", status.budget.host.revocable),
        ] {
            let Resources {
                vcpu,
                memory_mb,
                disk_mb,
            } = resources;
            for (resource, value) in [
                ("vcpu", u64::from(vcpu)),
                ("memory_mb", memory_mb),
                ("disk_mb", disk_mb),
            ] {
                let labels = vec![("kind", kind.to_owned()), ("resource", resource.to_owned())];
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                self.budget.get_or_create(&labels).set(value);
            }
        }
        for (index, worker) in status.proxy.iter().enumerate() {
            let labels = vec![("worker", index.to_string())];
            let up = worker.state == WorkerState::Ready;
            self.proxy.get_or_create(&labels).set(i64::from(up));
        }
        if let Some(api) = &status.api {
            let none = Labels::new();
            let up = api.last_contact.is_some() && api.error.is_none();
            self.api_up.get_or_create(&none).set(i64::from(up));
            self.api_undelivered
                .get_or_create(&none)
                .set(signed(api.undelivered));
        }
        for (mode, name) in [
            (Mode::Starting, "starting"),
            (Mode::Running, "running"),
            (Mode::Draining, "draining"),
            (Mode::Stopping, "stopping"),
        ] {
            let labels = vec![("mode", name.to_owned())];
            let now = i64::from(status.mode == mode);
            self.mode.get_or_create(&labels).set(now);
        }
    }
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_vms_did_adds_up_and_is_absent_where_nothing_is_counted() {
        let metrics = Metrics::new(None, "1.0.0");
        let text = || {
            let mut text = String::new();
            encode(&mut text, &metrics.registry.lock().unwrap()).unwrap();
            text
        };
        assert!(!text().contains("vm_io_bytes_total{"), "{}", text());
        let did = DeviceStats {
            disk_read_bytes: 1,
            disk_written_bytes: 2,
            disk_throttled: 3,
            network_sent_bytes: 4,
            network_received_bytes: 5,
            network_throttled: 6,
        };
        metrics.devices(did);
        metrics.devices(did);
        for line in [
            "vm0_runner_vm_io_bytes_total{device=\"disk\",direction=\"read\"} 2\n",
            "vm0_runner_vm_io_bytes_total{device=\"disk\",direction=\"write\"} 4\n",
            "vm0_runner_vm_io_bytes_total{device=\"network\",direction=\"send\"} 8\n",
            "vm0_runner_vm_io_bytes_total{device=\"network\",direction=\"receive\"} 10\n",
            "vm0_runner_vm_throttled_total{device=\"disk\"} 6\n",
            "vm0_runner_vm_throttled_total{device=\"network\"} 12\n",
        ] {
            assert!(text().contains(line), "{line}: {}", text());
        }
    }
}
