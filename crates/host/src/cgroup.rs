//! Control groups of slots, v2 and v1 alike.
//!
//! Every slot has one group `vm0/<uid>` at the root of each hierarchy that offers a controller we want: its name
//! follows from the slot alone, so that whoever reclaims the slot finds it. The hierarchy of our own service is not
//! used: another runner could not find the group there, and the service manager would kill VMs before we do.
//! Decisions go through [`CgroupFs`], so that they are tested without root.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::launcher::CgroupLimits;

/// Name of the group that holds all slots' groups.
const PARENT: &str = "vm0";

/// The few file operations that control groups are made of.
pub trait CgroupFs {
    /// Makes a group; one that exists is fine.
    fn make(&self, group: &Path) -> io::Result<()>;
    /// Writes one control file.
    fn write(&self, file: &Path, value: &str) -> io::Result<()>;
    /// Reads one control file.
    fn read(&self, file: &Path) -> io::Result<String>;
    /// Removes an empty group; one that is not there is fine.
    fn remove(&self, group: &Path) -> io::Result<()>;
}

/// The kernel's.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealCgroupFs;

impl CgroupFs for RealCgroupFs {
    fn make(&self, group: &Path) -> io::Result<()> {
        match std::fs::create_dir(group) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn write(&self, file: &Path, value: &str) -> io::Result<()> {
        use std::io::Write;
        // Never creates: a control file that is not there is an error, not a plain file on some tmpfs.
        let mut file = std::fs::OpenOptions::new().write(true).open(file)?;
        file.write_all(value.as_bytes())
    }

    fn read(&self, file: &Path) -> io::Result<String> {
        std::fs::read_to_string(file)
    }

    fn remove(&self, group: &Path) -> io::Result<()> {
        match std::fs::remove_dir(group) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// A controller we use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Controller {
    /// Memory limit and its out-of-memory counter.
    Memory,
    /// Processes and threads.
    Pids,
    /// Share of the CPU.
    Cpu,
}

impl Controller {
    const ALL: [Controller; 3] = [Controller::Memory, Controller::Pids, Controller::Cpu];

    fn name(self) -> &'static str {
        match self {
            Controller::Memory => "memory",
            Controller::Pids => "pids",
            Controller::Cpu => "cpu",
        }
    }
}

/// The two generations of the kernel's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy a controller.
    V1,
    /// The unified hierarchy.
    V2,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Version::V1 => "v1",
            Version::V2 => "v2",
        })
    }
}

/// Which limits this host can put on a VM, and why not where it cannot. `doctor` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupSupport {
    /// For each controller its version, or why it cannot be had.
    pub controllers: Vec<(Controller, Result<Version, String>)>,
}

impl CgroupSupport {
    /// Whether every limit can be had.
    pub fn is_complete(&self) -> bool {
        self.controllers.iter().all(|(_, found)| found.is_ok())
    }
}

impl fmt::Display for CgroupSupport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (controller, found)) in self.controllers.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            match found {
                Ok(version) => write!(f, "{comma}{}: {version}", controller.name())?,
                Err(reason) => write!(f, "{comma}{}: none ({reason})", controller.name())?,
            }
        }
        Ok(())
    }
}

/// A hierarchy and the controllers we use in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    mount: PathBuf,
    controllers: Vec<Controller>,
}

impl Hierarchy {
    fn group(&self, uid: u32) -> PathBuf {
        self.mount.join(PARENT).join(uid.to_string())
    }
}

/// The control groups of this host's slots.
#[derive(Debug)]
pub struct Cgroups<F = RealCgroupFs> {
    fs: F,
    hierarchies: Vec<Hierarchy>,
    support: CgroupSupport,
}

impl Cgroups<RealCgroupFs> {
    /// Looks at this host's mounts; makes nothing yet.
    pub fn detect() -> Cgroups<RealCgroupFs> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Cgroups::with_fs(RealCgroupFs, &mounts)
    }
}

impl<F: CgroupFs> Cgroups<F> {
    /// Chooses hierarchies from the text of `/proc/self/mountinfo`: for each controller the unified hierarchy if it
    /// offers it, else the controller's own.
    pub fn with_fs(fs: F, mountinfo: &str) -> Cgroups<F> {
        let mounts: Vec<Mount<'_>> = mountinfo.lines().filter_map(Mount::parse).collect();
        let mut hierarchies: Vec<Hierarchy> = Vec::new();
        let mut controllers = Vec::new();
        for controller in Controller::ALL {
            let unified = mounts.iter().find(|mount| {
                mount.kind == "cgroup2"
                    && fs
                        .read(&mount.point.join("cgroup.controllers"))
                        .is_ok_and(|list| list.split_whitespace().any(|c| c == controller.name()))
            });
            let own = mounts.iter().find(|mount| {
                mount.kind == "cgroup" && mount.options.split(',').any(|o| o == controller.name())
            });
            let (version, mount) = match (unified, own) {
                (Some(mount), _) => (Version::V2, mount),
                (None, Some(mount)) => (Version::V1, mount),
                (None, None) => {
                    let reason = "no mounted hierarchy offers it".to_owned();
                    controllers.push((controller, Err(reason)));
                    continue;
                }
            };
            controllers.push((controller, Ok(version)));
            match hierarchies.iter_mut().find(|h| h.mount == mount.point) {
                Some(hierarchy) => hierarchy.controllers.push(controller),
                None => hierarchies.push(Hierarchy {
                    version,
                    mount: mount.point.clone(),
                    controllers: vec![controller],
                }),
            }
        }
        Cgroups {
            fs,
            hierarchies,
            support: CgroupSupport { controllers },
        }
    }

    /// The directory of the slot's group in the unified hierarchy, where that is in use: for a child to be born in.
    pub fn open_unified(&self, uid: u32) -> Option<File> {
        let unified = self
            .hierarchies
            .iter()
            .find(|hierarchy| hierarchy.version == Version::V2)?;
        File::open(unified.group(uid)).ok()
    }

    /// What this host can limit.
    pub fn support(&self) -> &CgroupSupport {
        &self.support
    }

    /// Makes the parent groups once and drops hierarchies where that is not allowed, so that every later step may
    /// count on what is left.
    pub fn establish(&mut self) {
        let (fs, support) = (&self.fs, &mut self.support);
        self.hierarchies.retain(|hierarchy| {
            let made = make_parent(fs, hierarchy);
            if let Err(reason) = &made {
                for (controller, found) in &mut support.controllers {
                    if hierarchy.controllers.contains(controller) {
                        *found = Err(reason.clone());
                    }
                }
            }
            made.is_ok()
        });
    }

    /// Makes the slot's group, if need be, and sets its limits.
    pub fn prepare(&self, uid: u32, limits: &CgroupLimits) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            let group = hierarchy.group(uid);
            if let Err(e) = self.fs.make(&group) {
                // Another runner that ended may have taken the empty parent with it.
                if e.kind() != io::ErrorKind::NotFound {
                    return Err(e);
                }
                make_parent(&self.fs, hierarchy).map_err(io::Error::other)?;
                self.fs.make(&group)?;
            }
            for controller in &hierarchy.controllers {
                self.limit(hierarchy.version, &group, *controller, limits)?;
            }
        }
        Ok(())
    }

    /// Sets one limit; 0 asks for none.
    fn limit(
        &self,
        version: Version,
        group: &Path,
        controller: Controller,
        limits: &CgroupLimits,
    ) -> io::Result<()> {
        let set = |name: &str, value: u64| self.fs.write(&group.join(name), &value.to_string());
        let unlimited = match controller {
            Controller::Memory => limits.memory_max == 0,
            Controller::Pids => limits.pids_max == 0,
            Controller::Cpu => limits.cpu_weight == 0,
        };
        if unlimited {
            // Only this one may have been set since the group was made: see `forbid_forks`.
            return match controller {
                Controller::Pids => self.fs.write(&group.join("pids.max"), "max"),
                Controller::Memory | Controller::Cpu => Ok(()),
            };
        }
        match (controller, version) {
            (Controller::Memory, Version::V2) => {
                set("memory.max", limits.memory_max)?;
                // Absent without swap accounting. Out of memory is then out of memory, not a slow VM.
                let _ = set("memory.swap.max", 0);
            }
            (Controller::Memory, Version::V1) => {
                // Memory and swap together may never be less than memory: they go first when the limit grows. Without
                // swap accounting there is no such file.
                let both = "memory.memsw.limit_in_bytes";
                let grows = set(both, limits.memory_max);
                set("memory.limit_in_bytes", limits.memory_max)?;
                if grows.is_err() {
                    let _ = set(both, limits.memory_max);
                }
            }
            (Controller::Pids, _) => set("pids.max", u64::from(limits.pids_max))?,
            (Controller::Cpu, Version::V2) => {
                set("cpu.weight", u64::from(limits.cpu_weight.clamp(1, 10_000)))?;
            }
            (Controller::Cpu, Version::V1) => {
                // v1 is neutral at 1024 where v2 is at 100; the kernel's least is 2.
                let shares = u64::from(limits.cpu_weight.clamp(1, 10_000)) * 1024 / 100;
                set("cpu.shares", shares.max(2))?;
            }
        }
        Ok(())
    }

    /// Puts the calling process, which has one thread, into the slot's groups; into that of the unified hierarchy only
    /// if it is not `in_unified` already.
    pub fn join(&self, uid: u32, in_unified: bool) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            // Moving a whole process stops every fork and exit on the host for a moment, 5 to 9 ms on an idle one;
            // moving just the thread that asks does not, and v1 lets us say so. v2 lets a child be born in its group.
            let file = match hierarchy.version {
                Version::V1 => "tasks",
                Version::V2 if in_unified => continue,
                Version::V2 => "cgroup.procs",
            };
            // 0 is the writer itself, in both versions.
            self.fs.write(&hierarchy.group(uid).join(file), "0")?;
        }
        Ok(())
    }

    /// Lets nothing in the slot's group fork any more, until [`Cgroups::prepare`]: whoever kills it gets done.
    pub fn forbid_forks(&self, uid: u32) {
        for hierarchy in &self.hierarchies {
            if hierarchy.controllers.contains(&Controller::Pids) {
                // Fails where there is no such group, and then there is nothing in it.
                let _ = self.fs.write(&hierarchy.group(uid).join("pids.max"), "0");
            }
        }
    }

    /// Processes in the slot's group, dead ones not counted; none where there is no group. The answer is `None` where
    /// the host has no control groups at all.
    pub fn members(&self, uid: u32) -> Option<Vec<u32>> {
        let hierarchy = self.hierarchies.first()?;
        let list = self.fs.read(&hierarchy.group(uid).join("cgroup.procs"));
        let list = list.unwrap_or_default();
        Some(list.lines().filter_map(|pid| pid.parse().ok()).collect())
    }

    /// How many processes of the slot the kernel has killed for want of memory.
    pub fn oom_kills(&self, uid: u32) -> u64 {
        let Some(hierarchy) = self
            .hierarchies
            .iter()
            .find(|h| h.controllers.contains(&Controller::Memory))
        else {
            return 0;
        };
        let file = match hierarchy.version {
            Version::V2 => "memory.events",
            Version::V1 => "memory.oom_control",
        };
        let text = self.fs.read(&hierarchy.group(uid).join(file));
        // Both files hold `key value` lines, and the same key.
        text.unwrap_or_default()
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Removes the parent groups where no slot of any runner is left in them.
    pub fn remove_parents(&self) {
        for hierarchy in &self.hierarchies {
            // Refused while a group is in it, which is the answer we want.
            let _ = self.fs.remove(&hierarchy.mount.join(PARENT));
        }
    }

    /// Removes the slot's group, which must be empty.
    pub fn remove(&self, uid: u32) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            self.fs.remove(&hierarchy.group(uid))?;
        }
        Ok(())
    }
}

/// Makes `vm0` in a hierarchy and, in the unified one, hands the controllers down to it and below it.
fn make_parent(fs: &impl CgroupFs, hierarchy: &Hierarchy) -> Result<(), String> {
    let parent = hierarchy.mount.join(PARENT);
    fs.make(&parent)
        .map_err(|e| format!("{} could not be made: {e}", parent.display()))?;
    if hierarchy.version == Version::V2 {
        for group in [&hierarchy.mount, &parent] {
            let file = group.join("cgroup.subtree_control");
            for controller in &hierarchy.controllers {
                fs.write(&file, &format!("+{}", controller.name()))
                    .map_err(|e| format!("{} was refused: {e}", file.display()))?;
            }
        }
    }
    Ok(())
}

/// What we need of a line of mountinfo.
struct Mount<'a> {
    point: PathBuf,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    /// proc_pid_mountinfo(5): `36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
    fn parse(line: &'a str) -> Option<Mount<'a>> {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?;
        let mut after = after.split(' ');
        let kind = after.next()?;
        let options = after.nth(1)?;
        // A space in a mount point is written \040: no cgroup file system is mounted at such a place.
        Some(Mount {
            point: PathBuf::from(point),
            kind,
            options,
        })
    }
}

#[cfg(test)]
mod tests;
