//! Confined paths: what they promise, tried against what would break it.
#![cfg(test)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use host::fs::{Access, Dir, EntryKind, FsError, LockKind, lock_holder};

fn scratch() -> (tempfile::TempDir, Dir) {
    let temp = tempfile::tempdir().unwrap();
    let dir = Dir::open(temp.path()).unwrap();
    (temp, dir)
}

#[test]
fn no_path_leads_out_of_the_directory() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "s").unwrap();
    let (temp, dir) = scratch();
    symlink(outside.path(), temp.path().join("link")).unwrap();
    symlink(outside.path().join("secret"), temp.path().join("file")).unwrap();
    let absolute = outside.path().join("secret");
    for path in [
        Path::new("link/secret"),
        Path::new("file"),
        Path::new("../secret"),
        absolute.as_path(),
    ] {
        assert!(
            matches!(
                dir.open_file(path, Access::Read),
                Err(FsError::Escapes { .. })
            ),
            "{} was opened",
            path.display()
        );
        assert!(dir.open_file(path, Access::Append { mode: 0o600 }).is_err());
        // Where a link stands in the last place it is replaced, not followed.
        assert_eq!(
            dir.write_atomic(path, 0o600, b"x").is_ok(),
            path == Path::new("file")
        );
    }
    assert_eq!(fs::read(&absolute).unwrap(), b"s");
    assert!(dir.create_dir_all("link/new/deeper", 0o700).is_err());
    assert!(dir.remove_tree("link/secret").is_err());
    assert!(dir.remove_file("../x").is_err());
    for name in ["", ".", "..", "/", "a/.."] {
        assert!(dir.create_new_dir(name, 0o700).is_err(), "{name:?}");
        assert!(dir.remove_tree(name).is_err(), "{name:?}");
    }
    // A link itself may be removed, and takes nothing with it.
    assert!(dir.remove_tree("link").unwrap());
    assert_eq!(fs::read(&absolute).unwrap(), b"s");
}

#[test]
fn atomic_write_replaces_whole_files_with_the_mode_asked_for() {
    let (temp, dir) = scratch();
    let sub = dir.create_dir_all("a/b", 0o711).unwrap();
    assert_eq!(sub.own_metadata().unwrap().mode() & 0o7777, 0o711);
    dir.write_atomic("a/b/f", 0o666, b"one").unwrap();
    dir.write_atomic("a/b/f", 0o640, b"two").unwrap();
    assert_eq!(dir.read_bounded("a/b/f", 3).unwrap(), b"two");
    let meta = dir.metadata("a/b/f").unwrap().unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o640);
    assert_eq!(fs::read_dir(temp.path().join("a/b")).unwrap().count(), 1);
    // Onto a directory it fails and leaves no temporary.
    dir.create_dir("a/b/d/", 0o700).unwrap();
    assert!(dir.write_atomic("a/b/d", 0o600, b"x").is_err());
    assert_eq!(fs::read_dir(temp.path().join("a/b")).unwrap().count(), 2);
}

#[test]
fn only_regular_files_of_bounded_size_are_read() {
    let (temp, dir) = scratch();
    dir.write_atomic("f", 0o600, b"12345").unwrap();
    assert!(matches!(
        dir.read_bounded("f", 4),
        Err(FsError::TooLarge { max: 4, .. })
    ));
    let fifo = temp.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    for access in [
        Access::Read,
        Access::ReadWrite,
        Access::Append { mode: 0o600 },
    ] {
        assert!(matches!(
            dir.open_file("fifo", access),
            Err(FsError::NotRegular { .. })
        ));
    }
    dir.create_dir("d", 0o700).unwrap();
    assert!(matches!(
        dir.open_file("d", Access::Read),
        Err(FsError::NotRegular { .. })
    ));
    assert!(dir.read_bounded("missing", 4).unwrap_err().is_not_found());
    assert!(dir.metadata("missing").unwrap().is_none());
    let kinds = |name: &str| {
        let entries = dir.list().unwrap();
        entries.iter().find(|e| e.name == name).unwrap().kind
    };
    assert_eq!(kinds("f"), EntryKind::File);
    assert_eq!(kinds("d"), EntryKind::Dir);
    assert_eq!(kinds("fifo"), EntryKind::Other);
}

#[test]
fn link_claims_a_name_once() {
    let (_temp, dir) = scratch();
    let claims = dir.create_dir(".claims", 0o700).unwrap();
    let first = claims.write_temporary(0o600, b"first").unwrap();
    let second = claims.write_temporary(0o600, b"second").unwrap();
    claims.link(&first, &claims, "id.claim").unwrap();
    let again = claims.link(&second, &dir, ".claims/id.claim").unwrap_err();
    assert!(again.is_already_exists());
    assert_eq!(dir.read_bounded(".claims/id.claim", 9).unwrap(), b"first");
    assert!(claims.remove_file(&second).unwrap());
    assert!(!claims.remove_file(&second).unwrap());
}

#[test]
fn a_directory_others_may_change_is_refused() {
    let (temp, dir) = scratch();
    let me = rustix::process::geteuid().as_raw();
    dir.require_private(me).unwrap();
    fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let error = dir.require_private(me).unwrap_err().to_string();
    assert!(
        error.contains("others may write in it (mode 0777)"),
        "{error}"
    );
}

#[test]
fn a_tree_is_removed_whole_without_following_links() {
    let (temp, dir) = scratch();
    dir.create_dir_all("t/a/b/c", 0o700).unwrap();
    dir.write_atomic("t/a/f", 0o600, b"").unwrap();
    symlink("/etc", temp.path().join("t/a/link")).unwrap();
    assert!(dir.remove_tree("t").unwrap());
    assert!(!dir.remove_tree("t").unwrap());
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn what_is_mounted_in_a_tree_is_never_removed() {
    if !rustix::process::geteuid().is_root() {
        host::test_support::skip("needs root, to mount something");
        return;
    }
    let (temp, dir) = scratch();
    dir.create_dir_all("t/mounted", 0o700).unwrap();
    let kept = dir.create_dir("kept", 0o700).unwrap();
    kept.write_atomic("f", 0o600, b"kept").unwrap();
    let place = temp.path().to_owned();
    // In a mount namespace of this thread's own, which goes with it.
    let in_own_namespace = move || {
        // SAFETY: gives this thread a file-system context of its own; nothing is shared by it.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
        let private = rustix::mount::MountPropagationFlags::PRIVATE
            | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        rustix::mount::mount_bind(place.join("kept"), place.join("t/mounted")).unwrap();
        let dir = Dir::open(&place).unwrap();
        let error = dir.remove_tree("t").unwrap_err().to_string();
        assert!(
            error.contains("another file system is mounted there"),
            "{error}"
        );
    };
    std::thread::spawn(in_own_namespace).join().unwrap();
    assert_eq!(dir.read_bounded("kept/f", 4).unwrap(), b"kept");
    assert!(dir.remove_tree("t").unwrap());
}

#[test]
fn a_lock_excludes_and_names_its_holder() {
    let (_temp, dir) = scratch();
    let held = dir.lock("l", LockKind::Exclusive, 0o644).unwrap();
    assert!(
        dir.try_lock("l", LockKind::Shared, 0o644)
            .unwrap()
            .is_none()
    );
    assert!(dir.is_locked("l").unwrap());
    assert_eq!(lock_holder(held.file()), Some(std::process::id()));
    drop(held);
    assert!(!dir.is_locked("l").unwrap());
    let one = dir.try_lock("l", LockKind::Shared, 0o644).unwrap().unwrap();
    let two = dir.try_lock("l", LockKind::Shared, 0o644).unwrap().unwrap();
    assert!(
        dir.try_lock("l", LockKind::Exclusive, 0o644)
            .unwrap()
            .is_none()
    );
    drop((one, two));
}

#[test]
fn a_waiter_never_wins_a_lock_on_a_removed_file() {
    let (_temp, dir) = scratch();
    let held = dir.lock("l", LockKind::Exclusive, 0o600).unwrap();
    let waiter = {
        let dir = dir.try_clone().unwrap();
        std::thread::spawn(move || {
            let lock = dir.lock("l", LockKind::Exclusive, 0o600).unwrap();
            let named = dir.metadata("l").unwrap().unwrap();
            assert_eq!(named.ino(), lock.file().metadata().unwrap().ino());
        })
    };
    dir.remove_file("l").unwrap();
    drop(held);
    waiter.join().unwrap();
}

#[test]
fn sockets_work_below_paths_longer_than_an_address() {
    let (_temp, dir) = scratch();
    let deep = dir.create_dir_all("x".repeat(120), 0o700).unwrap();
    let listener = deep.bind_socket("control.sock", 0o600).unwrap();
    let mut client = deep.connect_socket("control.sock").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(b"hi").unwrap();
    drop(client);
    let mut got = String::new();
    server.read_to_string(&mut got).unwrap();
    assert_eq!(got, "hi");
    // A new owner takes the dead socket's place.
    drop(listener);
    assert!(deep.connect_socket("control.sock").is_err());
    let _again = deep.bind_socket("control.sock", 0o600).unwrap();
    deep.connect_socket("control.sock").unwrap();
}
