//! Runs the daemon.

mod collector;
mod handover;
pub(super) mod source;
mod sweep;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use host::fs::{Access, Lock, LockKind, lock_holder};
use host::launcher::{ForkedLauncher, Launcher, LauncherConfig};
use sandbox::{Engine, EngineKind, IoLimits, Template};
use tokio::sync::Semaphore;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::MakeWriterExt;

use self::handover::{Readiness, Side};
use self::source::Source;
use self::sweep::sweep;
use crate::audit::{Action, Audit, Outcome, Who};
use crate::config::{self, Config, EngineChoice};
use crate::context::{CliError, Context};
use crate::control::server;
use crate::daemon::{self, Identity, Inbox, Mailbox, Parts};
use crate::engine;
use crate::executor::Setting;
use crate::gc;
use crate::home::{Home, HomeError, rel};
use crate::image::{InUse, Store};
use crate::metrics::{self, Metrics};
use crate::names::{ProfileName, RunId, RunnerName};
use crate::network::{JobNetworks, NetworkSettings, REGISTRY_FILE};
use crate::provider::api::{ApiProvider, ApiRunner};
use crate::provider::local::LocalProvider;
use crate::provider::{Provider, ProviderEvent};
use crate::proxy::{Authority, ProxyConfig, install};
use crate::queue::LiveRunner;
use crate::resource_budget::{self, Budget, HostSize};
use crate::status::{STATUS_FILE, StatusWriter};
use crate::telemetry::{Settings, Telemetry};

/// A log larger than this is put aside (one is kept) when the daemon starts, bytes.
const LOG_ROTATE: u64 = 64 << 20;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Needs root, to make slots for VMs; everything in the home is then done as the home's owner.\n\
SIGTERM stops (jobs may finish within stop_timeout_secs, a second one cancels them), SIGUSR1 drains, SIGUSR2 resumes.\n\n\
Example:\n  sudo runner start --config ~/.vm0-runner/runners/demo/runner.yaml --local"
)]
pub(crate) struct Args {
    /// The runner's configuration, as `runner config` wrote it
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Take jobs from the local file queue
    #[arg(long, conflicts_with = "api_token_file")]
    local: bool,
    /// Take runs from the Web API at this address
    #[arg(long, value_name = "URL", env = "VM0_API_URL")]
    api_url: Option<String>,
    /// File with the runner token for the Web API, readable for its owner only; without it the token is taken from
    /// the variable VM0_API_TOKEN
    #[arg(long, value_name = "FILE")]
    api_token_file: Option<PathBuf>,
    /// Refuse profiles that were built for another engine, whatever the configuration says
    #[arg(long, value_enum)]
    engine: Option<EngineChoice>,
    /// Set a variable of the runner's own environment; USE_MOCK_CLAUDE=true makes jobs run the mock agent
    #[arg(long, value_name = "NAME=VALUE", value_parser = crate::cmd::parse::variable)]
    env: Vec<(String, String)>,
    /// How the daemon's own log is written
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
    /// Take over from the instance of this name that runs; returns when that is done. For `systemctl reload`
    #[arg(long, hide = true)]
    takeover: bool,
}

/// How a log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// A line of text.
    #[default]
    Text,
    /// A JSON object on each line.
    Json,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    if !rustix::process::geteuid().is_root() {
        let config = args.config.display();
        let hint = format!("sudo runner start --config {config} --local");
        return Err(
            CliError::failed("`runner start` needs root, to make slots for VMs").with_hint(hint),
        );
    }
    for (name, value) in &args.env {
        // SAFETY: the process has one thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
    let source = source::of(args.local, args.api_url, args.api_token_file.as_deref())?;
    // SAFETY: as above. What we start has no business with the runner's token.
    unsafe { std::env::remove_var(source::TOKEN) };
    let mut config = config::load(&args.config)?;
    if let Some(engine) = args.engine {
        config.engine = engine;
    }
    // SAFETY: as above.
    let traces = unsafe { collector::settle(&config.telemetry) }?;
    let home = Arc::new(context.home()?);
    let proxy = proxy_parts(&home, &config)?;
    let readiness = if args.takeover {
        match handover::split()? {
            Side::Command(code) => return Ok(code),
            Side::Instance(readiness) => Some(readiness),
        }
    } else {
        None
    };
    let instance = RunId::random().to_string();
    let launcher = LauncherConfig::from_env(instance.clone())?;
    let run_dir = launcher.run_dir.clone();
    // Before any thread, and before anything is open that the launcher should not hold.
    let forked = ForkedLauncher::fork(launcher)?;
    host::process::come_before_vms();
    // Still as root, who may have made the locks.
    let images = hold_images(&home, &config)?;
    home.become_owner()?;
    let name = match &readiness {
        None => Some(only_one(&home, &config.name)?),
        // It is somebody else's, most likely, until everything else is ready.
        Some(_) => name_if_free(&home, &config.name)?,
    };
    log_to_file(&home, &config.name, args.log_format)?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(async {
        let launcher = forked.attach()?;
        let starting = Starting {
            source,
            config,
            home,
            instance,
            launcher: launcher.clone(),
            run_dir,
            proxy,
            images,
            name,
            readiness,
            traces,
        };
        let result = starting.run().await;
        // Whatever is left of our VMs goes now.
        launcher.shutdown().await;
        result
    })?;
    // A task that hangs in the kernel must not keep a daemon that is done.
    runtime.shutdown_timeout(Duration::from_secs(2));
    Ok(ExitCode::from(code))
}

/// Two daemons of one name would answer for each other.
fn only_one(home: &Home, name: &RunnerName) -> Result<Lock, CliError> {
    if let Some(lock) = name_if_free(home, name)? {
        return Ok(lock);
    }
    let dir = home.ensure_dir(rel::runner(name))?;
    let file = dir.open_file(LOCK, Access::Read)?;
    let who = lock_holder(&file).map_or_else(String::new, |pid| format!(" (pid {pid})"));
    Err(
        CliError::failed(format!("a runner named {name} runs already{who}"))
            .with_hint("stop it first, or give this one another name"),
    )
}

fn name_if_free(home: &Home, name: &RunnerName) -> Result<Option<Lock>, CliError> {
    let dir = home.ensure_dir(rel::runner(name))?;
    Ok(dir.try_lock(LOCK, LockKind::Exclusive, 0o600)?)
}

/// Held by the one daemon of a runner that takes jobs.
const LOCK: &str = "runner.lock";

fn log_to_file(home: &Home, name: &RunnerName, format: LogFormat) -> Result<(), CliError> {
    home.logs()?;
    let path = rel::runner_log(name);
    if let Some(meta) = home.dir().metadata(&path)?
        && meta.len() > LOG_ROTATE
    {
        let old = path.with_extension("log.1");
        home.dir().rename(&path, home.dir(), old)?;
    }
    let file: File = home
        .dir()
        .open_file(&path, Access::Append { mode: 0o600 })?;
    let filter =
        EnvFilter::try_from_env("VM0_RUNNER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(io::stderr.and(Arc::new(file)));
    let _ = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// Memory that one process of the proxy takes, MiB: measured at 85 under load.
const PROXY_MB: u64 = 128;
/// Most networks that are kept ready for VMs to come.
const MOST_READY: usize = 16;

/// What only root may open: the proxy's key, and with it the rest of what it is started from.
fn proxy_parts(home: &Home, config: &Config) -> Result<ProxyConfig, CliError> {
    let missing = || {
        CliError::failed(
            "the proxy, which carries all traffic of jobs, is not installed here for this runner",
        )
        .with_hint("sudo runner setup")
    };
    let files = install::installed(home)?.ok_or_else(missing)?;
    Authority::load(home)?.ok_or_else(missing)?;
    let trusted = &config.network.ssl_verify_upstream_trusted_ca;
    if !trusted.as_os_str().is_empty() && !trusted.is_file() {
        return Err(CliError::failed(format_args!(
            "{}, which the proxy is to trust upstream, cannot be found",
            trusted.display()
        ))
        .with_hint("install ca-certificates, or set network.ssl_verify_upstream_trusted_ca"));
    }
    Ok(ProxyConfig {
        workers: config.network.workers(),
        files: files.as_fd().try_clone_to_owned()?,
        authority: Authority::for_proxy(home)?,
        trusted: (!trusted.as_os_str().is_empty()).then(|| trusted.clone()),
        resolver: host::net::RESOLVER_FOR_PROXY,
    })
}

/// What is there when the daemon starts.
struct Starting {
    source: Source,
    config: Config,
    home: Arc<Home>,
    instance: String,
    launcher: Launcher,
    run_dir: PathBuf,
    proxy: ProxyConfig,
    images: Vec<InUse>,
    /// `None` as long as another instance has it, which is to hand over.
    name: Option<Lock>,
    readiness: Option<Readiness>,
    /// Where traces of jobs go, if anywhere.
    traces: Option<Settings>,
}

impl Starting {
    async fn run(self) -> Result<u8, CliError> {
        let Self {
            source,
            config,
            home,
            instance,
            launcher,
            run_dir,
            proxy,
            images,
            name,
            readiness,
            traces,
        } = self;
        tracing::info!(
            runner = %config.name, group = %config.group, instance, pid = std::process::id(),
            version = crate::cli::VERSION, "starting"
        );
        let orphans = launcher.reclaim_orphans().await?;
        if orphans > 0 {
            tracing::warn!(orphans, "reclaimed slots that dead runners had left");
        }
        let instances = home.ensure_dir(rel::instances(&config.name))?;
        sweep(&instances, home.shown_instance(&config.name).as_deref());
        let instance_dir = instances.create_dir(instance.as_str(), 0o700)?;
        let _alive = instance_dir.lock("lock", LockKind::Exclusive, 0o600)?;

        home.logs()?;
        let home_dir = Arc::new(home.dir().try_clone()?);
        let log_max = config.log_max_mb.saturating_mul(1 << 20);
        let proxies = u64::from(proxy.workers).saturating_mul(PROXY_MB);
        let warm: u32 = config
            .profiles
            .values()
            .map(|profile| profile.warm.low)
            .sum();
        let policies = config.profiles.iter();
        let settings = NetworkSettings {
            api: source.api_access()?,
            internal_allow: config.network.internal_allow.clone(),
            profiles: policies
                .map(|(name, profile)| (name.clone(), profile.policy.clone()))
                .collect(),
            log_max,
            ready: usize::try_from(warm).unwrap_or(0).clamp(2, MOST_READY),
            proxy,
        };
        // The proxy comes up while images are verified.
        let (networks, pool) = JobNetworks::start(
            Arc::clone(&home_dir),
            launcher.clone(),
            settings,
            instance_dir.try_clone()?,
        )
        .await?;
        let (templates, kind) = open_profiles(&config, &home, &launcher).await?;
        let resident = templates.values().map(|t| t.resident_mb()).sum::<u64>();
        let resident = resident.saturating_add(proxies);
        let size = HostSize::detect(home.path())?;
        let sandbox = &config.sandbox;
        let limits = resource_budget::effective(
            size,
            sandbox.concurrency_factor,
            sandbox.memory_reserve_mb,
            resident,
        );
        tracing::info!(?size, total = ?limits.total, "the host's budget");
        let budget = Budget::new(
            launcher.clone(),
            instance.clone(),
            limits,
            resident,
            sandbox.max_concurrent,
            Some(pool),
        );
        networks.proxy().ready().await?;
        let metrics = Arc::new(Metrics::new(Some(networks.traffic()), crate::cli::VERSION));
        metrics.reclaimed(orphans);
        let (telemetry, flush) = match traces {
            None => (Telemetry::default(), None),
            Some(settings) => {
                let (telemetry, flush) = collector::start(&settings, &config, &instance, kind)?;
                metrics.telemetry(flush.counters());
                (telemetry, Some(flush))
            }
        };
        let listener = match config.metrics.listen {
            None => None,
            Some(address) => Some(metrics::bind(address).await.map_err(|error| {
                CliError::failed(format_args!("cannot listen on {address}: {error}"))
                    .with_hint("change metrics.listen in runner.yaml")
            })?),
        };
        let name = match name {
            Some(name) => name,
            None => {
                handover::retire_others(&home, &config.name, &instance).await?;
                only_one(&home, &config.name)?
            }
        };

        let (mailbox, inbox): (Mailbox, Inbox) = Mailbox::new();
        daemon::watch_signals(&mailbox)?;
        daemon::watch_host(&mailbox, launcher.clone(), run_dir);
        let runner = LiveRunner {
            instance: instance.clone(),
            name: config.name.clone(),
            pid: std::process::id(),
            profiles: config.profiles.keys().cloned().collect(),
        };
        let logs = Arc::clone(&home);
        let audit = Audit::new(
            move || logs.logs().map_err(HomeError::into_fs),
            config.name.clone(),
            instance.clone(),
        );
        let (told, noted) = (mailbox.clone(), audit.clone());
        let tell = move |event| {
            if let ProviderEvent::Marked { run, by } = event {
                noted.done(Who::of_uid(by), run, Action::Cancel, Outcome::ok());
            }
            daemon::forward(&told, event);
        };
        let (provider, api): (Arc<dyn Provider>, _) = match source {
            Source::Local => {
                let group = home.group(&config.group)?;
                (Arc::new(LocalProvider::start(group, &runner, tell)?), None)
            }
            Source::Api(settings) => {
                let runner = ApiRunner {
                    name: config.name.clone(),
                    instance: instance.clone(),
                    group: config.group.clone(),
                    profiles: templates
                        .iter()
                        .map(|(name, template)| {
                            let shape = template.shape();
                            let takes = resource_budget::of_vm(shape, template.overhead_mb());
                            (name.clone(), takes)
                        })
                        .collect(),
                    max_concurrent: sandbox.max_concurrent,
                    submitter: home.owner().uid,
                    networks: Some(Arc::clone(&networks)),
                };
                tracing::info!(?settings, "runs come from the Web API");
                let api = ApiProvider::start(settings, &home, runner, tell)
                    .map_err(|error| CliError::failed(error.to_string()))?;
                let api = Arc::new(api);
                (Arc::clone(&api) as Arc<_>, Some(api))
            }
        };
        // Restores are bound by the CPU: more at once only makes all of them late.
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let setting = Setting {
            home: home_dir,
            provider: Arc::clone(&provider),
            job_timeout: config.job_timeout(),
            log_max,
            mock: std::env::var("USE_MOCK_CLAUDE").ok(),
            networks: Some(networks),
            restores: Arc::new(Semaphore::new(cpus)),
        };
        let cleaned = Arc::clone(&metrics);
        let cleaning = tokio::spawn(gc::daemon::look_after(
            Arc::clone(&home),
            config.gc,
            launcher,
            images,
            move |report| cleaned.cleaned(report),
        ));
        let socket = instance_dir.bind_socket("control.sock", 0o600)?;
        let owner = home.owner().uid;
        let status_dir = instance_dir.try_clone()?;
        let link = home.ensure_dir(rel::runner(&config.name))?;
        let shown = instance.clone();
        let target = |file: &str| format!("instances/{instance}/{file}");
        let (status_target, registry_target) = (target(STATUS_FILE), target(REGISTRY_FILE));
        let parts = Parts {
            identity: Identity {
                name: config.name.clone(),
                instance: instance.clone(),
                version: crate::cli::VERSION.to_owned(),
                engine: kind,
            },
            config,
            templates,
            budget,
            provider,
            metrics: Arc::clone(&metrics),
            telemetry,
            setting,
            name: Some(name),
            mailbox,
            inbox,
        };
        tracing::info!("ready");
        if let Some(readiness) = readiness {
            readiness.tell();
        }
        let code = daemon::run(
            parts,
            |first| {
                let writer = StatusWriter::start(status_dir, first);
                for (target, file) in [
                    (status_target, STATUS_FILE),
                    (registry_target, REGISTRY_FILE),
                ] {
                    if let Err(error) = link.symlink_atomic(target, file) {
                        tracing::warn!(%error, "the link to {file} cannot be made");
                        return writer;
                    }
                }
                // The one that was shown until now goes, too.
                sweep(&instances, Some(OsStr::new(&shown)));
                writer
            },
            |lookup| {
                if let Some(api) = &api {
                    api.serve(Arc::clone(&lookup), audit.clone());
                }
                if let Some(listener) = listener {
                    let lookup = Arc::clone(&lookup);
                    let text = move || metrics.text(&lookup.snapshot()?).ok();
                    tokio::spawn(metrics::serve(listener, text));
                }
                tokio::spawn(async move {
                    if let Err(error) = server::serve(socket, owner, lookup, audit).await {
                        tracing::error!(%error, "the control socket is gone");
                    }
                });
            },
        )
        .await;
        cleaning.abort();
        if let Some(api) = api {
            api.finish().await;
        }
        if let Some(flush) = flush {
            flush.finish().await;
        }
        tracing::info!(code, "stopped");
        let _ = instance_dir.remove_file("control.sock");
        Ok(code)
    }
}

/// Keeps `gc` and builds from what the configuration names.
fn hold_images(home: &Arc<Home>, config: &Config) -> Result<Vec<InUse>, CliError> {
    let store = Store::open(Arc::clone(home))?;
    let held = config.profiles.iter().map(|(name, profile)| {
        let held = store.hold(&profile.rootfs_hash, &profile.snapshot_hash);
        held.map_err(|error| CliError::failed(format!("profile {name}: {error}")))
    });
    held.collect()
}

/// Verifies and opens the snapshot of every profile.
async fn open_profiles(
    config: &Config,
    home: &Arc<Home>,
    launcher: &Launcher,
) -> Result<(BTreeMap<ProfileName, Arc<dyn Template>>, EngineKind), CliError> {
    let store = Store::open(Arc::clone(home))?;
    let mut engines: Vec<(EngineKind, Arc<dyn Engine>)> = Vec::new();
    let mut templates = BTreeMap::new();
    for (name, profile) in &config.profiles {
        let spec = profile.shape().named(name);
        let stored = store
            .snapshot(&profile.rootfs_hash, &profile.snapshot_hash)
            .map_err(|error| {
                CliError::failed(format!("profile {name}: {error}"))
                    .with_hint(format!("sudo runner build --profile {spec}"))
            })?;
        let kind = stored.manifest.engine;
        if !engine::is_chosen(config.engine, kind) {
            let wanted = config.engine.name();
            return Err(CliError::failed(format!(
                "profile {name} was built for {}, and the engine is to be {wanted}",
                engine::describe(kind)
            ))
            .with_hint(format!(
                "sudo runner build --engine {wanted} --profile {spec}, and write the configuration anew; or use `engine: auto`"
            )));
        }
        let shape = sandbox::Shape {
            vcpu: profile.vcpu,
            memory_mb: profile.memory_mb,
            disk_mb: profile.disk_mb,
        };
        if shape != stored.shape {
            return Err(CliError::failed(format!(
                "profile {name}: its snapshot is of a VM of another size"
            ))
            .with_hint(format!(
                "build it with this size, or write the configuration anew: sudo runner build --profile {spec}"
            )));
        }
        let known = engines.iter().find(|(k, _)| *k == kind);
        let engine = match known {
            Some((_, engine)) => Arc::clone(engine),
            None => {
                let engine = engine::of_snapshot(kind, launcher.clone(), home)?;
                engines.push((kind, Arc::clone(&engine)));
                engine
            }
        };
        let template = engine
            .open(stored.image, shape, &stored.directory, &stored.outcome)
            .await
            .map_err(|error| CliError::failed(format!("profile {name}: {error}")))?;
        let limits = profile.limits;
        let template = if limits == IoLimits::default() {
            template
        } else {
            let limited = template.limited(limits);
            limited.map_err(|error| CliError::failed(format!("profile {name}: {error}")))?
        };
        tracing::info!(profile = %name, engine = ?kind, "opened");
        templates.insert(name.clone(), template);
    }
    let kind = engines.first().map(|(kind, _)| *kind);
    let kind = kind.ok_or_else(|| CliError::failed("the configuration names no profile"))?;
    if engines.iter().any(|(kind, _)| *kind == EngineKind::QemuTcg) {
        tracing::warn!("VMs are emulated in software on this host, 10 to 30 times slower");
    }
    Ok((templates, kind))
}
