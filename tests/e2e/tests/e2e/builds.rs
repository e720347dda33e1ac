//! `runner build`, interrupted in every way: what is half built is never used, and nothing runs on.
//!
//! Each test builds an image of its own: a copy of the mock CLI with one more byte makes another content address.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use e2e::{Host, LONG, Proc, Text, eventually, skip};
use rustix::process::Signal;

/// A build that runs.
struct Build {
    child: Child,
    stderr: Text,
}

impl Build {
    fn process(&self) -> Proc {
        Proc::open(self.child.id()).expect("it runs")
    }

    fn kill(&mut self) {
        self.process().kill();
        self.child.wait().expect("our child");
    }

    fn ends(&mut self) -> (ExitStatus, String) {
        let said = self.stderr.all(LONG * 3);
        (self.child.wait().expect("our child"), said)
    }
}

/// A host, and the arguments of a build whose image no other test has.
struct Builder {
    host: Host,
    arguments: Vec<String>,
}

impl Builder {
    fn new() -> Option<Self> {
        let host = Host::new().prepare()?;
        // Any ELF file will do as long as nothing boots; this one also starts.
        let mut program = fs::read("/bin/true").expect("coreutils");
        program.extend(host.home().as_os_str().as_encoded_bytes());
        let path = host.home().join("mock");
        fs::write(&path, program).expect("our home");
        let path = path.to_str().expect("test paths are text").to_owned();
        let arguments = [
            "build",
            "--profile",
            "vm0/small",
            "--guest-mock-claude",
            &path,
        ];
        let arguments = arguments.map(str::to_owned).to_vec();
        Some(Self { host, arguments })
    }

    fn command(&self) -> Command {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        self.host.runner(&arguments)
    }

    fn start(&self) -> Build {
        let mut child = self
            .command()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the runner starts");
        let stderr = Text::collect(child.stderr.take().expect("a pipe"));
        Build { child, stderr }
    }

    /// Where the image is to be.
    fn image(&self) -> PathBuf {
        let output = self
            .command()
            .arg("--dry-run")
            .output()
            .expect("the runner starts");
        let text = String::from_utf8(output.stdout).expect("text");
        let hash = text
            .lines()
            .find_map(|line| line.strip_prefix("rootfs_hash="))
            .expect("the hash is always printed");
        self.host.home().join("images").join(hash)
    }

    fn staging(&self) -> Vec<String> {
        let entries = fs::read_dir(self.host.home().join("images")).expect("our home");
        let names = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(".staging-")).collect()
    }

    fn doctor(&self) -> String {
        let output = self
            .host
            .runner(&["doctor"])
            .output()
            .expect("the runner starts");
        String::from_utf8(output.stdout).expect("text")
    }
}

#[test]
fn a_killed_build_is_no_image_and_goes_with_the_next_which_ctrl_c_undoes() {
    let Some(builder) = Builder::new() else {
        return;
    };
    let image = builder.image();
    let mut build = builder.start();
    build.stderr.wait_for("installing packages …", LONG);
    build.kill();
    assert!(!image.exists());
    assert_eq!(builder.staging().len(), 1);
    assert!(
        builder.doctor().contains("interrupted builds left"),
        "{}",
        builder.doctor()
    );

    let mut build = builder.start();
    build.stderr.wait_for("installing packages …", LONG);
    build.process().signal(Signal::INT);
    let (status, said) = build.ends();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("interrupted"), "{said}");
    assert_eq!(builder.staging(), Vec::<String>::new());
    assert!(!image.exists());
    builder.host.finish();
}

#[test]
fn a_second_build_of_the_same_image_waits_and_says_for_whom() {
    let Some(builder) = Builder::new() else {
        return;
    };
    let mut first = builder.start();
    first.stderr.wait_for("fetching the kernel …", LONG);
    let mut second = builder.start();
    second
        .stderr
        .wait_for("is at work on the same image; waiting for it", LONG);
    assert!(
        second
            .stderr
            .now()
            .contains(&format!("process {}", first.child.id())),
        "{}",
        second.stderr.now()
    );
    // Its turn comes when the first is gone.
    first.kill();
    second.stderr.wait_for("installing packages …", LONG);
    second.process().signal(Signal::TERM);
    let (status, said) = second.ends();
    assert_eq!(status.code(), Some(1), "{said}");
    assert_eq!(builder.staging(), Vec::<String>::new());
    builder.host.finish();
}

#[test]
fn a_damaged_image_is_refused_and_built_anew() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let hashes = host
        .runner(&["build", "--dry-run", "--profile", "vm0/small"])
        .output()
        .expect("the runner starts");
    let text = String::from_utf8(hashes.stdout).expect("text");
    let rootfs = text
        .lines()
        .find_map(|line| line.strip_prefix("rootfs_hash="))
        .expect("a hash");
    let kernel = host.home().join("images").join(rootfs).join("vmlinux");
    // The file may be a link to the one that all tests share: replaced, never written to.
    let mut bytes = fs::read(&kernel).expect("the image is there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(&kernel).expect("our home");
    fs::write(&kernel, bytes).expect("our home");
    assert!(
        !host.try_start_runner(),
        "a runner started on a damaged image"
    );

    let mut child = host
        .runner(&["build", "--profile", "vm0/small"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the runner starts");
    let stderr = Text::collect(child.stderr.take().expect("a pipe"));
    stderr.wait_for("building it anew", LONG);
    Proc::open(child.id()).expect("it runs").signal(Signal::INT);
    child.wait().expect("our child");
    host.finish();
}

/// A home on a file system with this much room, MiB, in a mount namespace of the test's own; without the image.
fn little_room(room_mb: u64) -> Option<Builder> {
    e2e::in_own_mounts("builds")?;
    let host = Host::new().own_file_system(room_mb).prepare()?;
    let arguments = ["build", "--profile", "vm0/small"]
        .map(str::to_owned)
        .to_vec();
    let builder = Builder { host, arguments };
    fs::remove_dir_all(builder.image()).expect("the image is there");
    Some(builder)
}

impl Builder {
    /// The build failed for want of room, says where and what to do, and left nothing.
    fn failed_for_room(&self, (status, said): (ExitStatus, String)) {
        assert_eq!(status.code(), Some(1), "{said}");
        let images = self.host.home().join("images");
        let place = format!("not enough disk space in {}", images.display());
        for wanted in [place.as_str(), "hint: ", "--home DIR"] {
            assert!(said.contains(wanted), "{wanted:?} in {said}");
        }
        assert_eq!(self.staging(), Vec::<String>::new());
        assert!(!self.image().exists());
        assert!(
            self.doctor().contains("PASS  leftovers"),
            "{}",
            self.doctor()
        );
    }
}

#[test]
fn a_build_without_room_is_refused_at_once() {
    let Some(builder) = little_room(300) else {
        return;
    };
    builder.failed_for_room(builder.start().ends());
    builder.host.finish();
}

#[test]
fn a_build_whose_disk_fills_up_says_so_and_the_next_one_begins_anew() {
    let Some(builder) = little_room(1300) else {
        return;
    };
    let mut build = builder.start();
    build.stderr.wait_for("installing packages …", LONG);
    let filler = builder.host.fill_disk(0);
    builder.failed_for_room(build.ends());

    fs::remove_file(filler).expect("our file");
    let mut build = builder.start();
    if std::env::var_os("VM0_TEST_SLOW").is_some() {
        let (status, said) = build.ends();
        assert!(status.success(), "{said}");
        assert!(builder.host.try_start_runner());
        builder.host.submit("true").run().expect_exit(0);
    } else {
        build.stderr.wait_for("fetching the kernel …", LONG);
        build.process().signal(Signal::INT);
        build.ends();
    }
    assert_eq!(builder.staging(), Vec::<String>::new());
    builder.host.finish();
}

#[test]
fn a_build_killed_at_any_step_leaves_nothing_that_the_next_one_trusts() {
    if std::env::var_os("VM0_TEST_SLOW").is_none() {
        skip("it builds an image nine times; scripts/test.sh --slow runs it");
        return;
    }
    let Some(host) = Host::new().prepare() else {
        return;
    };
    // The image that all tests share, taken out of this home (its files are links): so this one boots.
    let arguments = ["build", "--profile", "vm0/small"]
        .map(str::to_owned)
        .to_vec();
    let builder = Builder { host, arguments };
    fs::remove_dir_all(builder.image()).expect("the image is there");
    for step in [
        "fetching the kernel …",
        "installing packages …",
        "finishing the root file system …",
        "packing the root file system …",
        "sealing the image …",
        "boot the image …",
        "warm the guest up …",
        "save the snapshot …",
        "sealing the snapshot …",
    ] {
        let mut build = builder.start();
        build.stderr.wait_for(step, LONG * 3);
        build.kill();
        eventually(
            "everything a killed build had started has ended",
            LONG,
            || builder.host.vms().is_empty(),
        );
    }
    let (status, said) = builder.start().ends();
    assert!(status.success(), "{said}");
    assert_eq!(builder.staging(), Vec::<String>::new());
    assert!(
        builder.doctor().contains("PASS  leftovers"),
        "{}",
        builder.doctor()
    );
    builder.host.finish();
}
