//! `runner config`: writes a runner's configuration, or checks one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::ArgGroup;
use policy::InternalAllow;
use sandbox::IoLimits;

use crate::config::{
    self, Config, EngineChoice, NetworkConfig, ProfileConfig, Rendered, SandboxConfig, WarmConfig,
};
use crate::context::{CliError, Context};
use crate::engine;
use crate::home::{Home, rel};
use crate::image;
use crate::names::{GroupName, ImageHash, ProfileName, RunnerName};
use crate::profile::ProfileSpec;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    group = ArgGroup::new("what").args(["name", "check"]).required(true),
    after_help = "Prints the path of the file it wrote. Hashes that are not given are those of the newest build of \
the profile.\n\n\
Examples:\n  \
    runner config --name demo --group vm0/demo --profile vm0/small\n  \
    runner config --name big --group vm0/demo --profile vm0/big:vcpu=8,memory_mb=16384,flavour=full --warm 0:4\n  \
    runner config --check ~/.vm0-runner/runners/demo/runner.yaml"
)]
pub(crate) struct Args {
    /// Check this file and write nothing
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
    /// The runner's name
    #[arg(long, requires_all = ["group", "profile"])]
    name: Option<RunnerName>,
    /// The group of jobs it takes
    #[arg(long, value_name = "ORG/NAME")]
    group: Option<GroupName>,
    /// A profile it serves, built in or with its size; may be repeated
    #[arg(long, value_name = "ORG/NAME[:KEY=VALUE,…]")]
    profile: Vec<ProfileSpec>,
    /// The image of the profile of the same place in the order; all or none
    #[arg(long, value_name = "HASH", requires = "snapshot_hash")]
    rootfs_hash: Vec<ImageHash>,
    /// The snapshot of the profile of the same place in the order; all or none
    #[arg(long, value_name = "HASH", requires = "rootfs_hash")]
    snapshot_hash: Vec<ImageHash>,
    /// Warm VMs kept ready for each profile: at least LOW, up to HIGH
    #[arg(long, value_name = "LOW:HIGH")]
    warm: Option<Marks>,
    /// Most jobs at once; 0: as many as the host carries
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_concurrent: u32,
    /// The host's resources are multiplied by this
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    concurrency_factor: f64,
    /// Memory kept from VMs, MiB [default: 512]
    #[arg(long, value_name = "MIB")]
    memory_reserve_mb: Option<u64>,
    /// How long the VM of a finished job waits for its session's next, seconds [default: 300]
    #[arg(long, value_name = "SECONDS")]
    idle_timeout_secs: Option<u64>,
    /// Most VMs that wait so [default: 4]
    #[arg(long, value_name = "N")]
    idle_max: Option<u32>,
    /// A private address, CIDR or host name that jobs may reach all the same; may be repeated
    #[arg(long, value_name = "CIDR|HOST")]
    internal_allow: Vec<String>,
    /// Which engine runs the VMs
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
    /// How long a stopping runner lets jobs finish, seconds
    #[arg(long, value_name = "SECONDS")]
    stop_timeout_secs: Option<u64>,
    /// Longest time a job may run, seconds
    #[arg(long, value_name = "SECONDS")]
    job_timeout_secs: Option<u64>,
    /// Most a job's log may hold, MiB
    #[arg(long, value_name = "MIB")]
    log_max_mb: Option<u64>,
}

/// `LOW:HIGH`.
#[derive(Clone, Copy, Debug)]
struct Marks(WarmConfig);

impl FromStr for Marks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let marks = || {
            let (low, high) = text.split_once(':')?;
            Some(WarmConfig {
                low: low.parse().ok()?,
                high: high.parse().ok()?,
            })
        };
        marks()
            .map(Self)
            .ok_or_else(|| "it is LOW:HIGH, such as 1:4".to_owned())
    }
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    if let Some(file) = &args.check {
        let config = config::load(file)?;
        check_builds(&config, context)?;
        context.print_line(format_args!("{} is fine", file.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let (Some(name), Some(group)) = (&args.name, &args.group) else {
        return Err(CliError::usage("--name and --group are missing"));
    };
    check_counts(&args)?;
    let home = context.home()?;
    let config = configure(&args, name, group, |spec| newest(&home, spec, args.engine))?;
    home.become_owner()?;
    home.ensure_dir(rel::runner(name))?;
    let file = rel::runner_yaml(name);
    let text = Rendered(&config).to_string();
    home.dir().write_atomic(&file, 0o600, text.as_bytes())?;
    context.print_line(home.at(file).display())?;
    Ok(ExitCode::SUCCESS)
}

/// What can be wrong with the command line as a whole, before anything is opened.
fn check_counts(args: &Args) -> Result<(), CliError> {
    let profiles = args.profile.len();
    for (option, count) in [
        ("--rootfs-hash", args.rootfs_hash.len()),
        ("--snapshot-hash", args.snapshot_hash.len()),
    ] {
        if count != 0 && count != profiles {
            return Err(CliError::usage(format_args!(
                "{profiles} × --profile and {count} × {option} do not fit together: give one for each profile, or none"
            )));
        }
    }
    Ok(())
}

fn newest(
    home: &Home,
    spec: &ProfileSpec,
    engine: EngineChoice,
) -> Result<(ImageHash, ImageHash), CliError> {
    image::newest_build(home, &spec.profile, engine)?.ok_or_else(|| engine::not_built(spec, engine))
}

fn configure(
    args: &Args,
    name: &RunnerName,
    group: &GroupName,
    newest: impl Fn(&ProfileSpec) -> Result<(ImageHash, ImageHash), CliError>,
) -> Result<Config, CliError> {
    let mut profiles: BTreeMap<ProfileName, ProfileConfig> = BTreeMap::new();
    for (index, spec) in args.profile.iter().enumerate() {
        let given = args
            .rootfs_hash
            .get(index)
            .zip(args.snapshot_hash.get(index));
        let (rootfs_hash, snapshot_hash) = match given {
            Some((rootfs, snapshot)) => (rootfs.clone(), snapshot.clone()),
            None => newest(spec)?,
        };
        let profile = spec.profile;
        let before = profiles.insert(
            spec.name.clone(),
            ProfileConfig {
                rootfs_hash,
                snapshot_hash,
                vcpu: profile.vcpu,
                memory_mb: profile.memory_mb,
                disk_mb: profile.disk_mb,
                flavour: profile.flavour,
                warm: args.warm.map(|marks| marks.0).unwrap_or_default(),
                policy: policy::Draft::default(),
                limits: IoLimits::default(),
            },
        );
        if before.is_some() {
            return Err(CliError::usage(format_args!(
                "profile {} is named twice",
                spec.name
            )));
        }
    }
    let defaults = SandboxConfig::default();
    let config = Config {
        name: name.clone(),
        group: group.clone(),
        profiles,
        sandbox: SandboxConfig {
            max_concurrent: args.max_concurrent,
            concurrency_factor: args.concurrency_factor,
            memory_reserve_mb: args.memory_reserve_mb.unwrap_or(defaults.memory_reserve_mb),
            idle_timeout_secs: args.idle_timeout_secs.unwrap_or(defaults.idle_timeout_secs),
            idle_max: args.idle_max.unwrap_or(defaults.idle_max),
        },
        network: NetworkConfig {
            internal_allow: InternalAllow::parse(&args.internal_allow)
                .map_err(|error| CliError::usage(format_args!("--internal-allow: {error}")))?,
            ..NetworkConfig::default()
        },
        gc: Default::default(),
        metrics: Default::default(),
        telemetry: Default::default(),
        engine: args.engine,
        stop_timeout_secs: args.stop_timeout_secs.unwrap_or(config::STOP_TIMEOUT_SECS),
        job_timeout_secs: args.job_timeout_secs.unwrap_or(config::JOB_TIMEOUT_SECS),
        log_max_mb: args.log_max_mb.unwrap_or(config::LOG_MAX_MB),
    };
    config.check()?;
    Ok(config)
}

/// Whether the builds that a configuration names are in the home.
fn check_builds(config: &Config, context: &Context) -> Result<(), CliError> {
    let home = context.home()?;
    for (name, profile) in &config.profiles {
        let manifest = profile.snapshot_dir().join("manifest.json");
        if home.dir().metadata(&manifest)?.is_none() {
            return Err(CliError::failed(format_args!(
                "profile {name}: {} is not there",
                home.at(manifest).display()
            ))
            .with_hint(format_args!(
                "build it with `sudo runner build --profile {}` and configure the hashes that it prints",
                profile.shape().named(name)
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, String> {
        let line = Line::try_parse_from(format!("config {line}").split(' '));
        line.map(|line| line.args)
            .map_err(|error| error.to_string())
    }

    fn configured(line: &str) -> Result<Config, String> {
        let args = parse(line)?;
        check_counts(&args).map_err(|error| error.to_string())?;
        let (name, group) = (args.name.clone().unwrap(), args.group.clone().unwrap());
        configure(&args, &name, &group, |_| {
            Ok(("a".repeat(64).parse()?, "b".repeat(64).parse()?))
        })
        .map_err(|error| error.to_string())
    }

    const HASHES: &str = "--rootfs-hash 0123456789abcdef --snapshot-hash fedcba9876543210";

    #[test]
    fn what_is_written_is_what_is_read() {
        for line in [
            "--name a --group vm0/g --profile vm0/small".to_owned(),
            format!("--name a --group vm0/g --profile vm0/small {HASHES} --warm 0:8"),
            "--name a --group vm0/g --profile vm0/small --profile vm0/big:vcpu=8,memory_mb=16384,flavour=full \
             --engine qemu --concurrency-factor 0.75 --max-concurrent 3 --log-max-mb 1"
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" "),
        ] {
            let config = configured(&line).unwrap();
            let text = Rendered(&config).to_string();
            assert_eq!(Config::parse(&text).unwrap(), config, "{text}");
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for (line, word) in [
            ("--name a --group vm0/g", "--profile"),
            ("--group vm0/g --profile vm0/small", "--name"),
            (
                "--name a --group vm0/g --profile vm0/small --profile vm0/small",
                "twice",
            ),
            ("--name a --group vm0/g --profile vm0/other", "vcpu"),
            ("--name a --group vm0/g --profile vm0/small:vcpu=0", "vcpu"),
            (
                "--name a --group vm0/g --profile vm0/small --warm 3:2",
                "warm",
            ),
            (
                "--name a --group vm0/g --profile vm0/small --concurrency-factor inf",
                "concurrency_factor",
            ),
            (
                "--name a --group vm0/g --profile vm0/small --rootfs-hash 0123456789abcdef",
                "--snapshot-hash",
            ),
            (
                "--name ../a --group vm0/g --profile vm0/small",
                "runner name",
            ),
            (
                "--name a --group vm0/g --profile vm0/small --profile vm0/default --rootfs-hash 0123456789abcdef \
                 --snapshot-hash 0123456789abcdef",
                "do not fit together",
            ),
        ] {
            let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
            let error = configured(&line).unwrap_err();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
