//! `runner setup` fetches Firecracker, and what comes of it: from nothing to a job on a host that is like one in production.
//!
//! Its publishers cannot be reached from everywhere, so the files come from a server of the test's own, with their hashes in
//! a file of pins. Where the real programs are not named by the environment, stand-ins take their place up to the verified
//! installation; no job runs with those.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;

use e2e::{Host, LONG, Proc, Text, eventually, skip};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Runs a program of the distribution.
fn run(program: &str, arguments: &[&str], directory: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn sha256(path: &Path) -> String {
    let name = path.to_str().expect("test paths are text");
    let line = run("sha256sum", &["--", name], Path::new("/"));
    line.split(' ').next().expect("a hash").to_owned()
}

/// What a release consists of, and the pins of it.
struct Release {
    directory: tempfile::TempDir,
    archive: String,
    kernel: String,
}

impl Release {
    const VERSION: &str = "9.9.9";

    /// Of programs that do nothing, and a kernel of this size that is none.
    fn stand_in(kernel_bytes: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join("program");
        fs::write(&program, "#!/bin/sh\nexit 1\n").expect("our directory");
        let kernel = directory.path().join("kernel");
        fs::write(&kernel, vec![7; kernel_bytes]).expect("our directory");
        Self::of(directory, Self::VERSION, &program, &program, &kernel, "")
    }

    fn of(
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

    fn files(&self) -> PathBuf {
        self.directory.path().join("files")
    }

    /// `runner setup` with these pins, from a directory or URL.
    fn setup(&self, host: &Host, from: &str) -> Command {
        let pins = self.directory.path().join("pins.json");
        let mut command =
            host.runner(&["setup", "--json", "--engine", "firecracker", "--from", from]);
        command.arg("--firecracker-pins").arg(pins);
        command
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What `runner setup` printed about Firecracker.
fn installed(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    report["firecracker"].clone()
}

/// Names in the directory of Firecracker that somebody could take for an installation.
fn installations(host: &Host) -> Vec<String> {
    let Ok(entries) = fs::read_dir(host.home().join("firecracker")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && name != "lock")
        .collect()
}

fn check(host: &Host) -> Output {
    host.runner(&["setup", "--check", "--engine", "firecracker"])
        .output()
        .expect("the runner starts")
}

/// A process of ours that is killed and reaped however the test ends.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A web server of a directory with TLS, and a certificate that nobody else believes.
struct TlsMirror {
    _server: Reaped,
    url: String,
    certificate: PathBuf,
}

impl TlsMirror {
    const SERVER: &str = "
import functools, http.server, ssl, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2], sys.argv[3])
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_port, flush=True)
server.serve_forever()
";

    fn of(release: &Release) -> Self {
        let directory = release.directory.path();
        run(
            "openssl",
            &[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=mirror.example.com",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-addext",
                "basicConstraints=critical,CA:FALSE",
                "-keyout",
                "key.pem",
                "-out",
                "certificate.pem",
            ],
            directory,
        );
        let mut server = Command::new("python3")
            .args(["-I", "-c", Self::SERVER])
            .arg(release.files())
            .args([directory.join("certificate.pem"), directory.join("key.pem")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3 is installed");
        let mut port = String::new();
        BufReader::new(server.stdout.take().expect("a pipe"))
            .read_line(&mut port)
            .expect("it says its port");
        Self {
            _server: Reaped(server),
            url: format!("https://127.0.0.1:{}", port.trim()),
            certificate: directory.join("certificate.pem"),
        }
    }
}

#[test]
fn a_mirror_with_tls_is_believed_like_the_host_does_and_what_was_tampered_is_repaired() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let release = Release::stand_in(1 << 20);
    let mirror = TlsMirror::of(&release);
    let stranger = release
        .setup(&host, &mirror.url)
        .output()
        .expect("it starts");
    assert!(!stranger.status.success());
    assert!(
        said(&stranger).contains("certificate"),
        "{}",
        said(&stranger)
    );
    assert!(installations(&host).is_empty());
    assert!(!check(&host).status.success());

    let set_up = || {
        let mut command = release.setup(&host, &mirror.url);
        command.env("SSL_CERT_FILE", &mirror.certificate);
        command.output().expect("it starts")
    };
    let first = set_up();
    assert_eq!(installed(&first)["version"], Release::VERSION);
    assert!(
        said(&first).contains("the pins you gave"),
        "{}",
        said(&first)
    );
    assert!(check(&host).status.success());
    let doctor = host.runner(&["doctor", "--engine", "firecracker"]).output();
    let doctor = String::from_utf8(doctor.expect("it starts").stdout).expect("text");
    assert!(doctor.contains("build of your own"), "{doctor}");

    let directory = installations(&host)
        .into_iter()
        .find(|name| name != "current")
        .expect("it is installed");
    let jailer = host
        .home()
        .join("firecracker")
        .join(directory)
        .join("jailer");
    fs::write(&jailer, "#!/bin/sh\nexit 0\n").expect("our home");
    let refused = check(&host);
    assert!(!refused.status.success());
    let text = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(text.contains("not what was pinned"), "{text}");
    // A build does not take it either.
    let build = host
        .runner(&[
            "build",
            "--dry-run",
            "--profile",
            "vm0/small",
            "--engine",
            "firecracker",
        ])
        .output()
        .expect("it starts");
    assert!(!build.status.success());
    assert!(
        said(&build).contains("not what was pinned"),
        "{}",
        said(&build)
    );
    installed(&set_up());
    assert!(check(&host).status.success());

    // Another archive on the mirror, behind the back of the pins.
    fs::remove_dir_all(host.home().join("firecracker")).expect("our home");
    let archive = release.files().join(&release.archive);
    let mut bytes = fs::read(&archive).expect("our file");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&archive, bytes).expect("our file");
    let tampered = set_up();
    assert!(!tampered.status.success());
    assert!(
        said(&tampered).contains("thrown away"),
        "{}",
        said(&tampered)
    );
    assert!(installations(&host).is_empty());
    host.finish();
}

/// A server on loopback of one release, whose first answer about the kernel ends in the middle: nothing more comes until
/// the client hangs up.
struct Stalling {
    address: SocketAddr,
    /// A path and what its `Range` said, for each request.
    requests: mpsc::Receiver<(String, Option<String>)>,
}

impl Stalling {
    fn of(release: &Release) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("bound");
        let (files, kernel) = (release.files(), release.kernel.clone());
        let (seen, requests) = mpsc::channel();
        std::thread::spawn(move || {
            let mut stalled = false;
            while let Ok((mut stream, _)) = listener.accept() {
                let Some((path, range)) = request(&stream) else {
                    continue;
                };
                let content = fs::read(files.join(&path)).expect("a file of the release");
                let first = path == kernel && !stalled;
                stalled |= first;
                // The test may be over.
                let _ = seen.send((path, range.clone()));
                let from = range.map_or(0, |range| {
                    let from = range.trim_start_matches("bytes=").trim_end_matches('-');
                    from.parse().expect("a number")
                });
                let last = content.len();
                let status = match from {
                    0 => "200 OK",
                    _ => "206 Partial Content",
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{last}\r\nConnection: close\r\n\r\n",
                    last - from,
                    last - 1,
                );
                let end = if first {
                    content.len() / 2
                } else {
                    content.len()
                };
                let _ = stream.write_all(head.as_bytes());
                let _ = stream.write_all(&content[from..end]);
                if first {
                    let _ = stream.read(&mut [0]);
                }
            }
        });
        Self { address, requests }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// Path and `Range` of one request.
fn request(stream: &TcpStream) -> Option<(String, Option<String>)> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let path = first.split(' ').nth(1)?.trim_start_matches('/').to_owned();
    let mut range = None;
    for line in lines {
        let line = line.ok()?.to_lowercase();
        if line.is_empty() {
            break;
        }
        range = line.strip_prefix("range: ").map(str::to_owned).or(range);
    }
    Some((path, range))
}

/// A set-up that runs until it is told to end.
struct Running {
    child: Reaped,
    stderr: Text,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let stderr = Text::collect(child.stderr.take().expect("a pipe"));
        Self {
            child: Reaped(child),
            stderr,
        }
    }

    fn process(&self) -> Proc {
        Proc::open(self.child.0.id()).expect("it runs")
    }

    /// Whether it ended well, and what it said.
    fn ends(mut self) -> (bool, String) {
        let said = self.stderr.all(LONG);
        (self.child.0.wait().expect("our child").success(), said)
    }
}

/// Bytes of the unfinished kernel.
fn fetched(host: &Host) -> u64 {
    let parts = host.home().join("firecracker/.download");
    let Ok(entries) = fs::read_dir(parts) else {
        return 0;
    };
    let sizes = entries.flatten().filter_map(|entry| entry.metadata().ok());
    sizes.map(|meta| meta.len()).max().unwrap_or(0)
}

#[test]
fn a_set_up_that_is_killed_or_interrupted_is_never_used_and_the_next_goes_on() {
    for how in [Signal::KILL, Signal::INT] {
        let Some(host) = Host::new().prepare() else {
            return;
        };
        let size = 4 << 20;
        let release = Release::stand_in(size);
        let server = Stalling::of(&release);
        let half = (size / 2) as u64;
        let first = Running::start(release.setup(&host, &server.url()));
        eventually("half of the kernel is there", LONG, || {
            fetched(&host) >= half
        });
        // Who comes second waits, and then has nothing left to do.
        let second = Running::start(release.setup(&host, &server.url()));
        second.stderr.wait_for("another `runner setup`", LONG);
        assert!(installations(&host).is_empty());
        assert!(!check(&host).status.success());
        first.process().signal(how);
        let (well, text) = first.ends();
        assert!(!well, "{text}");
        if how == Signal::INT {
            assert!(
                text.contains("the next `runner setup` goes on from there"),
                "{text}"
            );
        }
        let (well, text) = second.ends();
        assert!(well, "{text}");
        assert!(check(&host).status.success());
        let ranges: Vec<_> = server
            .requests
            .try_iter()
            .filter(|(path, _)| *path == release.kernel)
            .map(|(_, range)| range)
            .collect();
        assert_eq!(ranges, [None, Some(format!("bytes={half}-"))]);
        host.finish();
    }
}

#[test]
fn a_full_disk_is_told_and_gets_its_room_back() {
    if e2e::in_own_mounts("firecracker").is_none() {
        return;
    }
    let room_mb = 100;
    let Some(host) = Host::new().own_file_system(room_mb).prepare() else {
        return;
    };
    let release = Release::stand_in(20 << 20);
    let filler = host.fill_disk(8);
    let full = release
        .setup(&host, release.files().to_str().expect("text"))
        .output()
        .expect("it starts");
    assert!(!full.status.success());
    assert!(said(&full).contains("is full"), "{}", said(&full));
    assert!(installations(&host).is_empty());
    assert!(fetched(&host) < 1 << 20, "the half kernel is gone");
    fs::remove_file(filler).expect("our file");
    let files = release.files();
    let output = release.setup(&host, files.to_str().expect("text")).output();
    installed(&output.expect("it starts"));
    host.finish();
}

#[test]
fn without_hardware_kvm_a_set_up_needs_no_network_and_says_why() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").expect("/proc is mounted");
    let hardware = cpuinfo
        .split_whitespace()
        .any(|word| word == "vmx" || word == "svm");
    if hardware && Path::new("/dev/kvm").exists() {
        skip("this machine's KVM has hardware support: Firecracker would be fetched");
        return;
    }
    // Whatever asked for the network would end here.
    let output = host
        .runner(&["setup", "--json"])
        .env("https_proxy", "http://127.0.0.1:1")
        .output()
        .expect("it starts");
    let firecracker = installed(&output);
    assert_eq!(firecracker["status"], "skipped");
    assert!(
        firecracker["reason"]
            .as_str()
            .is_some_and(|why| why.contains("/dev/kvm"))
    );
    assert!(installations(&host).is_empty());
    host.finish();
}

#[test]
fn an_image_for_both_engines_is_built_and_a_kvm_that_only_opens_is_explained() {
    if e2e::in_own_mounts("firecracker").is_none() {
        return;
    }
    if !Path::new("/dev/kvm").exists() {
        skip("there is no /dev/kvm");
        return;
    }
    let Some(host) = Host::new().prepare() else {
        return;
    };
    // A CPU that claims to have the extensions, in a virtual machine: the boot has to find out what that is worth.
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").expect("/proc is mounted");
    let hardware = cpuinfo
        .split_whitespace()
        .any(|word| word == "vmx" || word == "svm");
    let claims = host.home().join("cpuinfo");
    fs::write(
        &claims,
        format!("flags\t\t: fpu vmx hypervisor\n\n{cpuinfo}"),
    )
    .expect("our home");
    let claims = claims.to_str().expect("text");
    run(
        "mount",
        &["--bind", claims, "/proc/cpuinfo"],
        Path::new("/"),
    );

    let release = Release::stand_in(1 << 20);
    let files = release.files();
    let set_up = release.setup(&host, files.to_str().expect("text")).output();
    installed(&set_up.expect("it starts"));
    let build = host
        .runner(&["build", "--json", "--profile", "vm0/small"])
        .output()
        .expect("it starts");
    let text = said(&build);
    assert!(build.status.success(), "{text}");
    let report: Value = serde_json::from_slice(&build.stdout).expect("JSON");
    let rootfs = report["rootfs_hash"].as_str().expect("a hash");
    let image = host.home().join("images").join(rootfs);
    let json = |path: PathBuf| -> Value {
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_slice(&bytes).expect("JSON")
    };
    let manifest = json(image.join("manifest.json"));
    for engine in ["qemu", "firecracker"] {
        for part in ["kernel", "initrd", "rootfs"] {
            let name = manifest["sets"][engine][part]
                .as_str()
                .expect("it is named");
            assert_eq!(manifest["files"][name]["sha256"], sha256(&image.join(name)));
        }
    }
    // Both roots hold the same files.
    let squashfs = image.join("rootfs.squashfs");
    let listed = run(
        "unsquashfs",
        &["-l", squashfs.to_str().expect("text")],
        Path::new("/"),
    );
    assert!(
        listed.contains("squashfs-root/usr/local/bin/guest-agent"),
        "{listed}"
    );

    // Programs that only pretend were not taken for Firecracker.
    assert!(text.contains("Firecracker"), "{text}");
    let snapshot = report["snapshot_hash"].as_str().expect("a hash");
    let snapshot = json(image.join("snapshots").join(snapshot).join("manifest.json"));
    let kvm = json(image.join("proof-qemu-kvm.json"));
    if hardware {
        assert_eq!(snapshot["engine"], "qemu_kvm");
        assert_eq!(kvm["boots"], true);
    } else {
        assert_eq!(snapshot["engine"], "qemu_tcg");
        assert_eq!(kvm["boots"], false);
        for words in [
            "QEMU with KVM is not used",
            "nested KVM opens, but does not run",
            "emulated in software",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
    let doctor = host.runner(&["doctor"]).output().expect("it starts");
    let doctor = String::from_utf8(doctor.stdout).expect("text");
    assert!(
        doctor.contains("smt"),
        "a host with hardware KVM is checked for production: {doctor}"
    );
    if !hardware {
        assert!(
            doctor.contains("not QEMU with KVM (the image does not boot)"),
            "{doctor}"
        );
    }
    run("umount", &["/proc/cpuinfo"], Path::new("/"));
    host.finish();
}

/// The real programs, as the environment names them.
struct Real {
    firecracker: PathBuf,
    jailer: PathBuf,
    kernel: PathBuf,
    kernel_args: String,
}

impl Real {
    fn of_environment() -> Result<Self, String> {
        let file = |name: &str| {
            let path = std::env::var_os(name).map(PathBuf::from);
            match path {
                Some(path) if path.is_file() => Ok(path),
                Some(path) => Err(format!("{name} names {}, which is no file", path.display())),
                None => Err(format!("{name} names no real program")),
            }
        };
        let real = Self {
            firecracker: file("VM0_TEST_FIRECRACKER")?,
            jailer: file("VM0_TEST_JAILER")?,
            kernel: file("VM0_TEST_FIRECRACKER_KERNEL")?,
            kernel_args: std::env::var("VM0_TEST_FIRECRACKER_KERNEL_ARGS").unwrap_or_default(),
        };
        match Path::new("/dev/kvm").exists() {
            true => Ok(real),
            false => Err("there is no /dev/kvm".to_owned()),
        }
    }

    /// `Firecracker v1.16.1` without its first word.
    fn version(&self) -> String {
        let program = self.firecracker.to_str().expect("text");
        let text = run(program, &["--version"], Path::new("/"));
        let first = text.lines().next().unwrap_or_default();
        let version = first.rsplit('v').next().unwrap_or_default();
        version.to_owned()
    }
}

#[test]
fn a_host_in_production_gets_from_nothing_to_a_job_in_firecracker() {
    let real = match Real::of_environment() {
        Ok(real) => real,
        Err(reason) => {
            skip(&reason);
            return;
        }
    };
    let Some(host) = Host::new().option("engine", "firecracker").prepare() else {
        return;
    };
    // Nothing that was built before.
    fs::remove_dir_all(host.home().join("images")).expect("our home");
    let directory = tempfile::tempdir().expect("a directory");
    let version = real.version();
    let Real {
        firecracker,
        jailer,
        kernel,
        kernel_args,
    } = &real;
    let release = Release::of(
        directory,
        &version,
        firecracker,
        jailer,
        kernel,
        kernel_args,
    );
    let mirror = TlsMirror::of(&release);
    let set_up = release
        .setup(&host, &mirror.url)
        .env("SSL_CERT_FILE", &mirror.certificate)
        .output()
        .expect("it starts");
    assert_eq!(installed(&set_up)["version"], version.as_str());

    // A KVM without hardware support takes half a minute for the boot, and seconds for each process.
    let limit = "600";
    let small = ["--profile", "vm0/small", "--engine", "firecracker"];
    let build = host
        .runner(&["build", "--boot-limit", limit])
        .args(small)
        .output()
        .expect("it starts");
    assert!(build.status.success(), "{}", said(&build));
    let runner = host.config().parent().and_then(Path::file_name);
    let name = runner
        .and_then(|name| name.to_str())
        .expect("text")
        .to_owned();
    let config = host
        .runner(&[
            "config",
            "--name",
            &name,
            "--group",
            host.group(),
            "--warm",
            "0:0",
        ])
        .args(small)
        .output()
        .expect("it starts");
    assert!(config.status.success(), "{}", said(&config));
    host.start_runner();
    let status = host.until_status("it runs", |status| status["mode"] == "running");
    assert_eq!(status["engine"], "firecracker");
    let outcome = host.submit("uname -r; echo in-firecracker").run();
    outcome.expect_exit(0);
    assert!(host.log(&outcome.run_id()).contains("in-firecracker"));
    host.finish();
}
