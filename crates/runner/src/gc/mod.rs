//! Removing what nobody needs any more: images, snapshots, logs, what dead builds, daemons and deploys left.
//!
//! Whatever is in use is locked, and what is locked stays: a running daemon holds the image and the snapshot of each of
//! its profiles shared, a build exclusively. Two more things stay: what a `runner.yaml` names, and what is younger than
//! [`Rules::young`], because between the end of a build and the start of its daemon nobody holds a lock.
//!
//! Names are never trusted: a thing is removed only when its name parses as what it should be, and only through the
//! home's descriptor, which follows no link. One removal that fails is told and the rest goes on.
//!
//! What follows a slot (processes, namespaces, cgroups) belongs to root and is the launcher's to reclaim; the caller
//! adds it with [`Collector::reclaimed`].

pub(crate) mod daemon;
mod deployed;
mod handovers;
mod images;
mod logs;
mod remains;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use host::fs::{Dir, EntryKind, FsError};
use serde::Serialize;

use crate::config::Config;
use crate::home::{Home, rel};
use crate::names::{ImageHash, RunId, RunnerName};
use crate::status::{STATUS_FILE, Status};

/// Longest `runner.yaml` or `status.json` that is read, bytes.
const MAX_TEXT: u64 = 4 << 20;

/// What may go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// This many snapshots, those used last, stay whoever needs them.
    pub(crate) keep_latest: usize,
    /// Nothing younger goes.
    pub(crate) young: Duration,
    /// Images and snapshots that nobody has used for so long go.
    pub(crate) images_unused: Duration,
    /// Together they may take this many bytes; beyond it those unused longest go, however young they are.
    pub(crate) images_max: Option<u64>,
    /// Logs that nobody has written to for so long go.
    pub(crate) logs_age: Duration,
    /// Together they may take this many bytes; beyond it the oldest go.
    pub(crate) logs_max: Option<u64>,
    /// Audit logs that were put aside so long ago go; `None`: they stay.
    pub(crate) audit_age: Option<Duration>,
    /// Only say what would go.
    pub(crate) dry_run: bool,
}

impl Rules {
    /// The age guard: it covers the time between a build and the start of whoever uses it.
    pub(crate) const YOUNG: Duration = Duration::from_secs(600);
}

/// What kind of thing it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// An image, with what is below it.
    Image,
    /// A snapshot of an image.
    Snapshot,
    /// What a build that died left.
    Staging,
    /// A log.
    Log,
    /// A deployed runner that nobody starts any more, or part of a deploy that broke off.
    Deployed,
    /// The directory of a daemon that is gone.
    Instance,
    /// The lock of something that is gone.
    Lock,
    /// Secrets that a killed process left in shared memory.
    Handover,
    /// The slot of a dead runner, with its processes, network and cgroup.
    Slot,
}

impl Kind {
    /// Its name, for people and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Snapshot => "snapshot",
            Self::Staging => "staging",
            Self::Log => "log",
            Self::Deployed => "deployed",
            Self::Instance => "instance",
            Self::Lock => "lock",
            Self::Handover => "handover",
            Self::Slot => "slot",
        }
    }
}

/// Something that went, or would go.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Removed {
    /// What it is.
    pub(crate) kind: Kind,
    /// Where, below the home; of a slot its number, of secrets the whole path.
    pub(crate) path: PathBuf,
    /// What it takes on the disk, bytes.
    pub(crate) bytes: u64,
    /// How long nobody has used it, seconds.
    pub(crate) age_secs: u64,
}

/// Something that stays although it is old.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Kept {
    /// What it is.
    pub(crate) kind: Kind,
    /// Where, below the home.
    pub(crate) path: PathBuf,
    /// Why.
    pub(crate) why: &'static str,
}

/// Something that could not be removed or looked at.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Failed {
    /// What it is.
    pub(crate) kind: Kind,
    /// A sentence with its path.
    pub(crate) error: String,
}

/// What became of it all.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Report {
    /// Nothing was touched; `removed` is what would have gone.
    pub(crate) dry_run: bool,
    /// What went.
    pub(crate) removed: Vec<Removed>,
    /// Images and snapshots that stay.
    pub(crate) kept: Vec<Kept>,
    /// What did not work.
    pub(crate) failed: Vec<Failed>,
}

impl Report {
    /// Bytes of all that went.
    pub(crate) fn bytes(&self) -> u64 {
        self.removed.iter().map(|one| one.bytes).sum()
    }
}

/// One run over a home.
pub(crate) struct Collector<'a> {
    home: &'a Home,
    /// Where secrets are handed over.
    handovers: PathBuf,
    rules: Rules,
    now: SystemTime,
    report: Report,
}

/// Collects everything in a home that its owner may remove.
pub(crate) fn collect(home: &Home, rules: Rules) -> Collector<'_> {
    collect_with(home, host::handover::PLACE.into(), rules)
}

fn collect_with(home: &Home, handovers: PathBuf, rules: Rules) -> Collector<'_> {
    let mut collector = Collector {
        home,
        handovers,
        rules,
        now: SystemTime::now(),
        report: Report {
            dry_run: rules.dry_run,
            ..Report::default()
        },
    };
    for (kind, part) in [
        (
            Kind::Image,
            images::collect as fn(&mut Collector<'_>) -> Result<(), FsError>,
        ),
        (Kind::Instance, remains::instances),
        (Kind::Lock, remains::locks),
        (Kind::Log, logs::collect),
        (Kind::Deployed, deployed::collect),
        (Kind::Handover, handovers::collect),
    ] {
        if let Err(error) = part(&mut collector) {
            collector.failed(kind, &error);
        }
    }
    collector
}

impl Collector<'_> {
    /// Adds slots that the launcher reclaimed, or would.
    pub(crate) fn reclaimed(&mut self, slots: impl IntoIterator<Item = String>) {
        let removed = slots.into_iter().map(|slot| Removed {
            kind: Kind::Slot,
            path: slot.into(),
            bytes: 0,
            age_secs: 0,
        });
        self.report.removed.extend(removed);
    }

    /// What became of it.
    pub(crate) fn finish(self) -> Report {
        self.report
    }

    /// Tells a failure and goes on.
    pub(crate) fn failed(&mut self, kind: Kind, error: &dyn std::fmt::Display) {
        self.report.failed.push(Failed {
            kind,
            error: error.to_string(),
        });
    }

    fn kept(&mut self, kind: Kind, path: &Path, why: &'static str) {
        self.report.kept.push(Kept {
            kind,
            path: path.to_owned(),
            why,
        });
    }

    /// Removes one thing, unless this is only a rehearsal; true if it is, or would be, gone.
    fn remove(
        &mut self,
        kind: Kind,
        path: &Path,
        bytes: u64,
        used: SystemTime,
        how: impl FnOnce() -> Result<(), FsError>,
    ) -> bool {
        if !self.rules.dry_run
            && let Err(error) = how()
        {
            self.failed(kind, &error);
            return false;
        }
        self.report.removed.push(Removed {
            kind,
            path: path.to_owned(),
            bytes,
            age_secs: self.age(used).as_secs(),
        });
        true
    }

    /// How long ago; something of the future, after the clock was set back, is new.
    fn age(&self, then: SystemTime) -> Duration {
        self.now.duration_since(then).unwrap_or_default()
    }

    fn is_young(&self, used: SystemTime) -> bool {
        self.age(used) < self.rules.young
    }

    /// A directory of the home, if it is there.
    fn dir(&self, rel: impl AsRef<Path>) -> Result<Option<Dir>, FsError> {
        match self.home.dir().open_dir(rel) {
            Err(error) if error.is_not_found() => Ok(None),
            other => other.map(Some),
        }
    }

    /// The runners that have a directory.
    fn runners(&self) -> Result<Vec<RunnerName>, FsError> {
        let Some(runners) = self.dir(rel::RUNNERS)? else {
            return Ok(Vec::new());
        };
        let names = runners.list()?.into_iter();
        Ok(names
            .filter_map(|entry| entry.name.to_str()?.parse().ok())
            .collect())
    }

    /// What configurations name. An error if one cannot be understood: it may name anything.
    fn configured(&self) -> Result<BTreeSet<(ImageHash, ImageHash)>, String> {
        let mut named = BTreeSet::new();
        for runner in self.runners().map_err(|error| error.to_string())? {
            let path = rel::runner_yaml(&runner);
            let bytes = match self.home.dir().read_bounded(&path, MAX_TEXT) {
                Err(error) if error.is_not_found() => continue,
                other => other.map_err(|error| error.to_string())?,
            };
            let config = std::str::from_utf8(&bytes)
                .map_err(|error| error.to_string())
                .and_then(|text| Config::parse(text).map_err(|error| error.to_string()))
                .map_err(|error| {
                    format!(
                        "no image is removed, because {} may name any: {error}",
                        self.home.at(&path).display()
                    )
                })?;
            for profile in config.profiles.into_values() {
                named.insert((profile.rootfs_hash, profile.snapshot_hash));
            }
        }
        Ok(named)
    }

    /// Runs that are active in some daemon of this home, by their status.
    fn active(&self) -> Result<BTreeSet<RunId>, FsError> {
        let mut active = BTreeSet::new();
        for runner in self.runners()? {
            let Some(instances) = self.dir(rel::instances(&runner))? else {
                continue;
            };
            for entry in instances.list()? {
                let dir = Path::new(&entry.name);
                if !instances.is_locked(dir.join("lock")).unwrap_or(true) {
                    continue;
                }
                if let Ok(bytes) = instances.read_bounded(dir.join(STATUS_FILE), MAX_TEXT)
                    && let Ok(status) = serde_json::from_slice::<Status>(&bytes)
                {
                    active.extend(status.active_runs.iter().map(|run| run.run_id));
                }
            }
        }
        Ok(active)
    }
}

/// When something was last written, if it is there.
fn modified(dir: &Dir, rel: impl AsRef<Path>) -> Option<SystemTime> {
    dir.metadata(rel).ok()??.modified().ok()
}

/// What a file or a whole tree takes on the disk, bytes; what cannot be looked at counts nothing.
fn size(dir: &Dir, rel: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(Some(meta)) = dir.metadata(rel) else {
        return 0;
    };
    let own = meta.blocks().saturating_mul(512);
    if !meta.is_dir() {
        return own;
    }
    let Ok(inner) = dir.open_dir(rel) else {
        return own;
    };
    let below = inner.list().unwrap_or_default();
    below
        .iter()
        .map(|entry| match entry.kind {
            EntryKind::Dir | EntryKind::File => size(&inner, Path::new(&entry.name)),
            EntryKind::Other => 0,
        })
        .fold(own, u64::saturating_add)
}
