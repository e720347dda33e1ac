//! Whole installations from stand-ins of Firecracker's files, with pins of their own.

use std::fs;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;

const LIMITS: Limits = Limits {
    max_bytes: 1 << 20,
    stall: Duration::from_secs(20),
    attempts: 1,
    pause: Duration::ZERO,
};

/// One file of an archive.
struct Item<'a>(&'a str, tar::EntryType, &'a [u8]);

/// An archive as Firecracker's releases are, of the given programs.
fn archive(items: &[Item<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for Item(program, kind, content) in items {
        let arch = std::env::consts::ARCH;
        let path = format!("release-v9.9.9-{arch}/{program}-v9.9.9-{arch}");
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        if kind.is_symlink() {
            header.set_size(0);
            builder
                .append_link(&mut header, path, "/etc/passwd")
                .unwrap();
        } else {
            builder.append_data(&mut header, path, *content).unwrap();
        }
    }
    builder.into_inner().unwrap().finish().unwrap()
}

fn whole() -> Vec<u8> {
    let regular = tar::EntryType::Regular;
    archive(&[
        Item("seccompiler-bin", regular, b"something else"),
        Item("firecracker", regular, b"the program"),
        Item("jailer", regular, b"the jailer"),
    ])
}

/// A home, and a directory with the files.
struct Host {
    temp: tempfile::TempDir,
    home: Arc<Home>,
    pins: Pins,
}

impl Host {
    fn new(archive: &[u8]) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&temp.path().join("home")).unwrap();
        let mut pins = Pins::built_in().unwrap();
        let hash = |content: &[u8]| crate::image::sha256(content).parse().unwrap();
        pins.version = "9.9.9".to_owned().try_into().unwrap();
        pins.archive_sha256 = hash(archive);
        pins.firecracker_sha256 = hash(b"the program");
        pins.jailer_sha256 = hash(b"the jailer");
        pins.kernel_sha256 = hash(b"the kernel");
        let host = Self {
            temp,
            home: Arc::new(home),
            pins,
        };
        fs::create_dir(host.files()).unwrap();
        fs::write(host.files().join(archive_name(&host.pins)), archive).unwrap();
        fs::write(host.files().join(kernel_name(&host.pins)), "the kernel").unwrap();
        host
    }

    fn files(&self) -> PathBuf {
        self.temp.path().join("files")
    }

    async fn set_up(&self) -> Result<Installed, FirecrackerError> {
        let source = Source::Directory(self.files());
        let pins = Some(self.pins.clone());
        ensure_within(&self.home, pins, &source, &Steps::new(), LIMITS).await
    }

    /// Names below `firecracker/`.
    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.home.at(rel::FIRECRACKER)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Nothing that anybody could use is there.
    fn has_nothing(&self) {
        let found = find(&self.home).unwrap_err();
        assert!(matches!(found, FirecrackerError::NotInstalled), "{found}");
        assert!(
            self.left()
                .iter()
                .all(|name| name.starts_with('.') || name == "lock")
        );
    }
}

#[tokio::test]
async fn what_is_installed_is_found_again_and_needs_its_source_no_more() {
    let host = Host::new(&whole());
    let installed = host.set_up().await.unwrap();
    assert_eq!(installed.version(), "9.9.9");
    assert!(installed.is_own_build());
    assert_eq!(fs::read(installed.firecracker()).unwrap(), b"the program");
    assert_eq!(fs::read(installed.jailer()).unwrap(), b"the jailer");
    let mut kernel = String::new();
    std::io::Read::read_to_string(&mut installed.kernel().unwrap(), &mut kernel).unwrap();
    assert_eq!(kernel, "the kernel");
    let found = find(&host.home).unwrap();
    assert_eq!(found.firecracker(), installed.firecracker());
    assert_eq!(
        host.left(),
        [
            host.pins.directory(),
            "current".to_owned(),
            "lock".to_owned()
        ]
    );

    fs::remove_dir_all(host.files()).unwrap();
    host.set_up().await.unwrap();
}

#[tokio::test]
async fn what_was_changed_afterwards_is_not_used_and_made_anew() {
    let host = Host::new(&whole());
    let installed = host.set_up().await.unwrap();
    for (path, is_program) in [
        (installed.firecracker(), true),
        (installed.jailer(), true),
        (installed.directory.join(KERNEL), false),
    ] {
        fs::write(&path, "another").unwrap();
        if is_program {
            let error = find(&host.home).unwrap_err();
            assert!(matches!(error, FirecrackerError::Damaged { .. }), "{error}");
        } else {
            let error = find(&host.home).unwrap().kernel().unwrap_err();
            assert!(matches!(error, FirecrackerError::Damaged { .. }), "{error}");
        }
        host.set_up().await.unwrap().kernel().unwrap();
        find(&host.home).unwrap();
    }
    fs::write(installed.directory.join(MANIFEST), "{").unwrap();
    assert!(find(&host.home).is_err());
    host.set_up().await.unwrap();
    find(&host.home).unwrap();
}

#[tokio::test]
async fn a_program_that_is_not_the_pinned_one_is_refused_inside_a_right_archive() {
    let regular = tar::EntryType::Regular;
    for (items, word) in [
        (
            vec![
                Item("firecracker", regular, b"the program"),
                Item("jailer", regular, b"another jailer"),
            ],
            "not what this runner pins",
        ),
        (
            vec![Item("firecracker", regular, b"the program")],
            "no usable jailer",
        ),
        (
            vec![
                Item("firecracker", regular, b"the program"),
                Item("jailer", tar::EntryType::Symlink, b""),
            ],
            "no usable jailer",
        ),
    ] {
        let host = Host::new(&archive(&items));
        let error = host.set_up().await.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        host.has_nothing();
    }
    // Pinned, and yet no archive.
    let host = Host::new(b"not compressed at all");
    let error = host.set_up().await.unwrap_err();
    assert!(matches!(error, FirecrackerError::Archive(..)), "{error}");
    host.has_nothing();
}

#[tokio::test]
async fn files_of_a_directory_are_verified_like_any_other() {
    let host = Host::new(&whole());
    let kernel = host.files().join(kernel_name(&host.pins));
    fs::write(&kernel, "another kernel").unwrap();
    let error = host.set_up().await.unwrap_err();
    assert!(
        matches!(error, FirecrackerError::Tampered { .. }),
        "{error}"
    );
    host.has_nothing();
    fs::write(&kernel, vec![0; 2 << 20]).unwrap();
    let error = host.set_up().await.unwrap_err();
    assert!(
        matches!(error, FirecrackerError::TooLarge { .. }),
        "{error}"
    );
    fs::remove_file(&kernel).unwrap();
    let error = host.set_up().await.unwrap_err().to_string();
    assert!(error.contains(&kernel.display().to_string()), "{error}");
    host.has_nothing();
}

#[tokio::test]
async fn a_version_that_this_runner_does_not_pin_is_not_used_unless_it_is_ones_own() {
    let host = Host::new(&whole());
    let installed = host.set_up().await.unwrap();
    // As an older runner with pins of its own time would have left it.
    let path = installed.directory.join(MANIFEST);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"own\"", "\"built_in\"")).unwrap();
    let error = find(&host.home).unwrap_err();
    assert!(
        matches!(error, FirecrackerError::OtherVersion { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_set_up_that_was_killed_leaves_nothing_that_is_used() {
    let host = Host::new(&whole());
    let staging = host.home.at(rel::FIRECRACKER).join(STAGING);
    fs::create_dir_all(&staging).unwrap();
    fs::write(staging.join(FIRECRACKER), "half").unwrap();
    host.has_nothing();
    host.set_up().await.unwrap();
    assert!(!staging.exists());
}

#[tokio::test]
async fn two_at_once_both_end_well() {
    let host = Host::new(&whole());
    let (one, two) = tokio::join!(host.set_up(), host.set_up());
    assert_eq!(one.unwrap().directory, two.unwrap().directory);
    let base = Dir::open(host.home.at(rel::FIRECRACKER)).unwrap();
    // While somebody holds the lock nothing is touched.
    let held = base.lock("lock", LockKind::Exclusive, 0o600).unwrap();
    let waiting = host.set_up();
    tokio::pin!(waiting);
    let early = tokio::time::timeout(LOCK_POLL * 2, &mut waiting).await;
    assert!(early.is_err());
    drop(held);
    waiting.await.unwrap();
}

#[tokio::test]
async fn the_version_before_stays_for_runners_that_still_use_it() {
    let mut host = Host::new(&whole());
    let mut names = Vec::new();
    for args in ["a", "b", "c"] {
        host.pins.kernel_args = args.to_owned();
        host.set_up().await.unwrap();
        names.push(host.pins.directory());
    }
    let left = host.left();
    assert!(!left.contains(&names[0]) && left.contains(&names[1]) && left.contains(&names[2]));
    host.set_up().await.unwrap();
    assert!(host.left().contains(&names[1]));
}
