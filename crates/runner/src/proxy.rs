//! The intercepting proxy: its certificate authority, its files on this host, its workers and what they are told.
//!
//! [`Proxy::register`] returns when every worker knows the run, [`Proxy::unregister`] when every worker has closed the run's
//! connections and sent their log lines. A worker that dies in between is started again and told everything anew, so
//! neither ever needs to be repeated by the caller.

mod ca;
mod channel;
mod embedded;
pub(crate) mod install;
mod worker;

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use host::launcher::{Launcher, ServiceId};
use policy::wire::Request;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::network::{Registration, Registrations};
use crate::status::{ProxyWorker, WorkerState};
pub(crate) use ca::Authority;
use channel::{Channel, ChannelError};
use worker::State;

/// Port of the first worker; the others follow.
const FIRST_PORT: u16 = 8080;
/// How long a job waits for a proxy that is being started again.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// Why the proxy cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    /// A worker does not come up.
    #[error("the proxy is not running: {0}")]
    Down(String),
    /// A worker refused a registration.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// What the workers are started from.
#[derive(Debug)]
pub(crate) struct ProxyConfig {
    /// How many.
    pub(crate) workers: u16,
    /// The directory that holds `venv` and `addon`.
    pub(crate) files: OwnedFd,
    /// Key and certificate, sealed.
    pub(crate) authority: OwnedFd,
    /// Whom they trust upstream; nothing: mitmproxy's own list.
    pub(crate) trusted: Option<PathBuf>,
    /// Where they ask for names.
    pub(crate) resolver: Ipv4Addr,
}

/// All workers of a runner.
#[derive(Debug)]
pub(crate) struct Proxy {
    workers: Vec<watch::Receiver<State>>,
}

impl Proxy {
    /// The ports of `workers` workers.
    pub(crate) fn ports(workers: u16) -> Vec<u16> {
        (0..workers)
            .map(|number| FIRST_PORT.saturating_add(number))
            .collect()
    }

    /// Starts the workers; they come up in the background.
    pub(crate) fn start(
        config: &ProxyConfig,
        launcher: &Launcher,
        registrations: &Arc<Registrations>,
    ) -> std::io::Result<Self> {
        let mut workers = Vec::new();
        for (number, port) in (0..).zip(Self::ports(config.workers)) {
            let plan = worker::Plan {
                service: ServiceId(number),
                port,
                files: config.files.try_clone()?,
                authority: config.authority.try_clone()?,
                trusted: config.trusted.clone(),
                resolver: config.resolver,
            };
            let (state, states) = watch::channel(State::Starting);
            let (launcher, registrations) = (launcher.clone(), Arc::clone(registrations));
            tokio::spawn(worker::keep(plan, launcher, registrations, state));
            workers.push(states);
        }
        Ok(Self { workers })
    }

    /// Waits until every worker listens.
    pub(crate) async fn ready(&self) -> Result<(), ProxyError> {
        for worker in &self.workers {
            ready(worker.clone()).await?;
        }
        Ok(())
    }

    /// How every worker is, for people.
    pub(crate) fn states(&self) -> Vec<ProxyWorker> {
        let states = self.workers.iter().map(|worker| {
            let (state, reason) = match &*worker.borrow() {
                State::Starting => (WorkerState::Starting, None),
                State::Ready(_) => (WorkerState::Ready, None),
                State::Down(why) => (WorkerState::Down, Some(why.clone())),
            };
            ProxyWorker { state, reason }
        });
        states.collect()
    }

    /// Has somebody told whenever [`Proxy::states`] change.
    pub(crate) fn on_change(&self, tell: impl Fn() + Clone + Send + 'static) {
        for worker in &self.workers {
            let (mut worker, tell) = (worker.clone(), tell.clone());
            tokio::spawn(async move {
                while worker.changed().await.is_ok() {
                    tell();
                }
            });
        }
    }

    /// Makes a registration, which must stand in the [`Registrations`] already, known.
    pub(crate) async fn register(&self, registration: &Registration) -> Result<(), ProxyError> {
        for worker in &self.workers {
            loop {
                let channel = ready(worker.clone()).await?;
                match worker::register(&channel, registration).await {
                    Ok(()) => break,
                    // The next one is told when it comes up.
                    Err(ChannelError::Closed) => left(worker.clone()).await,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Changes the policy of a registration.
    pub(crate) async fn update(&self, registration: &Registration) -> Result<(), ProxyError> {
        let request = Request::Update {
            address: registration.address,
            generation: registration.generation,
            policy: &registration.decides,
        };
        for worker in &self.workers {
            let State::Ready(channel) = worker.borrow().clone() else {
                // It learns the new one when it comes up.
                continue;
            };
            match worker::ask(&channel, &request).await {
                Ok(()) | Err(ChannelError::Closed) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Ends a registration everywhere. A worker that is down has ended it by being down.
    pub(crate) async fn unregister(&self, address: Ipv4Addr, generation: u64) {
        let request = Request::Unregister {
            address,
            generation,
        };
        for worker in &self.workers {
            let State::Ready(channel) = worker.borrow().clone() else {
                continue;
            };
            match worker::ask(&channel, &request).await {
                Ok(()) | Err(ChannelError::Closed) => {}
                Err(error) => {
                    tracing::warn!(%address, generation, %error, "a registration is not ended cleanly")
                }
            }
        }
    }
}

/// Waits for a worker that is ready.
async fn ready(mut worker: watch::Receiver<State>) -> Result<Channel, ProxyError> {
    let is_ready = |state: &State| matches!(state, State::Ready(_));
    let states = worker.clone();
    let why = match timeout(READY_LIMIT, worker.wait_for(is_ready)).await {
        Ok(Ok(state)) => match &*state {
            State::Ready(channel) => return Ok(channel.clone()),
            State::Starting | State::Down(_) => "it is being started".to_owned(),
        },
        Ok(Err(_)) => "the runner stops".to_owned(),
        Err(_) => match &*states.borrow() {
            State::Down(why) => why.clone(),
            State::Starting | State::Ready(_) => "it does not come up".to_owned(),
        },
    };
    Err(ProxyError::Down(why))
}

/// Waits until a worker has noticed that its channel is closed.
async fn left(mut worker: watch::Receiver<State>) {
    let _ = timeout(
        READY_LIMIT,
        worker.wait_for(|state| !matches!(state, State::Ready(_))),
    )
    .await;
}
