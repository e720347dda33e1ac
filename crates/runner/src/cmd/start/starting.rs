//! The daemon is put together, piece by piece, and run.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;

use host::fs::{Dir, Lock, LockKind};
use host::launcher::Launcher;
use host::net::NetworkPool;
use sandbox::Template;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::collector;
use super::handover::{self, Readiness};
use super::profiles::open_profiles;
use super::source::Source;
use super::sweep::sweep;
use crate::audit::{Action, Audit, Outcome, Who};
use crate::config::Config;
use crate::context::CliError;
use crate::control::{SOCKET, server};
use crate::daemon::{self, Identity, Inbox, Mailbox, Parts};
use crate::executor::Setting;
use crate::gc;
use crate::home::{Home, HomeError, rel};
use crate::host_size::HostSize;
use crate::image::InUse;
use crate::metrics::{self, Metrics};
use crate::names::ProfileName;
use crate::network::{JobNetworks, NetworkSettings, REGISTRY_FILE};
use crate::provider::api::{ApiProvider, ApiRunner};
use crate::provider::local::LocalProvider;
use crate::provider::{Provider, ProviderEvent};
use crate::proxy::ProxyConfig;
use crate::queue::LiveRunner;
use crate::resource_budget::{self, Budget};
use crate::status::{STATUS_FILE, StatusWriter};
use crate::telemetry::{Settings, Telemetry};

/// Memory that one process of the proxy takes, MiB: measured at 85 under load.
const PROXY_MB: u64 = 128;
/// Most networks that are kept ready for VMs to come.
const MOST_READY: usize = 16;

/// What is there when the daemon starts.
pub(super) struct Starting {
    pub(super) source: Source,
    pub(super) config: Config,
    pub(super) home: Arc<Home>,
    pub(super) instance: String,
    pub(super) launcher: Launcher,
    pub(super) run_dir: PathBuf,
    pub(super) proxy: ProxyConfig,
    pub(super) images: Vec<InUse>,
    /// `None` as long as another instance has it, which is to hand over.
    pub(super) name: Option<Lock>,
    pub(super) readiness: Option<Readiness>,
    /// Where traces of jobs go, if anywhere.
    pub(super) traces: Option<Settings>,
}

impl Starting {
    pub(super) async fn run(self) -> Result<u8, CliError> {
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
        let proxies = u64::from(proxy.workers).saturating_mul(PROXY_MB);
        let settings = network_settings(&config, &source, proxy)?;
        // The proxy comes up while images are verified.
        let (networks, pool) = JobNetworks::start(
            Arc::clone(&home_dir),
            launcher.clone(),
            settings,
            instance_dir.try_clone()?,
        )
        .await?;
        let (templates, kind) = open_profiles(&config, &home, &launcher).await?;
        let budget = budget(
            &config, &home, &launcher, &instance, &templates, proxies, pool,
        )?;
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
        let listener = metrics_listener(&config).await?;
        let socket = instance_dir.bind_socket(SOCKET, 0o600)?;
        // Also where something fails before the daemon runs.
        let _named = SocketName(instance_dir.try_clone()?);
        let status_dir = instance_dir.try_clone()?;
        let link = home.ensure_dir(rel::runner(&config.name))?;

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
        let (provider, api) = match source {
            Source::Local => {
                let group = home.group(&config.group)?;
                let provider = LocalProvider::start(group, &runner, tell)?;
                (Arc::new(provider) as Arc<dyn Provider>, None)
            }
            Source::Api(settings) => {
                let runner = api_runner(&config, &templates, instance.clone(), &home, &networks);
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
            log_max: config.log_max(),
            mock: std::env::var("USE_MOCK_CLAUDE").ok(),
            networks: Some(networks),
            // One more than the pool takes: a job need not wait until a warm VM has run its warm-up jobs.
            restores: Arc::new(Semaphore::new(cpus.saturating_add(1))),
        };
        // Last, when nothing else can fail: who has retired takes no jobs any more whatever becomes of us, and its jobs would
        // end with us, whom systemd takes for the service from then on. It sends its signals to us, too, and they are heard.
        // That both look for jobs for a moment does no harm: a claim is a link that one of them makes, and the claims of an
        // instance that lives are left alone. From the API nothing is asked for before the daemon runs.
        launcher.usage().await?;
        let name = match name {
            Some(name) => name,
            None => match handover::take_over(&home, &config.name, &instance).await {
                Ok(name) => name,
                Err(error) => {
                    // The API knows us since the provider was started.
                    if let Some(api) = api {
                        api.finish().await;
                    }
                    return Err(error);
                }
            },
        };
        let cleaned = Arc::clone(&metrics);
        let cleaning = tokio::spawn(gc::daemon::look_after(
            Arc::clone(&home),
            config.gc,
            launcher,
            images,
            move |report| cleaned.cleaned(report),
        ));
        let owner = home.owner().uid;
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
        Ok(code)
    }
}

/// The name of the control socket in an instance's directory, which goes with this.
struct SocketName(Dir);

impl Drop for SocketName {
    fn drop(&mut self) {
        let _ = self.0.remove_file(SOCKET);
    }
}

/// What jobs' networks need, but for what each job says itself.
fn network_settings(
    config: &Config,
    source: &Source,
    proxy: ProxyConfig,
) -> Result<NetworkSettings, CliError> {
    let profiles = config.profiles.iter();
    let warm: u32 = config.profiles.values().map(|p| p.warm.low).sum();
    Ok(NetworkSettings {
        api: source.api_access()?,
        internal_allow: config.network.internal_allow.clone(),
        profiles: profiles
            .map(|(name, profile)| (name.clone(), profile.policy.clone()))
            .collect(),
        log_max: config.log_max(),
        ready: usize::try_from(warm).unwrap_or(0).clamp(2, MOST_READY),
        proxy,
    })
}

/// The host's budget, less what this runner itself keeps in memory.
fn budget(
    config: &Config,
    home: &Home,
    launcher: &Launcher,
    instance: &str,
    templates: &BTreeMap<ProfileName, Arc<dyn Template>>,
    proxies_mb: u64,
    pool: NetworkPool,
) -> Result<Budget, CliError> {
    let resident = templates.values().map(|t| t.resident_mb()).sum::<u64>();
    let resident = resident.saturating_add(proxies_mb);
    let size = HostSize::detect(home.path())?;
    let sandbox = &config.sandbox;
    let limits = resource_budget::effective(
        size,
        sandbox.concurrency_factor,
        sandbox.memory_reserve_mb,
        resident,
    );
    tracing::info!(?size, total = ?limits.total, "the host's budget");
    Ok(Budget::new(
        launcher.clone(),
        instance.to_owned(),
        limits,
        resident,
        sandbox.max_concurrent,
        Some(pool),
    ))
}

/// Where figures are served, if anywhere.
async fn metrics_listener(config: &Config) -> Result<Option<TcpListener>, CliError> {
    let Some(address) = config.metrics.listen else {
        return Ok(None);
    };
    let listener = metrics::bind(address).await.map_err(|error| {
        CliError::failed(format_args!("cannot listen on {address}: {error}"))
            .with_hint("change metrics.listen in runner.yaml")
    })?;
    Ok(Some(listener))
}

/// Who we are to the Web API.
fn api_runner(
    config: &Config,
    templates: &BTreeMap<ProfileName, Arc<dyn Template>>,
    instance: String,
    home: &Home,
    networks: &Arc<JobNetworks>,
) -> ApiRunner {
    ApiRunner {
        name: config.name.clone(),
        instance,
        group: config.group.clone(),
        profiles: resource_budget::of_profiles(templates).collect(),
        max_concurrent: config.sandbox.max_concurrent,
        submitter: home.owner().uid,
        networks: Some(Arc::clone(networks)),
    }
}
