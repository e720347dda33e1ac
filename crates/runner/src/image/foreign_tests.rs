//! An image for another architecture than this host's, by the code that makes all images: kernel, modules, initramfs.
//!
//! Its root holds one static busybox and what [`EXTRA`] names, because Debian's packages could be configured only with that
//! architecture's emulation registered in this host's kernel, which is not a test's to do.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::apt::Apt;
use super::kernel;
use super::progress::Steps;
use super::rootfs::EROFS_OPTIONS;
use super::sources::{Release, Sources};
use super::tools::Tool;

/// Where the guest's programs for aarch64 are.
const GUEST: &str = "VM0_TEST_AARCH64_GUEST";
/// Empty directory for the image, for whoever boots it afterwards; a temporary one without it.
const INTO: &str = "VM0_TEST_AARCH64_INTO";
/// More programs for it, separated by colons, put into `/opt`.
const EXTRA: &str = "VM0_TEST_AARCH64_EXTRA";

#[tokio::test]
async fn an_image_of_another_architecture_has_its_kernel_modules_and_init() {
    let Some(guest) = std::env::var_os(GUEST).map(PathBuf::from) else {
        println!(
            "SKIP an_image_of_another_architecture: {GUEST} names no guest programs for aarch64"
        );
        return;
    };
    let work = tempfile::tempdir().unwrap();
    let target = std::env::var_os(INTO).map_or_else(|| work.path().join("image"), PathBuf::from);
    fs::create_dir_all(&target).unwrap();
    let steps = Steps::new();
    let release = Release::of_host().unwrap();
    let sources = Sources::choose(&release, &[], None).unwrap();
    let apt = Apt::new(work.path().join("apt"), &sources, "arm64").unwrap();
    apt.refresh(&steps).await.unwrap();

    let package = kernel::resolve(&apt, release.distribution, "arm64", &steps)
        .await
        .unwrap();
    let init = fs::read(guest.join("guest-init")).unwrap();
    let facts = kernel::build(&apt, &package, &init, work.path(), &target, &steps)
        .await
        .unwrap();
    assert!(facts.release.ends_with("arm64"), "{facts:?}");
    assert!(
        facts.modules.iter().any(|name| name == "erofs"),
        "{facts:?}"
    );
    assert_eq!(facts.form, "Image", "nothing is left to unpack");

    let root = work.path().join("root");
    furnish(&apt, &root, &guest, work.path(), &steps).await;
    Tool::new("mkfs.erofs")
        .arg("--quiet")
        .args(EROFS_OPTIONS)
        .arg(target.join("rootfs.erofs"))
        .arg(&root)
        .run("packing the root file system", &steps)
        .await
        .unwrap();
}

async fn furnish(apt: &Apt, root: &Path, guest: &Path, work: &Path, steps: &Steps) {
    for directory in [
        "bin",
        "etc/ssl/certs",
        "home/user",
        "opt",
        "root",
        "usr/local/bin",
    ] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    // The host's: without any, clients of HTTP cannot be made, wherever they lead.
    let authorities = Path::new("etc/ssl/certs/ca-certificates.crt");
    fs::copy(Path::new("/").join(authorities), root.join(authorities)).unwrap();
    let busybox = apt.candidate("busybox-static", steps).await.unwrap();
    let deb = apt
        .download(&busybox, &work.join("debs"), steps)
        .await
        .unwrap();
    let unpacked = work.join("busybox");
    Tool::new("dpkg-deb")
        .arg("-x")
        .arg(&deb)
        .arg(&unpacked)
        .run("unpacking busybox", steps)
        .await
        .unwrap();
    fs::copy(
        ["bin/busybox", "usr/bin/busybox"]
            .map(|path| unpacked.join(path))
            .iter()
            .find(|path| path.exists())
            .unwrap(),
        root.join("bin/busybox"),
    )
    .unwrap();
    // Busybox has no applet of that name.
    let bash = root.join("bin/bash");
    fs::write(&bash, "#!/bin/sh\nexec sh \"$@\"\n").unwrap();
    fs::set_permissions(&bash, fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["sh", "uname", "ls", "wc", "cat", "true", "mkfifo"] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    let accounts = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    fs::write(root.join("etc/passwd"), accounts).unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
    for name in ["guest-agent", "guest-mock-claude"] {
        fs::copy(guest.join(name), root.join("usr/local/bin").join(name)).unwrap();
    }
    for extra in std::env::var_os(EXTRA)
        .iter()
        .flat_map(std::env::split_paths)
    {
        fs::copy(&extra, root.join("opt").join(extra.file_name().unwrap())).unwrap();
    }
}
