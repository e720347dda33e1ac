//! Slot files and the host lock around them. Root only: the launcher's side.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{HostLimits, HostUsage, LeaseKind, Resources, SLOTS, SlotId, SlotRecord, admit};
use crate::fs::{Access, Dir, FsError, Lock, LockKind};

/// File in the run directory that is replaced whenever any slot of the host changes: watch the directory for it.
pub const CHANGES_FILE: &str = "slots.json";

/// Longest slot file or list of slots that is believed, bytes.
const MAX_LIST: u64 = 4 << 20;

/// A slot somebody holds, as published in [`CHANGES_FILE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldSlot {
    /// Which.
    pub slot: SlotId,
    /// The launcher that holds it.
    pub launcher_pid: u32,
    /// What it said.
    pub record: SlotRecord,
}

/// The slots held on this host, for readers without privileges. Slots of dead launchers are left out; none where no
/// runner has run yet.
pub fn held_slots(run_dir: impl AsRef<Path>) -> Result<Vec<HeldSlot>, FsError> {
    let dir = match Dir::open(run_dir.as_ref()) {
        Err(e) if e.is_not_found() => return Ok(Vec::new()),
        other => other?,
    };
    let mut held = published(&dir)?;
    held.retain(|slot| Path::new(&format!("/proc/{}", slot.launcher_pid)).exists());
    Ok(held)
}

/// The slots that dead launchers left on this host, with what they said of themselves; none where no runner has run yet.
/// Root only.
pub fn orphaned_slots(run_dir: impl AsRef<Path>) -> Result<BTreeMap<SlotId, SlotRecord>, FsError> {
    match Dir::open(run_dir.as_ref()) {
        Err(e) if e.is_not_found() => return Ok(BTreeMap::new()),
        other => drop(other?),
    }
    let store = SlotStore::open(run_dir.as_ref())?;
    let _host = store.host_lock()?;
    let left = store.survey(&BTreeMap::new())?.left.into_iter();
    let described = left.map(|slot| {
        let file = store.slots.open_file(slot.0.to_string(), Access::Read)?;
        Ok((slot, read_record(&file)))
    });
    described.collect()
}

fn published(dir: &Dir) -> Result<Vec<HeldSlot>, FsError> {
    match dir.read_bounded(CHANGES_FILE, MAX_LIST) {
        // A list that cannot be read is rewritten with the next change.
        Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_default()),
        Err(e) if e.is_not_found() => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Why a slot was not given.
#[derive(Debug)]
pub(crate) enum StoreError {
    NoRoom(HostUsage),
    NoSlot(u16),
    Fs(FsError),
}

impl From<FsError> for StoreError {
    fn from(error: FsError) -> StoreError {
        StoreError::Fs(error)
    }
}

/// A slot we hold.
#[derive(Debug)]
pub(crate) struct Holding {
    lock: Lock,
    pub(crate) record: SlotRecord,
}

/// The host's slots, seen from one launcher.
#[derive(Debug)]
pub(crate) struct SlotStore {
    run_dir: Dir,
    slots: Dir,
    pid: u32,
}

impl SlotStore {
    /// Opens the run directory, made if missing: readable by all, writable by root only.
    pub(crate) fn open(run_dir: &Path) -> Result<SlotStore, FsError> {
        std::fs::create_dir_all(run_dir).map_err(|e| FsError::io(run_dir, "made", e))?;
        let run_dir = Dir::open(run_dir)?;
        run_dir.set_mode(0o755)?;
        run_dir.require_private(0)?;
        let slots = run_dir.create_dir("slots", 0o755)?;
        Ok(SlotStore {
            run_dir,
            slots,
            pid: std::process::id(),
        })
    }

    pub(crate) fn run_dir(&self) -> &Dir {
        &self.run_dir
    }

    fn host_lock(&self) -> Result<Lock, FsError> {
        self.run_dir.lock("lock", LockKind::Exclusive, 0o600)
    }

    /// Takes the lowest free slot if the reservation fits. `reclaim` is called, under the host lock, for every slot a
    /// dead owner left on the way, before the slot is used; a slot it cannot clean stays out of use.
    pub(crate) fn reserve(
        &self,
        record: &SlotRecord,
        limits: &HostLimits,
        ours: &BTreeMap<SlotId, SlotRecord>,
        mut reclaim: impl FnMut(SlotId) -> bool,
    ) -> Result<(SlotId, Holding), StoreError> {
        let _host = self.host_lock()?;
        let survey = self.survey(ours)?;
        admit(survey.held.values(), record, limits).map_err(StoreError::NoRoom)?;
        for number in 0..SLOTS {
            let slot = SlotId(number);
            if survey.held.contains_key(&slot) {
                continue;
            }
            if survey.left.contains(&slot) && !reclaim(slot) {
                continue;
            }
            let Some(lock) = self
                .slots
                .try_lock(number.to_string(), LockKind::Exclusive, 0o600)?
            else {
                continue;
            };
            let mut holding = Holding {
                lock,
                record: record.clone(),
            };
            holding.write()?;
            return Ok((slot, holding));
        }
        Err(StoreError::NoSlot(SLOTS))
    }

    /// Rewrites the record of a slot we hold; one that becomes firm is admitted as a new one is.
    pub(crate) fn update(
        &self,
        slot: SlotId,
        holding: &mut Holding,
        record: SlotRecord,
        limits: &HostLimits,
        ours: &BTreeMap<SlotId, SlotRecord>,
    ) -> Result<(), StoreError> {
        let _host = self.host_lock()?;
        if holding.record.kind != record.kind || holding.record.resources != record.resources {
            let mut survey = self.survey(ours)?;
            survey.held.remove(&slot);
            admit(survey.held.values(), &record, limits).map_err(StoreError::NoRoom)?;
        }
        holding.record = record;
        holding.write()?;
        Ok(())
    }

    /// Gives a slot back; its name goes before its lock.
    pub(crate) fn release(&self, slot: SlotId, holding: Holding) -> Result<(), FsError> {
        let _host = self.host_lock()?;
        self.slots.remove_file(slot.0.to_string())?;
        drop(holding.lock);
        Ok(())
    }

    /// What all held slots take.
    pub(crate) fn usage(&self, ours: &BTreeMap<SlotId, SlotRecord>) -> Result<HostUsage, FsError> {
        let _host = self.host_lock()?;
        // Whoever holds nothing has nothing that its limits leave out.
        let own = ours.values().next().map(|record| record.instance.as_str());
        let survey = self.survey(ours)?;
        Ok(HostUsage::of(survey.held.values(), own.unwrap_or_default()))
    }

    /// Calls `reclaim` for every slot a dead owner left, and forgets those it cleaned; returns their number.
    pub(crate) fn reclaim_orphans(
        &self,
        ours: &BTreeMap<SlotId, SlotRecord>,
        mut reclaim: impl FnMut(SlotId) -> bool,
    ) -> Result<u32, FsError> {
        let _host = self.host_lock()?;
        let survey = self.survey(ours)?;
        let mut count = 0_u32;
        for slot in survey.left {
            if reclaim(slot) {
                self.slots.remove_file(slot.0.to_string())?;
                count = count.saturating_add(1);
            }
        }
        Ok(count)
    }

    /// Looks at every slot file. Under the host lock, so that two launchers never mistake each other's look for a
    /// holder.
    fn survey(&self, ours: &BTreeMap<SlotId, SlotRecord>) -> Result<Survey, FsError> {
        let mut survey = Survey::default();
        for entry in self.slots.list()? {
            let Some(slot) = slot_number(&entry.name) else {
                continue;
            };
            if let Some(record) = ours.get(&slot) {
                survey.held.insert(slot, record.clone());
                continue;
            }
            let file = match self.slots.open_file(&entry.name, Access::Read) {
                Err(e) if e.is_not_found() => continue,
                other => other?,
            };
            let path = self.slots.display_path(&entry.name);
            match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => survey.left.push(slot),
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    survey.held.insert(slot, read_record(&file));
                }
                Err(e) => return Err(FsError::io(&path, "locked", e)),
            }
        }
        Ok(survey)
    }

    /// Replaces the published list. Apart from the change itself and after it was answered: admission never reads
    /// the list, and where the run directory is no tmpfs the replacement costs milliseconds.
    ///
    /// Entries of other launchers keep the pid they were published with.
    pub(crate) fn publish(&self, ours: &BTreeMap<SlotId, SlotRecord>) -> Result<(), FsError> {
        let _host = self.host_lock()?;
        let before: BTreeMap<SlotId, u32> = published(&self.run_dir)?
            .into_iter()
            .map(|entry| (entry.slot, entry.launcher_pid))
            .collect();
        let held = self.survey(ours)?.held.into_iter();
        let list: Vec<HeldSlot> = held
            .map(|(slot, record)| HeldSlot {
                slot,
                launcher_pid: match ours.contains_key(&slot) {
                    true => self.pid,
                    false => before.get(&slot).copied().unwrap_or(0),
                },
                record,
            })
            .collect();
        let text = serde_json::to_vec(&list)
            .map_err(|e| FsError::io(self.run_dir.path(), "described", e))?;
        // State of running processes: it need not survive a power cut, so it is replaced without fsync.
        self.run_dir.replace(CHANGES_FILE, 0o644, &text)
    }
}

/// What the slot files say.
#[derive(Debug, Default)]
struct Survey {
    held: BTreeMap<SlotId, SlotRecord>,
    /// A file that nobody holds: its owner died.
    left: Vec<SlotId>,
}

impl Holding {
    fn write(&mut self) -> Result<(), FsError> {
        let place = Path::new("slot record");
        let text =
            serde_json::to_vec(&self.record).map_err(|e| FsError::io(place, "described", e))?;
        let mut file = self.lock.file();
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(&text))
            .map_err(|e| FsError::io(place, "written", e))
    }
}

fn slot_number(name: &std::ffi::OsStr) -> Option<SlotId> {
    let number = name.to_str()?.parse::<u16>().ok()?;
    (number < SLOTS).then_some(SlotId(number))
}

/// A held slot's record. Its holder wrote it under the host lock, which we hold. Where it cannot be understood (its
/// holder met a full disk) it still counts as a firm slot, of unknown size.
fn read_record(file: &File) -> SlotRecord {
    let mut text = vec![0; 64 * 1024];
    let length = file.read_at(&mut text, 0).unwrap_or(0);
    serde_json::from_slice(text.get(..length).unwrap_or_default()).unwrap_or_else(|_| SlotRecord {
        instance: "unreadable".to_owned(),
        kind: LeaseKind::Firm,
        resources: Resources::default(),
        run_id: None,
        shared_mb: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TestHost;

    #[test]
    fn a_host_without_a_free_uid_says_so_and_what_cannot_be_cleaned_stays_out_of_use() {
        // Needs root: nobody else's run directory is believed.
        let Some(host) = TestHost::new() else { return };
        let store = SlotStore::open(host.run_dir()).unwrap();
        for number in 0..SLOTS {
            let file = store
                .slots
                .open_file(number.to_string(), Access::CreateNew { mode: 0o600 });
            drop(file.unwrap());
        }
        let record = SlotRecord {
            instance: "i".to_owned(),
            kind: LeaseKind::Firm,
            resources: Resources::default(),
            run_id: None,
            shared_mb: 0,
        };
        let limits = HostLimits {
            total: Resources {
                vcpu: 1,
                memory_mb: 1,
                disk_mb: 1,
            },
        };
        let ours = BTreeMap::new();
        let dirty = store.reserve(&record, &limits, &ours, |_| false);
        assert!(matches!(dirty, Err(StoreError::NoSlot(SLOTS))));
        // The last one of all can be cleaned.
        let last = SlotId(SLOTS - 1);
        let (slot, _holding) = store
            .reserve(&record, &limits, &ours, |slot| slot == last)
            .unwrap();
        assert_eq!(slot, last);
    }
}
