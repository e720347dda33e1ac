//! What a release of Firecracker consists of, its pins, and `runner setup` with them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use e2e::Host;
use serde_json::{Value, json};

/// Runs a program of the distribution.
pub(super) fn run(program: &str, arguments: &[&str], directory: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

pub(super) fn sha256(path: &Path) -> String {
    let name = path.to_str().expect("test paths are text");
    let line = run("sha256sum", &["--", name], Path::new("/"));
    line.split(' ').next().expect("a hash").to_owned()
}

/// What a release consists of, and the pins of it.
pub(super) struct Release {
    pub(super) directory: tempfile::TempDir,
    pub(super) archive: String,
    pub(super) kernel: String,
}

impl Release {
    pub(super) const VERSION: &str = "9.9.9";

    /// Of programs that do nothing, and a kernel of this size that is none.
    pub(super) fn stand_in(kernel_bytes: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join("program");
        fs::write(&program, "#!/bin/sh\nexit 1\n").expect("our directory");
        let kernel = directory.path().join("kernel");
        fs::write(&kernel, vec![7; kernel_bytes]).expect("our directory");
        Self::of(directory, Self::VERSION, &program, &program, &kernel, "")
    }

    pub(super) fn of(
        directory: tempfile::TempDir,
        version: &str,
        firecracker: &Path,
        jailer: &Path,
        kernel: &Path,
        kernel_args: &str,
    ) -> Self {
        let arch = std::env::consts::ARCH;
        let files = directory.path().join("files");
        let tree = format!("release-v{version}-{arch}");
        fs::create_dir_all(files.join(&tree)).expect("our directory");
        let packed = |program: &str| {
            files
                .join(&tree)
                .join(format!("{program}-v{version}-{arch}"))
        };
        fs::copy(firecracker, packed("firecracker")).expect("a copy");
        fs::copy(jailer, packed("jailer")).expect("a copy");
        let archive = format!("firecracker-v{version}-{arch}.tgz");
        run("tar", &["czf", &archive, &tree], &files);
        let kernel_name = format!("vmlinux-test-{arch}");
        fs::copy(kernel, files.join(&kernel_name)).expect("a copy");
        let pins = json!({
            "version": version,
            "archive_sha256": sha256(&files.join(&archive)),
            "firecracker_sha256": sha256(&packed("firecracker")),
            "jailer_sha256": sha256(&packed("jailer")),
            "kernel": "vmlinux-test",
            "kernel_sha256": sha256(&files.join(&kernel_name)),
            "kernel_args": kernel_args,
        });
        fs::write(directory.path().join("pins.json"), pins.to_string()).expect("our directory");
        Self {
            directory,
            archive,
            kernel: kernel_name,
        }
    }

    pub(super) fn files(&self) -> PathBuf {
        self.directory.path().join("files")
    }

    /// `runner setup` with these pins, from a directory or URL.
    pub(super) fn setup(&self, host: &Host, from: &str) -> Command {
        let pins = self.directory.path().join("pins.json");
        let mut command =
            host.runner(&["setup", "--json", "--engine", "firecracker", "--from", from]);
        command.arg("--firecracker-pins").arg(pins);
        command
    }
}

pub(super) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What `runner setup` printed about Firecracker.
pub(super) fn installed(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    report["firecracker"].clone()
}

/// Names in the directory of Firecracker that somebody could take for an installation.
pub(super) fn installations(host: &Host) -> Vec<String> {
    let Ok(entries) = fs::read_dir(host.home().join("firecracker")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && name != "lock")
        .collect()
}

pub(super) fn check(host: &Host) -> Output {
    host.runner(&["setup", "--check", "--engine", "firecracker"])
        .output()
        .expect("the runner starts")
}
