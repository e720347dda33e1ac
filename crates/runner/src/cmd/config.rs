//! `runner config`: writes a runner's configuration, or checks one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use clap::ArgGroup;
use policy::InternalAllow;

use crate::config::{self, Config, EngineChoice, ProfileConfig, Rendered, WarmConfig};
use crate::context::{CliError, Context, note};
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
A file that is there is brought up to date: it gets the hashes and what the options say, and keeps all other values, \
such as policies and limits (comments are lost). Profiles that are not named are taken out of it. One that is not valid \
is refused.\n\n\
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
    /// Most jobs at once; 0: as many as the host carries [default: 0]
    #[arg(long, value_name = "N")]
    max_concurrent: Option<u32>,
    /// The host's resources are multiplied by this [default: 1.0]
    #[arg(long, value_name = "FACTOR")]
    concurrency_factor: Option<f64>,
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
    /// Which engine runs the VMs [default: auto]
    #[arg(long, value_enum)]
    engine: Option<EngineChoice>,
    /// How long a stopping runner lets jobs finish, seconds
    #[arg(long, value_name = "SECONDS")]
    stop_timeout_secs: Option<u64>,
    /// Longest time a job may run, seconds
    #[arg(long, value_name = "SECONDS")]
    job_timeout_secs: Option<u64>,
    /// Most a job's log may hold, MiB
    #[arg(long, value_name = "MIB")]
    log_max_mb: Option<u64>,
    /// Keep nothing of the file that is there
    #[arg(long)]
    fresh: bool,
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
    let file = rel::runner_yaml(name);
    let before = match args.fresh {
        true => None,
        false => existing(&home, &file)?,
    };
    let config = configure(&args, name, group, before.clone(), |spec, engine| {
        newest(&home, spec, engine)
    })?;
    home.become_owner()?;
    home.ensure_dir(rel::runner(name))?;
    let text = Rendered(&config).to_string();
    home.dir().write_atomic(&file, 0o600, text.as_bytes())?;
    if let Some(before) = &before {
        tell(&args, before, &home.at(&file));
    }
    context.print_line(home.at(file).display())?;
    Ok(ExitCode::SUCCESS)
}

/// The configuration that is there. What cannot be understood is nothing to overwrite: somebody has written it.
fn existing(home: &Home, file: &Path) -> Result<Option<Config>, CliError> {
    if home.dir().metadata(file)?.is_none() {
        return Ok(None);
    }
    let config = config::load(&home.at(file)).map_err(|error| {
        error.with_hint("correct it, or have it written anew, without what stands in it: --fresh")
    })?;
    Ok(Some(config))
}

/// Says what became of the file that was there.
fn tell(args: &Args, before: &Config, file: &Path) {
    note(format_args!(
        "updated {}: what no option named is as it was (--fresh writes it anew)",
        file.display()
    ));
    for (name, profile) in &before.profiles {
        match args.profile.iter().find(|spec| spec.name == *name) {
            None => note(format_args!("profile {name} is not in it any more")),
            Some(spec) if spec.profile != profile.shape() => note(format_args!(
                "profile {name} is now {}",
                spec.profile.keys()
            )),
            Some(_) => {}
        }
    }
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
    before: Option<Config>,
    newest: impl Fn(&ProfileSpec, EngineChoice) -> Result<(ImageHash, ImageHash), CliError>,
) -> Result<Config, CliError> {
    let mut config = before.unwrap_or_else(|| bare(name.clone(), group.clone()));
    config.name = name.clone();
    config.group = group.clone();
    set(&mut config.engine, args.engine);
    let mut profiles: BTreeMap<ProfileName, ProfileConfig> = BTreeMap::new();
    for (index, spec) in args.profile.iter().enumerate() {
        let given = args
            .rootfs_hash
            .get(index)
            .zip(args.snapshot_hash.get(index));
        let (rootfs_hash, snapshot_hash) = match given {
            Some((rootfs, snapshot)) => (rootfs.clone(), snapshot.clone()),
            None => newest(spec, config.engine)?,
        };
        let before = config.profiles.remove(&spec.name);
        let (mut warm, policy, limits) = before
            .map(|before| (before.warm, before.policy, before.limits))
            .unwrap_or_default();
        set(&mut warm, args.warm.map(|marks| marks.0));
        // The size is that of the build.
        let profile = spec.profile;
        let twice = profiles.insert(
            spec.name.clone(),
            ProfileConfig {
                rootfs_hash,
                snapshot_hash,
                vcpu: profile.vcpu,
                memory_mb: profile.memory_mb,
                disk_mb: profile.disk_mb,
                flavour: profile.flavour,
                warm,
                policy,
                limits,
            },
        );
        if twice.is_some() {
            return Err(CliError::usage(format_args!(
                "profile {} is named twice",
                spec.name
            )));
        }
    }
    config.profiles = profiles;
    let sandbox = &mut config.sandbox;
    set(&mut sandbox.max_concurrent, args.max_concurrent);
    set(&mut sandbox.concurrency_factor, args.concurrency_factor);
    set(&mut sandbox.memory_reserve_mb, args.memory_reserve_mb);
    set(&mut sandbox.idle_timeout_secs, args.idle_timeout_secs);
    set(&mut sandbox.idle_max, args.idle_max);
    if !args.internal_allow.is_empty() {
        config.network.internal_allow = InternalAllow::parse(&args.internal_allow)
            .map_err(|error| CliError::usage(format_args!("--internal-allow: {error}")))?;
    }
    set(&mut config.stop_timeout_secs, args.stop_timeout_secs);
    set(&mut config.job_timeout_secs, args.job_timeout_secs);
    set(&mut config.log_max_mb, args.log_max_mb);
    config.check()?;
    Ok(config)
}

/// Says nothing but who it is; it serves nothing yet.
fn bare(name: RunnerName, group: GroupName) -> Config {
    Config {
        name,
        group,
        profiles: BTreeMap::new(),
        sandbox: Default::default(),
        network: Default::default(),
        gc: Default::default(),
        metrics: Default::default(),
        telemetry: Default::default(),
        engine: Default::default(),
        stop_timeout_secs: config::STOP_TIMEOUT_SECS,
        job_timeout_secs: config::JOB_TIMEOUT_SECS,
        log_max_mb: config::LOG_MAX_MB,
    }
}

/// What an option gives, if it was given.
fn set<T>(value: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *value = given;
    }
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
        configure(&args, &name, &group, None, some_build).map_err(|error| error.to_string())
    }

    fn some_build(_: &ProfileSpec, _: EngineChoice) -> Result<(ImageHash, ImageHash), CliError> {
        Ok(("a".repeat(64).parse()?, "b".repeat(64).parse()?))
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

    /// A file in which somebody has changed whatever can be changed.
    const EDITED: &str = "\
name: a
group: vm0/old
profiles:
  vm0/small:
    rootfs_hash: 0123456789abcdef
    snapshot_hash: fedcba9876543210
    vcpu: 1
    memory_mb: 256
    disk_mb: 1024
    flavour: small
    warm: {low: 3, high: 4}
    policy: {default: deny, rules: [{host: git.example.com, path: /a}, {host: x.example.com, action: deny}]}
    limits: {disk_kib_s: 4096, network_kib_s: 1024}
  vm0/gone:
    rootfs_hash: 0123456789abcdef
    snapshot_hash: fedcba9876543210
    vcpu: 1
    memory_mb: 256
    disk_mb: 1024
    flavour: small
sandbox: {max_concurrent: 3, concurrency_factor: 0.5, memory_reserve_mb: 1, idle_timeout_secs: 2, idle_max: 5}
network: {internal_allow: [10.1.0.0/16, git.internal], proxy_workers: 2, ssl_verify_upstream_trusted_ca: /ca.pem}
gc: {interval_secs: 7, images_days: 8, images_max_mb: 9, logs_days: 10, logs_max_mb: 11, audit_days: 12}
metrics: {listen: '127.0.0.1:9464'}
telemetry: {otlp_endpoint: 'http://127.0.0.1:4318', headers_file: /h, sample_ratio: 0.5}
engine: qemu
stop_timeout_secs: 13
job_timeout_secs: 14
log_max_mb: 15
";

    #[test]
    fn what_no_option_names_stays_as_somebody_has_written_it() {
        let line = |options: &str| {
            let args = parse(&format!(
                "--name a --group vm0/new --profile vm0/small{options}"
            ))
            .unwrap();
            let before = Config::parse(EDITED).unwrap();
            let (name, group) = (args.name.clone().unwrap(), args.group.clone().unwrap());
            configure(&args, &name, &group, Some(before), |spec, engine| {
                assert_eq!(engine, args.engine.unwrap_or(EngineChoice::Qemu));
                some_build(spec, engine)
            })
            .unwrap()
        };
        let mut wanted = Config::parse(EDITED).unwrap();
        wanted.group = "vm0/new".parse().unwrap();
        wanted.profiles.remove(&"vm0/gone".parse().unwrap());
        let small = wanted.profiles.values_mut().next().unwrap();
        small.rootfs_hash = "a".repeat(64).parse().unwrap();
        small.snapshot_hash = "b".repeat(64).parse().unwrap();
        let kept = line("");
        assert_eq!(kept, wanted);
        // Also by way of the file that is written.
        assert_eq!(Config::parse(&Rendered(&kept).to_string()).unwrap(), wanted);
        let set = line(
            " --warm 0:1 --max-concurrent 0 --concurrency-factor 1 --internal-allow 10.2.0.0/16 --engine auto \
             --log-max-mb 16",
        );
        assert_eq!(set.profiles.values().next().unwrap().warm.high, 1);
        assert_eq!(set.sandbox.max_concurrent, 0);
        assert_eq!(
            (set.sandbox.concurrency_factor, set.sandbox.idle_max),
            (1.0, 5)
        );
        assert_eq!(set.network.proxy_workers, 2);
        assert_eq!(
            serde_json::json!(set.network.internal_allow),
            serde_json::json!(["10.2.0.0/16"])
        );
        assert_eq!((set.engine, set.log_max_mb), (EngineChoice::Auto, 16));
    }

    #[test]
    fn a_file_that_is_there_is_kept_or_refused_but_never_lost() {
        let temp = tempfile::tempdir().unwrap();
        let context = Context::new(Some(temp.path().join("home")));
        let file = temp.path().join("home/runners/a/runner.yaml");
        let line = format!("--name a --group vm0/g --profile vm0/small {HASHES}");
        let write = |more: &str| run(parse(&format!("{line}{more}")).unwrap(), &context);
        write("").unwrap();
        std::fs::write(&file, EDITED).unwrap();
        write(" --idle-max 6").unwrap();
        let config = config::load(&file).unwrap();
        assert_eq!((config.sandbox.idle_max, config.gc.audit_days), (6, 12));
        std::fs::write(&file, "name: a\n").unwrap();
        let error = write("").unwrap_err().to_string();
        assert!(error.contains("runner.yaml"), "{error}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "name: a\n");
        write(" --fresh").unwrap();
        assert_eq!(config::load(&file).unwrap(), configured(&line).unwrap());
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
