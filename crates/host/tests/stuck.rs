//! Slots that cannot be given back at once. Needs root and control groups; says so and passes where there are none.
#![cfg(test)]

use std::path::PathBuf;
use std::time::Duration;

use host::launcher::{CgroupLimits, ForkedLauncher, LaunchSpec};
use host::slot::{HostLimits, HostUsage, LeaseKind, Resources, SlotRecord};
use host::test_support::{TestHost, skip};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

const VM: Resources = Resources {
    vcpu: 1,
    memory_mb: 256,
    disk_mb: 100,
};

/// The group of a uid, in a hierarchy that has one.
fn group_of(uid: u32) -> Option<PathBuf> {
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup").ok()?;
    let mut places: Vec<_> = hierarchies
        .filter_map(|place| Some(place.ok()?.path()))
        .collect();
    places.push("/sys/fs/cgroup".into());
    let mut groups = places
        .into_iter()
        .map(|place| place.join("vm0").join(uid.to_string()));
    groups.find(|group| group.is_dir())
}

#[tokio::test]
async fn a_slot_that_could_not_be_given_back_is_given_back_later() {
    let Some(host) = TestHost::new() else { return };
    let forked = ForkedLauncher::fork_in_tests(host.config("a")).unwrap();
    let launcher = forked.attach().unwrap();
    let record = SlotRecord {
        instance: "a".to_owned(),
        kind: LeaseKind::Firm,
        resources: VM,
        run_id: None,
        shared_mb: 0,
    };
    let limits = HostLimits { total: VM };
    let slot = launcher.reserve(record, limits).await.unwrap();
    let spec = LaunchSpec {
        slot,
        program: "/bin/true".into(),
        args: Vec::new(),
        fds: Vec::new(),
        devices: Vec::new(),
        network: None,
        limits: CgroupLimits {
            memory_max: 64 << 20,
            pids_max: 32,
            cpu_weight: 50,
        },
    };
    launcher.launch(spec).await.unwrap();
    launcher.wait(slot).await.unwrap();
    let Some(group) = group_of(host.uid_base() + u32::from(slot.0)) else {
        launcher.shutdown().await;
        return skip("needs control groups");
    };
    let inner = group.join("in-the-way");
    std::fs::create_dir(&inner).unwrap();
    let error = launcher.release(slot).await.unwrap_err();
    assert!(error.to_string().contains("not empty"), "{error}");
    assert_eq!(launcher.usage().await.unwrap().firm_count, 1);

    std::fs::remove_dir(&inner).unwrap();
    let given_back = async { while launcher.usage().await.unwrap() != HostUsage::default() {} };
    let given_back = tokio::time::timeout(PATIENCE, given_back).await;
    given_back.expect("the slot is still held");
    assert!(!group.exists());
    launcher.shutdown().await;
}
