//! Whole directories: copied, linked, given away, on a file system of their own.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

/// Hard links of a whole tree.
pub(crate) fn link_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory can be made");
    let mode = fs::metadata(from).expect("it was listed").permissions();
    for entry in fs::read_dir(from).expect("images can be read").flatten() {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().expect("a file type").is_dir() {
            link_tree(&source, &target);
        } else {
            fs::hard_link(&source, &target).expect("images and homes are on one file system");
        }
    }
    fs::set_permissions(to, mode).expect("our directory");
}

/// A copy of a whole tree that keeps holes: the saved memory is mostly holes.
pub(crate) fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().expect("below a home")).expect("a directory can be made");
    let copied = Command::new("cp")
        .args(["--archive", "--sparse=always"])
        .args([from, to])
        .status()
        .expect("cp is installed");
    assert!(copied.success(), "a copy of {}", from.display());
}

/// A copy of a program, made by another process: what this one has open for writing the children of other threads hold
/// until they execute something, and what anybody holds so cannot be executed.
pub fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").args([from, to]).status();
    assert!(
        copied.expect("cp is installed").success(),
        "a copy of {}",
        from.display()
    );
}

/// Bytes of all files below a directory.
pub(crate) fn size_of(directory: &Path) -> u64 {
    fs::read_dir(directory)
        .expect("images can be read")
        .flatten()
        .map(|entry| {
            let kind = entry.file_type().expect("a file type");
            if kind.is_dir() {
                size_of(&entry.path())
            } else {
                // What it takes, not what it spans: the saved memory is mostly holes.
                entry.metadata().expect("its size").blocks() * 512
            }
        })
        .sum()
}

/// An ext4 of its own, on a file beside the mount point that is already unlinked when a test can fail.
pub(crate) fn mount_ext4(at: &Path, bytes: u64) {
    let backing = at.with_extension("ext4");
    File::create(&backing)
        .and_then(|file| file.set_len(bytes))
        .expect("the target directory can be written");
    for (program, args) in [
        ("mkfs.ext4", &["-q", "-m", "0"][..]),
        ("mount", &["-o", "loop"]),
    ] {
        let mut command = Command::new(program);
        command.args(args).arg(&backing);
        if program == "mount" {
            command.arg(at);
        }
        let status = command.status().expect("e2fsprogs and mount are installed");
        assert!(status.success(), "{program} for {}", at.display());
    }
    fs::remove_file(&backing).expect("our file");
    fs::set_permissions(at, fs::Permissions::from_mode(0o700)).expect("our directory");
}

/// Gives a whole tree to a user.
pub(crate) fn give(path: &Path, uid: u32) {
    chown(path, Some(uid), Some(uid)).expect("root may chown");
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("our home").flatten() {
            give(&entry.path(), uid);
        }
    }
}
