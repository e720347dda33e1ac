//! A host of a test's own, with the built runner on it.

mod builder;
mod places;
mod trees;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

pub use builder::HostBuilder;
pub(crate) use builder::{home_prefix, sweep};
pub(crate) use places::{binary, hashes, images, target, top, wheels};
pub use places::{has_wheels, kept};
pub use trees::copy_program;
pub(crate) use trees::{copy_tree, give};

use crate::audit;
use crate::network_log::NetworkLog;
use crate::process::{Proc, processes_of_uids};
use crate::range::RunRange;
use crate::skip::test_name;
use crate::submit::Submit;
use crate::wait::{LONG, eventually, eventually_some};
use crate::world::Wiring;

/// Time within which everything of a runner must be gone once it is dead.
const GONE: Duration = Duration::from_secs(20);

/// Shows what follows the hosts file and the resolv.conf of a world.
const INTO_WORLD: &str = "mount --bind \"$1\" /etc/hosts && mount --bind \"$2\" /etc/resolv.conf && shift 2 && exec \"$@\"";

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
    /// Arguments of `runner start` that say where jobs come from.
    source: Vec<String>,
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

    /// Its run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.range.run_dir.clone()
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
        let mut command = self.in_environment(command, &["start", "--config", config]);
        command.args(&self.source);
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

    /// Waits until a run has made a file in its VM.
    pub fn until_file(&self, run: &str, path: &str) {
        eventually(&format!("{path} is in the VM"), LONG, || {
            let mut asked = self.runner(&["exec", run, "--", "test", "-e", path]);
            asked.output().expect("it starts").status.success()
        });
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

    /// The uid of slot 0.
    pub fn first_uid(&self) -> u32 {
        self.range.uids.start
    }

    /// The processes of VMs.
    pub fn vms(&self) -> Vec<Proc> {
        processes_of_uids(&self.range.uids)
    }

    /// Kills the daemon and waits until its VMs are gone.
    pub fn kill_daemon(&self) {
        let mut daemon = self.held().take().expect("the runner runs");
        daemon.process.kill();
        daemon.child.wait().expect("our child");
        eventually("every VM is gone", LONG, || self.vms().is_empty());
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
