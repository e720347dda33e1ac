//! Firecracker, its jailer and its guest kernel below `firecracker/<version>-<hash>/`, made by `runner setup`.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use host::fs::{Access, Dir, Lock, LockKind};
use serde::{Deserialize, Serialize};

use super::download::{Downloader, Limits, copy, hash, part_name};
use super::pins::{Origin, Pins, Sha256Hex};
use super::source::{Place, Source, archive_name, kernel_name};
use super::{FirecrackerError, archive};
use crate::home::{Home, rel};
use crate::image::Steps;

/// Names of the installed files.
pub(super) const FIRECRACKER: &str = "firecracker";
pub(super) const JAILER: &str = "jailer";
const KERNEL: &str = "vmlinux";
const MANIFEST: &str = "manifest.json";
/// Which directory is current, written last.
const CURRENT: &str = "current";
/// Unfinished downloads.
const PARTS: &str = ".download";
const STAGING: &str = ".staging";
/// Largest manifest, bytes.
const MAX_MANIFEST: u64 = 64 << 10;
/// How often a set-up that waits for another looks again.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// What an installation says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    origin: Origin,
    pins: Pins,
    /// RFC 3339.
    installed_at: String,
    /// The runner that installed it.
    runner: String,
}

/// Files that are there and are what was pinned.
#[derive(Clone, Debug)]
pub(crate) struct Installed {
    directory: PathBuf,
    pins: Pins,
    origin: Origin,
}

impl Installed {
    /// The program that runs a VM.
    pub(crate) fn firecracker(&self) -> PathBuf {
        self.directory.join(FIRECRACKER)
    }

    /// The program that confines it.
    pub(crate) fn jailer(&self) -> PathBuf {
        self.directory.join(JAILER)
    }

    /// Firecracker's version.
    pub(crate) fn version(&self) -> &str {
        self.pins.version.as_str()
    }

    /// What was pinned.
    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    /// The pins are the operator's own, not this runner's.
    pub(crate) fn is_own_build(&self) -> bool {
        self.origin == Origin::Own
    }

    /// The guest kernel, whose content is compared with its pin now.
    pub(crate) fn kernel(&self) -> Result<File, FirecrackerError> {
        let directory = Dir::open(&self.directory)?;
        verified(&directory, KERNEL, &self.pins.kernel_sha256)
    }
}

#[cfg(test)]
impl Installed {
    /// Nothing of it is on any disk.
    pub(crate) fn for_tests() -> Self {
        Self {
            directory: "/nowhere".into(),
            pins: Pins::built_in().unwrap(),
            origin: Origin::BuiltIn,
        }
    }

    /// The same with other words on the kernel's command line.
    pub(crate) fn with_args(mut self, args: &str) -> Self {
        self.pins.kernel_args = args.to_owned();
        self
    }
}

/// What is installed for a home. Both programs are compared with their pins.
pub(crate) fn find(home: &Home) -> Result<Installed, FirecrackerError> {
    let absent = |error: host::fs::FsError| match error.is_not_found() {
        true => FirecrackerError::NotInstalled,
        false => error.into(),
    };
    let base = home.dir().open_dir(rel::FIRECRACKER).map_err(absent)?;
    let name = base.read_bounded(CURRENT, 256).map_err(absent)?;
    let name = String::from_utf8_lossy(&name).into_owned();
    let found = at(&base, name.trim()).map_err(|error| match error {
        FirecrackerError::Fs(error) => absent(error),
        other => other,
    })?;
    if let Some(wanted) = Pins::built_in()
        && found.origin == Origin::BuiltIn
        && found.pins != wanted
    {
        return Err(FirecrackerError::OtherVersion {
            found: found.pins.version.to_string(),
            wanted: wanted.version.to_string(),
        });
    }
    Ok(found)
}

/// The installation in a directory, verified.
fn at(base: &Dir, name: &str) -> Result<Installed, FirecrackerError> {
    let directory = base.open_dir(name)?;
    let bytes = directory.read_bounded(MANIFEST, MAX_MANIFEST)?;
    // Written whole and renamed with the rest: one that cannot be read is as good as none.
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|_| FirecrackerError::NotInstalled)?;
    let pins = manifest.pins;
    verified(&directory, FIRECRACKER, &pins.firecracker_sha256)?;
    verified(&directory, JAILER, &pins.jailer_sha256)?;
    Ok(Installed {
        directory: directory.path().to_owned(),
        pins,
        origin: manifest.origin,
    })
}

/// An installed file that is what was pinned, at its beginning.
fn verified(directory: &Dir, name: &str, pin: &Sha256Hex) -> Result<File, FirecrackerError> {
    let path = directory.display_path(name);
    let mut file = directory.open_file(name, Access::Read)?;
    let found = hash(&file, &path)?;
    if found != pin.as_str() {
        return Err(FirecrackerError::Damaged {
            path,
            found,
            expected: pin.to_string(),
        });
    }
    file.rewind()
        .map_err(|source| FirecrackerError::Local { path, source })?;
    Ok(file)
}

/// Makes what is missing or damaged of it; `own` are pins to use instead of this runner's.
pub(crate) async fn ensure(
    home: &Home,
    own: Option<Pins>,
    source: &Source,
    steps: &Steps,
) -> Result<Installed, FirecrackerError> {
    ensure_within(home, own, source, steps, Limits::default()).await
}

async fn ensure_within(
    home: &Home,
    own: Option<Pins>,
    source: &Source,
    steps: &Steps,
    limits: Limits,
) -> Result<Installed, FirecrackerError> {
    let (pins, origin) = match own {
        Some(pins) => (pins, Origin::Own),
        None => {
            let pins = Pins::built_in();
            let arch = FirecrackerError::Architecture(std::env::consts::ARCH);
            (pins.ok_or(arch)?, Origin::BuiltIn)
        }
    };
    let base = home.ensure_dir(rel::FIRECRACKER)?;
    let _lock = lock(&base, steps).await?;
    let name = pins.directory();
    let there = at(&base, &name).and_then(|found| {
        found.kernel()?;
        Ok(found)
    });
    let usable = match there {
        Ok(found) => found.origin == origin,
        Err(FirecrackerError::Fs(error)) if error.is_not_found() => false,
        Err(error) => {
            steps.note(&format!("{error}; fetching it anew"));
            false
        }
    };
    if !usable {
        make(home, &base, &name, (&pins, origin), source, steps, limits).await?;
    }
    let before = base.read_bounded(CURRENT, 256).unwrap_or_default();
    base.write_atomic(CURRENT, 0o644, name.as_bytes())?;
    sweep(&base, &String::from_utf8_lossy(&before), &name);
    at(&base, &name)
}

/// One set-up at a time; waits for another, and says so.
async fn lock(base: &Dir, steps: &Steps) -> Result<Lock, FirecrackerError> {
    let mut told = false;
    loop {
        if let Some(lock) = base.try_lock("lock", LockKind::Exclusive, 0o600)? {
            return Ok(lock);
        }
        if !told {
            steps.note("another `runner setup` is fetching Firecracker; waiting for it");
            told = true;
        }
        tokio::select! {
            () = tokio::time::sleep(LOCK_POLL) => {}
            () = steps.interrupted() => return Err(FirecrackerError::Interrupted),
        }
    }
}

async fn make(
    home: &Home,
    base: &Dir,
    name: &str,
    (pins, origin): (&Pins, Origin),
    source: &Source,
    steps: &Steps,
    limits: Limits,
) -> Result<(), FirecrackerError> {
    if origin == Origin::Own {
        steps.note("note: Firecracker is checked against the pins you gave, not against those of this runner");
    }
    let parts = home.ensure_dir(Path::new(rel::FIRECRACKER).join(PARTS))?;
    let downloader = Downloader::new(&parts, steps, limits)?;
    let fetch = async |what: &str, place: Place, pin: &Sha256Hex| {
        steps.begin(&format!("fetching {what}"));
        let file = match place {
            Place::Remote(url) => downloader.fetch(&url, pin).await?,
            Place::Local(path) => copy(&path, pin, &parts, limits)?,
        };
        steps.end();
        Ok::<_, FirecrackerError>(file)
    };
    let place = |place: Result<Place, String>| place.map_err(FirecrackerError::Client);
    let release = archive_name(pins);
    let mut archive = fetch(&release, place(source.archive(pins))?, &pins.archive_sha256).await?;
    let kernel = kernel_name(pins);
    fetch(&kernel, place(source.kernel(pins))?, &pins.kernel_sha256).await?;

    base.remove_tree(STAGING)?;
    let staging = base.create_new_dir(STAGING, 0o700)?;
    archive::unpack(&mut archive, pins, &staging)?;
    let kernel = part_name(&pins.kernel_sha256);
    parts.rename(&kernel, &staging, KERNEL)?;
    // What is named here is what was verified: the name could have been given to another file meanwhile.
    let file = verified(&staging, KERNEL, &pins.kernel_sha256)?;
    let path = staging.display_path(KERNEL);
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o644))
        .map_err(std::io::Error::from)
        .and_then(|()| file.sync_all())
        .map_err(FirecrackerError::write(path))?;
    let manifest = Manifest {
        origin,
        pins: pins.clone(),
        installed_at: jiff::Timestamp::now().to_string(),
        runner: crate::cli::VERSION.to_owned(),
    };
    write_manifest(&staging, &manifest)?;
    // The daemon, which is the home's owner, reads all of it.
    staging.set_mode(0o755)?;
    staging.sync()?;
    base.remove_tree(name)?;
    base.rename(STAGING, base, name)?;
    base.sync()?;
    Ok(())
}

fn write_manifest(staging: &Dir, manifest: &Manifest) -> Result<(), FirecrackerError> {
    let path = staging.display_path(MANIFEST);
    let text = serde_json::to_vec_pretty(manifest)
        .map_err(|error| FirecrackerError::write(path.clone())(error.into()))?;
    let mut file = staging.open_file(MANIFEST, Access::CreateNew { mode: 0o644 })?;
    file.write_all(&text)
        .and_then(|()| file.sync_all())
        .map_err(FirecrackerError::write(path))
}

/// Removes downloads, which are used up or of another version, and versions before the last two: VMs of a runner that was
/// not started anew yet come from the one before.
fn sweep(base: &Dir, before: &str, current: &str) {
    let _ = base.remove_tree(PARTS);
    let Ok(entries) = base.list() else {
        return;
    };
    for entry in entries {
        let Some(name) = entry.name.to_str() else {
            continue;
        };
        if name.contains('-') && before != current && name != before && name != current {
            let _ = base.remove_tree(name);
        }
    }
}

#[cfg(test)]
#[path = "install_tests.rs"]
mod tests;
