//! What is wrong with what is going on: judged from a [`Scene`], and reported only if it is still wrong some looks later.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host::fs::Space;
use host::slot::SlotId;
use serde::Serialize;

use super::scene::{Runner, Scene};
use super::{Line, Outcome};
use crate::home::Home;
use crate::names::{RunId, RunnerName};
use crate::status::{Mode, Phase, WorkerState};

/// A run prepares for longer than this only when something is stuck.
const PREPARING: u64 = 120;
/// How often, and how far apart, what was found is looked at again.
const LOOKS: u32 = 3;
const APART: Duration = Duration::from_secs(1);
/// Less free space than this is too little for jobs, bytes.
const DISK_FULL: u64 = 1 << 30;
/// Less free space than this part of all is worth a word, percent.
const DISK_LOW: u64 = 5;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Anomaly {
    /// Which kind, for people and scripts.
    pub(super) name: &'static str,
    /// What it is about: the same thing, looked at again, has the same.
    key: String,
    pub(super) outcome: Outcome,
    pub(super) remedy: Remedy,
}

/// What `--fix` can do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Nothing by itself.
    None,
    /// The launcher reclaims slots of dead ones.
    Reclaim,
    /// A process that belongs to nobody is killed.
    Kill(SlotId),
    /// A table of a hub that is gone is deleted.
    Table(String),
}

impl From<Anomaly> for Line {
    fn from(anomaly: Anomaly) -> Self {
        Self {
            name: anomaly.name,
            outcome: anomaly.outcome,
        }
    }
}

/// One VM, as people are shown it.
#[derive(Debug, Serialize)]
pub(super) struct Vm {
    pub(super) run_id: RunId,
    pub(super) phase: String,
    pub(super) slot: u16,
    /// Its address in the hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) address: Option<String>,
    /// The proxy's port that serves it, by the registry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) proxy_port: Option<u16>,
    /// The port that the kernel's rules lead its web traffic to; only root sees it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) redirect: Option<u16>,
}

/// One runner, as people are shown it.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    pub(super) name: RunnerName,
    /// `stopped` where nobody runs.
    pub(super) mode: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pid: Option<u32>,
    pub(super) vms: Vec<Vm>,
}

/// Looks until what is wrong is still so, and says that.
pub(super) fn persisting(home: &Home, only: Option<&RunnerName>) -> (Vec<Anomaly>, Scene) {
    let mut scene = Scene::look(home, only);
    let mut found = judge(&scene);
    for _ in 0..LOOKS {
        if found.is_empty() {
            break;
        }
        std::thread::sleep(APART);
        scene = Scene::look(home, only);
        let again = judge(&scene);
        let before: BTreeSet<_> = found
            .iter()
            .map(|one| (one.name, one.key.clone()))
            .collect();
        found = again;
        found.retain(|one| before.contains(&(one.name, one.key.clone())));
    }
    (found, scene)
}

/// Everything that is wrong in a scene.
pub(super) fn judge(scene: &Scene) -> Vec<Anomaly> {
    let mut found = Vec::new();
    let mut add = |name, key: String, outcome, remedy| {
        found.push(Anomaly {
            name,
            key,
            outcome,
            remedy,
        });
    };
    for (group, (waiting, live)) in &scene.groups {
        if *waiting == 0 || *live > 0 {
            continue;
        }
        let jobs = plural(*waiting, "job waits", "jobs wait");
        let serving = |runner: &&Runner| runner.group.as_ref() == Some(group);
        let runner = scene.runners.iter().find(serving);
        let outcome = match runner.and_then(|runner| Some((runner, runner.unit.as_ref()?))) {
            Some((runner, unit)) if !unit.local => Outcome::fail(
                format_args!(
                    "{jobs} in {group}, and {} starts runner {} without --local: it does not take jobs from the local queue",
                    unit.name, runner.name
                ),
                format_args!(
                    "runner service start --name {} --local --env USE_MOCK_CLAUDE=true",
                    runner.name
                ),
            ),
            Some((runner, unit)) => Outcome::fail(
                format_args!("{jobs} in {group}, and runner {} does not run", runner.name),
                format_args!("systemctl status {0}; sudo systemctl start {0}", unit.name),
            ),
            None => match runner {
                Some(runner) => Outcome::fail(
                    format_args!("{jobs} in {group}, and runner {} does not run", runner.name),
                    format_args!(
                        "sudo runner start --config <home>/runners/{}/runner.yaml --local",
                        runner.name
                    ),
                ),
                None => Outcome::fail(
                    format_args!("{jobs} in {group}, which no runner is configured for"),
                    format_args!("runner config --group {group} …, or cancel the jobs"),
                ),
            },
        };
        let name = match runner.and_then(|runner| runner.unit.as_ref()) {
            Some(unit) if !unit.local => "not local",
            _ => "not running",
        };
        add(name, group.to_string(), outcome, Remedy::None);
    }
    for runner in scene.runners.iter().filter(|runner| runner.live) {
        of_runner(scene, runner, &mut add);
    }
    for slot in scene.orphans.iter().flatten() {
        let outcome = Outcome::fail(
            format_args!("slot {} was left by a runner that died", slot.0),
            "sudo runner gc",
        );
        add(
            "orphaned slot",
            slot.0.to_string(),
            outcome,
            Remedy::Reclaim,
        );
    }
    let held: BTreeSet<SlotId> = scene.held.iter().map(|held| held.slot).collect();
    let orphaned = |slot: SlotId| {
        let orphans = scene.orphans.iter().flatten();
        orphans.into_iter().any(|orphan| *orphan == slot)
    };
    for process in &scene.processes {
        if held.contains(&process.slot) || orphaned(process.slot) {
            continue;
        }
        let outcome = Outcome::fail(
            format_args!(
                "process {} ({}) runs as slot {}, which nobody holds",
                process.pid,
                crate::terminal::escape(&process.name),
                process.slot.0
            ),
            "sudo runner doctor --fix kills it",
        );
        let key = process.pid.to_string();
        add(
            "VM without an owner",
            key,
            outcome,
            Remedy::Kill(process.slot),
        );
    }
    for table in scene.tables.iter().flatten() {
        let outcome = Outcome::fail(
            format_args!("the nftables table ip {table} belongs to no network of a runner"),
            format_args!("sudo nft delete table ip {table}"),
        );
        let remedy = Remedy::Table(table.clone());
        add("orphaned table", table.clone(), outcome, remedy);
    }
    if let Some(Space { free, total }) = scene.disk {
        let found = format!(
            "{} MiB of {} MiB are free for the home",
            free >> 20,
            total >> 20
        );
        let fix = "sudo runner gc --keep-latest 3; then look at logs/, images/ and what else is on this file system";
        if free < DISK_FULL {
            add(
                "disk full",
                String::new(),
                Outcome::fail(found, fix),
                Remedy::None,
            );
        } else if free < total / 100 * DISK_LOW {
            add(
                "disk full",
                String::new(),
                Outcome::warn(found, fix),
                Remedy::None,
            );
        }
    }
    found
}

fn of_runner(
    scene: &Scene,
    runner: &Runner,
    add: &mut impl FnMut(&'static str, String, Outcome, Remedy),
) {
    let name = &runner.name;
    let Some(status) = &runner.status else {
        let outcome = Outcome::fail(
            format_args!("runner {name} runs and tells no status"),
            format_args!("look at logs/runner-{name}.log"),
        );
        return add("no status", name.to_string(), outcome, Remedy::None);
    };
    if status.mode == Mode::Draining && status.waiting > 0 {
        let outcome = Outcome::warn(
            format_args!(
                "runner {name} is draining, and {} in its group",
                plural(
                    usize::try_from(status.waiting).unwrap_or(usize::MAX),
                    "job waits",
                    "jobs wait"
                )
            ),
            format_args!(
                "runner service resume --name {name} (or kill -USR2 {})",
                status.pid
            ),
        );
        add("draining", name.to_string(), outcome, Remedy::None);
    }
    if let Some(api) = &status.api
        && let Some(error) = &api.error
    {
        let kept = plural(api.undelivered, "answer waits", "answers wait");
        let outcome = Outcome::warn(
            format_args!(
                "the Web API at {} does not take runner {name}'s heartbeats: {}; {kept} on disk for it",
                crate::terminal::escape(&api.url),
                crate::terminal::escape(error)
            ),
            format_args!(
                "curl {}/readyz from this host; is the token still good? logs/runner-{name}.log says more",
                crate::terminal::escape(&api.url)
            ),
        );
        add("API away", name.to_string(), outcome, Remedy::None);
    }
    for (index, worker) in status.proxy.iter().enumerate() {
        if worker.state != WorkerState::Down {
            continue;
        }
        let why = worker.reason.as_deref().unwrap_or("nobody knows why");
        let outcome = Outcome::fail(
            format_args!(
                "process {index} of runner {name}'s proxy is down: {}",
                crate::terminal::escape(why)
            ),
            format_args!(
                "sudo runner setup, then restart the runner; logs/runner-{name}.log says more"
            ),
        );
        add(
            "proxy down",
            format!("{name} {index}"),
            outcome,
            Remedy::None,
        );
    }
    let slots = crate::vms::by_slot(&scene.processes);
    for run in &status.active_runs {
        let id = run.run_id;
        let key = id.to_string();
        let age = now().saturating_sub(run.phase_started_at.unix_secs());
        match run.phase {
            Phase::Preparing if age > PREPARING => {
                let outcome = Outcome::fail(
                    format_args!("run {id} has been preparing for {age} s"),
                    format_args!("runner logs {id}; runner kill {id} --force"),
                );
                add("stuck", key, outcome, Remedy::None);
            }
            Phase::Running if !slots.contains_key(&SlotId(run.slot)) => {
                let outcome = Outcome::fail(
                    format_args!("run {id} has no VM process in its slot {}", run.slot),
                    format_args!("runner kill {id} --force; logs/runner-{name}.log says more"),
                );
                add("run without VM", key, outcome, Remedy::None);
            }
            Phase::Running => unplugged(scene, runner, id, status.pid, add),
            Phase::Preparing | Phase::Finishing => {}
        }
    }
}

/// A run whose traffic cannot reach the proxy, or is not told of.
fn unplugged(
    scene: &Scene,
    runner: &Runner,
    run: RunId,
    pid: u32,
    add: &mut impl FnMut(&'static str, String, Outcome, Remedy),
) {
    let mut registered = runner.registry.iter();
    let found = registered.find(|(_, registered)| registered.run_id == run);
    let kill = format!("runner kill {run}, and submit the job again");
    let Some((address, registered)) = found else {
        let outcome = Outcome::fail(
            format_args!(
                "the VM of run {run} is not in proxy-registry.json: nothing of it gets through, and there is no network log"
            ),
            &kill,
        );
        return add("not registered", run.to_string(), outcome, Remedy::None);
    };
    if !runner.logged.contains(&run) {
        let outcome = Outcome::fail(
            format_args!("run {run} has no logs/network-{run}.jsonl, though its VM is registered"),
            "was the directory of logs deleted? Jobs that start from now on are logged again",
        );
        add("no network log", run.to_string(), outcome, Remedy::None);
    }
    if let Some(redirects) = scene.redirects.as_ref().and_then(|all| all.get(&pid)) {
        let leads = redirects.get(address).copied();
        if leads != registered.proxy_port {
            let outcome = Outcome::fail(
                format_args!(
                    "the rules lead the web traffic of run {run} ({address}) to {}, and the proxy serves it on {}",
                    port(leads),
                    port(registered.proxy_port)
                ),
                "restart the runner: it makes the rules of its network anew",
            );
            add("no redirect", run.to_string(), outcome, Remedy::None);
        }
    }
}

/// What runs, for people.
pub(super) fn shown(scene: &Scene) -> Vec<Shown> {
    let shown = |runner: &Runner| {
        let status = runner.status.as_ref().filter(|_| runner.live);
        let runs = status.into_iter().flat_map(|status| &status.active_runs);
        let vm = |run: &crate::status::ActiveRun| {
            let mut registry = runner.registry.iter();
            let entry = registry.find(|(_, entry)| entry.run_id == run.run_id);
            let leads = status.and_then(|status| scene.redirects.as_ref()?.get(&status.pid));
            Vm {
                run_id: run.run_id,
                phase: run.phase.to_string(),
                slot: run.slot,
                address: entry.map(|(address, _)| address.to_string()),
                proxy_port: entry.and_then(|(_, entry)| entry.proxy_port),
                redirect: entry.and_then(|(address, _)| leads?.get(address).copied()),
            }
        };
        Shown {
            name: runner.name.clone(),
            mode: match status {
                Some(status) => serde_json::to_value(status.mode)
                    .ok()
                    .and_then(|mode| mode.as_str().map(str::to_owned))
                    .unwrap_or_default(),
                None => "stopped".to_owned(),
            },
            pid: status.map(|status| status.pid),
            vms: runs.map(vm).collect(),
        }
    };
    scene.runners.iter().map(shown).collect()
}

fn port(port: Option<u16>) -> String {
    port.map_or_else(|| "no port".to_owned(), |port| format!("port {port}"))
}

fn plural(count: usize, one: &str, several: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { several })
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}
