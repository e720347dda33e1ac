use std::collections::BTreeMap;
use std::fs;

use host::fs::LockKind;

use super::*;
use crate::image::progress::Steps;
use crate::image::staging::lock_name;

use locks::LOCK_POLL;

const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";

fn store(path: &Path) -> Store {
    fs::create_dir_all(path.join(rel::CA)).unwrap();
    fs::write(path.join(rel::CA).join("ca.pem"), CERTIFICATE).unwrap();
    Store::open(Arc::new(Home::open_or_create(path).unwrap())).unwrap()
}

fn inputs() -> Vec<(String, String)> {
    let authority = manifest::sha256(CERTIFICATE.as_bytes());
    vec![
        ("flavour".to_owned(), "small".to_owned()),
        (AUTHORITY_INPUT.to_owned(), authority),
    ]
}

fn hash() -> ImageHash {
    manifest::address(&inputs()).parse().unwrap()
}

/// Writes a small image's files and publishes them.
fn publish(store: &Store) {
    let rel = Path::new(hash().as_str()).to_owned();
    let staging = store.stage(&rel, "image").unwrap();
    let facts = manifest::KernelFacts {
        release: "6.1".to_owned(),
        packages: Vec::new(),
        form: "vmlinux".to_owned(),
        modules: Vec::new(),
    };
    let set = BootSet::new(Family::Qemu, facts);
    for name in set.names() {
        fs::write(staging.path().join(name), name).unwrap();
    }
    let files = staging.seal().unwrap();
    let manifest = ImageManifest {
        format: FORMAT,
        rootfs_hash: hash().to_string(),
        inputs: inputs(),
        files: files.clone(),
        sets: BTreeMap::from([(Family::Qemu, set)]),
        packages: BTreeMap::new(),
        tree_bytes: 0,
        built_at: String::new(),
        runner: String::new(),
        steps: Vec::new(),
    };
    staging.publish(&manifest, &files).unwrap();
}

#[test]
fn what_was_published_is_found_and_what_was_not_is_removed() {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path());
    assert!(matches!(
        store.image(&hash()),
        Err(ImageError::Missing { .. })
    ));
    let rel = Path::new(hash().as_str()).to_owned();
    let staging = store.stage(&rel, "image").unwrap();
    fs::create_dir_all(staging.path().join("work/root/etc")).unwrap();
    drop(staging);
    assert_eq!(fs::read_dir(temp.path().join(IMAGES)).unwrap().count(), 0);
    publish(&store);
    let image = store.image(&hash()).unwrap();
    assert!(image.files(EngineKind::QemuTcg).unwrap().kernel.is_file());
    let error = image.files(EngineKind::Firecracker).unwrap_err();
    assert!(matches!(error, ImageError::NoSet { .. }), "{error}");
    assert_eq!(abandoned_in(temp.path()), 0);
}

#[test]
fn an_image_that_trusts_another_authority_or_none_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path());
    publish(&store);
    store.image(&hash()).unwrap();
    let certificate = temp.path().join(rel::CA).join("ca.pem");
    fs::write(&certificate, format!("{CERTIFICATE} of another")).unwrap();
    let refused = store.image(&hash());
    assert!(matches!(refused, Err(ImageError::OtherAuthority)));
    fs::remove_file(&certificate).unwrap();
    let refused = store.image(&hash());
    assert!(matches!(refused, Err(ImageError::NoAuthority)));
}

#[test]
fn what_a_killed_build_left_is_never_used_and_goes_with_the_next_one() {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path());
    let rel = Path::new(hash().as_str()).to_owned();
    // As after kill -9: no destructor runs.
    let staging = store.stage(&rel, "image").unwrap();
    for name in ["vmlinux", "rootfs.erofs", MANIFEST] {
        fs::write(staging.path().join(name), "half").unwrap();
    }
    std::mem::forget(staging);
    let other = manifest::address(&[]);
    fs::create_dir(temp.path().join(IMAGES).join(format!(".staging-{other}"))).unwrap();
    assert!(matches!(
        store.image(&hash()),
        Err(ImageError::Missing { .. })
    ));
    assert_eq!(abandoned_in(temp.path()), 2);
    publish(&store);
    assert_eq!(abandoned_in(temp.path()), 0);
    store.image(&hash()).unwrap();
}

#[test]
fn the_staging_of_a_build_that_runs_is_left_alone() {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path());
    let other: ImageHash = manifest::address(&[]).parse().unwrap();
    let lock = store
        .locks
        .try_lock(lock_name("image", &other), LockKind::Exclusive, 0o600)
        .unwrap();
    let running = temp.path().join(IMAGES).join(format!(".staging-{other}"));
    fs::create_dir(&running).unwrap();
    publish(&store);
    assert!(running.exists());
    assert_eq!(abandoned_in(temp.path()), 0);
    drop(lock);
    assert_eq!(abandoned_in(temp.path()), 1);
}

#[test]
fn an_image_that_was_changed_or_put_under_another_name_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path());
    publish(&store);
    let directory = temp.path().join(IMAGES).join(hash().as_str());
    let other: ImageHash = manifest::address(&[]).parse().unwrap();
    let moved = temp.path().join(IMAGES).join(other.as_str());
    fs::rename(&directory, &moved).unwrap();
    assert!(matches!(
        store.image(&other),
        Err(ImageError::Damaged { .. })
    ));
    fs::rename(&moved, &directory).unwrap();
    store.image(&hash()).unwrap();
    fs::remove_file(directory.join("rootfs.erofs")).unwrap();
    fs::write(directory.join("rootfs.erofs"), "ROOTFS.erofs").unwrap();
    assert!(matches!(
        store.image(&hash()),
        Err(ImageError::Damaged { .. })
    ));
    // Building it anew replaces it.
    publish(&store);
    store.image(&hash()).unwrap();
}

#[tokio::test]
async fn a_second_build_waits_for_the_first() {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path());
    let steps = Steps::new();
    let first = store.lock("image", &hash(), &steps).await.unwrap();
    let hash = hash();
    let second = store.lock("image", &hash, &steps);
    tokio::pin!(second);
    // Bounded by the poll interval, whatever the machine's speed: while the lock is held it cannot resolve.
    let early = tokio::time::timeout(LOCK_POLL * 2, &mut second).await;
    assert!(early.is_err());
    drop(first);
    second.await.unwrap();
}

#[test]
fn a_full_disk_is_told_as_such() {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path());
    assert!(matches!(
        store.require_space(u64::MAX),
        Err(ImageError::DiskFull { .. })
    ));
    let tool = |full| ImageError::Tool {
        what: "packing".to_owned(),
        status: "exit status: 1".to_owned(),
        full,
        last: vec!["write error: No space left on device".to_owned()],
    };
    let io = ImageError::Io {
        action: "run",
        path: "mkfs.erofs".into(),
        source: std::io::ErrorKind::StorageFull.into(),
    };
    let engine = ImageError::Sandbox(SandboxError::Io {
        action: "save the guest's memory".to_owned(),
        source: std::io::ErrorKind::StorageFull.into(),
    });
    for (error, need_mb) in [(tool(true), u64::MAX), (io, 1), (engine, 1)] {
        assert!(matches!(
            store.explain(error, need_mb),
            ImageError::DiskFull { .. }
        ));
    }
    // It failed of something else, or of a disk that is not this one: here is more than a MiB free.
    for (error, need_mb) in [(tool(false), u64::MAX), (tool(true), 1)] {
        assert!(matches!(
            store.explain(error, need_mb),
            ImageError::Tool { .. }
        ));
    }
}

fn abandoned_in(home: &Path) -> usize {
    staging::abandoned(&Dir::open(home).unwrap()).unwrap().len()
}
