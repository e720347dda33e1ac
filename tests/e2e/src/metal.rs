//! A metal host of a test's own: a container with systemd and an ssh server, reached from the world of the test as a
//! laptop reaches a host, by ssh and as a user who is not root.
//!
//! ```text
//! vm0e2e-<n>-world (the laptop, and the servers of the web) ═veth═ vm0e2e-<n>-host: the container
//!    scripts/dev-runner.sh ──────────────── ssh ──────────────────▶ 198.18.0.1:22
//! ```
//!
//! The container is an overlay on a root that is built once. It has no package archive of its own: the images and the
//! proxy that its user's home begins with are those of the tests, as if somebody had deployed to it before.

mod submission;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::host::{binary, copy_tree, give, hashes, home_prefix, images, sweep, target, top};
use crate::process::Proc;
use crate::skip::skip;
use crate::text::Text;
use crate::wait::{LONG, eventually};
use crate::world::World;

pub use submission::Submission;

/// The host's user.
const UID: u32 = 1000;
/// The runner's name on it, and its group.
pub const NAME: &str = "local-test";
/// Its address, as the laptop sees it.
const ADDRESS: &str = "198.18.0.1";
/// The pnpm that tests use: of the series that runs on the oldest Node of the distributions we know.
const PNPM: &str = "pnpm@10";

/// See the module's documentation.
pub struct Metal {
    world: World,
    directory: TempDir,
    root: PathBuf,
    profile: String,
    container: Option<Child>,
    /// Whether its control groups are of the second version alone, whatever this machine's are.
    unified: bool,
}

fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).exists())
}

/// The sources that the images were built from.
fn sources() -> Option<PathBuf> {
    let lists = fs::read_dir(images().join("images/.apt")).ok()?;
    lists
        .flatten()
        .map(|entry| entry.path().join("build.sources"))
        .find(|file| file.exists())
}

/// Runs `make` once for all tests of this checkout, whoever comes first.
fn once(made: &Path, make: impl FnOnce() -> Command) {
    fs::create_dir_all(made.parent().expect("below target")).expect("the target directory");
    let lock = File::create(made.with_extension("lock")).expect("a lock can be made");
    flock(&lock, FlockOperation::LockExclusive).expect("a lock can be taken");
    if made.exists() {
        return;
    }
    let output = make().stdin(Stdio::null()).output().expect("it starts");
    assert!(output.status.success(), "{}: {output:?}", made.display());
}

/// The root file system all metal hosts share, named by what it is made of.
fn root(sources: &Path) -> PathBuf {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let script = include_str!("metal/root.sh");
    let extra = std::env::var("VM0_TEST_SLOW").map_or("", |_| "npm");
    let mut hasher = DefaultHasher::new();
    (script, extra, fs::read(sources).expect("sources")).hash(&mut hasher);
    let made = target().join(format!("metal/root-{:016x}", hasher.finish()));
    once(&made, || {
        let mut command = Command::new("sh");
        command
            .args(["-c", script, "root.sh"])
            .arg(&made)
            .arg(sources);
        command.env("EXTRA_PACKAGES", extra);
        command
    });
    made
}

/// A directory of this user's home that a variable may name.
fn of_home(variable: &str, name: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(name),
        PathBuf::from,
    )
}

/// The directory that holds pnpm's program.
fn pnpm() -> Option<PathBuf> {
    if !has("npm") {
        return None;
    }
    let made = target().join("metal/pnpm/node_modules/.bin");
    once(&made.with_file_name(".bin/pnpm"), || {
        let mut command = Command::new("npm");
        command.args(["install", "--silent", "--no-fund", "--no-audit", "--prefix"]);
        command.arg(target().join("metal/pnpm")).arg(PNPM);
        command
    });
    Some(made)
}

impl Metal {
    /// Boots one whose runner serves `profile`. `None`, with the reason reported, where that is impossible.
    pub fn new(profile: &str) -> Option<Self> {
        Self::with_sites(profile, &[])
    }

    /// One whose web also has these sites.
    pub fn with_sites(profile: &str, sites: &[&str]) -> Option<Self> {
        Self::made(profile, sites, false)
    }

    /// One with control groups of the second version alone, as distributions have them. Where this machine has
    /// controllers of the first version, such a host has none of them: its VMs are not limited.
    pub fn unified(profile: &str) -> Option<Self> {
        Self::made(profile, &[], true)
    }

    fn made(profile: &str, sites: &[&str], unified: bool) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip("it boots a container, which needs root");
            return None;
        }
        for program in ["systemd-nspawn", "mmdebstrap", "ssh", "ssh-keygen"] {
            if !has(program) {
                skip(&format!("{program} is not installed"));
                return None;
            }
        }
        if !binary().exists() {
            skip(&format!(
                "{} is not built (scripts/build.sh)",
                binary().display()
            ));
            return None;
        }
        if profile != "vm0/small" && std::env::var_os("VM0_TEST_SLOW").is_none() {
            skip(&format!(
                "it needs the image of {profile}, which only the slow tier builds"
            ));
            return None;
        }
        let (Some((rootfs, _)), Some(sources)) = (hashes(profile), sources()) else {
            skip(&format!(
                "the image of {profile} is not built in {}",
                images().display()
            ));
            return None;
        };
        let root = root(&sources);
        let world = World::around(sites)?;
        let homes = target().join("test-homes");
        fs::create_dir_all(&homes).expect("the target directory can be written");
        sweep(&homes, &home_prefix(world.range()));
        let directory = tempfile::Builder::new()
            .prefix(&home_prefix(world.range()))
            .permissions(Permissions::from_mode(0o755))
            .tempdir_in(&homes)
            .expect("a directory can be made");
        let mut metal = Self {
            world,
            directory,
            root,
            profile: profile.to_owned(),
            container: None,
            unified,
        };
        metal.furnish(&rootfs);
        metal.boot();
        Some(metal)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let file = self.at(path);
        fs::create_dir_all(file.parent().expect("a parent")).expect("our directory");
        fs::write(file, text).expect("our directory");
    }

    /// What the host has before it boots, and the laptop's settings.
    fn furnish(&self, rootfs: &str) {
        for part in ["upper", "work", "merged", "laptop"] {
            fs::create_dir(self.at(part)).expect("our directory");
        }
        let wiring = self.world.wiring();
        let read = |path: &Path| fs::read(path).expect("it is there");
        self.write("upper/etc/hosts", {
            let mut hosts = b"127.0.0.1 localhost metal\n".to_vec();
            hosts.extend(read(&wiring.hosts));
            hosts
        });
        self.write("upper/etc/resolv.conf", read(&wiring.resolv_conf));
        // The web's authority is one that the host trusts.
        self.write("upper/etc/ssl/certs/ca-certificates.crt", {
            let mut trusted = read(&self.root.join("etc/ssl/certs/ca-certificates.crt"));
            trusted.extend(read(&wiring.trusted));
            trusted
        });
        // To this machine its VMs are processes like any: they need users of their own, or a runner beside the test
        // would take them for what it left itself.
        let uids = format!("VM0_RUNNER_UID_BASE={}", self.world.range().uids.start);
        self.write(
            "upper/etc/systemd/system.conf.d/uids.conf",
            format!("[Manager]\nDefaultEnvironment={uids}\n"),
        );
        self.write("upper/etc/environment", format!("{uids}\n"));
        self.write(
            "upper/etc/sudoers.d/uids",
            "Defaults env_keep += VM0_RUNNER_UID_BASE\n",
        );
        // Twenty connections at once are more than a server takes as it comes.
        self.write(
            "upper/etc/ssh/sshd_config.d/many.conf",
            "MaxStartups 100\nMaxSessions 100\n",
        );
        let key = self.at("laptop/key");
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&key)
            .status();
        assert!(made.expect("ssh-keygen is installed").success());
        self.write(
            "upper/home/dev/.ssh/authorized_keys",
            read(&key.with_extension("pub")),
        );
        let home = self.at("upper/home/dev/.vm0-runner");
        for part in [
            "ca".to_owned(),
            "proxy".to_owned(),
            "images/.apt".to_owned(),
            format!("images/{rootfs}"),
        ] {
            copy_tree(&images().join(&part), &home.join(&part));
        }
        // Lists that were fetched this hour are not fetched again.
        for entry in fs::read_dir(home.join("images/.apt"))
            .expect("copied")
            .flatten()
        {
            File::options()
                .append(true)
                .open(entry.path().join("kernel.json"))
                .and_then(|file| file.set_modified(std::time::SystemTime::now()))
                .expect("copied");
        }
        give(&self.at("upper/home/dev"), UID);
        give(&home.join("ca/ca-key.pem"), 0);
        for (path, mode) in [("", 0o711), ("ca", 0o700), ("images", 0o700)] {
            fs::set_permissions(home.join(path), Permissions::from_mode(mode)).expect("ours");
        }
        let host_key = self.root.join("etc/ssh/ssh_host_ed25519_key.pub");
        let host_key = fs::read_to_string(host_key).expect("the ssh server has a key");
        self.write(
            "laptop/known_hosts",
            format!("{ADDRESS},metal-1.eu.example.com {host_key}"),
        );
        self.settings("");
    }

    /// Writes the laptop's settings, with `more` at their end.
    pub fn settings(&self, more: &str) {
        let laptop = self.at("laptop");
        self.write(
            "laptop/env",
            format!(
                "RUNNER_LOCAL_HOST={ADDRESS}\nRUNNER_LOCAL_USER=dev\nRUNNER_SSH_KEY='{0}/key'\n\
                 RUNNER_SSH_KNOWN_HOSTS='{0}/known_hosts'\nRUNNER_DEFAULT_GROUP=vm0/{NAME}\nRUNNER_PROFILES={1}\n\
                 RUNNER_BINARY='{2}'\n{more}\n",
                laptop.display(),
                self.profile,
                binary().display()
            ),
        );
    }

    /// Boots the host, the first time or again, and waits until ssh lets the user in.
    pub fn boot(&mut self) {
        let netns = self.world.wiring().namespace;
        let number = self.world.range().number.to_string();
        let console = File::create(self.at("console")).expect("our directory");
        let child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--"])
            .args(["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c"])
            .args([include_str!("metal/boot.sh"), "boot.sh"])
            .arg(&self.root)
            .arg(self.directory.path())
            .arg(netns)
            .arg(&number)
            .env(crate::range::RunRange::WORLD_VARIABLE, &number)
            .envs(
                self.unified
                    .then_some(("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1")),
            )
            .stdin(Stdio::null())
            .stdout(console.try_clone().expect("a file"))
            .stderr(console)
            .spawn()
            .expect("unshare is installed");
        self.container = Some(child);
        eventually("the host answers", LONG, || {
            let container = self.container.as_mut().expect("just started");
            if let Some(status) = container.try_wait().expect("our child") {
                let said = fs::read_to_string(self.at("console")).unwrap_or_default();
                panic!("the container ended ({status}): {said}");
            }
            // Refused until the server listens and logins are allowed.
            self.ssh("exec systemctl is-system-running --wait")
                .status
                .success()
        });
    }

    /// The world that it is in.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Cuts its power.
    pub fn power_cut(&mut self) {
        if let Some(mut container) = self.container.take() {
            let processes = self.processes();
            container.kill().expect("our child");
            container.wait().expect("our child");
            for process in processes {
                process.kill();
                assert!(process.ends_within(LONG), "{process:?}");
            }
        }
    }

    /// Every process in the container.
    fn processes(&self) -> Vec<Proc> {
        let netns = self.world.wiring().namespace;
        let pids = Command::new("ip")
            .args(["netns", "pids"])
            .arg(netns.file_name().expect("a name"))
            .output()
            .expect("ip is installed");
        let text = String::from_utf8_lossy(&pids.stdout).into_owned();
        text.split_whitespace()
            .filter_map(|pid| Proc::open(pid.parse().ok()?))
            .collect()
    }

    /// `program` on the laptop, in the checkout, with pnpm at hand if there is one.
    pub fn laptop(&self, program: &str) -> Command {
        let namespace = format!("--net={}", self.world.laptop().display());
        let mut path = vec![self.at("laptop/bin")];
        path.extend(pnpm());
        path.extend(std::env::split_paths(
            &std::env::var_os("PATH").unwrap_or_default(),
        ));
        let mut command = Command::new("nsenter");
        command
            // Whoever started the tests in the background has Ctrl-C ignored, and a shell cannot take that back.
            .args([&namespace, "--", "env", "--default-signal", program])
            .env("PATH", std::env::join_paths(path).expect("a path"))
            .env("RUNNER_ENV_FILE", self.at("laptop/env"))
            // A laptop's user has no agent or settings that would help.
            .env("HOME", self.at("laptop"))
            // But the Rust that is here.
            .env("CARGO_HOME", of_home("CARGO_HOME", ".cargo"))
            .env("RUSTUP_HOME", of_home("RUSTUP_HOME", ".rustup"))
            .env_remove("SSH_AUTH_SOCK")
            .current_dir(top())
            .stdin(Stdio::null());
        command
    }

    /// Whether the laptop has pnpm.
    pub fn has_pnpm(&self) -> bool {
        let there = self.laptop("sh").args(["-c", "command -v pnpm"]).output();
        there.is_ok_and(|output| output.status.success())
    }

    /// Puts a program of the test's own before all others of the laptop.
    pub fn laptop_program(&self, name: &str, script: &str) {
        self.write(&format!("laptop/bin/{name}"), script);
        let program = self.at(&format!("laptop/bin/{name}"));
        fs::set_permissions(program, Permissions::from_mode(0o755)).expect("our file");
    }

    /// The runner under test.
    pub fn binary(&self) -> PathBuf {
        binary()
    }

    /// A directory of the laptop's.
    pub fn laptop_directory(&self) -> PathBuf {
        self.at("laptop")
    }

    /// `scripts/dev-runner.sh ARGS` on the laptop.
    pub fn dev_runner(&self, args: &[&str]) -> Command {
        let mut command = self.laptop("scripts/dev-runner.sh");
        command.args(args);
        command
    }

    /// The command line `script` on the host, as its user.
    pub fn ssh(&self, script: &str) -> Output {
        self.laptop("scripts/cf-ssh.sh")
            .args([ADDRESS, "-o", "LogLevel=ERROR", "--", script])
            .output()
            .expect("it starts")
    }

    /// What a command line on the host printed; it must succeed.
    pub fn on_host(&self, script: &str) -> String {
        let output = self.ssh(script);
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The command line `runner ARGS` on the host, as root.
    pub fn root_runner(&self, args: &str) -> Output {
        self.ssh(&format!("sudo -n ~/.vm0-runner/bin/{NAME}/runner {args}"))
    }

    /// A property of the runner's unit.
    pub fn property(&self, name: &str) -> String {
        let text = self.on_host(&format!(
            "systemctl show --property {name} --value vm0-runner-{NAME}"
        ));
        text.trim().to_owned()
    }

    /// Deploys in local mode; it must succeed.
    pub fn deploy_local(&self) {
        let output = self
            .dev_runner(&["deploy-local"])
            .output()
            .expect("it starts");
        assert!(output.status.success(), "{output:?}");
    }

    /// Submits a job from the laptop and goes on.
    pub fn submit(&self, prompt: &str) -> Submission {
        let mut child = self
            .dev_runner(&["submit", &self.profile, prompt])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        Submission {
            stdout: Text::collect(child.stdout.take().expect("piped")),
            stderr: Text::collect(child.stderr.take().expect("piped")),
            child,
        }
    }

    /// Ids of the active runs of all instances of the runner; the host must answer.
    pub fn active(&self) -> Vec<String> {
        // A directory may vanish while we look.
        let script = format!(
            "cd ~/.vm0-runner/runners/{NAME}/instances && \
             for i in *; do flock -n $i/lock true 2>/dev/null || cat $i/status.json 2>/dev/null || true; done"
        );
        let text = self.on_host(&script);
        serde_json::Deserializer::from_str(&text)
            .into_iter::<serde_json::Value>()
            .map_while(Result::ok)
            .filter_map(|status| status["active_runs"].as_array().cloned())
            .flatten()
            .filter_map(|run| run["run_id"].as_str().map(str::to_owned))
            .collect()
    }

    /// What arrived at the servers of the web.
    pub fn arrived(&self) -> Vec<serde_json::Value> {
        self.world.arrived()
    }

    /// Ends it and checks that nothing of it is left on this machine.
    pub fn finish(mut self) {
        self.power_cut();
        let left = self.processes();
        assert!(left.is_empty(), "left in the container: {left:?}");
        for cgroup in self.world.range().container_cgroups() {
            remove_cgroup(&cgroup, LONG);
            assert!(!cgroup.exists(), "{} is left", cgroup.display());
        }
    }
}

/// Removes a group and all below it, as soon as their processes are reaped.
fn remove_cgroup(group: &Path, within: Duration) {
    eventually("its control groups are empty", within, || {
        crate::range::remove_groups(group)
    });
}

impl Drop for Metal {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.ssh(&format!(
                "journalctl --no-pager -o short-precise -n 200 -u vm0-runner-{NAME}; \
                 cat ~/.vm0-runner/runners/{NAME}/status.json"
            ));
            eprintln!(
                "the service's journal, and its state:\n{}",
                String::from_utf8_lossy(&log.stdout)
            );
        }
        self.power_cut();
        if std::env::var_os("VM0_TEST_KEEP").is_some() {
            self.directory.disable_cleanup(true);
            eprintln!("kept {}", self.directory.path().display());
        }
    }
}
