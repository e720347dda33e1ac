//! The host's `/etc/resolv.conf` and `/etc/hosts`.

use std::collections::HashMap;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use policy::Host;

/// Most bytes of a file that are read: longer ones are block lists, whose end is not missed.
const MAX_FILE: u64 = 4 << 20;
/// Most name servers; the C library knows three.
const MAX_SERVERS: usize = 8;
/// How often the files are looked at.
const RECHECK: Duration = Duration::from_secs(1);

/// Who is asked, and how patiently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvConf {
    /// The servers, in order.
    pub servers: Vec<SocketAddr>,
    /// How long one of them has to answer.
    pub timeout: Duration,
    /// How often all of them are asked.
    pub attempts: u32,
}

impl Default for ResolvConf {
    /// What the C library does without the file, but with less patience: the clients' own runs out after five seconds.
    fn default() -> Self {
        Self {
            servers: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 53))],
            timeout: Duration::from_secs(2),
            attempts: 2,
        }
    }
}

impl ResolvConf {
    /// Reads the text of a `resolv.conf`. Like the C library it passes over what it does not know; `search` and `ndots`
    /// are among that: names are asked for as they are.
    pub fn parse(text: &str) -> Self {
        let mut conf = Self {
            servers: Vec::new(),
            ..Self::default()
        };
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                    conf.servers
                        .extend(address.map(|address| SocketAddr::from((address, 53))));
                }
                Some("options") => words.for_each(|option| conf.option(option)),
                _ => {}
            }
        }
        conf.servers.truncate(MAX_SERVERS);
        if conf.servers.is_empty() {
            conf.servers = Self::default().servers;
        }
        conf
    }

    fn option(&mut self, option: &str) {
        match option
            .split_once(':')
            .map(|(key, value)| (key, value.parse::<u32>()))
        {
            Some(("timeout", Ok(seconds))) => {
                self.timeout = Duration::from_secs(seconds.clamp(1, 5).into())
            }
            Some(("attempts", Ok(attempts))) => self.attempts = attempts.clamp(1, 5),
            _ => {}
        }
    }
}

/// Names of the hosts file and their IPv4 addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts(HashMap<String, Vec<Ipv4Addr>>);

impl Hosts {
    /// Reads the text of a hosts file; lines that make no sense are passed over.
    pub fn parse(text: &str) -> Self {
        let mut hosts: HashMap<String, Vec<Ipv4Addr>> = HashMap::new();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            let Some(Ok(IpAddr::V4(address))) = words.next().map(str::parse) else {
                continue;
            };
            for name in words {
                if let Ok(Host::Name(name)) = Host::parse(name) {
                    let addresses = hosts.entry(name).or_default();
                    if !addresses.contains(&address) && addresses.len() < policy::log::MAX_ANSWERS {
                        addresses.push(address);
                    }
                }
            }
        }
        Self(hosts)
    }

    /// The addresses of a name.
    pub fn addresses(&self, name: &str) -> Option<&[Ipv4Addr]> {
        self.0.get(name).map(Vec::as_slice)
    }
}

/// Where both come from: the host's files, read again when they change (an address from DHCP, a name that somebody
/// adds), or given once and for all.
#[derive(Debug)]
pub struct HostFiles {
    resolv_conf: Source<ResolvConf>,
    hosts: Source<Hosts>,
}

#[derive(Debug)]
enum Source<T> {
    File(Watched<T>),
    Fixed(Arc<T>),
}

impl<T> Source<T> {
    fn get(&self) -> Arc<T> {
        match self {
            Self::File(file) => file.get(Instant::now()),
            Self::Fixed(value) => Arc::clone(value),
        }
    }
}

impl HostFiles {
    /// `/etc/resolv.conf` and `/etc/hosts`, or others in their place.
    pub fn new(resolv_conf: PathBuf, hosts: PathBuf) -> Self {
        Self {
            resolv_conf: Source::File(Watched::new(resolv_conf, ResolvConf::parse)),
            hosts: Source::File(Watched::new(hosts, Hosts::parse)),
        }
    }

    /// What the files would say, without them.
    pub fn fixed(resolv_conf: ResolvConf, hosts: Hosts) -> Self {
        Self {
            resolv_conf: Source::Fixed(Arc::new(resolv_conf)),
            hosts: Source::Fixed(Arc::new(hosts)),
        }
    }

    pub(crate) fn resolv_conf(&self) -> Arc<ResolvConf> {
        self.resolv_conf.get()
    }

    pub(crate) fn hosts(&self) -> Arc<Hosts> {
        self.hosts.get()
    }
}

/// What tells that a file is another one than it was.
type Stamp = (u64, u64, i64, i64, u64);

#[derive(Debug)]
struct Watched<T> {
    path: PathBuf,
    parse: fn(&str) -> T,
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    looked: Option<Instant>,
    stamp: Option<Stamp>,
    value: Arc<T>,
}

impl<T> Watched<T> {
    fn new(path: PathBuf, parse: fn(&str) -> T) -> Self {
        let state = State {
            looked: None,
            stamp: None,
            value: Arc::new(parse("")),
        };
        Self {
            path,
            parse,
            state: Mutex::new(state),
        }
    }

    /// The file's meaning. Once a second this looks at the file's metadata, and reads it if that changed: two quick
    /// calls to a local file system, not worth a thread. A file that cannot be read counts as it was.
    fn get(&self, now: Instant) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state
            .looked
            .is_none_or(|looked| now.saturating_duration_since(looked) >= RECHECK)
        {
            state.looked = Some(now);
            match stamp(&self.path) {
                Ok(stamp) if state.stamp == Some(stamp) => {}
                Ok(stamp) => match read(&self.path) {
                    Ok(text) => {
                        state.value = Arc::new((self.parse)(&text));
                        state.stamp = Some(stamp);
                    }
                    Err(error) => tracing::warn!("cannot read {}: {error}", self.path.display()),
                },
                Err(error) => tracing::debug!("cannot look at {}: {error}", self.path.display()),
            }
        }
        Arc::clone(&state.value)
    }
}

fn stamp(path: &Path) -> std::io::Result<Stamp> {
    let file = std::fs::metadata(path)?;
    Ok((
        file.dev(),
        file.ino(),
        file.mtime(),
        file.mtime_nsec(),
        file.len(),
    ))
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(MAX_FILE)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changes_is_read_again_and_one_that_vanishes_counts_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        let watched = Watched::new(path.clone(), Hosts::parse);
        let start = Instant::now();
        let known = |after: u32, name: &str| {
            watched
                .get(start + RECHECK * after)
                .addresses(name)
                .is_some()
        };
        assert!(!known(0, "a.example"));
        std::fs::write(&path, "198.18.0.1 a.example").unwrap();
        assert!(
            !known(0, "a.example"),
            "looked at no more than once a second"
        );
        assert!(known(1, "a.example"));
        std::fs::write(dir.path().join("new"), "198.18.0.1 b.example").unwrap();
        std::fs::rename(dir.path().join("new"), &path).unwrap();
        assert!(known(2, "b.example") && !known(2, "a.example"));
        std::fs::remove_file(&path).unwrap();
        assert!(known(3, "b.example"));
    }

    #[test]
    fn resolv_conf_is_read_as_the_c_library_reads_it() {
        let conf = ResolvConf::parse(
            "# a comment\n; another\nsearch example.com\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 # v6\n\
             nameserver fe80::1%eth0\nnameserver\nnameserver nonsense\noptions ndots:2 timeout:9 attempts:3 edns0\n",
        );
        let servers: Vec<String> = conf.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53"]);
        assert_eq!((conf.timeout, conf.attempts), (Duration::from_secs(5), 3));
        for text in [
            "",
            "nonsense",
            "options timeout:x attempts:-1",
            "nameserver 256.1.1.1\0\u{fffd}",
        ] {
            assert_eq!(ResolvConf::parse(text), ResolvConf::default(), "{text}");
        }
    }

    #[test]
    fn the_hosts_file_gives_names_their_addresses() {
        let hosts = Hosts::parse(
            "127.0.0.1 localhost\n::1 localhost ip6\n198.18.0.1 A.example. b.example # c.example\n198.18.0.2\ta.example\n\
             198.18.0.2 a.example\nx y\n198.18.0.3 not/a/name 198.18.0.4\n#198.18.0.9 d.example",
        );
        let addresses = |name: &str| {
            hosts
                .addresses(name)
                .map(|all| all.iter().map(ToString::to_string).collect())
        };
        assert_eq!(
            addresses("a.example"),
            Some(vec!["198.18.0.1".to_owned(), "198.18.0.2".to_owned()])
        );
        assert_eq!(addresses("b.example"), Some(vec!["198.18.0.1".to_owned()]));
        assert_eq!(addresses("localhost"), Some(vec!["127.0.0.1".to_owned()]));
        for none in ["c.example", "d.example", "ip6", "198.18.0.4", "not/a/name"] {
            assert_eq!(addresses(none), None, "{none}");
        }
    }
}
