//! The checks, each a small function of the host.

use std::path::Path;
use std::sync::Arc;

use host::cgroup::Cgroups;
use host::fs::{Dir, Space};
use sandbox_qemu::QemuEngine;

use super::{Check, Outcome, Subject, engines};
use crate::cmd::setup;
use crate::image::{self, GuestBinaries, ImageError, Store, StoredSnapshot, Tool};
use crate::names::ImageHash;

/// All of them, in the order in which somebody would fix them.
pub(super) const ALL: &[Check] = &[
    Check {
        name: "privileges",
        run: privileges,
    },
    Check {
        name: "kernel",
        run: kernel,
    },
    Check {
        name: "packages",
        run: packages,
    },
    Check {
        name: "kvm",
        run: engines::kvm,
    },
    Check {
        name: "qemu",
        run: engines::qemu,
    },
    Check {
        name: "firecracker",
        run: engines::firecracker,
    },
    Check {
        name: "engine",
        run: engines::choice,
    },
    Check {
        name: "package sources",
        run: package_sources,
    },
    Check {
        name: "cgroups",
        run: cgroups,
    },
    Check {
        name: "memory",
        run: memory,
    },
    Check {
        name: "home",
        run: home,
    },
    Check {
        name: "disk space",
        run: disk_space,
    },
    Check {
        name: "guest binaries",
        run: guest_binaries,
    },
    Check {
        name: "image",
        run: built,
    },
    Check {
        name: "leftovers",
        run: leftovers,
    },
];

fn privileges(_: &Subject<'_>) -> Outcome {
    if rustix::process::geteuid().is_root() {
        Outcome::pass("this is root")
    } else if Tool::exists("sudo") {
        Outcome::warn(
            "this is not root; `build` and `start` need it, `submit`, `exec` and `logs` do not",
            "run those with sudo",
        )
    } else {
        Outcome::fail(
            "this is not root, and there is no sudo",
            "log in as root, or install sudo",
        )
    }
}

fn kernel(_: &Subject<'_>) -> Outcome {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    // openat2, pidfd_open and close_range: all there since 5.9; 5.10 is the oldest that anybody still maintains.
    if version(&release).is_some_and(|found| found >= (5, 10)) {
        Outcome::pass(format_args!("Linux {release}"))
    } else {
        Outcome::fail(
            format_args!("Linux {release} is too old: 5.10 or later is needed"),
            "upgrade the host's system",
        )
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn packages(subject: &Subject<'_>) -> Outcome {
    let missing = setup::missing(
        &[subject.profile.profile.flavour],
        subject.wants_firecracker(),
    );
    if missing.is_empty() {
        return Outcome::pass("everything is installed");
    }
    let names = setup::packages(&missing).join(", ");
    Outcome::fail(
        format_args!("missing: {names}"),
        format_args!("sudo runner setup --profile {}", subject.profile.name),
    )
}

fn package_sources(_: &Subject<'_>) -> Outcome {
    match image::host_suite() {
        Ok(suite) => Outcome::pass(format_args!("images are built from {suite}")),
        Err(error) => Outcome::fail(
            &error,
            error
                .hint()
                .unwrap_or_else(|| "use Debian 12 or Ubuntu 22.04 or later".to_owned()),
        ),
    }
}

fn cgroups(_: &Subject<'_>) -> Outcome {
    let cgroups = Cgroups::detect();
    let support = cgroups.support();
    if support.is_complete() {
        Outcome::pass(support)
    } else {
        Outcome::warn(
            format_args!(
                "{support}; what is missing cannot be limited, so one VM can starve the others"
            ),
            "mount the cgroup2 file system with these controllers (systemd does)",
        )
    }
}

fn memory(subject: &Subject<'_>) -> Outcome {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(available) = meminfo_mb(&text, "MemAvailable") else {
        return Outcome::warn(
            "/proc/meminfo says nothing of available memory",
            "mount /proc",
        );
    };
    let needed = subject.profile.profile.memory_mb;
    let name = &subject.profile.name;
    if available >= needed.saturating_mul(2) {
        Outcome::pass(format_args!(
            "{available} MiB are available, a VM of {name} has {needed}"
        ))
    } else if available >= needed {
        Outcome::warn(
            format_args!(
                "{available} MiB are available: enough for one VM of {name} ({needed} MiB)"
            ),
            "free some memory, or use a smaller profile",
        )
    } else {
        Outcome::fail(
            format_args!("{available} MiB are available, a VM of {name} has {needed}"),
            "free some memory, or use a smaller profile",
        )
    }
}

/// A line of /proc/meminfo, MiB.
fn meminfo_mb(text: &str, key: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

fn home(subject: &Subject<'_>) -> Outcome {
    let path = &subject.home;
    if !path.exists() {
        return Outcome::pass(format_args!(
            "{} will be made when it is needed",
            path.display()
        ));
    }
    match subject.context.home() {
        Ok(home) => Outcome::pass(format_args!(
            "{} belongs to uid {} alone",
            path.display(),
            home.owner().uid
        )),
        Err(error) => Outcome::fail(
            &error,
            "use another home with --home DIR, or correct its owner and mode",
        ),
    }
}

fn disk_space(subject: &Subject<'_>) -> Outcome {
    // The nearest directory that exists, where the home is still to be made.
    let existing = subject
        .home
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let free_mb = match Space::of(existing) {
        Ok(space) => space.free_mb(),
        Err(error) => {
            return Outcome::fail(
                format_args!("{}: {error}", existing.display()),
                "use another home with --home DIR",
            );
        }
    };
    let profile = subject.profile.profile;
    let needed = profile
        .flavour
        .build_space_mb()
        .saturating_add(profile.memory_mb);
    let found = format!("{free_mb} MiB are free in {}", existing.display());
    if free_mb >= needed {
        Outcome::pass(found)
    } else {
        Outcome::warn(
            format_args!(
                "{found}; building {} takes about {needed}",
                subject.profile.name
            ),
            "free some space, or use a home elsewhere with --home DIR",
        )
    }
}

fn guest_binaries(_: &Subject<'_>) -> Outcome {
    if GuestBinaries::are_embedded() {
        Outcome::pass("this runner carries them")
    } else {
        Outcome::fail(
            "this runner was built without them",
            "build it with scripts/build.sh",
        )
    }
}

fn built(subject: &Subject<'_>) -> Outcome {
    let name = &subject.profile.name;
    let build = format!("sudo runner build --profile {}", subject.profile);
    if !subject.home.join(crate::home::rel::IMAGES).is_dir() {
        return Outcome::fail(format_args!("{name} has not been built"), &build);
    }
    let home = match subject.context.home() {
        Ok(home) => home,
        Err(error) => return Outcome::fail(&error, "use another home with --home DIR"),
    };
    let (rootfs, snapshot) =
        match image::newest_build(&home, &subject.profile.profile, subject.engine) {
            Ok(Some(newest)) => newest,
            Ok(None) => return Outcome::fail(format_args!("{name} has not been built"), &build),
            Err(error) => return Outcome::fail(&error, &build),
        };
    let verified = Store::open(Arc::new(home))
        .map_err(ImageError::from)
        .and_then(|store| store.snapshot(&rootfs, &snapshot));
    let qemu = QemuEngine::probe().qemu.map(|qemu| qemu.version);
    match (verified, qemu) {
        (Ok(found), Ok(version)) if made_with(&found).is_some_and(|made| *made != version) => {
            Outcome::fail(
                format_args!(
                    "{name}: its snapshot was made with another QEMU than this host's {version}"
                ),
                &build,
            )
        }
        (Ok(found), _) => Outcome::pass(format_args!(
            "{name}: image {}, snapshot {}, every byte as built ({})",
            short(&rootfs),
            short(&snapshot),
            found.manifest.built_at
        )),
        (Err(error), _) => Outcome::fail(&error, &build),
    }
}

/// The QEMU a snapshot was made with; it can be restored by no other.
fn made_with(snapshot: &StoredSnapshot) -> Option<&String> {
    snapshot.outcome.facts.get("qemu_version")
}

fn short(hash: &ImageHash) -> &str {
    hash.as_str().get(..12).unwrap_or_default()
}

fn leftovers(subject: &Subject<'_>) -> Outcome {
    if !subject.home.exists() {
        return Outcome::pass("none");
    }
    let found = Dir::open(&subject.home).and_then(|home| image::abandoned(&home));
    match found {
        Ok(found) if found.is_empty() => Outcome::pass("none"),
        Ok(found) => {
            let names: Vec<_> = found
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            Outcome::warn(
                format_args!("interrupted builds left {}", names.join(", ")),
                format_args!(
                    "sudo runner build --profile {} (the next build removes them)",
                    subject.profile
                ),
            )
        }
        Err(error) => Outcome::warn(&error, "look as root: sudo runner doctor"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_compared_as_numbers() {
        assert_eq!(version("6.1.0-56-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("5.4-rc1"), Some((5, 4)));
        assert!(version("5.4.0") < Some((5, 10)));
        assert_eq!(version("strange"), None);
    }

    #[test]
    fn memory_is_read_from_meminfo() {
        let text = "MemTotal:       24684000 kB\nMemAvailable:    2048000 kB\n";
        assert_eq!(meminfo_mb(text, "MemAvailable"), Some(2000));
        assert_eq!(meminfo_mb(text, "MemNothing"), None);
    }
}
