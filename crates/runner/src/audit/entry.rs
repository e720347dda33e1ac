//! What was done, and how it went.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use guest_control::{ExitReport, ExitStatus};
use policy::RuleArgument;
use serde::{Deserialize, Serialize};

use super::{Audit, Event, Line, now};

/// Most bytes of a command line or path that are kept.
const MOST: usize = 4096;

/// What somebody did.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub(crate) enum Action {
    /// A command in the run's VM.
    Exec {
        /// Program and arguments, control characters escaped.
        command: Vec<String>,
        /// Some of it is left out.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cut: bool,
        /// Whom it runs as in the guest.
        as_user: String,
        /// It was left running.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        detach: bool,
    },
    /// Attaching to a session that was detached.
    Attach {
        /// Its number.
        session: u32,
    },
    /// A file out of the VM.
    CpOut {
        /// Its path in the guest.
        path: String,
    },
    /// A file into the VM.
    CpIn {
        /// Its path in the guest.
        path: String,
        /// Its mode there, octal.
        mode: String,
    },
    /// Cancelling the run at the control socket.
    Kill,
    /// Cancelling it by a marker in the queue.
    Cancel,
    /// Changing what it may reach.
    Policy {
        /// Rules that were put before all others, denials first.
        deny: Vec<String>,
        /// Rules that were put behind those.
        allow: Vec<String>,
    },
}

impl Action {
    /// A command; `blot` takes the values of secrets out of a text.
    pub(crate) fn exec(
        argv: &[Vec<u8>],
        as_user: &str,
        detach: bool,
        blot: impl Fn(String) -> String,
    ) -> Self {
        let mut room = MOST;
        let mut cut = false;
        let mut command = Vec::new();
        for argument in argv {
            // Blotted before anything is cut or escaped: half a secret is one too.
            let (text, shortened) = bounded(argument, room, &blot);
            room = room.saturating_sub(text.len().max(1));
            cut |= shortened;
            if room == 0 && text.is_empty() {
                cut = true;
                break;
            }
            command.push(text);
        }
        Self::Exec {
            command,
            cut,
            as_user: as_user.to_owned(),
            detach,
        }
    }

    /// A path, or another short text.
    pub(crate) fn text(text: &str, blot: impl Fn(String) -> String) -> String {
        bounded(text.as_bytes(), MOST, &blot).0
    }

    /// A change of policy.
    pub(crate) fn policy(deny: &[RuleArgument], allow: &[RuleArgument]) -> Self {
        let texts = |rules: &[RuleArgument]| rules.iter().map(ToString::to_string).collect();
        Self::Policy {
            deny: texts(deny),
            allow: texts(allow),
        }
    }

    /// Its name.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::CpOut { .. } => "cp_out",
            Self::CpIn { .. } => "cp_in",
            Self::Kill => "kill",
            Self::Cancel => "cancel",
            Self::Policy { .. } => "policy",
        }
    }
}

fn bounded(bytes: &[u8], room: usize, blot: &impl Fn(String) -> String) -> (String, bool) {
    let text: String = bytes
        .utf8_chunks()
        .map(|chunk| {
            let invalid = chunk.invalid().iter();
            let invalid: String = invalid.map(|byte| format!("\\x{byte:02x}")).collect();
            chunk.valid().to_owned() + &invalid
        })
        .collect();
    let mut text = crate::terminal::escape(&blot(text));
    let cut = text.len() > room;
    if cut {
        shorten(&mut text, room);
    }
    (text, cut)
}

fn shorten(text: &mut String, most: usize) {
    let end = (0..=most).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// It was done. The command's own failure does not count.
    pub(crate) ok: bool,
    /// The command's exit status, that of a signal being 128 more than its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) exit_code: Option<i32>,
    /// Why it was not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// How long it took, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) took_ms: Option<u64>,
}

impl Outcome {
    /// It was done.
    pub(crate) fn ok() -> Self {
        Self {
            ok: true,
            exit_code: None,
            error: None,
            took_ms: None,
        }
    }

    /// The command ended.
    pub(crate) fn exit(code: i32) -> Self {
        Self {
            exit_code: Some(code),
            ..Self::ok()
        }
    }

    /// The command ended.
    pub(crate) fn report(report: &ExitReport) -> Self {
        match report.status {
            ExitStatus::Exited(code) => Self::exit(code),
            ExitStatus::Signaled(signal) => Self::exit(signal.saturating_add(128)),
            ExitStatus::TimedOut => Self {
                error: Some("its time ran out".to_owned()),
                ..Self::ok()
            },
        }
    }

    /// It was not done.
    pub(crate) fn failed(why: impl std::fmt::Display) -> Self {
        let mut error = crate::terminal::escape(&why.to_string());
        shorten(&mut error, MOST);
        Self {
            ok: false,
            error: Some(error),
            ..Self::ok()
        }
    }
}

/// An operation under way. Dropped, it is over.
#[derive(Debug)]
pub(crate) struct Entry {
    audit: Audit,
    line: Line,
    since: Instant,
    outcome: Mutex<Option<Outcome>>,
}

impl Entry {
    pub(super) fn new(audit: Audit, line: Line) -> Self {
        Self {
            audit,
            line,
            since: Instant::now(),
            outcome: Mutex::new(None),
        }
    }

    /// Says how it went; who says so last is believed.
    pub(crate) fn set(&self, outcome: Outcome) {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(outcome);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let slot = self.outcome.get_mut();
        let outcome = slot.unwrap_or_else(PoisonError::into_inner).take();
        let mut outcome =
            outcome.unwrap_or_else(|| Outcome::failed("the connection ended before it was over"));
        let took = self.since.elapsed().as_millis();
        outcome.took_ms = Some(u64::try_from(took).unwrap_or(u64::MAX));
        let mut line = self.line.clone();
        line.event = Event::End;
        line.time = now();
        line.outcome = Some(outcome);
        self.audit.write(&line);
    }
}
