//! `runner.yaml`: what one runner serves and within which limits.
//!
//! Everything is validated here, before anything is opened or started, so the rest of the runner never meets a
//! value that makes no sense. An unknown key is refused, with its path: a misspelt limit must not be ignored.

mod gc;
mod metrics;
mod render;
mod telemetry;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use policy::{Draft, InternalAllow};
use sandbox::IoLimits;
use serde::{Deserialize, Serialize};

use crate::names::{GroupName, ImageHash, ProfileName, RunnerName};
use crate::profile::{Flavour, Profile};

pub(crate) use gc::{GcConfig, LOGS_DAYS, days};
pub(crate) use metrics::MetricsConfig;
pub(crate) use render::Rendered;
pub(crate) use telemetry::{Collector, TelemetryConfig};

/// The whole file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The runner's own name: its directory `runners/<name>` and its log.
    pub(crate) name: RunnerName,
    /// The group of jobs it takes.
    pub(crate) group: GroupName,
    /// What it serves; at least one.
    pub(crate) profiles: BTreeMap<ProfileName, ProfileConfig>,
    /// How VMs share the host.
    #[serde(default)]
    pub(crate) sandbox: SandboxConfig,
    /// What jobs reach, and through what.
    #[serde(default)]
    pub(crate) network: NetworkConfig,
    /// What the daemon removes by itself.
    #[serde(default)]
    pub(crate) gc: GcConfig,
    /// Figures for Prometheus.
    #[serde(default)]
    pub(crate) metrics: MetricsConfig,
    /// Traces of jobs for an OpenTelemetry collector.
    #[serde(default)]
    pub(crate) telemetry: TelemetryConfig,
    /// Which engine runs the VMs.
    #[serde(default)]
    pub(crate) engine: EngineChoice,
    /// Seconds a stopping runner lets jobs finish before it cancels them.
    #[serde(default = "default_stop_timeout")]
    pub(crate) stop_timeout_secs: u64,
    /// Longest time a job may run, seconds; a job may ask for less.
    #[serde(default = "default_job_timeout")]
    pub(crate) job_timeout_secs: u64,
    /// Most a job's system log may hold, MiB; the cut is marked in the log.
    #[serde(default = "default_log_max")]
    pub(crate) log_max_mb: u64,
}

/// One profile in `runner.yaml`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ProfileConfig {
    /// The image, as `runner build` printed it.
    pub(crate) rootfs_hash: ImageHash,
    /// The snapshot, as `runner build` printed it.
    pub(crate) snapshot_hash: ImageHash,
    /// Virtual CPUs.
    pub(crate) vcpu: u32,
    /// Memory, MiB.
    pub(crate) memory_mb: u64,
    /// Writable disk, MiB.
    pub(crate) disk_mb: u64,
    /// Which root file system the image holds.
    pub(crate) flavour: Flavour,
    /// How many warmed VMs are kept ready.
    #[serde(default)]
    pub(crate) warm: WarmConfig,
    /// What its jobs may reach unless they say otherwise; what it denies holds whatever they say.
    #[serde(default)]
    pub(crate) policy: Draft,
    /// How much its VMs may read, write, send and receive.
    #[serde(default)]
    pub(crate) limits: IoLimits,
}

/// Marks of the warm pool of one profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WarmConfig {
    /// Below this many ready VMs new ones are made.
    pub(crate) low: u32,
    /// Up to this many are made.
    pub(crate) high: u32,
}

impl Default for WarmConfig {
    fn default() -> Self {
        Self { low: 1, high: 2 }
    }
}

/// What jobs reach, and through what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NetworkConfig {
    /// Private addresses, CIDRs and host names that jobs may reach all the same.
    pub(crate) internal_allow: InternalAllow,
    /// Processes of the proxy; 0: one for every 16 CPUs.
    pub(crate) proxy_workers: u16,
    /// File of the certificate authorities that the proxy trusts upstream; empty: mitmproxy's own list.
    pub(crate) ssl_verify_upstream_trusted_ca: PathBuf,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            internal_allow: InternalAllow::default(),
            proxy_workers: 0,
            ssl_verify_upstream_trusted_ca: HOST_AUTHORITIES.into(),
        }
    }
}

impl NetworkConfig {
    /// How many processes of the proxy run on this host.
    pub(crate) fn workers(&self) -> u16 {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        match self.proxy_workers {
            0 => u16::try_from(cpus.div_ceil(16))
                .unwrap_or(MAX_WORKERS)
                .min(MAX_WORKERS),
            workers => workers,
        }
    }
}

/// Where Debian and Ubuntu keep the host's certificate authorities.
const HOST_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Most processes of the proxy: as many services as the launcher has.
const MAX_WORKERS: u16 = host::launcher::SERVICES;

/// How VMs share the host.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SandboxConfig {
    /// Most jobs at once; 0: as many as the host's resources carry.
    pub(crate) max_concurrent: u32,
    /// The host's CPUs, memory and disk are multiplied by this; above 1 overcommits.
    pub(crate) concurrency_factor: f64,
    /// Memory kept from VMs, MiB.
    pub(crate) memory_reserve_mb: u64,
    /// How long the VM of a finished job is kept for its session's next job, seconds; 0: not at all.
    pub(crate) idle_timeout_secs: u64,
    /// Most VMs kept that way.
    pub(crate) idle_max: u32,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            max_concurrent: 0,
            concurrency_factor: 1.0,
            memory_reserve_mb: 512,
            idle_timeout_secs: 300,
            idle_max: 4,
        }
    }
}

/// Which engine runs the VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EngineChoice {
    /// The fastest that was proved to work on this host.
    #[default]
    Auto,
    /// QEMU, with KVM where that was proved to work.
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl EngineChoice {
    /// Its name in `runner.yaml`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }
}

/// Default of `stop_timeout_secs`.
pub(crate) const STOP_TIMEOUT_SECS: u64 = 120;
/// Default of `job_timeout_secs`: two hours.
pub(crate) const JOB_TIMEOUT_SECS: u64 = 7200;
/// Default of `log_max_mb`.
pub(crate) const LOG_MAX_MB: u64 = 256;

fn default_stop_timeout() -> u64 {
    STOP_TIMEOUT_SECS
}

fn default_job_timeout() -> u64 {
    JOB_TIMEOUT_SECS
}

fn default_log_max() -> u64 {
    LOG_MAX_MB
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file is not YAML, lacks a key, or has one that does not exist.
    #[error("the configuration cannot be understood: {0}")]
    Syntax(String),
    /// A value makes no sense.
    #[error("the configuration's `{key}` is not usable: {reason}")]
    Value {
        /// Path of the key.
        key: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
}

impl Config {
    /// Parses and validates the text of a `runner.yaml`; reads nothing else.
    pub(crate) fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self =
            serde_saphyr::from_str(text).map_err(|error| ConfigError::Syntax(error.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// Limit on stopping.
    pub(crate) fn stop_timeout(&self) -> Duration {
        Duration::from_secs(self.stop_timeout_secs)
    }

    /// Longest time a job may run.
    pub(crate) fn job_timeout(&self) -> Duration {
        Duration::from_secs(self.job_timeout_secs)
    }

    /// Most bytes of a job's log.
    pub(crate) fn log_max(&self) -> u64 {
        self.log_max_mb.saturating_mul(1 << 20)
    }

    /// Checks every value against the others and against its bounds.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let refuse = |key: String, reason: String| Err(ConfigError::Value { key, reason });
        if self.profiles.is_empty() {
            return refuse("profiles".to_owned(), "it names no profile".to_owned());
        }
        for (name, profile) in &self.profiles {
            if let Err(reason) = profile.shape().check() {
                return refuse(format!("profiles.{name}"), reason);
            }
            let IoLimits {
                disk_kib_s,
                disk_ops_s,
                network_kib_s,
            } = profile.limits;
            for (key, limit) in [
                ("disk_kib_s", disk_kib_s),
                ("disk_ops_s", disk_ops_s),
                ("network_kib_s", network_kib_s),
            ] {
                if limit.is_some_and(|limit| !LIMITS.contains(&limit)) {
                    return refuse(
                        format!("profiles.{name}.limits.{key}"),
                        format!("it must be {} to {}", LIMITS.start(), LIMITS.end()),
                    );
                }
            }
            let WarmConfig { low, high } = profile.warm;
            if low > high {
                return refuse(
                    format!("profiles.{name}.warm"),
                    format!("low ({low}) is above high ({high})"),
                );
            }
            if high > MAX_WARM {
                return refuse(
                    format!("profiles.{name}.warm.high"),
                    format!("it is {high}; it must be at most {MAX_WARM}"),
                );
            }
        }
        let factor = self.sandbox.concurrency_factor;
        if !(factor.is_finite() && factor > 0.0) {
            return refuse(
                "sandbox.concurrency_factor".to_owned(),
                format!("it is {factor}; it must be a finite number above 0"),
            );
        }
        let ratio = self.telemetry.sample_ratio;
        if !(0.0..=1.0).contains(&ratio) {
            return refuse(
                "telemetry.sample_ratio".to_owned(),
                format!("it is {ratio}; it must be 0 to 1"),
            );
        }
        if self.network.proxy_workers > MAX_WORKERS {
            return refuse(
                "network.proxy_workers".to_owned(),
                format!(
                    "it is {}; it must be 0 to {MAX_WORKERS}",
                    self.network.proxy_workers
                ),
            );
        }
        for (key, value, range) in [
            ("stop_timeout_secs", self.stop_timeout_secs, 0..=MAX_SECS),
            ("job_timeout_secs", self.job_timeout_secs, 1..=MAX_SECS),
            (
                "sandbox.idle_timeout_secs",
                self.sandbox.idle_timeout_secs,
                0..=MAX_SECS,
            ),
            ("log_max_mb", self.log_max_mb, 1..=1 << 20),
        ]
        .into_iter()
        .chain(self.gc.bounds())
        {
            if !range.contains(&value) {
                return refuse(
                    key.to_owned(),
                    format!(
                        "it is {value}; it must be {} to {}",
                        range.start(),
                        range.end()
                    ),
                );
            }
        }
        Ok(())
    }
}

/// What a limit on disk or network may be: less would stop a VM, more is no limit. The device's counters hold it in bytes.
const LIMITS: std::ops::RangeInclusive<u64> = 64..=1 << 32;
/// Most warmed VMs of one profile: the slots of a host.
const MAX_WARM: u32 = 4096;
/// A week: longer limits are mistakes in the unit.
const MAX_SECS: u64 = 7 * 24 * 3600;

impl ProfileConfig {
    /// The profile's size and image.
    pub(crate) fn shape(&self) -> Profile {
        Profile {
            vcpu: self.vcpu,
            memory_mb: self.memory_mb,
            disk_mb: self.disk_mb,
            flavour: self.flavour,
        }
    }

    /// Where its image lies, relative to the home.
    pub(crate) fn snapshot_dir(&self) -> std::path::PathBuf {
        crate::home::rel::snapshot(&self.rootfs_hash, &self.snapshot_hash)
    }
}

/// Reads and validates a configuration file.
pub(crate) fn load(path: &Path) -> Result<Config, crate::context::CliError> {
    use crate::context::CliError;
    use std::io::Read;

    let read = || -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        std::fs::File::open(path)?
            .take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| {
        CliError::failed(format_args!("cannot read {}: {error}", path.display())).with_hint(
            "write one with `runner config --name NAME --group ORG/GROUP --profile ORG/PROFILE`",
        )
    })?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(CliError::failed(format_args!(
            "{} is larger than {MAX_BYTES} bytes: it is no runner.yaml",
            path.display()
        )));
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| CliError::failed(format_args!("{} is not UTF-8 text", path.display())))?;
    Config::parse(&text)
        .map_err(|error| CliError::failed(format_args!("{}: {error}", path.display())))
}

/// Most bytes a configuration may have.
const MAX_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "\
name: demo
group: vm0/demo
profiles:
  vm0/small:
    rootfs_hash: 0123456789abcdef
    snapshot_hash: fedcba9876543210
    vcpu: 1
    memory_mb: 256
    disk_mb: 1024
    flavour: small
";

    fn refused(text: &str) -> String {
        Config::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_minimal_file_gets_the_documented_defaults_and_survives_a_round_trip() {
        let limits = "    limits: {disk_kib_s: 4096, network_kib_s: 1024}\n";
        let telemetry = "telemetry: {otlp_endpoint: \"http://127.0.0.1:4318\", headers_file: /h, sample_ratio: 0.5}\n";
        let limited = Config::parse(&format!("{MINIMAL}{limits}{telemetry}")).unwrap();
        let profile = limited.profiles.values().next().unwrap();
        assert_eq!(profile.limits.disk_kib_s, Some(4096));
        assert_eq!(profile.limits.disk_ops_s, None);
        let again = Config::parse(&Rendered(&limited).to_string()).unwrap();
        assert_eq!(again, limited);
        let config = Config::parse(MINIMAL).unwrap();
        assert_eq!(config.sandbox.max_concurrent, 0);
        assert_eq!(config.sandbox.concurrency_factor, 1.0);
        assert_eq!(config.job_timeout_secs, 7200);
        assert_eq!(config.log_max_mb, 256);
        assert_eq!(config.engine, EngineChoice::Auto);
        assert_eq!(
            Config::parse(&Rendered(&config).to_string()).unwrap(),
            config
        );
    }

    #[test]
    fn a_name_that_yaml_takes_for_something_else_survives_a_round_trip() {
        for name in ["null", "true", "123", "1e3", "0x1f", "no"] {
            let mut config = Config::parse(MINIMAL).unwrap();
            config.name = name.parse().unwrap();
            assert_eq!(
                Config::parse(&Rendered(&config).to_string()).unwrap(),
                config
            );
        }
    }

    #[test]
    fn unknown_keys_are_refused_by_name_at_every_level() {
        for (text, key) in [
            (format!("{MINIMAL}max_jobs: 3\n"), "max_jobs"),
            (format!("{MINIMAL}    cpus: 3\n"), "cpus"),
            (
                format!("{MINIMAL}    limits: {{disk_mb_s: 3}}\n"),
                "disk_mb_s",
            ),
            (
                format!("{MINIMAL}    limits: {{network_kib_s: 3}}\n"),
                "limits.network_kib_s",
            ),
            (
                format!("{MINIMAL}sandbox:\n  max_concurent: 3\n"),
                "max_concurent",
            ),
        ] {
            let error = refused(&text);
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn values_that_make_no_sense_are_refused_with_their_key() {
        for (from, to, key) in [
            ("vcpu: 1", "vcpu: 0", "profiles.vm0/small"),
            ("memory_mb: 256", "memory_mb: 1", "profiles.vm0/small"),
            (
                "flavour: small",
                "flavour: small\n    warm: {low: 3, high: 2}",
                "profiles.vm0/small.warm",
            ),
            (
                "name: demo",
                "name: demo\nsandbox: {concurrency_factor: .nan}",
                "sandbox.concurrency_factor",
            ),
            (
                "name: demo",
                "name: demo\nsandbox: {concurrency_factor: 0}",
                "sandbox.concurrency_factor",
            ),
            (
                "name: demo",
                "name: demo\njob_timeout_secs: 0",
                "job_timeout_secs",
            ),
            (
                "name: demo",
                "name: demo\ntelemetry: {sample_ratio: 1.5}",
                "telemetry.sample_ratio",
            ),
            (
                "name: demo",
                "name: demo\ntelemetry: {otlp_endpoint: \"ftp://a.example.com\"}",
                "must begin with http",
            ),
        ] {
            let error = refused(&MINIMAL.replace(from, to));
            assert!(error.contains(key), "{error}");
        }
        assert!(refused("name: demo\ngroup: vm0/demo\nprofiles: {}\n").contains("profiles"));
    }

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for (from, to) in [
            ("name: demo", "name: ../demo"),
            ("group: vm0/demo", "group: vm0/../demo"),
            ("rootfs_hash: 0123456789abcdef", "rootfs_hash: ../../etc/x"),
            ("vm0/small:", "vm0/..:"),
        ] {
            let error = refused(&MINIMAL.replace(from, to));
            assert!(error.contains("not valid"), "{error}");
        }
    }
}
