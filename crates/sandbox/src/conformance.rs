//! What every engine must do, as tests of the trait alone.
//!
//! A test program makes a [`Subject`], asks for the [`cases`] that fit it, and runs them one after another. A case
//! takes the slots it needs and gives them back whatever happens. Nothing waits by sleeping.

mod agent_root;
mod guest;
pub mod harness;
mod isolation;
mod life;

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use guest_control::{ExecSpec, ExitReport, Output, Stream, UserSpec, Wake};
use host::slot::SlotId;

use crate::engine::Template;
use crate::error::SandboxError;
use crate::sandbox::{Limits, Sandbox};
use crate::types::Place;

/// Nothing a case waits for takes longer, on a host under full load; see [`Subject::patience`].
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Gives cases slots to put VMs in.
#[async_trait]
pub trait Slots: Send + Sync {
    /// A free slot.
    async fn take(&self) -> Result<SlotId, SandboxError>;
    /// It is empty again, or is emptied now.
    async fn give_back(&self, slot: SlotId) -> Result<(), SandboxError>;
}

/// What is tested.
#[derive(Clone)]
pub struct Subject {
    /// Makes the VMs.
    pub template: Arc<dyn Template>,
    /// Where they go.
    pub slots: Arc<dyn Slots>,
    /// Whether there is a Linux guest in them, with bash and coreutils.
    pub real_guest: bool,
    /// How long one case may take: [`PATIENCE`], unless guests are slower here than any user would bear.
    pub patience: Duration,
    /// Whether parked VMs give memory back.
    pub balloon: bool,
    /// Whether what devices do is counted.
    pub device_stats: bool,
}

/// How a case ended.
pub type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

type CaseFuture = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// One promise.
pub struct Case {
    /// The promise.
    pub name: &'static str,
    needs_guest: bool,
    body: fn(Room) -> CaseFuture,
}

impl Case {
    /// Runs it and gives back what it took.
    pub async fn run(&self, subject: &Subject) -> Outcome {
        let room = Room {
            subject: subject.clone(),
            taken: Arc::default(),
        };
        let patience = subject.patience;
        let outcome = tokio::time::timeout(patience, (self.body)(room.clone()))
            .await
            .unwrap_or_else(|_| Err(format!("not done within {patience:?}").into()));
        let slots = std::mem::take(&mut *room.taken.lock().await);
        let mut deaths = String::new();
        for (slot, sandbox) in slots {
            // A lost channel is one cause of failures, and what it is about becomes known a moment later.
            let closed = sandbox.client().closed();
            let own = async {
                closed.await;
                sandbox.died().await
            };
            let moment = Duration::from_millis(if outcome.is_err() { 3000 } else { 0 });
            if let Ok(death) = tokio::time::timeout(moment, own).await {
                deaths.push_str(&format!(" (a VM had died: {})", death.reason));
            }
            sandbox.destroy().await;
            subject.slots.give_back(slot).await?;
        }
        outcome.map_err(|error| format!("{error}{deaths}").into())
    }
}

/// The cases for a subject, in the order to run them in.
pub fn cases(subject: &Subject) -> Vec<Case> {
    life::CASES
        .iter()
        .chain(guest::CASES)
        .chain(agent_root::CASES)
        .chain(isolation::CASES)
        .map(|(name, needs_guest, body)| Case {
            name,
            needs_guest: *needs_guest,
            body: *body,
        })
        .filter(|case| subject.real_guest || !case.needs_guest)
        .collect()
}

type Entry = (&'static str, bool, fn(Room) -> CaseFuture);

/// What a case has: a place to make VMs that are cleared away after it.
#[derive(Clone)]
struct Room {
    subject: Subject,
    taken: Arc<tokio::sync::Mutex<Vec<(SlotId, Sandbox)>>>,
}

impl Room {
    /// A clone of the template, running.
    async fn restore(&self) -> Result<Sandbox, SandboxError> {
        let slot = self.subject.slots.take().await?;
        let vm = match self.subject.template.restore(Place::unplugged(slot)).await {
            Ok(vm) => vm,
            Err(error) => {
                self.subject.slots.give_back(slot).await?;
                return Err(error);
            }
        };
        let mut limits = Limits::default();
        if self.subject.patience > PATIENCE {
            limits.pause = self.subject.patience;
        }
        let sandbox = Sandbox::adopt_with(vm, slot, limits);
        self.taken.lock().await.push((slot, sandbox.clone()));
        Ok(sandbox)
    }
}

/// A bash command line as root in the guest.
fn script(text: &str) -> ExecSpec {
    ExecSpec {
        argv: ["bash", "-c", text]
            .map(|word| word.as_bytes().to_vec())
            .to_vec(),
        user: UserSpec::Root,
        kill_group_on_exit: true,
        ..ExecSpec::default()
    }
}

/// What a process printed, by stream.
#[derive(Debug, Default)]
struct Printed {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

async fn drain(mut output: Output) -> Printed {
    let mut printed = Printed::default();
    while let Some(chunk) = output.next().await {
        match chunk.stream {
            Stream::Stdout => printed.stdout.extend_from_slice(&chunk.data),
            Stream::Stderr => printed.stderr.extend_from_slice(&chunk.data),
        }
    }
    printed
}

/// Runs a process to its end.
async fn run(
    sandbox: &Sandbox,
    spec: ExecSpec,
) -> Result<(ExitReport, Printed), Box<dyn Error + Send + Sync>> {
    let session = sandbox.client().exec(spec).await?;
    let printed = drain(session.attach(0, true)).await;
    Ok((session.wait().await?, printed))
}

/// The standard output of a command line that must succeed.
async fn stdout_of(sandbox: &Sandbox, text: &str) -> Result<String, Box<dyn Error + Send + Sync>> {
    let (report, printed) = run(sandbox, script(text)).await?;
    if report.status != guest_control::ExitStatus::Exited(0) {
        return Err(format!("`{text}`: {report:?}, {printed:?}").into());
    }
    Ok(String::from_utf8_lossy(&printed.stdout).trim().to_owned())
}

/// Clock and entropy as a claim sets them.
fn wake() -> Result<Wake, Box<dyn Error + Send + Sync>> {
    use std::io::Read;
    let mut entropy = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut entropy)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(Wake {
        realtime_ns: u64::try_from(now.as_nanos())?,
        entropy,
    })
}

/// Ends a case that found something else than it should.
macro_rules! ensure {
    ($condition:expr, $($words:tt)+) => {
        if !$condition {
            return Err(format!($($words)+).into());
        }
    };
}
use ensure;
