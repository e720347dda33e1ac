//! A host of a test's own, with the built runner on it.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::audit;
use crate::network_log::NetworkLog;
use crate::process::{Proc, processes_of_uids};
use crate::range::RunRange;
use crate::skip::{skip, test_name};
use crate::submit::Submit;
use crate::wait::{LONG, eventually, eventually_some};
use crate::world::{Wiring, World};

/// Time within which everything of a runner must be gone once it is dead.
const GONE: Duration = Duration::from_secs(20);

/// Shows what follows the hosts file and the resolv.conf of a world.
const INTO_WORLD: &str = "mount --bind \"$1\" /etc/hosts && mount --bind \"$2\" /etc/resolv.conf && shift 2 && exec \"$@\"";

/// The checkout.
pub(crate) fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("tests/e2e is two levels down")
}

pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| top().join("target"), PathBuf::from)
}

/// The binary under test.
pub(crate) fn binary() -> PathBuf {
    std::env::var_os("VM0_RUNNER_BIN")
        .map_or_else(|| target().join("release/runner"), PathBuf::from)
}

/// The home that holds the images.
pub(crate) fn images() -> PathBuf {
    std::env::var_os("VM0_TEST_IMAGES").map_or_else(|| target().join("test-home"), PathBuf::from)
}

/// Where a test leaves a file for a person to look at.
pub fn kept(name: &str) -> PathBuf {
    let directory = target().join("test-kept");
    fs::create_dir_all(&directory).expect("the target directory can be written");
    directory.join(name)
}

/// Hashes of a profile's image, as `runner build --dry-run` prints them; `None` when it is not built.
pub(crate) fn hashes(profile: &str) -> Option<(String, String)> {
    let output = Command::new(binary())
        .args(["build", "--dry-run", "--profile", profile])
        .env("VM0_RUNNER_HOME", images())
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(str::to_owned)
    };
    let (rootfs, snapshot) = (value("rootfs_hash")?, value("snapshot_hash")?);
    images()
        .join(format!(
            "images/{rootfs}/snapshots/{snapshot}/manifest.json"
        ))
        .exists()
        .then_some((rootfs, snapshot))
}

/// Hard links of a whole tree.
fn link_tree(from: &Path, to: &Path) {
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

/// How the names of a range's homes begin.
pub(crate) fn home_prefix(range: &RunRange) -> String {
    format!("vm0-e2e-home-{}-", range.number)
}

/// Removes the homes and logs that killed tests left: whoever holds a range is the only one with such names.
pub(crate) fn sweep(homes: &Path, prefix: &str) {
    for entry in fs::read_dir(homes).expect("our directory").flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            // A log is a file, a home a directory; one of the two calls fits.
            let _ = fs::remove_dir_all(entry.path());
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Bytes of all files below a directory.
fn size_of(directory: &Path) -> u64 {
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
fn mount_ext4(at: &Path, bytes: u64) {
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

/// A host being put together.
pub struct HostBuilder {
    name: String,
    group: String,
    profile: String,
    warm: (u32, u32),
    sandbox: Vec<(&'static str, String)>,
    options: Vec<(&'static str, String)>,
    environment: Vec<(String, String)>,
    owner: Option<u32>,
    own_file_system: Option<u64>,
    range: Option<Arc<RunRange>>,
    wiring: Option<Wiring>,
}

impl Default for HostBuilder {
    fn default() -> Self {
        Self {
            name: "e2e".to_owned(),
            group: "vm0/e2e".to_owned(),
            profile: "vm0/small".to_owned(),
            warm: (0, 0),
            sandbox: Vec::new(),
            options: Vec::new(),
            environment: vec![("USE_MOCK_CLAUDE".to_owned(), "true".to_owned())],
            owner: None,
            own_file_system: None,
            range: None,
            wiring: None,
        }
    }
}

impl HostBuilder {
    /// The profile jobs run with unless they say otherwise; `vm0/small` if not called. Its image must be built.
    pub fn profile(mut self, profile: &str) -> Self {
        self.profile = profile.to_owned();
        self
    }

    /// The runner's name, for hosts with several.
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// The group of jobs it takes; `vm0/e2e` if not called.
    pub fn group(mut self, group: &str) -> Self {
        self.group = group.to_owned();
        self
    }

    /// Marks of the warm pool; none is kept warm if not called.
    pub fn warm(mut self, low: u32, high: u32) -> Self {
        self.warm = (low, high);
        self
    }

    /// A key of `sandbox:` in runner.yaml.
    pub fn sandbox(mut self, key: &'static str, value: impl ToString) -> Self {
        self.sandbox.push((key, value.to_string()));
        self
    }

    /// A top-level key of runner.yaml.
    pub fn option(mut self, key: &'static str, value: impl ToString) -> Self {
        self.options.push((key, value.to_string()));
        self
    }

    /// A variable of the daemon's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The real agent CLI instead of the mock.
    pub fn real_agent(mut self) -> Self {
        self.environment
            .retain(|(name, _)| name != "USE_MOCK_CLAUDE");
        self
    }

    /// Gives the home to a user who is not root.
    pub fn owned_by(mut self, uid: u32) -> Self {
        self.owner = Some(uid);
        self
    }

    /// The home on a file system of its own with this much room beside the images, MiB. Only in a mount namespace of
    /// the test's own: see [`crate::in_own_mounts`].
    pub fn own_file_system(mut self, room_mb: u64) -> Self {
        self.own_file_system = Some(room_mb);
        self
    }

    /// The same machine as `other`: its run directory, so its slots and its budget.
    pub fn beside(mut self, other: &Host) -> Self {
        self.range = Some(other.range.clone());
        self
    }

    /// The runner in the host's namespace of this world, so that its jobs reach the world's servers.
    pub fn world(mut self, world: &World) -> Self {
        self.wiring = Some(world.wiring());
        self
    }

    /// Makes the home and starts the runner. `None`, with the reason reported, where that is impossible.
    pub fn start(self) -> Option<Host> {
        let host = self.prepare()?;
        host.start_runner();
        Some(host)
    }

    /// Makes the home without starting a runner.
    pub fn prepare(self) -> Option<Host> {
        if !rustix::process::geteuid().is_root() {
            skip("it starts a runner, which needs root");
            return None;
        }
        if !binary().exists() {
            skip(&format!(
                "{} is not built (scripts/build.sh)",
                binary().display()
            ));
            return None;
        }
        if self.profile != "vm0/small" && std::env::var_os("VM0_TEST_SLOW").is_none() {
            skip(&format!(
                "it needs the image of {}, which only the slow tier builds",
                self.profile
            ));
            return None;
        }
        static SMALL: OnceLock<Option<(String, String)>> = OnceLock::new();
        let found = if self.profile == "vm0/small" {
            SMALL.get_or_init(|| hashes("vm0/small")).clone()
        } else {
            hashes(&self.profile)
        };
        let Some((rootfs, snapshot)) = found else {
            let images = images();
            skip(&format!(
                "the image of {} is not built in {}",
                self.profile,
                images.display()
            ));
            return None;
        };
        let homes = match self.owner {
            None => target().join("test-homes"),
            // Where a user who is not root can get at it, whoever owns the checkout.
            Some(_) => PathBuf::from("/var/tmp"),
        };
        fs::create_dir_all(&homes).expect("the target directory can be written");
        let range = self.range.clone().unwrap_or_else(|| {
            let range = RunRange::take();
            sweep(&homes, &home_prefix(&range));
            Arc::new(range)
        });
        let home = tempfile::Builder::new()
            .prefix(&home_prefix(&range))
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&homes)
            .expect("a home can be made");
        let image = images().join("images").join(&rootfs);
        if let Some(room_mb) = self.own_file_system {
            // ext4's own tables take a few more.
            let proxy = size_of(&images().join("proxy"));
            let size = size_of(&image) + proxy + ((room_mb + 40) << 20);
            mount_ext4(home.path(), size);
        }
        let linked = home.path().join("images").join(&rootfs);
        // A hard link would give the shared files away, or cannot cross file systems.
        if self.owner.is_some() || self.own_file_system.is_some() {
            copy_tree(&image, &linked);
        } else {
            link_tree(&image, &linked);
        }
        // The proxy and the authority that the image trusts, as `runner setup` made them.
        for part in ["ca", "proxy"] {
            let (from, to) = (images().join(part), home.path().join(part));
            if self.owner.is_some() || self.own_file_system.is_some() {
                copy_tree(&from, &to);
            } else {
                link_tree(&from, &to);
            }
        }
        let mut runs = binary();
        if self.owner.is_some() {
            let directory = home.path().join("bin").join(&self.name);
            fs::create_dir_all(&directory).expect("a home can be filled");
            let copy = directory.join("runner");
            fs::copy(&runs, &copy).expect("the binary can be copied");
            runs = copy;
        }
        let queue = home.path().join("groups").join(&self.group);
        let runner = home.path().join("runners").join(&self.name);
        for directory in [&queue, &runner] {
            fs::create_dir_all(directory).expect("a home can be filled");
            fs::set_permissions(directory, fs::Permissions::from_mode(0o700))
                .expect("our directory");
        }
        let config = runner.join("runner.yaml");
        fs::write(&config, self.yaml(&rootfs, &snapshot)).expect("a home can be filled");
        if let Some(uid) = self.owner {
            give(home.path(), uid);
        }
        Some(Host {
            range,
            home,
            group: self.group,
            profile: self.profile,
            config,
            binary: runs,
            environment: self.environment,
            own_file_system: self.own_file_system.is_some(),
            wiring: self.wiring,
            daemon: Mutex::new(None),
            finished: false,
        })
    }

    fn yaml(&self, rootfs: &str, snapshot: &str) -> String {
        let small = self.profile == "vm0/small";
        let (vcpu, memory, disk) = if small {
            (1, 256, 1024)
        } else {
            (2, 2048, 8192)
        };
        let mut yaml = format!("name: {}\ngroup: {}\n", self.name, self.group);
        for (key, value) in &self.options {
            yaml += &format!("{key}: {value}\n");
        }
        if let Some(wiring) = &self.wiring {
            let trusted = wiring.trusted.display();
            yaml += &format!("network:\n  ssl_verify_upstream_trusted_ca: {trusted}\n");
        }
        if !self.sandbox.is_empty() {
            yaml += "sandbox:\n";
        }
        for (key, value) in &self.sandbox {
            yaml += &format!("  {key}: {value}\n");
        }
        yaml + &format!(
            "profiles:\n  {}:\n    rootfs_hash: {rootfs}\n    snapshot_hash: {snapshot}\n    vcpu: {vcpu}\n    \
             memory_mb: {memory}\n    disk_mb: {disk}\n    flavour: {}\n    warm: {{low: {}, high: {}}}\n",
            self.profile,
            if small { "small" } else { "full" },
            self.warm.0,
            self.warm.1,
        )
    }
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

struct Daemon {
    child: Child,
    process: Proc,
}

/// A home, a run directory and a runner; see the crate's documentation.
pub struct Host {
    pub(crate) range: Arc<RunRange>,
    home: TempDir,
    group: String,
    profile: String,
    config: PathBuf,
    binary: PathBuf,
    environment: Vec<(String, String)>,
    own_file_system: bool,
    wiring: Option<Wiring>,
    daemon: Mutex<Option<Daemon>>,
    finished: bool,
}

impl Host {
    /// A host of the built-in small profile, with nothing kept warm.
    #[expect(
        clippy::new_ret_no_self,
        reason = "the builder is what tests start from"
    )]
    pub fn new() -> HostBuilder {
        HostBuilder::default()
    }

    /// The runner's home.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Its group of jobs.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// Its first profile.
    pub fn profile(&self) -> &str {
        &self.profile
    }

    /// The path of its runner.yaml.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// The command `runner ARGS` on this host.
    pub fn runner(&self, args: &[&str]) -> Command {
        self.in_environment(Command::new(&self.binary), args)
    }

    /// Fills the home's file system up to `leave_mb` MiB; returns the file whose removal makes room again. Only with
    /// [`HostBuilder::own_file_system`].
    pub fn fill_disk(&self, leave_mb: u64) -> PathBuf {
        assert!(self.own_file_system, "this would fill the machine's disk");
        let path = self.home().join("filler");
        let mut filler = File::create(&path).expect("the home can be written");
        let block = vec![0; 1 << 16];
        // Until "no space left on device".
        while filler.write_all(&block).is_ok() {}
        let length = filler.metadata().expect("our file").len();
        filler
            .set_len(length.saturating_sub(leave_mb << 20))
            .expect("our file");
        path
    }

    /// What `runner ARGS` shows on a terminal, as the terminal gets it.
    pub fn on_a_terminal(&self, args: &[&str]) -> String {
        // script(1) of bsdutils, which every Debian has; quoting for the shell it starts.
        let line: Vec<String> = std::iter::once(self.binary.display().to_string())
            .chain(args.iter().map(|argument| (*argument).to_owned()))
            .map(|word| format!("'{}'", word.replace('\'', "'\\''")))
            .collect();
        let command = Command::new("script");
        let output = self
            .in_environment(command, &["-qec", &line.join(" "), "/dev/null"])
            .output()
            .expect("script is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn in_environment(&self, mut command: Command, args: &[&str]) -> Command {
        command
            .args(args)
            .env("VM0_RUNNER_HOME", self.home())
            .env("VM0_RUNNER_RUN_DIR", &self.range.run_dir)
            .env("VM0_RUNNER_UID_BASE", self.range.uids.start.to_string())
            .env_remove("SUDO_UID")
            .stdin(Stdio::null());
        command
    }

    /// The command that starts this host's runner, for tests of starts that fail.
    pub fn start_command(&self) -> Command {
        // A killed test takes its runner along.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        if let Some(wiring) = &self.wiring {
            // Every step replaces itself by the next: the child is the runner in the end.
            let net = format!("--net={}", wiring.namespace.display());
            command
                .args(["nsenter", &net, "--", "unshare", "--mount"])
                .args([
                    "--propagation",
                    "private",
                    "--",
                    "sh",
                    "-c",
                    INTO_WORLD,
                    "sh",
                ])
                .args([&wiring.hosts, &wiring.resolv_conf]);
        }
        command.arg(&self.binary);
        let config = self.config.to_str().expect("test paths are text");
        let mut command = self.in_environment(command, &["start", "--config", config, "--local"]);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    fn daemon_log(&self) -> PathBuf {
        self.home().with_extension("log")
    }

    fn held(&self) -> MutexGuard<'_, Option<Daemon>> {
        // A test that panicked meanwhile still wants its runner ended.
        self.daemon
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Starts the runner and waits until it takes jobs.
    pub fn start_runner(&self) {
        self.start_runner_with(self.start_command());
    }

    /// Like [`Host::start_runner`], with a command made from [`Host::start_command`].
    pub fn start_runner_with(&self, command: Command) {
        if let Err(status) = self.try_start_runner_with(command) {
            panic!("the runner ended at once, {status}: {}", self.log_tail());
        }
    }

    /// Starts the runner; false if it refused to run.
    pub fn try_start_runner(&self) -> bool {
        self.try_start_runner_with(self.start_command()).is_ok()
    }

    fn try_start_runner_with(&self, mut command: Command) -> Result<(), ExitStatus> {
        assert!(self.held().is_none(), "the runner runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.daemon_log())
            .expect("the target directory can be written");
        let child = command
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .expect("setpriv is installed");
        let process = Proc::open(child.id()).expect("our child");
        *self.held() = Some(Daemon { child, process });
        eventually_some("the runner is ready or has ended", LONG, || {
            let ended = self
                .held()
                .as_mut()
                .and_then(|daemon| daemon.child.try_wait().expect("our child"));
            if let Some(status) = ended {
                *self.held() = None;
                return Some(Err(status));
            }
            self.status()
                .filter(|status| status["mode"] == "running")
                .map(|_| Ok(()))
        })
    }

    /// `status.json`, once it is there and names this host's live runner.
    pub fn status(&self) -> Option<Value> {
        let path = self.config.with_file_name("status.json");
        let value: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let pid = self.held().as_ref()?.process.pid;
        (value["pid"] == pid).then_some(value)
    }

    /// Waits until `status.json` satisfies a condition.
    pub fn until_status(&self, what: &str, mut condition: impl FnMut(&Value) -> bool) -> Value {
        eventually_some(what, LONG, || {
            self.status().filter(|status| condition(status))
        })
    }

    /// A job to submit.
    pub fn submit(&self, prompt: &str) -> Submit<'_> {
        Submit::new(self, prompt)
    }

    /// Where a run's output is kept.
    pub fn log_path(&self, run: &str) -> PathBuf {
        self.home().join(format!("logs/system-{run}.log"))
    }

    /// A run's output.
    pub fn log(&self, run: &str) -> String {
        let path = self.log_path(run);
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A run's network log, each line checked for what every line of its type has.
    pub fn network_log(&self, run: &str) -> NetworkLog {
        NetworkLog::read(&self.home().join(format!("logs/network-{run}.jsonl")))
    }

    /// What a script prints in a running job's VM, by `runner exec`; it must succeed.
    pub fn in_vm(&self, run: &str, script: &str) -> String {
        let output = self.runner(&["exec", run, "--", script]).output();
        let output = output.expect("the runner starts");
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The daemon's process.
    pub fn daemon(&self) -> Proc {
        let pid = self.held().as_ref().expect("the runner runs").process.pid;
        Proc::open(pid).expect("not yet reaped")
    }

    /// The launcher's process: the daemon's one child.
    pub fn launcher(&self) -> Proc {
        let mut children = self.daemon().children();
        assert_eq!(children.len(), 1, "the daemon's children: {children:?}");
        children.remove(0)
    }

    /// The processes of the proxy.
    pub fn proxies(&self) -> Vec<Proc> {
        let mut found = self.launcher().children();
        // Behind whatever keeps it in its namespaces.
        let behind: Vec<Proc> = found.iter().flat_map(Proc::children).collect();
        found.extend(behind);
        found.retain(|process| {
            let line = fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
            String::from_utf8_lossy(&line).contains("mitmdump")
        });
        found
    }

    /// The processes of VMs.
    pub fn vms(&self) -> Vec<Proc> {
        processes_of_uids(&self.range.uids)
    }

    /// Kills the daemon and checks that its VMs are gone within a second.
    pub fn kill_daemon(&self) {
        let mut daemon = self.held().take().expect("the runner runs");
        daemon.process.kill();
        daemon.child.wait().expect("our child");
        eventually("every VM is gone", Duration::from_secs(1), || {
            self.vms().is_empty()
        });
    }

    /// Waits until the daemon has ended by itself.
    pub fn daemon_ends(&self) -> ExitStatus {
        let mut daemon = self.held().take().expect("the runner runs");
        if !daemon.process.ends_within(LONG) {
            daemon.process.kill();
            panic!("the runner does not end: {}", self.log_tail());
        }
        daemon.child.wait().expect("our child")
    }

    /// Stops the runner as an operator does.
    pub fn stop(&self) -> ExitStatus {
        self.daemon().signal(Signal::TERM);
        self.daemon_ends()
    }

    /// Stops the runner, if one runs, and checks that nothing is left of it.
    pub fn finish(mut self) {
        if self.held().is_some() {
            let status = self.stop();
            assert!(
                status.success(),
                "the runner ended with {status}: {}",
                self.log_tail()
            );
        }
        let mut left = Vec::new();
        let shared = Arc::strong_count(&self.range) > 1;
        let clean = |left: &mut Vec<String>| {
            // The other runner of a shared machine is not ours to judge.
            *left = if shared {
                Vec::new()
            } else {
                audit::leftovers(&self.range, self.home(), &self.group)
            };
            if self.own_file_system {
                // The file system itself is the test's, and goes with its mount namespace.
                left.retain(|one| !one.contains(" - ext4 "));
            }
            left.is_empty()
        };
        let begin = std::time::Instant::now();
        while !clean(&mut left) && begin.elapsed() < GONE {
            std::thread::park_timeout(Duration::from_millis(20));
        }
        assert!(
            left.is_empty(),
            "left behind: {left:#?}\n{}",
            self.log_tail()
        );
        self.finished = true;
    }

    /// What the runner wrote to its standard error so far.
    pub fn daemon_log_text(&self) -> String {
        let log = fs::read(self.daemon_log()).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    fn log_tail(&self) -> String {
        let text = self.daemon_log_text();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines.len().saturating_sub(60);
        format!("the runner's log:\n{}", lines[tail..].join("\n"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if !self.finished {
            if std::thread::panicking() {
                eprintln!("{}: {}", test_name(), self.log_tail());
            }
            if let Some(mut daemon) = self.held().take() {
                daemon.process.kill();
                // Reaped or not, the test has failed already.
                let _ = daemon.child.wait();
            }
            if Arc::strong_count(&self.range) == 1 {
                self.range.clear();
            }
        }
        if self.own_file_system {
            // Else the mount point could not be removed. The runner is dead; if this fails the directory is swept later.
            let _ = Command::new("umount").arg(self.home()).status();
        }
        if std::env::var_os("VM0_TEST_KEEP").is_some() {
            self.home.disable_cleanup(true);
            eprintln!("{}: kept {}", test_name(), self.home().display());
        } else {
            // It may not exist yet.
            let _ = fs::remove_file(self.daemon_log());
        }
        if self.finished && Arc::strong_count(&self.range) == 1 {
            // Slot files stay by design; the directory is this test's own.
            let _ = fs::remove_dir_all(&self.range.run_dir);
        }
    }
}
