//! A Web API of a test's own: a NATS server and replicas of `vm0-api` in a [`World`], whose VMs reach them as
//! `http://runs.example.com:8090`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api_exec::{ApiExec, Door};
use crate::host::target;
use crate::skip::skip;
use crate::wait::{LONG, eventually, eventually_some};
use crate::world::World;

/// It ends when it is dropped, and with the thread of the test when that is killed.
pub struct Api {
    directory: TempDir,
    /// The network namespace of the world, as an argument of nsenter.
    namespace: String,
    /// The same, as a file.
    namespace_file: PathBuf,
    program: PathBuf,
    nats: Child,
    group: String,
    lease_secs: u32,
    replicas: Vec<Option<Child>>,
    /// An API key of the group.
    pub client: String,
    /// A runner token of the group.
    pub runner: String,
}

/// How long a run stays with a runner that says nothing: longer than one takes to start and to bring what it has.
const LEASE_SECS: u32 = 60;

/// A program in a network namespace that ends with the thread that started it.
fn bound(namespace: &str, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", "nsenter", namespace, "--"])
        .arg(program)
        .stdin(Stdio::null());
    command
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Where `scripts/test.sh` has put the NATS server: below the Python and the hash that it was installed by.
fn installed_nats() -> PathBuf {
    let all = target().join("nats");
    let entries = fs::read_dir(&all).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path().join("bin/nats-server"))
        .find(|server| server.exists())
        .unwrap_or(all)
}

impl Api {
    /// The group of its runs and tokens, unless it serves another.
    pub const GROUP: &'static str = "vm0/e2e";

    /// The address of the API, as runners and VMs know it: the first replica's.
    pub const URL: &'static str = "http://runs.example.com:8090";

    /// The same over TLS, which ends at a balancer of the world's.
    pub const SECURE_URL: &'static str = "https://runs.example.com:8443";

    /// NATS and one replica. `None`, with the reason reported, where that is impossible.
    pub fn start(world: &World) -> Option<Self> {
        Self::serving(world, Self::GROUP)
    }

    /// The same for another group than [`Self::GROUP`].
    pub fn serving(world: &World, group: &str) -> Option<Self> {
        Self::made(world, group, LEASE_SECS)
    }

    /// The same for a test that waits for the end of a lease, which lasts so long.
    pub fn with_leases(world: &World, secs: u32) -> Option<Self> {
        Self::made(world, Self::GROUP, secs)
    }

    fn made(world: &World, group: &str, lease_secs: u32) -> Option<Self> {
        let nats = std::env::var_os("VM0_TEST_NATS").map_or_else(installed_nats, PathBuf::from);
        let program = std::env::var_os("VM0_TEST_API")
            .map_or_else(|| target().join("debug/vm0-api"), PathBuf::from);
        for (what, path) in [("NATS server", &nats), ("vm0-api", &program)] {
            if !path.exists() {
                skip(&format!(
                    "there is no {what} at {} (scripts/test.sh brings it)",
                    path.display()
                ));
                return None;
            }
        }
        let namespace = format!("--net={}", world.laptop().display());
        let directory = tempfile::tempdir().expect("a directory can be made");
        let config = format!(
            "listen: \"127.0.0.1:4222\"\njetstream {{ store_dir: {:?}, sync_interval: always }}\n\
             accounts {{\n SYS {{ users: [{{user: sys, password: sys}}] }}\n \
             APP {{ jetstream: enabled, users: [{{user: app, password: app}}] }}\n}}\nsystem_account: SYS\n",
            directory.path().join("store")
        );
        let file = directory.path().join("nats.conf");
        fs::write(&file, config).expect("our directory");
        let nats = bound(&namespace, &nats)
            .arg("-c")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setpriv is installed");
        let mut api = Self {
            directory,
            namespace,
            namespace_file: world.laptop(),
            program,
            nats,
            group: group.to_owned(),
            lease_secs,
            replicas: Vec::new(),
            client: String::new(),
            runner: String::new(),
        };
        let mut listens = bound(&api.namespace, Path::new("bash"));
        listens.args(["-c", "exec 3<>/dev/tcp/127.0.0.1/4222"]);
        listens.stderr(Stdio::null());
        eventually("NATS listens", LONG, || {
            listens.status().is_ok_and(|status| status.success())
        });
        let made = api
            .command(&["master-key", "--out"])
            .arg(api.key_file())
            .status();
        assert!(made.expect("vm0-api runs").success());
        api.client = api.token("client");
        api.runner = api.token("runner");
        fs::write(api.token_file(), &api.runner).expect("our directory");
        fs::set_permissions(api.token_file(), fs::Permissions::from_mode(0o600)).expect("our file");
        api.start_replica(0);
        Some(api)
    }

    fn key_file(&self) -> PathBuf {
        self.directory.path().join("master.key")
    }

    fn token_file(&self) -> PathBuf {
        self.directory.path().join("runner.token")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = bound(&self.namespace, &self.program);
        command
            .args(args)
            .env("VM0_NATS_URL", "nats://app:app@127.0.0.1:4222")
            .env("VM0_NATS_SYSTEM_URL", "nats://sys:sys@127.0.0.1:4222");
        command
    }

    /// Makes a token of this kind for the group.
    pub fn token(&self, kind: &str) -> String {
        let args = ["token", "create", "--kind", kind, "--group", &self.group];
        let output = self.command(&args).args(["--name", "e2e"]).output();
        let output = output.expect("vm0-api runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let token = text
            .split_whitespace()
            .find(|word| word.starts_with("vm0_"));
        token
            .unwrap_or_else(|| {
                panic!(
                    "no token: {text} {}",
                    String::from_utf8_lossy(&output.stderr)
                )
            })
            .to_owned()
    }

    /// Where a replica listens.
    fn address(replica: u16) -> String {
        format!("198.18.0.{}:8090", 5 + replica)
    }

    /// Starts a replica that does not run, and waits until it is ready.
    pub fn start_replica(&mut self, replica: u16) {
        let listen = Self::address(replica);
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join(format!("api-{replica}.log")))
            .expect("our directory");
        let child = self
            .command(&["serve", "--listen", &listen, "--lease-secs"])
            .arg(self.lease_secs.to_string())
            .arg("--master-key")
            .arg(self.key_file())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("vm0-api starts");
        let index = usize::from(replica);
        if self.replicas.len() <= index {
            self.replicas.resize_with(index + 1, || None);
        }
        assert!(self.replicas[index].is_none(), "the replica runs already");
        self.replicas[index] = Some(child);
        let ready = format!("http://{listen}/readyz");
        eventually("the replica is ready", LONG, || {
            let ended = self.replicas[index]
                .as_mut()
                .and_then(|child| child.try_wait().ok().flatten());
            assert!(
                ended.is_none(),
                "vm0-api ended at once: {}",
                self.log(replica)
            );
            let mut curl = bound(&self.namespace, Path::new("curl"));
            curl.args(["-fsS", "-o", "/dev/null", &ready])
                .stderr(Stdio::null());
            curl.status().is_ok_and(|status| status.success())
        });
    }

    /// Where NATS keeps everything.
    pub fn store(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    /// What a replica logged.
    pub fn log(&self, replica: u16) -> String {
        let log = self.directory.path().join(format!("api-{replica}.log"));
        fs::read_to_string(log).unwrap_or_default()
    }

    /// kill -9.
    pub fn kill_replica(&mut self, replica: u16) {
        let child = self.replicas[usize::from(replica)].take();
        end(&mut child.expect("the replica runs"));
    }

    /// The arguments of `runner start` that make it take this API's runs, at one of its addresses.
    pub(crate) fn runner_arguments(&self, url: &str) -> Vec<String> {
        let token = self.token_file().display().to_string();
        ["--api-url", url, "--api-token-file", &token]
            .map(str::to_owned)
            .into()
    }

    /// What `path` answers to this token: the status and the body.
    pub fn ask(&self, token: &str, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let mut curl = bound(&self.namespace, Path::new("curl"));
        curl.args([
            "-sS",
            "--max-time",
            "120",
            "-X",
            method,
            "-w",
            "\n%{http_code}",
        ])
        .args(["-H", &format!("Authorization: Bearer {token}")])
        .arg(format!("http://{}{path}", Self::address(0)));
        if let Some(body) = body {
            curl.args([
                "-H",
                "Content-Type: application/json",
                "-d",
                &body.to_string(),
            ]);
        }
        let output = curl.output().expect("curl is installed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').expect("curl writes the status");
        let status = status.parse().expect("a status");
        (
            status,
            serde_json::from_str(body).unwrap_or(Value::String(body.to_owned())),
        )
    }

    /// Makes a run of `vm0/small`; `more` is put over its fields. Gives its id.
    pub fn create(&self, prompt: &str, more: Value) -> String {
        let mut body = json!({"group": self.group, "profile": "vm0/small", "prompt": prompt});
        for (key, value) in more.as_object().cloned().unwrap_or_default() {
            body[key] = value;
        }
        let (status, run) = self.ask(&self.client, "POST", "/api/runs", Some(&body));
        assert_eq!(status, 201, "{run}");
        run["runId"].as_str().expect("an id").to_owned()
    }

    /// A run, as clients see it.
    pub fn run(&self, run: &str) -> Value {
        self.ask(&self.client, "GET", &format!("/api/runs/{run}"), None)
            .1
    }

    /// Asks for a run's end.
    pub fn cancel(&self, run: &str) {
        let path = format!("/api/runs/{run}/cancel");
        let (status, answer) = self.ask(&self.client, "POST", &path, None);
        assert!(status < 300, "{status}: {answer}");
    }

    /// Tells a run's agent something.
    pub fn input(&self, run: &str, text: &str) {
        let path = format!("/api/runs/{run}/input");
        let body = json!({"text": text});
        let (status, answer) = self.ask(&self.client, "POST", &path, Some(&body));
        assert_eq!(status, 202, "{answer}");
    }

    /// Waits until a run is so.
    pub fn until(&self, run: &str, what: &str, mut so: impl FnMut(&Value) -> bool) -> Value {
        eventually_some(what, LONG, || Some(self.run(run)).filter(|run| so(run)))
    }

    /// Waits until a run is answered; gives its result.
    pub fn result(&self, run: &str) -> Value {
        self.until(run, "the run is answered", |run| run["state"] == "done")["result"].clone()
    }

    /// All of a feed of a run that has ended, as its server-sent events say it.
    pub fn feed(&self, run: &str, feed: &str) -> String {
        let (status, text) = self.ask(
            &self.client,
            "GET",
            &format!("/api/runs/{run}/{feed}"),
            None,
        );
        assert_eq!(status, 200, "{text}");
        text.as_str().unwrap_or_default().to_owned()
    }
}

impl Api {
    /// Runs a command in a run's VM as the group's client, with a terminal of so many columns and rows if any. Where it
    /// is refused: the status.
    pub fn exec(&self, run: &str, argv: &[&str], size: Option<(u16, u16)>) -> Result<ApiExec, u16> {
        let door = Door {
            namespace: self.namespace_file.clone(),
            address: Self::address(0),
            token: self.client.clone(),
        };
        ApiExec::start(door, run, argv, size)
    }

    /// What a run that has ended said, as its events tell it.
    pub fn output(&self, run: &str) -> String {
        let feed = self.feed(run, "output");
        let data = feed.lines().filter_map(|line| line.strip_prefix("data: "));
        let pieces = data.filter_map(|data| serde_json::from_str::<Value>(data).ok());
        pieces
            .filter_map(|piece| piece["text"].as_str().map(str::to_owned))
            .collect()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        for replica in self.replicas.iter_mut().flatten() {
            end(replica);
        }
        end(&mut self.nats);
    }
}
