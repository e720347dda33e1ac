//! The network of this runner's jobs: hub, proxy, resolver and what the kernel tells, put together.
//!
//! ```text
//! admit: take secrets ─▶ policy ─▶ log ─▶ registration ─▶ ports of addresses opened ─▶ every proxy worker knows ─▶ run
//! end:   proxy closes the run's connections, lines sent ─▶ opened ports cut ─▶ kernel's events heard ─▶ log closed
//! ```
//!
//! An address that is not registered reaches nothing: the proxy closes its connections, the resolver refuses its queries,
//! the kernel refuses the rest. So a VM that waits, or whose job is over, has no network.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use host::fs::{Dir, FsError};
use host::launcher::{Launcher, LauncherError};
use host::net::{Cidr, HubConfig, NetworkId, NetworkLimits, NetworkPool};
use policy::{ApiAccess, Draft, InternalAllow, MergeError, Policy, Secret, ranges};
use resolver::{HostFiles, Limits, Resolver};
use tokio::net::{TcpListener, UdpSocket};

use super::directory::RunDirectory;
use super::kernel::KernelEvents;
use super::log::NetworkLog;
use super::mirror;
use super::registrations::{Registration, Registrations};
use super::sources::Sources;
use crate::metrics::Counters;
use crate::names::{ProfileName, RunId};
use crate::proxy::{Proxy, ProxyConfig, ProxyError};
use crate::queue::{ApiSide, Job, SecretsError, handover_name, receive};
use crate::sync::lock;

/// How long a destination named by address stays open: longer than any job.
const FOR_THE_JOB: Duration = Duration::from_secs(30 * 24 * 3600);

/// The policies of one run, changed by one at a time.
type SharedSources = tokio::sync::Mutex<Sources>;

/// Why a job gets no network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// Its secrets.
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    /// Its policy and the profile's do not go together.
    #[error("the job's policy cannot be used: {0}")]
    Policy(#[from] MergeError),
    /// Its policy names a secret that it does not have.
    #[error("the job's policy names the secret {0}, which the job does not have")]
    NoSecret(String),
    /// Its log.
    #[error("the job's network log cannot be made: {0}")]
    Log(#[from] FsError),
    /// The launcher.
    #[error(transparent)]
    Launcher(#[from] LauncherError),
    /// The proxy.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// Sockets of the hub.
    #[error("the hub's sockets cannot be used: {0}")]
    Sockets(#[from] std::io::Error),
    /// There is no such run.
    #[error("the run has no network now")]
    NoRun,
}

/// What the network is made with.
#[derive(Debug)]
pub(crate) struct NetworkSettings {
    /// The API whose webhooks every job may reach, where jobs come from one.
    pub(crate) api: Option<ApiAccess>,
    /// The operator's exceptions from the refused ranges.
    pub(crate) internal_allow: InternalAllow,
    /// What each profile's jobs may reach, unless they say otherwise.
    pub(crate) profiles: BTreeMap<ProfileName, Draft>,
    /// Most bytes of a job's network log.
    pub(crate) log_max: u64,
    /// Networks kept ready.
    pub(crate) ready: usize,
    /// The proxy.
    pub(crate) proxy: ProxyConfig,
}

/// The network of a runner's jobs.
#[derive(Debug)]
pub(crate) struct JobNetworks {
    home: Arc<Dir>,
    settings: NetworkSettings,
    launcher: Launcher,
    registrations: Arc<Registrations>,
    proxy: Proxy,
    kernel: KernelEvents,
    sources: Mutex<HashMap<RunId, Arc<SharedSources>>>,
}

impl JobNetworks {
    /// Makes the hub and starts everything in it; `directory` gets the registry for people.
    pub(crate) async fn start(
        home: Arc<Dir>,
        launcher: Launcher,
        settings: NetworkSettings,
        directory: Dir,
    ) -> Result<(Arc<Self>, NetworkPool), NetworkError> {
        let config = HubConfig {
            networks: host::net::MAX_NETWORKS,
            workers: Proxy::ports(settings.proxy.workers),
            refused: cidrs(ranges::REFUSED.iter().map(|(net, _)| net)),
            internal: cidrs(settings.internal_allow.nets().iter()),
            limits: NetworkLimits::default(),
        };
        let hub = launcher.make_hub(config.clone()).await?;
        let registrations = Arc::new(Registrations::new(settings.api.clone()));
        let kernel = KernelEvents::start(hub.refusals, hub.flows, Arc::clone(&registrations))?;
        let names = kernel.names();
        let run_directory = RunDirectory {
            launcher: launcher.clone(),
            registrations: Arc::clone(&registrations),
            names,
            api: settings.api.clone(),
            internal_allow: settings.internal_allow.clone(),
        };
        let mut internal_allow = settings.internal_allow.clone();
        if let Some(api) = &settings.api {
            // Also on a private address; what that opens is its port alone (`RunDirectory`).
            internal_allow = internal_allow.and_host(api.host().clone());
        }
        let resolver = Resolver::new(
            resolver::Config {
                files: HostFiles::new("/etc/resolv.conf".into(), "/etc/hosts".into()),
                internal_allow,
                limits: Limits::default(),
            },
            Arc::new(run_directory),
        );
        let udp = UdpSocket::from_std(hub.dns_udp.into())?;
        let tcp = TcpListener::from_std(hub.dns_tcp.into())?;
        tokio::spawn(async move {
            let error = resolver.serve(udp, tcp).await;
            tracing::error!(%error, "the resolver cannot go on: names are not resolved any more");
        });
        let proxy = Proxy::start(&settings.proxy, &launcher, &registrations)?;
        let ports = config.workers.clone();
        let mirrored = Arc::clone(&registrations);
        tokio::spawn(mirror::write_all(directory, mirrored, move |address| {
            let network = NetworkId::of_slot_address(address)?;
            ports.get(config.worker_of(network)?).copied()
        }));
        let pool = NetworkPool::new(launcher.clone(), settings.ready);
        tracing::info!(link = hub.number.link(), "the hub is made");
        let networks = Self {
            home,
            settings,
            launcher,
            registrations,
            proxy,
            kernel,
            sources: Mutex::default(),
        };
        Ok((Arc::new(networks), pool))
    }

    /// The proxy, to ask how it is.
    pub(crate) fn proxy(&self) -> &Proxy {
        &self.proxy
    }

    /// Lets a job use its VM's network from now on.
    pub(crate) async fn admit(
        self: &Arc<Self>,
        job: &Job,
        submitter: u32,
        api: Option<&ApiSide>,
        network: NetworkId,
    ) -> Result<Admission, NetworkError> {
        let secrets = self.secrets(job, submitter).await?;
        let wanted = job.network.as_ref().map(|network| network.policy.clone());
        let sources = Sources {
            profile: self.settings.profiles.get(&job.profile).cloned(),
            group: api.map(|api| api.group_policy.clone()),
            wanted: wanted.unwrap_or_default(),
            first: Vec::new(),
        };
        let policy = sources.policy()?;
        check_secrets(&policy, &secrets)?;
        let log = NetworkLog::create(&self.home, job.run_id, self.settings.log_max)?;
        let registration = self
            .registrations
            .add(
                network.slot_address(),
                job.run_id,
                Arc::new(policy),
                secrets.into(),
                log,
            )
            .map_err(MergeError::from)?;
        let admission = Admission {
            networks: Arc::clone(self),
            network,
            registration,
            ended: false,
        };
        let sources = Arc::new(SharedSources::new(sources));
        lock(&self.sources).insert(job.run_id, sources);
        // From here on a failure, or a caller that is cancelled, ends the registration again.
        self.admit_api().await?;
        self.open_addresses(&admission.registration, network)
            .await?;
        self.proxy.register(&admission.registration).await?;
        Ok(admission)
    }

    async fn secrets(&self, job: &Job, submitter: u32) -> Result<Vec<Secret>, NetworkError> {
        let Some(network) = job.network.as_ref().filter(|n| !n.secrets.is_empty()) else {
            return Ok(Vec::new());
        };
        let file = self
            .launcher
            .take_handover(&handover_name(job.run_id), submitter)
            .await?;
        Ok(receive(file, &network.secrets)?)
    }

    /// An API that is named by address: no query will announce it.
    async fn admit_api(&self) -> Result<(), NetworkError> {
        if let Some(api) = &self.settings.api
            && let policy::Host::Address(address) = *api.host()
        {
            let at = vec![SocketAddrV4::new(address, api.port())];
            self.launcher.admit_api(at, FOR_THE_JOB).await?;
        }
        Ok(())
    }

    /// Destinations that the policy names by address: no query will announce them.
    async fn open_addresses(
        &self,
        registration: &Registration,
        network: NetworkId,
    ) -> Result<(), NetworkError> {
        let internal = &self.settings.internal_allow;
        let usable = |address: &Ipv4Addr| {
            !matches!(
                internal.judge((*address).into(), None),
                ranges::Reach::Refused(_)
            )
        };
        let addresses = registration.decides.open_addresses();
        let destinations: Vec<SocketAddrV4> = addresses
            .into_iter()
            .filter(|(address, _)| usable(address))
            .map(|(address, port)| SocketAddrV4::new(address, port))
            .collect();
        if destinations.is_empty() {
            return Ok(());
        }
        if !self
            .registrations
            .opens(registration.address, registration.generation)
        {
            return Err(NetworkError::NoRun);
        }
        Ok(self
            .launcher
            .open_destinations(network, destinations, FOR_THE_JOB)
            .await?)
    }

    /// Counters of what jobs do.
    pub(crate) fn traffic(&self) -> Counters {
        self.registrations.traffic()
    }

    /// Takes the values of a run's secrets out of a text.
    pub(crate) fn blot(&self, run: RunId, text: String) -> String {
        let Some(found) = self.registrations.of_run(run) else {
            return text;
        };
        found.secrets.iter().fold(text, |text, secret| {
            text.replace(secret.value().expose(), "[secret]")
        })
    }

    /// What a running job may reach; nothing where it has no network.
    pub(crate) fn policy(&self, run: RunId) -> Option<Arc<Policy>> {
        self.registrations.of_run(run).map(|found| found.policy)
    }

    /// Puts rules before all others of a running job, where they stay until it ends; gives the policy that holds from now on.
    pub(crate) async fn update(
        self: &Arc<Self>,
        run: RunId,
        first: Vec<policy::Rule>,
    ) -> Result<Arc<Policy>, NetworkError> {
        self.change(run, move |sources| {
            // One that is said again counts as said last, and once.
            sources.first.retain(|before| !first.contains(before));
            sources.first.splice(0..0, first);
        })
        .await
    }

    /// Gives a running job another policy of its own, under those of its operators and the rules that [`Self::update`] put
    /// before them; gives the policy that holds from now on.
    pub(crate) async fn replace(
        self: &Arc<Self>,
        run: RunId,
        wanted: Draft,
    ) -> Result<Arc<Policy>, NetworkError> {
        self.change(run, move |sources| sources.wanted = wanted)
            .await
    }

    /// Changes what a run's policy is made of. Each change is carried to its end before the next begins, whoever stops
    /// waiting for it, so that everybody enforces the last one.
    async fn change(
        self: &Arc<Self>,
        run: RunId,
        how: impl FnOnce(&mut Sources) + Send + 'static,
    ) -> Result<Arc<Policy>, NetworkError> {
        let found = lock(&self.sources).get(&run).cloned();
        let shared = found.ok_or(NetworkError::NoRun)?;
        let networks = Arc::clone(self);
        let change = tokio::spawn(async move {
            let mut sources = shared.lock().await;
            let before = networks
                .registrations
                .of_run(run)
                .ok_or(NetworkError::NoRun)?;
            let mut changed = sources.clone();
            how(&mut changed);
            let policy = changed.policy()?;
            check_secrets(&policy, &before.secrets)?;
            *sources = changed;
            networks.set(run, policy).await
        });
        // It ends early only with the runtime.
        change.await.unwrap_or(Err(NetworkError::NoRun))
    }

    async fn set(&self, run: RunId, changed: Policy) -> Result<Arc<Policy>, NetworkError> {
        let registration = self
            .registrations
            .set_policy(run, Arc::new(changed))
            .map_err(MergeError::from)?
            .ok_or(NetworkError::NoRun)?;
        self.proxy.update(&registration).await?;
        if let Some(network) = NetworkId::of_slot_address(registration.address) {
            // What was open may be denied now; connections past the proxy end, and names are asked for again.
            let Registration {
                address,
                generation,
                ..
            } = registration;
            if self.registrations.take_opened(address, generation) {
                self.launcher.cut_network(network).await?;
            }
            self.open_addresses(&registration, network).await?;
        }
        Ok(registration.policy)
    }

    async fn end(&self, registration: &Registration, network: NetworkId) {
        let Registration {
            address,
            generation,
            ..
        } = *registration;
        lock(&self.sources).remove(&registration.run);
        // First: a worker that comes up, or a name that is asked for, meanwhile would be missed by what follows.
        self.registrations.begin_end(address, generation);
        self.proxy.unregister(address, generation).await;
        if self.registrations.take_opened(address, generation)
            && let Err(error) = self.launcher.cut_network(network).await
        {
            tracing::warn!(%address, %error, "connections past the proxy cannot be cut; they go with the VM");
        }
        self.kernel.settle().await;
        match self.registrations.remove(address, generation) {
            Some(lost) if lost > 0 => {
                tracing::warn!(run = %registration.run, lost, "the network log lacks lines");
            }
            _ => {}
        }
    }
}

/// What the policy wants to inject has to be there.
fn check_secrets(policy: &Policy, secrets: &[Secret]) -> Result<(), NetworkError> {
    let missing = policy
        .secrets()
        .into_iter()
        .find(|name| !secrets.iter().any(|secret| secret.name() == *name));
    match missing {
        Some(name) => Err(NetworkError::NoSecret(name.as_str().to_owned())),
        None => Ok(()),
    }
}

/// A job's use of its network. [`Admission::end`] ends it and returns when its log is complete; dropping it ends it in the
/// background.
#[derive(Debug)]
pub(crate) struct Admission {
    networks: Arc<JobNetworks>,
    network: NetworkId,
    registration: Registration,
    ended: bool,
}

impl Admission {
    /// What the agent finds in its environment: each secret's placeholder under its name.
    pub(crate) fn environment(&self) -> impl Iterator<Item = (String, String)> {
        self.registration.secrets.iter().map(|secret| {
            let (name, placeholder) = (secret.name(), secret.placeholder());
            (name.as_str().to_owned(), placeholder.as_str().to_owned())
        })
    }

    /// Ends it.
    pub(crate) async fn end(mut self) {
        self.networks.end(&self.registration, self.network).await;
        self.ended = true;
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let (networks, registration) = (Arc::clone(&self.networks), self.registration.clone());
        let network = self.network;
        runtime.spawn(async move { networks.end(&registration, network).await });
    }
}

/// Networks, as the launcher takes them.
fn cidrs<'a>(nets: impl Iterator<Item = &'a ranges::Ipv4Net>) -> Vec<Cidr> {
    // Each is valid in both crates' types.
    nets.filter_map(|net| Cidr::new(net.network(), net.prefix_len()).ok())
        .collect()
}
