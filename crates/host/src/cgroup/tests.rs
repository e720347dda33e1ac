//! Which files are written, with a double that writes them down.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::*;

/// Writes down what is done, and answers reads from a table.
#[derive(Default)]
struct Recorder {
    files: BTreeMap<PathBuf, &'static str>,
    missing: Vec<&'static str>,
    done: RefCell<Vec<String>>,
}

impl Recorder {
    fn note(&self, what: String) -> io::Result<()> {
        let known = !self.missing.iter().any(|part| what.contains(part));
        self.done.borrow_mut().push(what);
        match known {
            true => Ok(()),
            false => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }
}

impl CgroupFs for Recorder {
    fn make(&self, group: &Path) -> io::Result<()> {
        self.note(format!("make {}", group.display()))
    }
    fn write(&self, file: &Path, value: &str) -> io::Result<()> {
        self.note(format!("{} = {value}", file.display()))
    }
    fn read(&self, file: &Path) -> io::Result<String> {
        let text = self.files.get(file).ok_or(io::ErrorKind::NotFound)?;
        Ok((*text).to_owned())
    }
    fn remove(&self, group: &Path) -> io::Result<()> {
        self.note(format!("remove {}", group.display()))
    }
}

const LIMITS: CgroupLimits = CgroupLimits {
    memory_max: 1000,
    pids_max: 10,
    cpu_weight: 50,
};

const UNIFIED: &str =
    "30 1 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
const SPLIT: &str = "\
    31 1 0:27 / /cg/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
    32 1 0:28 / /cg/memory rw - cgroup cgroup rw,memory\n\
    33 1 0:29 / /cg/unified rw - cgroup2 cgroup2 rw";

fn unified() -> Recorder {
    Recorder {
        files: BTreeMap::from([
            (
                "/sys/fs/cgroup/cgroup.controllers".into(),
                "cpuset cpu io memory pids\n",
            ),
            (
                "/sys/fs/cgroup/vm0/7/memory.events".into(),
                "low 0\noom 3\noom_kill 2\noom_group_kill 0\n",
            ),
            ("/sys/fs/cgroup/vm0/7/cgroup.procs".into(), "12\n13\n"),
        ]),
        ..Recorder::default()
    }
}

#[test]
fn the_unified_hierarchy_is_used_where_it_has_the_controllers() {
    let mut cgroups = Cgroups::with_fs(unified(), UNIFIED);
    assert!(cgroups.support().is_complete());
    assert_eq!(
        cgroups.support().to_string(),
        "memory: v2, pids: v2, cpu: v2"
    );
    cgroups.establish();
    cgroups.prepare(7, &LIMITS).unwrap();
    cgroups.join(7, true).unwrap();
    cgroups.join(7, false).unwrap();
    cgroups.forbid_forks(7);
    cgroups.remove(7).unwrap();
    let root = "/sys/fs/cgroup";
    let expected = [
        "make R/vm0",
        "R/cgroup.subtree_control = +memory",
        "R/cgroup.subtree_control = +pids",
        "R/cgroup.subtree_control = +cpu",
        "R/vm0/cgroup.subtree_control = +memory",
        "R/vm0/cgroup.subtree_control = +pids",
        "R/vm0/cgroup.subtree_control = +cpu",
        "make R/vm0/7",
        "R/vm0/7/memory.max = 1000",
        "R/vm0/7/memory.swap.max = 0",
        "R/vm0/7/pids.max = 10",
        "R/vm0/7/cpu.weight = 50",
        "R/vm0/7/cgroup.procs = 0",
        "R/vm0/7/pids.max = 0",
        "remove R/vm0/7",
    ];
    let expected = expected.map(|line| line.replace('R', root));
    assert_eq!(*cgroups.fs.done.borrow(), expected);
    assert_eq!(cgroups.oom_kills(7), 2);
    assert_eq!(cgroups.members(7), Some(vec![12, 13]));
    assert_eq!(cgroups.members(8), Some(vec![]));
}

#[test]
fn split_hierarchies_are_used_where_the_unified_one_has_nothing() {
    let mut recorder = Recorder::default();
    recorder.files.insert(
        "/cg/memory/vm0/7/memory.oom_control".into(),
        "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    );
    let mut cgroups = Cgroups::with_fs(recorder, SPLIT);
    assert_eq!(
        cgroups.support().to_string(),
        "memory: v1, pids: none (no mounted hierarchy offers it), cpu: v1"
    );
    cgroups.establish();
    cgroups.prepare(7, &LIMITS).unwrap();
    cgroups.join(7, false).unwrap();
    let expected = [
        "make /cg/memory/vm0",
        "make /cg/cpu,cpuacct/vm0",
        "make /cg/memory/vm0/7",
        "/cg/memory/vm0/7/memory.memsw.limit_in_bytes = 1000",
        "/cg/memory/vm0/7/memory.limit_in_bytes = 1000",
        "make /cg/cpu,cpuacct/vm0/7",
        "/cg/cpu,cpuacct/vm0/7/cpu.shares = 512",
        "/cg/memory/vm0/7/tasks = 0",
        "/cg/cpu,cpuacct/vm0/7/tasks = 0",
    ];
    assert_eq!(*cgroups.fs.done.borrow(), expected);
    assert_eq!(cgroups.oom_kills(7), 1);
}

#[test]
fn what_is_refused_is_said_and_not_used() {
    let recorder = Recorder {
        missing: vec!["/sys/fs/cgroup/cgroup.subtree_control"],
        ..unified()
    };
    let mut cgroups = Cgroups::with_fs(recorder, UNIFIED);
    cgroups.establish();
    assert!(!cgroups.support().is_complete());
    let text = cgroups.support().to_string();
    assert!(
        text.contains("subtree_control was refused: permission denied"),
        "{text}"
    );
    cgroups.prepare(7, &LIMITS).unwrap();
    cgroups.join(7, false).unwrap();
    assert_eq!((cgroups.members(7), cgroups.oom_kills(7)), (None, 0));
}

#[test]
fn zero_is_no_limit() {
    let cgroups = Cgroups::with_fs(unified(), UNIFIED);
    cgroups.prepare(7, &CgroupLimits::default()).unwrap();
    let done = cgroups.fs.done.borrow();
    assert_eq!(
        *done,
        [
            "make /sys/fs/cgroup/vm0/7",
            "/sys/fs/cgroup/vm0/7/pids.max = max"
        ]
    );
}
