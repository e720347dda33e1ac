//! Real NATS servers for tests: one, or a cluster of three. They end with the test, also when it is killed: shells that
//! hold the other ends of pipes kill the servers and remove their files when the pipes close.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use web_api::engine::Settings;

/// Kills what it starts, and removes the directory, when its standard input ends.
pub(crate) const GUARD: &str = r#"trap '' INT TERM HUP
"$@" & pid=$!
echo "pid $pid"
read -r _
kill -9 "$pid" 2>/dev/null
wait "$pid" 2>/dev/null
"#;

/// Removes a directory when its standard input ends; those who still write to it are about to be killed.
const JANITOR: &str = r#"trap '' INT TERM HUP
read -r _
n=0
while [ -e "$1" ] && [ $n -lt 100 ]; do rm -rf "$1" 2>/dev/null || sleep 0.1; n=$((n+1)); done
"#;

/// A process that lasts until its standard input ends: with this, or with a test that is killed.
pub(crate) struct Held {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Held {
    fn start(command: &mut Command) -> Result<Self, String> {
        let child = command.stdin(Stdio::piped()).spawn();
        let mut child = child.map_err(|error| format!("{command:?} does not start: {error}"))?;
        Ok(Self {
            pipe: child.stdin.take(),
            child,
        })
    }

    /// Starts it and waits for this line of it; `None` if it says something else or ends.
    pub(crate) fn saying(command: &mut Command, line: &str) -> Result<Option<Self>, String> {
        let mut held = Self::start(command.stdout(Stdio::piped()).stderr(Stdio::null()))?;
        let mut said = String::new();
        BufReader::new(held.child.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        Ok((said.trim() == line).then_some(held))
    }

    /// Its process, to enter its namespaces by.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.child.wait();
    }
}

/// Held for as long as the directory is needed.
fn janitor(dir: &Path) -> Held {
    Held::start(Command::new("sh").args(["-c", JANITOR, "janitor"]).arg(dir)).unwrap()
}

/// The server's program, or why there is none.
pub(crate) fn program() -> Result<PathBuf, String> {
    let path = match std::env::var_os("VM0_TEST_NATS") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/nats/nats-server"),
    };
    if path.exists() {
        Ok(path)
    } else {
        Err(format!(
            "there is no NATS server at {} (scripts/test.sh installs it; VM0_TEST_NATS names another)",
            path.display()
        ))
    }
}

/// A loopback address that is this process's own, so that copies of the tests do not meet.
pub(crate) fn address() -> String {
    let [_, a, b, c] = (std::process::id() << 1 | 1).to_be_bytes();
    format!("127.{}.{b}.{c}", a | 0x40)
}

fn port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A small file system in a mount namespace of its own: it is gone with the last process there, also after a kill.
struct Disk {
    shell: Held,
    at: PathBuf,
}

/// Mounts, and holds the namespace until its standard input ends.
const DISK: &str = r#"trap '' INT TERM HUP
mount -t tmpfs -o size="$2" vm0-api-test "$1" && echo mounted && read -r _
"#;

impl Disk {
    fn mount(at: &Path, bytes: &str) -> Result<Self, String> {
        let mut shell = Command::new("unshare");
        shell.args(["--mount", "sh", "-c", DISK, "disk"]);
        let mounted = Held::saying(shell.arg(at).arg(bytes), "mounted")?;
        Ok(Self {
            shell: mounted.ok_or("a small file system cannot be mounted: that needs root")?,
            at: at.to_owned(),
        })
    }

    /// What to put before a command that is to see it.
    fn within(&self) -> Vec<String> {
        let pid = self.shell.pid().to_string();
        ["nsenter", "--target", &pid, "--mount"]
            .map(str::to_owned)
            .to_vec()
    }

    fn resize(&self, bytes: &str) {
        let within = self.within();
        let done = Command::new(&within[0])
            .args(&within[1..])
            .args(["mount", "-o", &format!("remount,size={bytes}")])
            .arg(&self.at)
            .status();
        assert!(done.unwrap().success());
    }
}

struct Running {
    guard: Child,
    pid: u32,
    pipe: Option<ChildStdin>,
}

impl Running {
    fn start(program: &Path, config: &Path, disk: Option<&Disk>) -> Self {
        let mut guard = Command::new("sh")
            .args(["-c", GUARD, "guard"])
            .args(disk.map(Disk::within).unwrap_or_default())
            .arg(program)
            .arg("-c")
            .arg(config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(guard.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let pid = line.trim().strip_prefix("pid ").unwrap().parse().unwrap();
        Self {
            pipe: guard.stdin.take(),
            guard,
            pid,
        }
    }

    fn kill(mut self) {
        drop(self.pipe.take());
        self.guard.wait().unwrap();
    }

    fn signal(&self, signal: &str) {
        assert!(
            Command::new("kill")
                .args([signal, &self.pid.to_string()])
                .status()
                .unwrap()
                .success()
        );
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.guard.wait();
    }
}

/// How a server is to be.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) nodes: usize,
    pub(crate) sync_always: bool,
    /// Most bytes on disk.
    pub(crate) max_file: &'static str,
    /// Most of these for feeds; NATS sets them aside at once.
    pub(crate) feed_bytes: i64,
    /// Gives each server's files a file system of their own of so many bytes, as mount(8) writes them.
    pub(crate) disk: Option<&'static str>,
    /// Whether it speaks TLS, and what name its certificate holds.
    pub(crate) tls: Option<Certified>,
}

/// The name in a server's certificate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Certified {
    /// The server's own.
    Itself,
    /// Another's.
    Another,
}

/// Makes an authority and a certificate by it: `ca.pem`, `server.pem`, `server.key`.
pub(crate) fn certify(dir: &Path, name: &str) {
    let openssl = |args: &[&str]| {
        let output = Command::new("openssl").args(args).current_dir(dir).output();
        let output = output.expect("openssl is there");
        assert!(output.status.success(), "{output:?}");
    };
    let key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    let subject = format!("/CN=Authority for {name}");
    let mut ca = vec!["req", "-x509", "-days", "2", "-subj", &subject];
    ca.extend(key);
    openssl(&[&ca[..], &["-keyout", "ca.key", "-out", "ca.pem"]].concat());
    let mut server = vec!["req", "-x509", "-days", "2", "-subj", "/CN=nats"];
    server.extend(key);
    let san = format!("subjectAltName={name}");
    server.extend(["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", &san]);
    server.extend(["-addext", "basicConstraints=critical,CA:FALSE"]);
    openssl(
        &[
            &server[..],
            &["-keyout", "server.key", "-out", "server.pem"],
        ]
        .concat(),
    );
}

impl Default for Kind {
    fn default() -> Self {
        Self {
            nodes: 1,
            sync_always: true,
            max_file: "4G",
            feed_bytes: 256 << 20,
            disk: None,
            tls: None,
        }
    }
}

/// The servers.
pub(crate) struct Nats {
    program: PathBuf,
    dir: PathBuf,
    address: String,
    ports: Vec<u16>,
    feed_bytes: i64,
    tls: bool,
    // Dropped before the janitor.
    nodes: Vec<Option<Running>>,
    disks: Vec<Disk>,
    _janitor: Held,
}

impl Nats {
    pub(crate) fn start(kind: Kind) -> Result<Self, String> {
        let program = program()?;
        let dir = tempfile::tempdir().unwrap();
        let janitor = janitor(dir.path());
        let address = address();
        let ports: Vec<u16> = (0..kind.nodes).map(|_| port()).collect();
        let routes: Vec<u16> = (0..kind.nodes).map(|_| port()).collect();
        match kind.tls {
            Some(Certified::Itself) => certify(dir.path(), &format!("IP:{address}")),
            Some(Certified::Another) => certify(dir.path(), "DNS:nats.example.com"),
            None => {}
        }
        for node in 0..kind.nodes {
            let sync = if kind.sync_always { "always" } else { "2m" };
            let mut config = format!(
                "server_name: n{node}\nlisten: \"{address}:{}\"\njetstream {{ store_dir: {:?}, sync_interval: {sync}, \
                 max_file_store: {} }}\naccounts {{\n SYS {{ users: [{{user: sys, password: \"s/p\"}}] }}\n APP {{ \
                 jetstream: enabled, users: [{{user: app, password: app}}] }}\n}}\nsystem_account: SYS\n",
                ports[node],
                dir.path().join(format!("n{node}")),
                kind.max_file,
            );
            if kind.tls.is_some() {
                config.push_str(&format!(
                    "tls {{ cert_file: {:?}, key_file: {:?} }}\n",
                    dir.path().join("server.pem"),
                    dir.path().join("server.key")
                ));
            }
            if kind.nodes > 1 {
                let others: Vec<String> = routes
                    .iter()
                    .map(|p| format!("\"nats://{address}:{p}\""))
                    .collect();
                config.push_str(&format!(
                    "cluster {{ name: c, listen: \"{address}:{}\", routes: [{}] }}\n",
                    routes[node],
                    others.join(", ")
                ));
            }
            let mut file = std::fs::File::create(dir.path().join(format!("n{node}.conf"))).unwrap();
            file.write_all(config.as_bytes()).unwrap();
        }
        let mut disks = Vec::new();
        if let Some(bytes) = kind.disk {
            for node in 0..kind.nodes {
                let at = dir.path().join(format!("n{node}"));
                std::fs::create_dir(&at).unwrap();
                disks.push(Disk::mount(&at, bytes)?);
            }
        }
        let mut nats = Self {
            disks,
            program,
            dir: dir.keep(),
            address,
            ports,
            feed_bytes: kind.feed_bytes,
            tls: kind.tls.is_some(),
            nodes: (0..kind.nodes).map(|_| None).collect(),
            _janitor: janitor,
        };
        for node in 0..kind.nodes {
            nats.restart(node);
        }
        for node in 0..kind.nodes {
            nats.wait(node);
        }
        Ok(nats)
    }

    fn wait(&self, node: usize) {
        let begin = Instant::now();
        let to = format!("{}:{}", self.address, self.ports[node]);
        // There is no event for «it listens»; connecting is the question itself.
        while std::net::TcpStream::connect(&to).is_err() {
            assert!(
                begin.elapsed() < Duration::from_secs(20),
                "NATS does not start"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends a node without a chance to tidy up.
    pub(crate) fn kill(&mut self, node: usize) {
        self.nodes[node].take().unwrap().kill();
    }

    /// Starts a node, with what it has on disk.
    pub(crate) fn restart(&mut self, node: usize) {
        let config = self.dir.join(format!("n{node}.conf"));
        self.nodes[node] = Some(Running::start(&self.program, &config, self.disks.get(node)));
    }

    /// Stops a node's processor time, or gives it back: what a network or disk that hangs looks like.
    pub(crate) fn freeze(&self, node: usize, frozen: bool) {
        let running = self.nodes[node].as_ref().unwrap();
        running.signal(if frozen { "-STOP" } else { "-CONT" });
    }

    /// Makes a node's file system larger or smaller.
    pub(crate) fn resize(&self, node: usize, bytes: &str) {
        self.disks[node].resize(bytes);
    }

    /// Where the master key may lie, too.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn url(&self) -> String {
        self.urls("app:app")
    }

    /// NATS, as another replica has it.
    pub(crate) async fn client(&self) -> async_nats::Client {
        let user = async_nats::ConnectOptions::with_user_and_password("app".into(), "app".into());
        user.connect(self.url()).await.unwrap()
    }

    pub(crate) fn system_url(&self) -> String {
        // With what has to be escaped in an address.
        self.urls("sys:s%2Fp")
    }

    fn urls(&self, who: &str) -> String {
        let scheme = if self.tls { "tls" } else { "nats" };
        let urls: Vec<String> = self
            .ports
            .iter()
            .map(|port| format!("{scheme}://{who}@{}:{port}", self.address))
            .collect();
        urls.join(",")
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            url: self.url(),
            system_url: Some(self.system_url()),
            replicas: self.ports.len(),
            feed_max_bytes: self.feed_bytes,
            root_certificates: self.tls.then(|| self.dir.join("ca.pem")),
            ..Settings::default()
        }
    }
}
