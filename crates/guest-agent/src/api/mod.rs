//! The agent's side of API mode: webhooks (`docs/api-mode.md`).
//!
//! ```text
//! supervisor ─ event lines ─▶ ┌────────┐ ─▶ events ─▶ checkpoint
//! log ─ pieces, masked ─────▶ │ outbox │ ─▶ heartbeat, telemetry ─▶ complete
//!                             └────────┘
//! ```
//!
//! Who puts something into the outbox never waits: what does not fit is dropped and counted. At the end the rest has so long to
//! be sent, and what could not be is said in the log. What the API answers, or whether it does, changes nothing about
//! the run, but for the first heartbeat: without it the CLI is not started.

mod client;
mod mask;
mod metrics;
mod outbox;
mod sender;
mod session;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use api_types::RunId;
use api_types::guest::Alive;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use self::client::{CallError, Client};
use self::mask::Masker;
use self::outbox::Outbox;
pub(crate) use self::session::{Session, SessionError};
use crate::end::End;
use crate::log::Log;
use crate::signals;

/// How long the first heartbeat is tried.
const FIRST_HEARTBEAT: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// What is left of the deadline once the job has been told to end.
const AFTER_A_SIGNAL: Duration = Duration::from_secs(3);
/// Time of the last pieces of log, also where the events used up theirs.
const LAST_PIECES: Duration = Duration::from_secs(5);

/// What the host says about the API.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ApiEnv {
    pub(crate) url: String,
    pub(crate) token: String,
    /// Texts that are not to be sent.
    pub(crate) secrets: Vec<String>,
    pub(crate) heartbeat: Duration,
    pub(crate) telemetry: Duration,
    /// How long the rest may take at the end.
    pub(crate) deadline: Duration,
}

impl fmt::Debug for ApiEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiEnv")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl ApiEnv {
    /// What `VM0_SECRET_VALUES` lists.
    pub(crate) fn secrets(list: &str) -> Result<Vec<String>, String> {
        Masker::parse_list(list)
    }
}

/// Why the agent does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("the API cannot be used: {0}")]
    Unusable(String),
    #[error("network connectivity check failed: the API at {url} cannot be reached: {reason}")]
    Unreachable { url: String, reason: String },
    #[error(
        "network connectivity check failed: the API at {url} refuses this run's token: {reason}"
    )]
    Refused { url: String, reason: String },
    #[error("the threads that report to the API cannot be started: {0}")]
    Threads(#[from] io::Error),
}

/// What the threads share.
struct Shared {
    client: Client,
    run: RunId,
    home: PathBuf,
    masker: Masker,
    outbox: Outbox,
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    session: Option<Session>,
    checkpoint: Option<Result<(), String>>,
    outcome: Option<(i32, Option<String>)>,
    notes: Vec<String>,
}

impl Shared {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self) -> Option<Session> {
        self.told().session.clone()
    }

    fn set_checkpoint(&self, outcome: Result<(), String>) {
        self.told().checkpoint = Some(outcome);
    }

    fn outcome(&self) -> Option<(i32, Option<String>)> {
        self.told().outcome.clone()
    }

    /// For the log's end.
    fn note(&self, note: String) {
        self.told().notes.push(note);
    }
}

/// Where a run is reported to: nowhere without a token.
#[derive(Clone, Default)]
pub(crate) struct Reporter(Option<Arc<Shared>>);

impl Reporter {
    /// An event of the CLI.
    pub(crate) fn event(&self, line: &str) {
        if let Some(shared) = &self.0 {
            shared.outbox.event(line);
        }
    }

    /// Some log.
    pub(crate) fn log(&self, text: &str) {
        if let Some(shared) = &self.0 {
            shared.outbox.log(&shared.masker.text(text));
        }
    }

    /// The CLI says which session it has begun.
    pub(crate) fn session(&self, session: impl FnOnce() -> Option<Session>) {
        if let Some(shared) = &self.0 {
            let mut told = shared.told();
            if told.session.is_none() {
                told.session = session();
            }
        }
    }
}

/// The API, reached, and the threads that report to it.
pub(crate) struct Api {
    shared: Arc<Shared>,
    deadline: Duration,
    events_sent: Arc<OwnedFd>,
    all_sent: Arc<OwnedFd>,
}

impl Api {
    /// Proves that the API can be reached, and starts reporting.
    pub(crate) fn connect(env: &ApiEnv, run: &str, home: &Path) -> Result<Self, ConnectError> {
        // The token is in our memory and environment: what runs beside us under the same user is not to read it.
        let _root_may_all_the_same =
            rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
        let run: RunId = run
            .parse()
            .map_err(|_| ConnectError::Unusable(format!("{run:?} is no run id")))?;
        let client = Client::new(&env.url, &env.token).map_err(ConnectError::Unusable)?;
        let hidden = env.secrets.iter().chain([&env.token]).cloned();
        let shared = Arc::new(Shared {
            client,
            run,
            home: home.to_owned(),
            masker: Masker::new(hidden),
            outbox: Outbox::default(),
            told: Mutex::default(),
        });
        first_heartbeat(&shared, &env.url)?;
        let api = Self {
            shared,
            deadline: env.deadline,
            events_sent: Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from)?),
            all_sent: Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from)?),
        };
        api.spawn("events", &api.events_sent, Shared::send_events)?;
        let (heartbeat, telemetry) = (env.heartbeat, env.telemetry);
        api.spawn("telemetry", &api.all_sent, move |shared| {
            shared.send_telemetry(heartbeat, telemetry);
        })?;
        let wanted = signals::catch_checkpoint()?;
        let shared = Arc::clone(&api.shared);
        thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || {
                let mut count = [0; 8];
                while rustix::io::retry_on_intr(|| rustix::io::read(&wanted, &mut count)).is_ok() {
                    shared.outbox.checkpoint();
                }
            })?;
        Ok(api)
    }

    /// For who has something to report.
    pub(crate) fn reporter(&self) -> Reporter {
        Reporter(Some(Arc::clone(&self.shared)))
    }

    fn spawn(
        &self,
        name: &str,
        done: &Arc<OwnedFd>,
        work: impl FnOnce(&Shared) + Send + 'static,
    ) -> io::Result<()> {
        let (shared, done) = (Arc::clone(&self.shared), Arc::clone(done));
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                work(&shared);
                let _nobody_waits = rustix::io::write(&*done, &1_u64.to_ne_bytes());
            })?;
        Ok(())
    }

    /// No event comes any more: waits until they are sent and the session is kept, and says what became of it.
    pub(crate) fn checkpoint(&self, log: &mut Log, signalled: &OwnedFd) -> Instant {
        let deadline = Instant::now() + self.deadline;
        self.shared.outbox.close_events();
        if self.shared.session().is_some() {
            log.line(format_args!("▷ Checkpoint"));
        }
        // What people read is out before anything waits for the API.
        log.flush();
        let deadline = wait(&self.events_sent, signalled, deadline);
        // Not within `match`, which would hold the lock.
        let outcome = self.shared.told().checkpoint.take();
        match outcome {
            Some(Ok(())) => log.line(format_args!("✓ Checkpoint complete")),
            Some(Err(error)) => log.line(format_args!("✗ Checkpoint failed: {error}")),
            None if self.shared.session().is_some() => {
                log.line(format_args!(
                    "✗ Checkpoint failed: the API did not answer in time"
                ));
            }
            None => {}
        }
        deadline
    }

    /// Waits until the rest is sent; says what is not.
    pub(crate) fn close(self, log: &mut Log, end: &End, signalled: &OwnedFd, deadline: Instant) {
        log.flush();
        self.shared.told().outcome = Some((end.code.into(), end.reason.clone()));
        self.shared.outbox.close_log();
        let least = if signals::received().is_some() {
            Duration::ZERO
        } else {
            LAST_PIECES.min(self.deadline)
        };
        let _ = wait(
            &self.all_sent,
            signalled,
            deadline.max(Instant::now() + least),
        );
        self.shared.outbox.give_up();
        let (unsent, mut told) = (self.shared.outbox.unsent(), self.shared.told());
        let notes = std::mem::take(&mut told.notes);
        drop(told);
        for note in notes {
            log.line(format_args!("[API: {}]", self.shared.masker.text(&note)));
        }
        if unsent.events > 0 || unsent.log_bytes > 0 {
            log.line(format_args!(
                "[API: {} events and {} bytes of log were not sent]",
                unsent.events, unsent.log_bytes
            ));
        }
    }
}

fn first_heartbeat(shared: &Shared, url: &str) -> Result<Alive, ConnectError> {
    let end = Instant::now() + FIRST_HEARTBEAT;
    let mut pause = FIRST_PAUSE;
    let url = || url.to_owned();
    loop {
        match shared.heartbeat() {
            Ok(alive) => return Ok(alive),
            Err(CallError::Again { reason, after }) => {
                let next = after.map_or(pause, |after| after.max(pause));
                if Instant::now() + next >= end {
                    return Err(ConnectError::Unreachable { url: url(), reason });
                }
                thread::sleep(next);
                pause *= 2;
            }
            Err(error) => {
                return Err(ConnectError::Refused {
                    url: url(),
                    reason: error.to_string(),
                });
            }
        }
    }
}

/// Waits for `done`, until the deadline; a signal leaves little of it. Gives the deadline that holds then.
fn wait(done: &OwnedFd, signalled: &OwnedFd, mut deadline: Instant) -> Instant {
    loop {
        let now = Instant::now();
        let ended = signals::received().is_some();
        if ended {
            deadline = deadline.min(now + AFTER_A_SIGNAL);
        }
        let mut sources = vec![PollFd::new(done, PollFlags::IN)];
        if !ended {
            sources.push(PollFd::new(signalled, PollFlags::IN));
        }
        let left = deadline.saturating_duration_since(now);
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut sources, timeout.as_ref()) {
            Ok(0) => return deadline,
            Ok(_) if sources.first().is_some_and(|fd| !fd.revents().is_empty()) => return deadline,
            // A signal, or an interrupted call.
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return deadline,
        }
    }
}
