//! Which uid a service gets: runners that share a run directory must not share one, for everything of a uid dies with it.
//!
//! Service number *n* of the run directory is a flock on `<run-dir>/services/<n>`, held until the launcher is dead.

use std::collections::BTreeMap;

use crate::fs::{Dir, FsError, Lock, LockKind};
use crate::launcher::{SERVICES, ServiceId};

/// The numbers that this launcher's services hold.
#[derive(Debug, Default)]
pub(super) struct Services {
    held: BTreeMap<ServiceId, (u16, Lock)>,
}

impl Services {
    /// The number of a service that has one.
    pub(super) fn number(&self, service: ServiceId) -> Option<u16> {
        self.held.get(&service).map(|(number, _)| *number)
    }

    /// Gives a service the lowest number that is free and that `reclaim` can clear of what a dead owner left; keeps
    /// the one it has. `None` if there is none.
    pub(super) fn claim(
        &mut self,
        run_dir: &Dir,
        service: ServiceId,
        reclaim: impl Fn(u16) -> bool,
    ) -> Result<Option<u16>, FsError> {
        if let Some(number) = self.number(service) {
            return Ok(Some(number));
        }
        let directory = run_dir.create_dir("services", 0o755)?;
        for number in 0..SERVICES {
            let Some(lock) = directory.try_lock(number.to_string(), LockKind::Exclusive, 0o600)?
            else {
                continue;
            };
            if reclaim(number) {
                self.held.insert(service, (number, lock));
                return Ok(Some(number));
            }
        }
        Ok(None)
    }
}
