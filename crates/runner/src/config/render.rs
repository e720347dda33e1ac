//! `runner.yaml` as `runner config` writes it: every key, with what it means.

use std::fmt::{self, Display};

use super::{Config, ProfileConfig};

/// The text of a configuration. Parsing it gives the same configuration again.
pub(crate) struct Rendered<'a>(pub(crate) &'a Config);

impl Display for Rendered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = self.0;
        writeln!(
            f,
            "# Configuration of one runner. Every key is checked when the runner starts; an unknown one is refused.\n\
             # Check a change with: runner config --check FILE\n\n\
             # The runner's name: its directory below runners/ and its log.\n\
             name: \"{}\"\n\n\
             # The group of jobs it takes: groups/<group>/ in the home.\n\
             group: {}\n\n\
             # What it serves. Several profiles may stand here.\n\
             profiles:",
            config.name, config.group
        )?;
        for (index, (name, profile)) in config.profiles.iter().enumerate() {
            profile_lines(f, name.as_str(), profile, index == 0)?;
        }
        let sandbox = &config.sandbox;
        writeln!(
            f,
            "\n# How VMs share the host.\n\
             sandbox:\n\
             \x20 # Most jobs at once; 0: as many as CPUs, memory and disk carry.\n\
             \x20 max_concurrent: {}\n\
             \x20 # The host's CPUs, memory and disk times this are given to VMs; above 1 overcommits.\n\
             \x20 concurrency_factor: {:?}\n\
             \x20 # Memory kept from VMs, MiB.\n\
             \x20 memory_reserve_mb: {}\n\
             \x20 # How long the VM of a finished job waits for its session's next job, seconds; 0: not at all.\n\
             \x20 idle_timeout_secs: {}\n\
             \x20 # Most VMs that wait so.\n\
             \x20 idle_max: {}\n\n\
             # What jobs reach, and through what.\n\
             network:\n\
             \x20 # Private addresses that jobs may reach all the same: CIDRs and host names, such as [10.1.0.0/16, git.internal].\n\
             \x20 internal_allow: {}\n\
             \x20 # Processes of the proxy; 0: one for every 16 CPUs.\n\
             \x20 proxy_workers: {}\n\
             \x20 # Certificate authorities that the proxy trusts upstream; empty: mitmproxy's own list.\n\
             \x20 ssl_verify_upstream_trusted_ca: {}\n\n\
             # What the runner removes by itself.\n\
             gc:\n\
             \x20 # Seconds between two looks; 0: never.\n\
             \x20 interval_secs: {}\n\
             \x20 # Days after which an image that no runner.yaml names and nobody has used goes, and what all may take, MiB; 0: no limit.\n\
             \x20 images_days: {}\n\
             \x20 images_max_mb: {}\n\
             \x20 # The same for logs.\n\
             \x20 logs_days: {}\n\
             \x20 logs_max_mb: {}\n\
             \x20 # Days that the audit log reaches back.\n\
             \x20 audit_days: {}\n\n\
             # Figures for Prometheus, such as 127.0.0.1:9464; null: none. Whoever reaches the address may read them.\n\
             metrics:\n\
             \x20 listen: {}\n\n\
             # Traces of jobs for an OpenTelemetry collector, such as http://127.0.0.1:4318; null: none.\n\
             telemetry:\n\
             \x20 otlp_endpoint: {}\n\
             \x20 # File of root's, mode 0600, with headers for it, a `Name: value` a line; null: none.\n\
             \x20 headers_file: {}\n\
             \x20 # Which part of the jobs is traced, 0 to 1, where the submitter's trace does not decide.\n\
             \x20 sample_ratio: {:?}\n\n\
             # auto (the fastest that is proved to work on this host), qemu or firecracker.\n\
             engine: {}\n\n\
             # How long a stopping runner lets jobs finish before it cancels them, seconds.\n\
             stop_timeout_secs: {}\n\n\
             # Longest time a job may run, seconds. A job may ask for less.\n\
             job_timeout_secs: {}\n\n\
             # Most a job's log may hold, MiB; a cut is marked in the log.\n\
             log_max_mb: {}",
            sandbox.max_concurrent,
            sandbox.concurrency_factor,
            sandbox.memory_reserve_mb,
            sandbox.idle_timeout_secs,
            sandbox.idle_max,
            json(&config.network.internal_allow),
            config.network.proxy_workers,
            json(&config.network.ssl_verify_upstream_trusted_ca),
            config.gc.interval_secs,
            config.gc.images_days,
            config.gc.images_max_mb,
            config.gc.logs_days,
            config.gc.logs_max_mb,
            config.gc.audit_days,
            json(&config.metrics.listen),
            json(&config.telemetry.otlp_endpoint),
            json(&config.telemetry.headers_file),
            config.telemetry.sample_ratio,
            config.engine.name(),
            config.stop_timeout_secs,
            config.job_timeout_secs,
            config.log_max_mb,
        )
    }
}

fn profile_lines(
    f: &mut fmt::Formatter<'_>,
    name: &str,
    profile: &ProfileConfig,
    explain: bool,
) -> fmt::Result {
    let why = |text: &'static str| if explain { text } else { "" };
    writeln!(
        f,
        "  {name}:\n\
         {}    rootfs_hash: \"{}\"\n    snapshot_hash: \"{}\"\n\
         {}    vcpu: {}\n    memory_mb: {}\n    disk_mb: {}\n\
         {}    flavour: {}\n\
         {}    warm: {{low: {}, high: {}}}\n\
         {}    policy: {}\n\
         {}    limits: {}",
        why("    # The build, as `runner build` printed it.\n"),
        profile.rootfs_hash,
        profile.snapshot_hash,
        why("    # Size of its VMs; memory and writable disk in MiB.\n"),
        profile.vcpu,
        profile.memory_mb,
        profile.disk_mb,
        why("    # full or small: what the image holds.\n"),
        profile.flavour.name(),
        why("    # VMs kept ready: below `low` new ones are made, up to `high`.\n"),
        profile.warm.low,
        profile.warm.high,
        why(
            "    # What its jobs may reach unless they say otherwise (docs/network.md); what it denies holds in any case.\n"
        ),
        json(&profile.policy),
        why(
            "    # What each VM may read and write (disk_kib_s, disk_ops_s), send and receive (network_kib_s) a second; {}: no limit.\n    # With Firecracker only.\n"
        ),
        json(&profile.limits),
    )
}

/// A value as JSON, which is YAML too.
fn json(value: &impl serde::Serialize) -> String {
    // Strings, numbers and lists: writing them into memory cannot fail.
    serde_json::to_string(value).unwrap_or_default()
}
