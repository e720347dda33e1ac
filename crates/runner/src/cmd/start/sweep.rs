//! Directories of instances that are gone.

use std::ffi::OsStr;
use std::path::Path;

use host::fs::Dir;

/// Removes what instances that are gone left, but the one whose status people may still want to read.
pub(super) fn sweep(instances: &Dir, shown: Option<&OsStr>) {
    let Ok(entries) = instances.list() else {
        return;
    };
    for entry in entries {
        let lock = Path::new(&entry.name).join("lock");
        if shown == Some(&entry.name) || instances.is_locked(&lock).unwrap_or(true) {
            continue;
        }
        if let Err(error) = instances.remove_tree(&entry.name) {
            tracing::warn!(%error, "what a dead instance left cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use host::fs::LockKind;

    use super::*;
    use crate::home::{Home, rel};
    use crate::status::STATUS_FILE;

    #[test]
    fn a_dead_instance_goes_but_for_the_one_whose_status_is_shown() {
        let top = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&top.path().join("home")).unwrap();
        let name = "demo".parse().unwrap();
        let instances = home.ensure_dir(rel::instances(&name)).unwrap();
        let make = |instance: &str| {
            let dir = instances.create_dir(instance, 0o700).unwrap();
            std::fs::write(dir.path().join(STATUS_FILE), "{}").unwrap();
            dir.lock("lock", LockKind::Exclusive, 0o600).unwrap()
        };
        let _alive = make("alive");
        drop([make("shown"), make("dead")]);
        let link = home.at(rel::runner(&name).join(STATUS_FILE));
        std::os::unix::fs::symlink("instances/shown/status.json", &link).unwrap();
        sweep(&instances, home.shown_instance(&name).as_deref());
        let left = instances.list().unwrap();
        let mut left: Vec<_> = left.into_iter().map(|entry| entry.name).collect();
        left.sort();
        assert_eq!(left, ["alive", "shown"]);
        assert!(link.exists());
    }
}
