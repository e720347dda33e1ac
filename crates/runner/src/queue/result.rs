//! The answer to a job.

use serde::{Deserialize, Serialize};

use crate::names::RunId;

/// Largest result file, bytes.
pub(super) const MAX_RESULT_BYTES: u64 = 64 << 10;
/// Longest error text kept, bytes.
const MAX_ERROR_BYTES: usize = 4 << 10;

/// What `submit` prints: one line of JSON with exactly these fields in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JobResult {
    /// The run.
    pub(crate) run_id: RunId,
    /// The agent's exit code; 137 when cancelled, 124 when timed out, 1 when the runner failed.
    pub(crate) exit_code: i32,
    /// What happened, when something did.
    pub(crate) error: Option<String>,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// With exit status 0.
    Ok,
    /// Somebody, or the end of the runner, cancelled it.
    Cancelled,
    /// Its time ran out.
    TimedOut,
    /// Otherwise.
    Failed,
}

impl Verdict {
    /// As metrics and traces name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
            Self::Failed => "failed",
        }
    }
}

impl JobResult {
    /// Exit code of a job that somebody cancelled: that of a process killed by SIGKILL.
    pub(crate) const CANCELLED: i32 = 137;
    /// Exit code of a job that ran too long, as of `timeout(1)`.
    pub(crate) const TIMED_OUT: i32 = 124;

    /// A job that ended with an exit code and nothing to add.
    pub(crate) fn exited(run_id: RunId, exit_code: i32) -> Self {
        Self {
            run_id,
            exit_code,
            error: None,
        }
    }

    /// A job that ended otherwise. The text loses its control characters (it is shown on terminals) and its
    /// excess length.
    pub(crate) fn failed(run_id: RunId, exit_code: i32, error: &str) -> Self {
        let mut text = String::new();
        for piece in error.chars().map(printable) {
            if text.len() > MAX_ERROR_BYTES {
                text.push('…');
                break;
            }
            text.push_str(&piece);
        }
        Self {
            run_id,
            exit_code,
            error: Some(text),
        }
    }

    /// How the job ended, in one word: what an agent says may be long, and anything.
    pub(crate) fn verdict(&self) -> Verdict {
        match (&self.error, self.exit_code) {
            (_, 0) => Verdict::Ok,
            (Some(_), Self::CANCELLED) => Verdict::Cancelled,
            (Some(_), Self::TIMED_OUT) => Verdict::TimedOut,
            (_, _) => Verdict::Failed,
        }
    }

    /// A job that its submitter, or an operator, cancelled.
    pub(crate) fn cancelled(run_id: RunId) -> Self {
        Self::failed(run_id, Self::CANCELLED, "cancelled by user")
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

fn printable(c: char) -> String {
    if c.is_control() {
        c.escape_default().to_string()
    } else {
        c.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_the_documented_line() {
        let id: RunId = "6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f".parse().unwrap();
        assert_eq!(
            serde_json::to_string(&JobResult::exited(id, 0)).unwrap(),
            r#"{"run_id":"6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f","exit_code":0,"error":null}"#
        );
    }

    #[test]
    fn error_texts_are_bounded_and_printable() {
        let result = JobResult::failed(RunId::random(), 1, &"\u{1b}[31m".repeat(10_000));
        let bytes = serde_json::to_vec(&result).unwrap();
        assert!(bytes.len() < usize::try_from(MAX_RESULT_BYTES).unwrap());
        assert!(!result.error.unwrap().contains('\u{1b}'));
    }
}
