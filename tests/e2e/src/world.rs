//! A world of a test's own: a network namespace that plays the host, another that plays the internet, and real TLS
//! servers in it.
//!
//! ```text
//! VM ─ hub ─ vm0h<h> │ vm0e2e-<n>-host ─ 198.18.0.1 ═veth═ 198.18.0.2 ─ vm0e2e-<n>-world: 443, 80, 9000 (echo), and
//!                    │                                                  servers that nobody may reach
//! ```
//!
//! The daemon of a [`crate::Host`] made with it lives in the host's namespace and sees a hosts file that names the world's
//! servers. `n` is a range of [`crate::range`], so whoever takes that range next removes what a killed test left.

use std::fs::{self, Permissions};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::host::wheels;
use crate::range::RunRange;
use crate::skip::skip;
use crate::text::Text;
use crate::wait::LONG;

/// Where the world's servers are.
pub const WORLD: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
/// The host's address on that side.
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

/// Names of the world: those with a good certificate, those with another, and those that lead astray.
const HOSTS: &str = "\
198.18.0.2 www.example.com api.example.com other.example.org tcp.example.com
198.18.0.2 unknown.example.net expired.example.net wrong.example.net
127.0.0.1 loopback.example.com
169.254.169.254 metadata.example.com
10.9.9.9 private.example.com
198.18.0.4 git.example.com wheels.example.com npm.example.com crates.example.com model.example.com
198.18.0.5 runs.example.com
";

/// How a daemon is put into a world.
#[derive(Clone, Debug)]
pub(crate) struct Wiring {
    /// The host's network namespace.
    pub(crate) namespace: PathBuf,
    /// What it sees as /etc/hosts.
    pub(crate) hosts: PathBuf,
    /// And as /etc/resolv.conf.
    pub(crate) resolv_conf: PathBuf,
    /// Whom the proxy trusts upstream.
    pub(crate) trusted: PathBuf,
}

/// See the module's documentation.
pub struct World {
    range: RunRange,
    servers: Vec<Child>,
}

/// Runs a program that must succeed.
fn run(program: &str, args: &[&str], directory: &Path) -> String {
    let output = Command::new(program)
        .args(args)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The programs without which no world can be made.
const PROGRAMS: [&str; 7] = ["curl", "git", "ip", "nft", "nsenter", "openssl", "python3"];

impl World {
    /// Makes one. `None`, with the reason reported, where that is impossible.
    pub fn new() -> Option<Self> {
        let mut world = Self::around(&[])?;
        world.serve("host", include_str!("upstreams.py"), &[]);
        Some(world)
    }

    /// One whose host is somebody else's business, and whose web also has `sites`.
    pub(crate) fn around(sites: &[&str]) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip("it makes network namespaces, which needs root");
            return None;
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let missing = |program: &&str| {
            !std::env::split_paths(&path).any(|directory| directory.join(program).exists())
        };
        if let Some(program) = PROGRAMS.iter().find(|program| missing(program)) {
            skip(&format!("{program} is not installed"));
            return None;
        }
        let range = RunRange::take();
        fs::create_dir_all(&range.run_dir).expect("root may write to /run");
        fs::set_permissions(&range.run_dir, Permissions::from_mode(0o755)).expect("our directory");
        let mut world = Self {
            range,
            servers: Vec::new(),
        };
        world.files(sites);
        world.links();
        world.serve("world", include_str!("upstreams.py"), &[]);
        Some(world)
    }

    fn directory(&self) -> &Path {
        &self.range.run_dir
    }

    fn namespace(&self, which: &str) -> String {
        self.range.namespace(which)
    }

    fn files(&self, sites: &[&str]) {
        let directory = self.directory();
        let mut hosts = HOSTS.to_owned();
        for site in sites {
            hosts += &format!("{WORLD} {site}\n");
        }
        fs::write(directory.join("hosts"), hosts).expect("our directory");
        // Nobody answers there: what the hosts file does not name does not exist.
        fs::write(
            directory.join("resolv.conf"),
            "nameserver 198.18.0.3\noptions timeout:1 attempts:1\n",
        )
        .expect("our directory");
        let openssl = |line: &str| {
            run("openssl", &line.split(' ').collect::<Vec<_>>(), directory);
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        for authority in ["ca", "stranger"] {
            openssl(&format!(
                "req -x509 {key} -keyout {authority}.key -out {authority}.pem -days 2 -subj /CN=e2e-{authority}"
            ));
        }
        openssl(&format!(
            "req -new {key} -keyout server.key -out server.csr -subj /CN=e2e"
        ));
        let mut good =
            "www.example.com,DNS:api.example.com,DNS:other.example.org,DNS:runs.example.com"
                .to_owned();
        for site in sites {
            good += &format!(",DNS:{site}");
        }
        let services = "git.example.com,DNS:wheels.example.com,DNS:npm.example.com,DNS:crates.example.com,DNS:model.example.com";
        for (name, authority, names, valid) in [
            ("good", "ca", good.as_str(), "-days 2"),
            ("services", "ca", services, "-days 2"),
            ("unknown", "stranger", "unknown.example.net", "-days 2"),
            ("expired", "ca", "expired.example.net", "-days -1"),
            ("wrong", "ca", "somebody.else.example", "-days 2"),
        ] {
            let extensions = format!("{name}.ext");
            fs::write(
                directory.join(&extensions),
                format!("subjectAltName=DNS:{names}\n"),
            )
            .expect("our directory");
            openssl(&format!(
                "x509 -req -in server.csr -CA {authority}.pem -CAkey {authority}.key -CAcreateserial -out {name}.pem \
                 -extfile {extensions} {valid}"
            ));
        }
    }

    fn links(&self) {
        let (host, world) = (self.namespace("host"), self.namespace("world"));
        let ip = |line: &str| {
            run("ip", &line.split(' ').collect::<Vec<_>>(), self.directory());
        };
        ip(&format!("netns add {host}"));
        ip(&format!("netns add {world}"));
        ip(&format!(
            "-n {host} link add world type veth peer name host netns {world}"
        ));
        for (namespace, device) in [(&host, "world"), (&world, "host")] {
            ip(&format!("-n {namespace} link set lo up"));
            ip(&format!("-n {namespace} link set {device} up"));
        }
        ip(&format!("-n {host} address add {HOST}/24 dev world"));
        // What nobody may reach would be reached if a packet got this far.
        ip(&format!("-n {host} route add default via {WORLD}"));
        for address in [
            "198.18.0.2/24",
            "198.18.0.4/24",
            "198.18.0.5/24",
            "198.18.0.6/24",
            "198.18.0.53/24",
            "10.9.9.9/32",
            "169.254.169.254/32",
        ] {
            ip(&format!("-n {world} address add {address} dev host"));
        }
    }

    /// Its range.
    pub(crate) fn range(&self) -> &RunRange {
        &self.range
    }

    /// The network namespace of its web, from which a laptop may be looked at.
    pub(crate) fn laptop(&self) -> PathBuf {
        Path::new("/run/netns").join(self.namespace("world"))
    }

    fn record(&self, which: &str) -> PathBuf {
        self.directory().join(format!("{which}.record"))
    }

    /// Starts the services that package managers, git and an agent's CLI talk to: `git.`, `wheels.`, `npm.`, `crates.` and
    /// `model.example.com`.
    pub fn serve_services(&mut self) {
        // The program that runs the tests is the one that jobs fetch.
        let cargo = Path::new(env!("CARGO"));
        let script = include_str!("services.py");
        self.serve("services", script, &[wheels().as_path(), cargo]);
    }

    /// Lets the model answer what it was asked and will be asked.
    pub fn let_the_model_answer(&self) {
        let output = self
            .on_host("curl")
            .args([
                "-sS",
                "--fail",
                "--resolve",
                "model.example.com:443:198.18.0.4",
            ])
            .arg("--cacert")
            .arg(self.directory().join("ca.pem"))
            .arg("https://model.example.com/answer")
            .output()
            .expect("curl is installed");
        assert!(output.status.success(), "{output:?}");
    }

    /// Runs servers; their name is the namespace they are in, unless they are of the world beside others.
    fn serve(&mut self, which: &str, script: &str, args: &[&Path]) {
        let place = if which == "host" { "host" } else { "world" };
        let namespace = format!("--net=/run/netns/{}", self.namespace(place));
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "nsenter", &namespace, "--"])
            .args(["python3", "-c", script, which])
            .arg(self.record(which))
            .args(args)
            .env(RunRange::WORLD_VARIABLE, self.range.number.to_string())
            .current_dir(self.directory())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("setpriv is installed");
        let said = Text::collect(child.stdout.take().expect("piped"));
        self.servers.push(child);
        said.wait_for("ready", LONG);
    }

    pub(crate) fn wiring(&self) -> Wiring {
        let in_directory = |name: &str| self.directory().join(name);
        Wiring {
            namespace: Path::new("/run/netns").join(self.namespace("host")),
            hosts: in_directory("hosts"),
            resolv_conf: in_directory("resolv.conf"),
            trusted: in_directory("ca.pem"),
        }
    }

    /// What arrived at the world's servers so far.
    pub fn arrived(&self) -> Vec<Value> {
        self.recorded("world")
    }

    /// What arrived at the services so far.
    pub fn served(&self) -> Vec<Value> {
        self.recorded("services")
    }

    /// What arrived where nothing may arrive: at the metadata service, private hosts, other ports, the host itself.
    pub fn trespasses(&self) -> Vec<Value> {
        let mut all = self.recorded("world");
        all.extend(self.recorded("host"));
        all.retain(|one| {
            one["at"]
                .as_str()
                .is_some_and(|at| at.starts_with("forbidden"))
        });
        all
    }

    fn recorded(&self, which: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.record(which)).unwrap_or_default();
        // A last line may be half written.
        text.split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .map(|line| serde_json::from_str(line).expect("our servers write JSON"))
            .collect()
    }

    /// The command `program` in the host's namespace.
    pub fn on_host(&self, program: &str) -> Command {
        let namespace = format!("--net=/run/netns/{}", self.namespace("host"));
        let mut command = Command::new("nsenter");
        command
            .args([&namespace, "--", program])
            .stdin(Stdio::null());
        command
    }

    /// Links of hubs in the host's namespace.
    pub fn hub_links(&self) -> Vec<String> {
        let output = self
            .on_host("ip")
            .args(["-o", "link", "show"])
            .output()
            .expect("ip is installed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines()
            .filter_map(|line| line.split_whitespace().nth(1))
            .filter_map(|name| name.split(['@', ':']).next())
            .filter(|name| name.starts_with("vm0h"))
            .map(str::to_owned)
            .collect()
    }

    /// Tables of hubs in the host's namespace.
    pub fn hub_tables(&self) -> Vec<String> {
        let output = self
            .on_host("nft")
            .args(["list", "tables"])
            .output()
            .expect("nft is installed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines()
            .filter(|line| line.contains("vm0_hub"))
            .map(str::to_owned)
            .collect()
    }

    /// Checks, after its hosts have finished, that they left nothing in it.
    pub fn finish(self) {
        let mut left = self.hub_links();
        left.extend(self.hub_tables());
        assert!(left.is_empty(), "left on the host: {left:?}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for server in &mut self.servers {
            // It ends with its namespaces otherwise.
            let _ = server.kill();
            let _ = server.wait();
        }
        self.range.clear();
    }
}
