//! `runner benchmark`: what this host, engine and build of the runner cost, in one run.
//!
//! Three parts, one after the other, so that none disturbs another:
//!
//! 1. `vms`: VMs of the engine, alternating with a process driven by hand with the same arguments, so that both see
//!    the same host;
//! 2. `idle`: what VMs that only wait take of the host's memory;
//! 3. `jobs`: a daemon of its own, in a group of its own, and the commands a user types, timed from outside.
//!
//! What is waited for between two measurements (a pool that fills up again) is asked for now and then; nothing that is
//! measured is.

mod idle;
mod jobs;
mod samples;
mod vms;

use std::process::ExitCode;
use std::sync::Arc;

use host::launcher::{ForkedLauncher, LauncherConfig};
use serde::Serialize;

use crate::config::EngineChoice;
use crate::context::{CliError, Context, block_on, note};
use crate::engine;
use crate::home::Home;
use crate::image::{self, Store, StoredSnapshot};
use crate::names::ImageHash;
use crate::profile::ProfileSpec;
use samples::Figures;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Needs root and a built profile; takes minutes and wants an idle host. It runs beside other runners, \
but they would disturb the figures.\n\n\
Examples:\n  \
    sudo runner benchmark\n  \
    sudo runner benchmark --json\n  \
    sudo runner benchmark --burst 32\n  \
    sudo runner benchmark --profile vm0/default --runs 10"
)]
pub(crate) struct Args {
    /// The profile whose VMs are measured
    #[arg(
        long,
        value_name = "ORG/NAME[:KEY=VALUE,…]",
        default_value = "vm0/small"
    )]
    profile: ProfileSpec,
    /// The engine whose newest build of the profile is measured
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
    /// How often VMs are restored, claimed and jobs run
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// How often VMs are cold booted
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    boots: u32,
    /// How many jobs are put into the queue to see how soon they are claimed
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pickups: u32,
    /// How many VMs wait at once when their memory is measured
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    idle: u32,
    /// Measure only this: N jobs at once against a warm pool of N VMs, from the first one queued to the last one answered
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    burst: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is printed. Keys and units are documented in docs/performance.md.
#[derive(Serialize)]
struct Report {
    cold_boot_ms: Figures,
    /// Of QEMU only: nothing else is driven by hand.
    #[serde(skip_serializing_if = "Option::is_none")]
    raw_restore_ms: Option<Figures>,
    restore_ms: Figures,
    /// Where the time of `restore_ms` and of what follows it goes, in order.
    steps_ms: Vec<Step>,
    #[serde(skip_serializing_if = "Option::is_none")]
    raw_claim_ms: Option<Figures>,
    warm_claim_ms: Figures,
    pickup_ms: Figures,
    exec_ms: Figures,
    ping_us: Figures,
    submit_to_result_ms: Figures,
    idle_private_mib: f64,
    host: Host,
    engine: sandbox::EngineKind,
    commit: &'static str,
}

/// One step of a preparation.
#[derive(Serialize)]
struct Step {
    step: &'static str,
    #[serde(flatten)]
    took: Figures,
}

/// The machine the figures belong to.
#[derive(Serialize)]
struct Host {
    cpus: usize,
    cpu: String,
    memory_mb: u64,
    kernel: String,
    arch: &'static str,
}

impl Host {
    fn look() -> Self {
        let first = |file: &str, key: &str| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(key));
            line.and_then(|line| line.split_once(':'))
                .map_or_else(String::new, |(_, value)| value.trim().to_owned())
        };
        let memory_kb = first("/proc/meminfo", "MemTotal");
        let memory_kb = memory_kb.split(' ').next().and_then(|kb| kb.parse().ok());
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: first("/proc/cpuinfo", "model name"),
            memory_mb: memory_kb.unwrap_or(0_u64) / 1024,
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            arch: std::env::consts::ARCH,
        }
    }
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    if !rustix::process::geteuid().is_root() {
        return Err(
            CliError::failed("`runner benchmark` needs root, to start VMs")
                .with_hint("sudo runner benchmark"),
        );
    }
    let home = Arc::new(context.home()?);
    let build = image::newest_build(&home, &args.profile.profile, args.engine)?;
    let (rootfs, snapshot) = build.ok_or_else(|| engine::not_built(&args.profile, args.engine))?;
    if let Some(jobs) = args.burst {
        return burst(&args, context, &home, (rootfs, snapshot), jobs);
    }
    let stored = Store::open(Arc::clone(&home))?.snapshot(&rootfs, &snapshot)?;
    // Before any thread exists.
    let instance = format!("benchmark-{}", std::process::id());
    let forked = ForkedLauncher::fork(LauncherConfig::from_env(instance.clone())?)?;
    block_on(async {
        let launcher = forked.attach()?;
        let bench = vms::Bench::open(launcher.clone(), instance, &stored, &home).await?;
        note(format_args!("VMs: {} rounds", args.runs));
        let engine = bench.measure(args.runs, args.boots).await?;
        note(format_args!("memory of {} idle VMs", args.idle));
        let idle_private_mib =
            idle::measure(&bench, args.profile.profile.flavour, args.idle).await?;
        drop(bench);
        launcher.shutdown().await;
        note(format_args!(
            "jobs: {} runs, {} pickups",
            args.runs, args.pickups
        ));
        let jobs = jobs::Jobs::start(&home, &args.profile, rootfs, snapshot, jobs::WARM).await?;
        let figures = jobs.measure(args.runs, args.pickups).await?;
        let report = Report {
            cold_boot_ms: engine.cold_boot.milliseconds(),
            raw_restore_ms: engine.raw_restore.some_milliseconds(),
            restore_ms: engine.restore.milliseconds(),
            steps_ms: engine
                .steps
                .iter()
                .map(|(step, samples)| Step {
                    step,
                    took: samples.milliseconds(),
                })
                .collect(),
            raw_claim_ms: engine.raw_claim.some_milliseconds(),
            warm_claim_ms: engine.warm_claim.milliseconds(),
            pickup_ms: figures.pickup.milliseconds(),
            exec_ms: figures.exec.milliseconds(),
            ping_us: engine.ping.microseconds(),
            submit_to_result_ms: figures.submit.milliseconds(),
            idle_private_mib,
            host: Host::look(),
            engine: stored.manifest.engine,
            commit: crate::cli::VERSION,
        };
        if args.json {
            context.print_json(&report)?;
        } else {
            context.print(report.table())?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// What `--burst` prints.
#[derive(Serialize)]
struct Burst {
    jobs: u32,
    burst_ms: Figures,
    host: Host,
    commit: &'static str,
}

fn burst(
    args: &Args,
    context: &Context,
    home: &Arc<Home>,
    (rootfs, snapshot): (ImageHash, ImageHash),
    jobs: u32,
) -> Result<ExitCode, CliError> {
    block_on(async {
        note(format_args!("{} bursts of {jobs} jobs", args.runs));
        let daemon = jobs::Jobs::start(home, &args.profile, rootfs, snapshot, jobs).await?;
        let report = Burst {
            jobs,
            burst_ms: daemon.bursts(args.runs).await?.milliseconds(),
            host: Host::look(),
            commit: crate::cli::VERSION,
        };
        if args.json {
            context.print_json(&report)?;
        } else {
            let Figures { p50, p95, p99, n } = report.burst_ms;
            context.print(format_args!(
                "{jobs} jobs at once, all answered after: p50 {p50} ms, p95 {p95} ms, p99 {p99} ms, n {n}\n"
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

impl Report {
    fn table(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        let host = &self.host;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{} CPUs ({}), {} MiB, Linux {} {}; engine {:?}; runner {}\n",
            host.cpus, host.cpu, host.memory_mb, host.kernel, host.arch, self.engine, self.commit
        );
        let _ = writeln!(
            text,
            "{:<22} {:>9} {:>9} {:>9} {:>6}",
            "", "p50", "p95", "p99", "n"
        );
        let mut lines = vec![("cold_boot_ms".to_owned(), &self.cold_boot_ms)];
        let raw = |name: &str, figures| Some((name.to_owned(), Option::as_ref(figures)?));
        lines.extend(raw("raw_restore_ms", &self.raw_restore_ms));
        lines.push(("restore_ms".to_owned(), &self.restore_ms));
        let steps = self.steps_ms.iter();
        lines.extend(steps.map(|Step { step, took }| (format!("  {step}"), took)));
        lines.extend(raw("raw_claim_ms", &self.raw_claim_ms));
        let rest = [
            ("warm_claim_ms", &self.warm_claim_ms),
            ("pickup_ms", &self.pickup_ms),
            ("exec_ms", &self.exec_ms),
            ("ping_us", &self.ping_us),
            ("submit_to_result_ms", &self.submit_to_result_ms),
        ];
        lines.extend(rest.map(|(name, figures)| (name.to_owned(), figures)));
        for (name, figures) in lines {
            let _ = writeln!(
                text,
                "{name:<22} {:>9.2} {:>9.2} {:>9.2} {:>6}",
                figures.p50, figures.p95, figures.p99, figures.n
            );
        }
        let _ = writeln!(
            text,
            "{:<22} {:>9.2}",
            "idle_private_mib", self.idle_private_mib
        );
        text
    }
}

/// A stored snapshot's engine-facing parts, which every part of the benchmark needs.
type Stored = StoredSnapshot;
