//! What is shown: the runners' own status, and what VMs take by the host's account of their processes.

use std::collections::HashMap;
use std::time::Instant;

use host::launcher::LauncherConfig;
use host::slot::SlotId;
use serde::Serialize;

use crate::context::CliError;
use crate::control::client::Instance;
use crate::control::protocol::{Reply, Request};
use crate::home::Home;
use crate::names::{RunId, RunnerName};
use crate::status::{RecentRun, Status};
use crate::vms::{self, VmProcess};

/// One active run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Run {
    pub(super) run_id: RunId,
    pub(super) runner: RunnerName,
    pub(super) profile: String,
    pub(super) phase: String,
    /// How long it is in this phase, seconds.
    pub(super) age_secs: u64,
    pub(super) slot: u16,
    /// Of one CPU; nothing at the first look.
    pub(super) cpu_percent: Option<u64>,
    /// What its processes have in memory, bytes.
    pub(super) memory: Option<u64>,
    /// Bytes a second towards the VM and from it.
    pub(super) network: Option<(u64, u64)>,
}

/// Everything that is shown.
#[derive(Debug, Default, Serialize)]
pub(super) struct Data {
    pub(super) runs: Vec<Run>,
    /// Each runner's status, or why it told none.
    pub(super) runners: Vec<(RunnerName, Result<Status, String>)>,
    /// Seconds since the Unix epoch.
    pub(super) at: u64,
}

impl Data {
    /// Whose run it is.
    pub(super) fn owner(&self, run: RunId) -> Option<&RunnerName> {
        let mut runs = self.runs.iter();
        runs.find(|one| one.run_id == run).map(|one| &one.runner)
    }

    /// The status of those that told one.
    pub(super) fn told(&self) -> impl Iterator<Item = &Status> {
        self.runners
            .iter()
            .filter_map(|(_, told)| told.as_ref().ok())
    }

    /// Runs that ended last, of all runners, the newest first.
    pub(super) fn recent(&self) -> Vec<&RecentRun> {
        let mut recent: Vec<_> = self.told().flat_map(|status| &status.recent).collect();
        recent.sort_by_key(|run| std::cmp::Reverse(run.ended_at));
        recent
    }
}

/// What a process had used so far.
#[derive(Clone, Copy, Debug)]
struct Used {
    at: Instant,
    /// Clock ticks.
    cpu: u64,
    /// Bytes to the VM and from it.
    network: Option<(u64, u64)>,
}

/// Looks again and again, and reckons the difference.
#[derive(Debug)]
pub(super) struct Sampler {
    uid_base: u32,
    ticks: u64,
    /// By number and start of the process.
    before: HashMap<(u32, u64), Used>,
}

impl Sampler {
    pub(super) fn new() -> Result<Self, CliError> {
        Ok(Self {
            uid_base: LauncherConfig::from_env(String::new())?.uid_base,
            ticks: rustix::param::clock_ticks_per_second(),
            before: HashMap::new(),
        })
    }

    /// Looks at everything now.
    pub(super) async fn look(&mut self, home: &Home) -> Result<Data, CliError> {
        let mut data = Data::default();
        for instance in Instance::live(home)? {
            let told = match instance.ask(&Request::Status).await {
                Ok(Reply::Status(text)) => {
                    serde_json::from_str::<Status>(&text).map_err(|error| error.to_string())
                }
                Ok(_) => Err("it gave an odd answer".to_owned()),
                Err(error) => Err(format!("it does not answer: {error}")),
            };
            data.runners.push((instance.runner, told));
        }
        let processes = vms::processes(self.uid_base);
        let slots = vms::by_slot(&processes);
        let now = jiff::Timestamp::now();
        data.at = u64::try_from(now.as_second()).unwrap_or(0);
        let mut seen = HashMap::new();
        for status in data
            .runners
            .iter()
            .filter_map(|(_, told)| told.as_ref().ok())
        {
            for run in &status.active_runs {
                let own = slots.get(&SlotId(run.slot)).map(Vec::as_slice);
                let taken = self.taken(own.unwrap_or_default(), &mut seen);
                data.runs.push(Run {
                    run_id: run.run_id,
                    runner: status.name.clone(),
                    profile: run.profile.to_string(),
                    phase: run.phase.to_string(),
                    age_secs: data.at.saturating_sub(run.phase_started_at.unix_secs()),
                    slot: run.slot,
                    cpu_percent: taken.0,
                    memory: taken.1,
                    network: taken.2,
                });
            }
        }
        self.before = seen;
        Ok(data)
    }

    /// CPU in percent, memory and network of the processes of one slot.
    fn taken(
        &self,
        processes: &[&VmProcess],
        seen: &mut HashMap<(u32, u64), Used>,
    ) -> (Option<u64>, Option<u64>, Option<(u64, u64)>) {
        let (mut cpu, mut memory, mut network) = (None, None, None);
        for process in processes {
            let Some(used) = used(process.pid) else {
                continue;
            };
            let key = (process.pid, process.started);
            if let Some(before) = self.before.get(&key) {
                let millis = used.at.duration_since(before.at).as_millis();
                let millis = u64::try_from(millis).unwrap_or(u64::MAX).max(1);
                let rate = |new: u64, old: u64, times: u64| {
                    new.saturating_sub(old).saturating_mul(times) / millis
                };
                let percent = rate(used.cpu, before.cpu, 100_000) / self.ticks.max(1);
                cpu = Some(cpu.unwrap_or(0) + percent);
                if let (Some(new), Some(old)) = (used.network, before.network) {
                    let (down, up) = network.unwrap_or((0, 0));
                    network = Some((
                        down + rate(new.0, old.0, 1000),
                        up + rate(new.1, old.1, 1000),
                    ));
                }
            }
            if let Some(bytes) = resident(process.pid) {
                memory = Some(memory.unwrap_or(0) + bytes);
            }
            seen.insert(key, used);
        }
        (cpu, memory, network)
    }
}

/// Of /proc/<pid>/stat fields 14 and 15 (proc_pid_stat(5)), and what went over the links of its network namespace.
fn used(pid: u32) -> Option<Used> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after) = stat.rsplit_once(") ")?;
    let mut fields = after.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let cpu = ticks()?.saturating_add(ticks()?);
    let links = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).ok();
    Some(Used {
        at: Instant::now(),
        cpu,
        network: links.and_then(|links| tap(&links)),
    })
}

/// The device of a VM, in the table of /proc/<pid>/net/dev (proc_pid_net(5)): what the host sends into it the VM receives.
fn tap(links: &str) -> Option<(u64, u64)> {
    links.lines().find_map(|line| {
        let (name, figures) = line.split_once(':')?;
        if !name.trim().starts_with("tap") {
            return None;
        }
        let mut figures = figures.split_whitespace();
        let from: u64 = figures.next()?.parse().ok()?;
        let to: u64 = figures.nth(7)?.parse().ok()?;
        Some((to, from))
    })
}

/// Resident memory, bytes.
fn resident(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages.saturating_mul(rustix::param::page_size() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vms_device_is_read_from_the_vms_side() {
        let text = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs\n\
                    \x20   lo: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0\n  tap0: 100 2 0 0 0 0 0 0 7000 3 0 0 0 0 0 0\n";
        assert_eq!(tap(text), Some((7000, 100)));
        assert_eq!(tap(""), None);
    }

    #[test]
    fn our_own_process_is_measured() {
        let own = used(std::process::id()).unwrap();
        assert!(own.cpu < 1 << 40);
        assert!(resident(std::process::id()).unwrap() > 1 << 20);
    }
}
