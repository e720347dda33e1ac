//! Secrets that a submitter or daemon left in shared memory for a run, and was killed over.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use host::fs::{Dir, EntryKind, FsError};
use host::handover::handed_over;

use super::{Collector, Kind, size};
use crate::names::RunId;

/// A job whose submitter was killed may still be waiting for a VM, and for its secrets.
const MAY_BE_WANTED: Duration = Duration::from_secs(3600);

/// Files that nobody holds locked: whoever left one holds it as long as they live. Those of the home's owner, and as root
/// everybody's.
pub(super) fn collect(collector: &mut Collector<'_>) -> Result<(), FsError> {
    let place = match Dir::open(&collector.handovers) {
        Err(error) if error.is_not_found() => return Ok(()),
        other => other?,
    };
    let owner = collector.home.owner().uid;
    let is_root = rustix::process::geteuid().is_root();
    for entry in place.list()? {
        let name = Path::new(&entry.name);
        let run = entry.name.to_str().and_then(handed_over);
        if entry.kind != EntryKind::File || run.is_none_or(|run| run.parse::<RunId>().is_err()) {
            continue;
        }
        // It may be taken while we look.
        let Some(meta) = place.metadata(name).ok().flatten() else {
            continue;
        };
        if !is_root && meta.uid() != owner {
            continue;
        }
        let left = meta.modified().unwrap_or(collector.now);
        let young = collector.age(left) < MAY_BE_WANTED.max(collector.rules.young);
        if young || place.is_held(name).unwrap_or(true) {
            continue;
        }
        let (bytes, path) = (size(&place, name), place.display_path(name));
        collector.remove(Kind::Handover, &path, bytes, left, || {
            place.remove_file(name).map(drop)
        });
    }
    Ok(())
}
