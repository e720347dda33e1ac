//! Who did what to a running job: `logs/audit.jsonl`, one JSON object a line.
//!
//! ```text
//! {"time":"…","runner":"demo","id":7,"event":"begin","action":"exec","run_id":"…","by":{"uid":0,"user":"root",…},"command":["id"],…}
//! {"time":"…","runner":"demo","id":7,"event":"end","action":"exec","run_id":"…","by":{…},"ok":true,"exit_code":0,"took_ms":12,…}
//! ```
//!
//! The daemon alone writes it, and only at its end; it is the home owner's. What takes a while has two lines of one `id`,
//! so that a daemon that dies in between leaves the first. Each line is one write to a file that is opened for it: a
//! deleted directory of logs does no more than end the old lines. A line that cannot be written stands in the daemon's own log.
//! Neither environments nor the bytes that went through are in it, and the values of the run's secrets are blotted out.

mod entry;
pub(crate) mod who;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use host::fs::{Access, Dir, FsError};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub(crate) use entry::{Action, Entry, Outcome};
pub(crate) use who::Who;

use crate::names::{RunId, RunnerName};

/// Its name in `logs/`.
pub(crate) const AUDIT_LOG: &str = "audit.jsonl";
/// How names of those begin that were put aside, in the order of their names.
pub(crate) const ASIDE: &str = "audit-";
/// How they end.
pub(crate) const SUFFIX: &str = ".jsonl";
/// A log larger than this is put aside, bytes.
const ROTATE_SIZE: u64 = 16 << 20;
/// And so is one older than this: what was put aside can go when its time is over.
const ROTATE_AGE: Duration = Duration::from_secs(30 * 24 * 3600);

/// The log. Clones write to the same.
#[derive(Clone)]
pub(crate) struct Audit(Arc<Shared>);

struct Shared {
    logs: Box<dyn Fn() -> Result<Dir, FsError> + Send + Sync>,
    runner: RunnerName,
    instance: String,
    last: AtomicU64,
}

/// Whether something begins or is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Event {
    /// It begins.
    Begin,
    /// It is over.
    End,
}

/// One line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Line {
    /// When.
    pub(crate) time: String,
    /// In which runner.
    pub(crate) runner: RunnerName,
    /// In which process of it.
    pub(crate) instance: String,
    /// Lines of one operation have the same, within a process.
    pub(crate) id: u64,
    /// Whether it begins.
    pub(crate) event: Event,
    /// On which run.
    pub(crate) run_id: RunId,
    /// Who.
    pub(crate) by: Who,
    /// What.
    #[serde(flatten)]
    pub(crate) action: Action,
    /// How it went, at the end.
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub(crate) outcome: Option<Outcome>,
}

impl Audit {
    /// A log in the directory that `logs` opens, making it where it is missing.
    pub(crate) fn new(
        logs: impl Fn() -> Result<Dir, FsError> + Send + Sync + 'static,
        runner: RunnerName,
        instance: String,
    ) -> Self {
        Self(Arc::new(Shared {
            logs: Box::new(logs),
            runner,
            instance,
            last: AtomicU64::new(0),
        }))
    }

    /// Notes something that takes a while; its end is noted when the entry is dropped.
    pub(crate) fn begin(&self, by: Who, run: RunId, action: Action) -> Entry {
        let id = self.0.last.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let line = self.line(id, Event::Begin, by, run, action);
        self.write(&line);
        Entry::new(self.clone(), line)
    }

    /// Notes something that is done at once.
    pub(crate) fn done(&self, by: Who, run: RunId, action: Action, outcome: Outcome) {
        let id = self.0.last.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let mut line = self.line(id, Event::End, by, run, action);
        line.outcome = Some(outcome);
        self.write(&line);
    }

    fn line(&self, id: u64, event: Event, by: Who, run: RunId, action: Action) -> Line {
        Line {
            time: now(),
            runner: self.0.runner.clone(),
            instance: self.0.instance.clone(),
            id,
            event,
            run_id: run,
            by,
            action,
            outcome: None,
        }
    }

    fn write(&self, line: &Line) {
        let written = serde_json::to_vec(line)
            .map_err(std::io::Error::other)
            .and_then(|mut text| {
                text.push(b'\n');
                let logs = (self.0.logs)()?;
                self.rotate(&logs)?;
                let mut file = logs.open_file(AUDIT_LOG, Access::Append { mode: 0o600 })?;
                file.write_all(&text)
            });
        if let Err(error) = written {
            let line = serde_json::to_string(line).unwrap_or_default();
            tracing::error!(%error, line, "the audit log cannot be written; the line stands here instead");
        }
    }

    /// Puts the log aside when it has become large or old. Another daemon of the home may do the same at this moment:
    /// then its fresh log is put aside too, and nothing is lost.
    fn rotate(&self, logs: &Dir) -> Result<(), FsError> {
        let Some(meta) = logs.metadata(AUDIT_LOG)? else {
            return Ok(());
        };
        // Some file systems do not know when a file was made.
        let made = meta.created().unwrap_or_else(|_| SystemTime::now());
        let old = made.elapsed().unwrap_or_default() > ROTATE_AGE;
        if meta.len() < ROTATE_SIZE && !old {
            return Ok(());
        }
        let part = self.0.instance.get(..8).unwrap_or("runner");
        let stamp = Timestamp::now().strftime("%Y%m%dT%H%M%S%.3fZ");
        let aside = format!("{ASIDE}{stamp}-{part}{SUFFIX}");
        logs.rename(AUDIT_LOG, logs, aside)
    }
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Audit").field(&self.0.runner).finish()
    }
}

fn now() -> String {
    format!("{:.3}", Timestamp::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audit(directory: &std::path::Path) -> Audit {
        let path = directory.to_owned();
        Audit::new(
            move || {
                std::fs::create_dir_all(&path).unwrap();
                Dir::open(&path)
            },
            "demo".parse().unwrap(),
            RunId::random().to_string(),
        )
    }

    fn lines(directory: &std::path::Path) -> Vec<Line> {
        let text = std::fs::read_to_string(directory.join(AUDIT_LOG)).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn an_operation_has_a_beginning_and_an_end_also_when_nobody_says_how_it_went() {
        let temp = tempfile::tempdir().unwrap();
        let audit = audit(temp.path());
        let run = RunId::random();
        let command = vec![b"id".to_vec(), b"\x1b[31m\xff".to_vec()];
        let action = Action::exec(&command, "agent", false, |text| text);
        let entry = audit.begin(Who::of_uid(0), run, action.clone());
        entry.set(Outcome::exit(3));
        drop(entry);
        drop(audit.begin(Who::of_uid(0), run, action));
        audit.done(Who::of_uid(0), run, Action::Kill, Outcome::ok());
        let lines = lines(temp.path());
        let ids: Vec<_> = lines.iter().map(|line| (line.id, line.event)).collect();
        let (begin, end) = (Event::Begin, Event::End);
        assert_eq!(ids, [(1, begin), (1, end), (2, begin), (2, end), (3, end)]);
        let outcome = lines[1].outcome.as_ref().unwrap();
        assert_eq!((outcome.ok, outcome.exit_code), (true, Some(3)));
        let broken = lines[3].outcome.as_ref().unwrap();
        assert!(!broken.ok && broken.error.is_some());
        let text = std::fs::read_to_string(temp.path().join(AUDIT_LOG)).unwrap();
        assert!(
            !text.contains('\x1b') && text.contains(r"\\u{1b}[31m\\xff"),
            "{text}"
        );
    }

    #[test]
    fn long_commands_are_cut_and_secrets_blotted_out_before() {
        let long = vec![b"a".repeat(3000), b"hunter22".to_vec(), b"b".repeat(3000)];
        let action = Action::exec(&long, "agent", false, |text| {
            text.replace("hunter22", "***")
        });
        let text = serde_json::to_string(&action).unwrap();
        assert!(text.len() < 5000 && text.contains("\"cut\":true"), "{text}");
        assert!(!text.contains("hunter22") && text.contains("***"));
    }

    #[test]
    fn a_deleted_directory_and_a_large_log_lose_no_line() {
        let temp = tempfile::tempdir().unwrap();
        let logs = temp.path().join("logs");
        let audit = audit(&logs);
        let run = RunId::random();
        let kill = || audit.done(Who::of_uid(0), run, Action::Kill, Outcome::ok());
        kill();
        std::fs::remove_dir_all(&logs).unwrap();
        kill();
        assert_eq!(lines(&logs).len(), 1);
        let file = std::fs::File::options()
            .append(true)
            .open(logs.join(AUDIT_LOG))
            .unwrap();
        file.set_len(ROTATE_SIZE).unwrap();
        kill();
        assert_eq!(lines(&logs).len(), 1);
        let aside = std::fs::read_dir(&logs).unwrap().flatten();
        let aside: Vec<_> = aside
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(ASIDE))
            .collect();
        assert_eq!(aside.len(), 1);
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(logs.join(AUDIT_LOG))
            .unwrap()
            .permissions();
        assert_eq!(mode.mode() & 0o7777, 0o600);
    }
}
