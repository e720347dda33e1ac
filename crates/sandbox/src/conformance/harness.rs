//! What test programs of engines share: slots of a launcher, a report in libtest's words, and a look at whether a
//! template is as it was.

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use guest_control::{Client, ControlError, ExecSpec, UserSpec};
use host::launcher::Launcher;
use host::slot::{HostLimits, LeaseKind, Resources, SlotId, SlotRecord};
use sha2::{Digest, Sha256};

use super::{Slots, Subject, cases};
use crate::engine::Progress;
use crate::error::SandboxError;
use crate::parts::disk::for_each_extent;
use crate::types::{Shape, SnapshotInputs};

/// Slots of a launcher that has the host for itself.
pub struct LauncherSlots {
    /// Gives them.
    pub launcher: Launcher,
    /// What each takes.
    pub shape: Shape,
    /// Who takes them.
    pub instance: String,
}

#[async_trait]
impl Slots for LauncherSlots {
    async fn take(&self) -> Result<SlotId, SandboxError> {
        let record = SlotRecord {
            instance: self.instance.clone(),
            kind: LeaseKind::Firm,
            resources: Resources {
                vcpu: self.shape.vcpu,
                memory_mb: self.shape.memory_mb,
                disk_mb: self.shape.disk_mb,
            },
            run_id: None,
            shared_mb: 0,
        };
        let plenty = HostLimits {
            total: Resources {
                vcpu: 1000,
                memory_mb: 1 << 20,
                disk_mb: 1 << 20,
            },
        };
        Ok(self.launcher.reserve(record, plenty).await?)
    }

    async fn give_back(&self, slot: SlotId) -> Result<(), SandboxError> {
        Ok(self.launcher.release(slot).await?)
    }
}

/// Progress that nobody watches.
pub struct Quiet;

impl Progress for Quiet {
    fn step(&self, _: &str) {}
}

/// What a snapshot for tests is made from, but for its image.
pub fn snapshot_inputs(
    image: crate::types::ImageFiles,
    shape: Shape,
    dir: &Path,
    limit: Duration,
) -> SnapshotInputs {
    SnapshotInputs {
        image,
        shape,
        dir: dir.to_owned(),
        warm_up: vec![ExecSpec {
            argv: ["bash", "-c", "ls / | wc -l"]
                .map(|word| word.as_bytes().to_vec())
                .to_vec(),
            user: UserSpec::User,
            kill_group_on_exit: true,
            ..ExecSpec::default()
        }],
        limit,
    }
}

/// What a bash command line prints in a guest, as the agent's own account.
pub async fn output(
    client: &Client,
    script: &str,
    limit: Duration,
) -> Result<String, ControlError> {
    let session = client
        .exec(ExecSpec {
            argv: ["bash", "-c", script]
                .map(|word| word.as_bytes().to_vec())
                .to_vec(),
            user: UserSpec::User,
            timeout: Some(limit),
            kill_group_on_exit: true,
            ..ExecSpec::default()
        })
        .await?;
    session.wait().await?;
    let mut output = session.attach(0, false);
    let mut said = Vec::new();
    while let Some(chunk) = output.next().await {
        said.extend_from_slice(&chunk.data);
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Counts and prints what was tested.
#[derive(Debug, Default)]
pub struct Report {
    passed: u32,
    failed: u32,
}

impl Report {
    /// One test, which began at `start`, is done.
    pub fn note(&mut self, name: &str, error: Option<String>, start: Instant) {
        let took = start.elapsed();
        match error {
            None => {
                self.passed += 1;
                println!("test {name} ... ok ({took:.1?})");
            }
            Some(error) => {
                self.failed += 1;
                println!("{name}: after {took:.1?}: {error}\ntest {name} ... FAILED");
            }
        }
    }

    /// Prints the sum; true if nothing failed.
    pub fn finish(&self) -> bool {
        let word = if self.failed == 0 { "ok" } else { "FAILED" };
        println!(
            "test result: {word}. {} passed; {} failed",
            self.passed, self.failed
        );
        self.failed == 0
    }
}

/// The files that a template is made of, and what was in them.
#[derive(Debug)]
pub struct Template {
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Template {
    /// Remembers what is in them now.
    pub fn new(dir: &Path, files: &[String]) -> io::Result<Template> {
        let files = files.iter().map(|name| {
            let path = dir.join(name);
            let digest = digest(&path)?;
            Ok((path, digest))
        });
        Ok(Template {
            files: files.collect::<io::Result<_>>()?,
        })
    }

    /// What has changed, if something has.
    pub fn change(&self) -> Option<String> {
        self.files.iter().find_map(|(path, before)| {
            let path_shown = path.display();
            match digest(path) {
                Ok(now) if now == *before => None,
                Ok(_) => Some(format!("{path_shown} has changed")),
                Err(error) => Some(format!("{path_shown}: {error}")),
            }
        })
    }
}

/// Of a file's data and where it is; holes cost nothing.
fn digest(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(length.to_le_bytes());
    let mut buffer = vec![0; 1 << 20];
    for_each_extent(&file, length, |start, end| {
        let mut at = start;
        while at < end {
            let wanted = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let part = buffer.get_mut(..wanted).unwrap_or_default();
            file.read_exact_at(part, at)?;
            // Zeros may become data or a hole again; both are the same memory.
            if part.iter().any(|byte| *byte != 0) {
                hash.update(at.to_le_bytes());
                hash.update(part);
            }
            at += u64::try_from(wanted).unwrap_or(u64::MAX);
        }
        Ok(())
    })?;
    Ok(hash.finalize().to_vec())
}

/// Runs the cases whose names contain one of `filters`, or all if there are none; `skip` gives a reason for those that cannot run here. After each the
/// template must be as it was.
pub async fn run(
    subject: &Subject,
    template: &Template,
    filters: &[String],
    skip: impl Fn(&str) -> Option<String>,
    report: &mut Report,
) {
    for case in cases(subject) {
        if !wanted(case.name, filters) {
            continue;
        }
        if let Some(reason) = skip(case.name) {
            skipped(case.name, &reason, report);
            continue;
        }
        let start = Instant::now();
        let outcome = case.run(subject).await.err().map(|e| e.to_string());
        report.note(case.name, outcome.or_else(|| template.change()), start);
    }
}

/// Says that a case was skipped in the form that `scripts/test.sh` counts: as a passed one, which it then takes out.
pub fn skipped(name: &str, reason: &str, report: &mut Report) {
    report.passed += 1;
    let name: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    println!("SKIP {name}: {reason}");
}

/// The arguments that are no options: parts of the names of the tests to run.
pub fn filters() -> Vec<String> {
    std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect()
}

/// Whether a test is to run.
pub fn wanted(name: &str, filters: &[String]) -> bool {
    filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
}

/// How many descriptors this process has.
pub fn open_descriptors() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

/// Notes what is left when everything should be gone: slots, descriptors.
pub async fn leftovers(
    launcher: &Launcher,
    descriptors: usize,
    report: &mut Report,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let start = Instant::now();
    let left = |what: bool, words: &dyn Display| what.then(|| words.to_string());
    let usage = launcher.usage().await?;
    let slots = usage.firm_count + usage.revocable_count;
    let words = left(slots > 0, &format!("{slots} slots"));
    report.note("no slot is left", words, start);
    let now = open_descriptors()?;
    let words = left(
        now > descriptors,
        &format!("{descriptors} before, {now} after"),
    );
    report.note("no descriptor is left", words, start);
    Ok(())
}
