//! Snapshots that are not what they should be, and guests that do not come up: each is an error with its reason, and
//! leaves a slot in which the next VM starts.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use sandbox::conformance::harness::{Quiet, snapshot_inputs};
use sandbox::{Engine, ImageFiles, Place, SandboxError, SnapshotOutcome};
use sandbox_firecracker::{FirecrackerEngine, Options, Programs};

use super::{Failure, SHAPE, Suite};

type Case = for<'a> fn(&'a Suite) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + 'a>>;

pub(crate) const CASES: &[(&str, Case)] = &[
    ("a state file that was cut off is refused", |suite| {
        Box::pin(refused(suite, |state| state.truncate(state.len() / 2)))
    }),
    ("a state file that was changed is refused", |suite| {
        Box::pin(refused(suite, |state| {
            let middle = state.len() / 2;
            for byte in state.iter_mut().skip(middle).take(64) {
                *byte = !*byte;
            }
        }))
    }),
    ("an empty state file is refused", |suite| {
        Box::pin(refused(suite, Vec::clear))
    }),
    ("a memory file that was cut off is refused", |suite| {
        Box::pin(short_memory(suite))
    }),
    ("a snapshot of another version or CPU is refused", |suite| {
        Box::pin(foreign(suite))
    }),
    (
        "a guest that does not answer in time is ended with what is known",
        |suite| Box::pin(silent(suite)),
    ),
    (
        "a VM that stands still from its load on is ended at the limit",
        |suite| Box::pin(stands_still(suite)),
    ),
    (
        "a disk that is full when a snapshot is saved is told, and leaves nothing running",
        |suite| Box::pin(full_disk(suite)),
    ),
    (
        "a kernel that is replaced under an open template changes nothing",
        |suite| Box::pin(replaced_kernel(suite)),
    ),
];

/// The snapshot in a directory of its own, with a changed state file; the other files are the very same.
fn copy(suite: &Suite, change: impl FnOnce(&mut Vec<u8>)) -> Result<tempfile::TempDir, Failure> {
    let from = suite.snapshot.path();
    let dir = tempfile::tempdir_in(from.parent().unwrap_or(Path::new(".")))?;
    for name in ["memory", "blank.ext4"] {
        std::fs::hard_link(from.join(name), dir.path().join(name))?;
    }
    let mut state = Vec::new();
    File::open(from.join("state"))?.read_to_end(&mut state)?;
    change(&mut state);
    write(&dir.path().join("state"), &state)?;
    Ok(dir)
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    file.set_permissions(mode)
}

async fn open_error(suite: &Suite, dir: &Path, outcome: &SnapshotOutcome) -> Option<SandboxError> {
    let opened = suite.engine.open(suite.image.clone(), SHAPE, dir, outcome);
    opened.await.err()
}

async fn refused(suite: &Suite, change: fn(&mut Vec<u8>)) -> Result<(), Failure> {
    let dir = copy(suite, change)?;
    let engine = &suite.engine;
    let template = engine
        .open(suite.image.clone(), SHAPE, dir.path(), &suite.outcome)
        .await?;
    let slot = suite.slots.take().await?;
    let restored = template.restore(Place::unplugged(slot)).await;
    let outcome = match restored {
        Ok(vm) => {
            vm.destroy().await?;
            Err("a broken snapshot was restored".into())
        }
        Err(error) if error.to_string().contains("/snapshot/load was refused") => Ok(()),
        Err(error) => Err(error.to_string().into()),
    };
    // Nothing runs in it: it takes another at once.
    let again = template.restore(Place::unplugged(slot)).await;
    suite.slots.give_back(slot).await?;
    match again {
        Err(SandboxError::Launcher(error)) => Err(error.into()),
        _ => outcome,
    }
}

async fn short_memory(suite: &Suite) -> Result<(), Failure> {
    let dir = copy(suite, |_| {})?;
    let path = dir.path().join("memory");
    std::fs::remove_file(&path)?;
    write(&path, &[0; 4096])?;
    match open_error(suite, dir.path(), &suite.outcome).await {
        Some(SandboxError::BadImage { reason, .. }) if reason.contains("bytes of memory") => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

async fn foreign(suite: &Suite) -> Result<(), Failure> {
    for fact in ["firecracker_version", "cpu"] {
        let mut outcome = suite.outcome.clone();
        outcome.facts.insert(fact.to_owned(), "another".to_owned());
        match open_error(suite, suite.snapshot.path(), &outcome).await {
            Some(SandboxError::BadImage { reason, .. }) if reason.contains("another") => {}
            other => return Err(format!("{fact}: {other:?}").into()),
        }
    }
    Ok(())
}

async fn silent(suite: &Suite) -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let options = Options {
        // Less than any guest needs.
        restore_limit: Duration::from_millis(1),
        ..suite.options.clone()
    };
    let engine = FirecrackerEngine::new(suite.launcher.clone(), Programs::find(&path)?, options);
    let template = engine
        .open(
            suite.image.clone(),
            SHAPE,
            suite.snapshot.path(),
            &suite.outcome,
        )
        .await?;
    let slot = suite.slots.take().await?;
    for _ in 0..2 {
        match template.restore(Place::unplugged(slot)).await {
            Err(SandboxError::Timeout { .. }) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Err("it came up in a millisecond".into()),
        }
    }
    suite.slots.give_back(slot).await?;
    Ok(())
}

/// The process of a slot, once it loads its snapshot: its vsock is there then.
fn loaded(uid: u32) -> Option<u32> {
    let pids = std::fs::read_dir("/proc").ok()?.flatten();
    let of_slot = pids.filter(|entry| entry.metadata().is_ok_and(|meta| meta.uid() == uid));
    of_slot
        .filter(|entry| entry.path().join("root/control/vsock.sock").exists())
        .find_map(|entry| entry.file_name().to_str()?.parse().ok())
}

async fn stands_still(suite: &Suite) -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let options = Options {
        // Enough for the load, and the silence is waited for.
        restore_limit: Duration::from_secs(5),
        ..suite.options.clone()
    };
    let engine = FirecrackerEngine::new(suite.launcher.clone(), Programs::find(&path)?, options);
    let image = suite.image.clone();
    let snapshot = suite.snapshot.path();
    let template = engine.open(image, SHAPE, snapshot, &suite.outcome).await?;
    let slot = suite.slots.take().await?;
    let uid = suite.uid_base + u32::from(slot.0);
    let silence = async {
        while loaded(uid).is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        suite.launcher.freeze(slot).await
    };
    let restore = template.restore(Place::unplugged(slot));
    let (restored, frozen) = tokio::join!(restore, tokio::time::timeout(suite.patience, silence));
    frozen??;
    match restored {
        // How far it got until it was stopped is a matter of milliseconds.
        Err(SandboxError::Timeout { step, .. })
            if ["load and resume", "handshake", "mount"].contains(&step) => {}
        Err(error) => return Err(error.into()),
        Ok(_) => return Err("a VM that stood still came up".into()),
    }
    // Its slot serves the next.
    let vm = suite.template.restore(Place::unplugged(slot)).await?;
    vm.control().ping().await?;
    vm.destroy().await?;
    suite.slots.give_back(slot).await?;
    Ok(())
}

async fn full_disk(suite: &Suite) -> Result<(), Failure> {
    let from = suite.snapshot.path();
    let dir = tempfile::tempdir_in(from.parent().unwrap_or(Path::new(".")))?;
    // Room for the blank disk and a part of the memory; the mount is this process's.
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=32m", "tmpfs"])
        .arg(dir.path())
        .status()?;
    if !mounted.success() {
        return Err(format!("mount: {mounted}").into());
    }
    let inputs = snapshot_inputs(suite.image.clone(), SHAPE, dir.path(), suite.patience);
    let slot = suite.slots.take().await?;
    let saved = suite.engine.create_snapshot(slot, inputs, &Quiet).await;
    let error = saved.err().ok_or("256 MiB were saved in 32")?.to_string();
    println!("     {error}");
    let vm = suite.template.restore(Place::unplugged(slot)).await?;
    vm.destroy().await?;
    suite.slots.give_back(slot).await?;
    let unmounted = std::process::Command::new("umount")
        .arg(dir.path())
        .status()?;
    if !unmounted.success() {
        return Err(format!("umount: {unmounted}").into());
    }
    match error.contains("No space left") || error.contains("os error 28") {
        true => Ok(()),
        false => Err(error.into()),
    }
}

async fn replaced_kernel(suite: &Suite) -> Result<(), Failure> {
    let from = suite.image.kernel.parent().unwrap_or(Path::new("."));
    let dir = tempfile::tempdir_in(from)?;
    let linked = |path: &Path| -> std::io::Result<PathBuf> {
        let to = dir.path().join(path.file_name().unwrap_or_default());
        std::fs::hard_link(path, &to)?;
        Ok(to)
    };
    let image = ImageFiles {
        kernel: linked(&suite.image.kernel)?,
        initrd: linked(&suite.image.initrd)?,
        rootfs: linked(&suite.image.rootfs)?,
    };
    let snapshot = suite.snapshot.path();
    let opened = suite
        .engine
        .open(image.clone(), SHAPE, snapshot, &suite.outcome);
    let template = opened.await?;
    for file in [&image.kernel, &image.initrd] {
        std::fs::remove_file(file)?;
        write(file, b"another")?;
    }
    let slot = suite.slots.take().await?;
    let vm = template.restore(Place::unplugged(slot)).await?;
    vm.control().ping().await?;
    vm.destroy().await?;
    suite.slots.give_back(slot).await?;
    Ok(())
}
