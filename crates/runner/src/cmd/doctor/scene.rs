//! What is going on on this host, looked at once: runners, their queue, their VMs, what dead ones left.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use host::fs::Space;
use host::launcher::LauncherConfig;
use host::net::HubNumber;
use host::slot::{HeldSlot, SlotId};
use serde::Deserialize;

use super::network::output;
use crate::config::Config;
use crate::home::{Home, rel};
use crate::names::{GroupName, RunId, RunnerName};
use crate::network::REGISTRY_FILE;
use crate::queue::{GroupQueue, JobState};
use crate::status::{STATUS_FILE, Status};
use crate::vms::{self, VmProcess};

/// Longest file that is read, bytes.
const MAX_TEXT: u64 = 4 << 20;
/// Where a unit of a runner may be, the one that counts first.
const UNITS: [&str; 3] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/run/systemd/transient",
];

/// Everything that is judged.
#[derive(Debug, Default)]
pub(super) struct Scene {
    pub(super) runners: Vec<Runner>,
    /// Jobs that wait, by group, with the number of runners that watch it.
    pub(super) groups: BTreeMap<GroupName, (usize, usize)>,
    pub(super) processes: Vec<VmProcess>,
    pub(super) held: Vec<HeldSlot>,
    /// Slots of dead launchers; `None`: only root sees them.
    pub(super) orphans: Option<Vec<SlotId>>,
    /// Tables of hubs that are gone; `None`: only root sees them.
    pub(super) tables: Option<Vec<String>>,
    /// Where the redirects of hubs lead; `None`: only root sees them.
    pub(super) redirects: Option<BTreeMap<u32, BTreeMap<Ipv4Addr, u16>>>,
    /// Of the file system of the home.
    pub(super) disk: Option<Space>,
}

/// One runner that has a directory.
#[derive(Debug)]
pub(super) struct Runner {
    pub(super) name: RunnerName,
    pub(super) group: Option<GroupName>,
    /// A daemon holds its lock.
    pub(super) live: bool,
    pub(super) status: Option<Status>,
    /// Its VMs by the proxy's registry.
    pub(super) registry: BTreeMap<Ipv4Addr, Registered>,
    pub(super) unit: Option<Unit>,
    /// Runs whose network log is there.
    pub(super) logged: BTreeSet<RunId>,
}

/// A line of `proxy-registry.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Registered {
    pub(super) run_id: RunId,
    #[serde(default)]
    pub(super) proxy_port: Option<u16>,
}

#[derive(Deserialize)]
struct Registry {
    vms: BTreeMap<Ipv4Addr, Registered>,
}

/// A unit of systemd.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    pub(super) name: String,
    /// Its command takes jobs from the local queue.
    pub(super) local: bool,
}

impl Scene {
    /// Looks.
    pub(super) fn look(home: &Home, only: Option<&RunnerName>) -> Self {
        let mut scene = Self::default();
        let entries = home.dir().open_dir(rel::RUNNERS).and_then(|dir| dir.list());
        let names = entries.unwrap_or_default().into_iter();
        for name in names.filter_map(|entry| entry.name.to_str()?.parse::<RunnerName>().ok()) {
            if only.is_none_or(|only| *only == name) {
                scene.runners.push(runner(home, name));
            }
        }
        scene.groups = groups(home);
        if let Ok(config) = LauncherConfig::from_env(String::new()) {
            scene.processes = vms::processes(config.uid_base);
            scene.held = host::slot::held_slots(&config.run_dir).unwrap_or_default();
            if rustix::process::geteuid().is_root() {
                let orphans = host::slot::orphaned_slots(&config.run_dir);
                scene.orphans = Some(orphans.unwrap_or_default().into_keys().collect());
                scene.tables = Some(stale_tables());
                scene.redirects = Some(redirects(&scene));
            }
        }
        scene.disk = Space::of(home.path()).ok();
        scene
    }
}

fn runner(home: &Home, name: RunnerName) -> Runner {
    let read = |path: PathBuf| {
        // status.json and proxy-registry.json are links to the current instance's, which nothing else of the home follows.
        std::fs::read(home.at(path)).ok()
    };
    let directory = rel::runner(&name);
    let status = read(directory.join(STATUS_FILE))
        .and_then(|bytes| serde_json::from_slice::<Status>(&bytes).ok());
    let registry = read(directory.join(REGISTRY_FILE))
        .and_then(|bytes| serde_json::from_slice::<Registry>(&bytes).ok());
    let config = home
        .dir()
        .read_bounded(rel::runner_yaml(&name), MAX_TEXT)
        .ok()
        .and_then(|bytes| Config::parse(std::str::from_utf8(&bytes).ok()?).ok());
    let logged = |run: &RunId| {
        let log = home.dir().metadata(rel::network_log(run));
        log.is_ok_and(|meta| meta.is_some())
    };
    let runs = status.iter().flat_map(|status| &status.active_runs);
    Runner {
        live: home
            .dir()
            .is_locked(directory.join("runner.lock"))
            .unwrap_or(false),
        group: config.map(|config| config.group),
        logged: runs.map(|run| run.run_id).filter(logged).collect(),
        status,
        registry: registry.map(|registry| registry.vms).unwrap_or_default(),
        unit: unit(&name),
        name,
    }
}

fn unit(name: &RunnerName) -> Option<Unit> {
    let file = format!("vm0-runner-{name}.service");
    let text = UNITS
        .iter()
        .find_map(|directory| std::fs::read_to_string(Path::new(directory).join(&file)).ok())?;
    let mut commands = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("ExecStart="));
    Some(Unit {
        name: file,
        local: commands.any(|command| {
            let words = command.split_whitespace();
            words
                .map(|word| word.trim_matches('"'))
                .any(|word| word == "--local")
        }),
    })
}

fn groups(home: &Home) -> BTreeMap<GroupName, (usize, usize)> {
    let mut groups = BTreeMap::new();
    let Ok(top) = home.dir().open_dir(rel::GROUPS) else {
        return groups;
    };
    for org in top.list().unwrap_or_default() {
        let Ok(inner) = top.open_dir(&org.name) else {
            continue;
        };
        for entry in inner.list().unwrap_or_default() {
            let (Some(org), Some(name)) = (org.name.to_str(), entry.name.to_str()) else {
                continue;
            };
            let (Ok(group), Ok(dir)) = (
                format!("{org}/{name}").parse::<GroupName>(),
                inner.open_dir(name),
            ) else {
                continue;
            };
            let Ok(queue) = GroupQueue::open(dir) else {
                continue;
            };
            let jobs = queue.list().unwrap_or_default();
            let waiting = jobs
                .iter()
                .filter(|job| matches!(job.state, JobState::Waiting));
            let live = queue.live_runners().unwrap_or_default();
            groups.insert(group, (waiting.count(), live.len()));
        }
    }
    groups
}

/// Tables of hubs whose link is gone: a hub makes its link before its table and removes it after.
fn stale_tables() -> Vec<String> {
    let text = output(&["nft", "list", "tables", "ip"], "").unwrap_or_default();
    let names = text
        .lines()
        .filter_map(|line| line.split_whitespace().last());
    let gone = |name: &&str| {
        HubNumber::of_table(name)
            .is_some_and(|hub| !Path::new("/sys/class/net").join(hub.link()).exists())
    };
    names.filter(gone).map(str::to_owned).collect()
}

/// Of each live runner, by its pid, where its hub's rules lead VMs' web traffic. The hub's namespace has no name; the
/// proxy's processes are in it.
fn redirects(scene: &Scene) -> BTreeMap<u32, BTreeMap<Ipv4Addr, u16>> {
    let mut found = BTreeMap::new();
    for runner in scene.runners.iter().filter(|runner| runner.live) {
        let Some(status) = &runner.status else {
            continue;
        };
        let proxy = descendants(status.pid)
            .into_iter()
            .find(|pid| command_line(*pid).contains("mitmdump"));
        let Some(proxy) = proxy else { continue };
        let net = format!("--net=/proc/{proxy}/ns/net");
        let rules = output(&["nsenter", &net, "nft", "list", "ruleset"], "");
        found.insert(status.pid, parse_redirects(&rules.unwrap_or_default()));
    }
    found
}

/// The elements of the map `worker_of`: `100.96.0.1 : 8080, …`.
fn parse_redirects(ruleset: &str) -> BTreeMap<Ipv4Addr, u16> {
    let map = ruleset.split_once("map worker_of").map(|(_, after)| after);
    let elements = map.and_then(|map| map.split_once("elements = {"));
    let elements = elements.and_then(|(_, after)| after.split_once('}'));
    let Some((elements, _)) = elements else {
        return BTreeMap::new();
    };
    let pair = |element: &str| {
        let (address, port) = element.split_once(':')?;
        // nft knows some ports by name unless it is told otherwise.
        let port = match port.trim() {
            "http-alt" => 8080,
            port => port.parse().ok()?,
        };
        Some((address.trim().parse().ok()?, port))
    };
    elements.split(',').filter_map(pair).collect()
}

fn command_line(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).into_owned()
}

fn descendants(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            let list = std::fs::read_to_string(task.path().join("children"));
            let list = list.unwrap_or_default();
            found.extend(
                list.split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_read_as_nft_prints_them() {
        let text = "table inet vm0 {\n map worker_of {\n  type ipv4_addr : inet_service\n  elements = { 100.96.0.1 : 8080,\n\
                    100.96.0.3 : 8081 }\n }\n chain x { }\n}\n";
        let found = parse_redirects(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[&Ipv4Addr::new(100, 96, 0, 3)], 8081);
        assert!(parse_redirects("").is_empty());
    }
}
