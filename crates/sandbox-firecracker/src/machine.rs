//! The machine: everything the guest can see, as the requests that describe it.
//!
//! Paths are those of the jail, the same in all of them.

use host::launcher::JailName;
use host::net::GUEST_MAC;
use sandbox::{IoLimits, Shape};

use crate::api::{
    BackendType, Balloon, BootSource, CacheType, Drive, DriveUpdate, Entropy, MachineConfig,
    MemoryBackend, NetworkInterface, NetworkInterfaceUpdate, NetworkOverride, RateLimiter, Request,
    SnapshotCreate, SnapshotLoad, SnapshotType, TokenBucket, Vsock, VsockOverride,
};
use crate::programs::{OLDEST, Version};

/// Sockets in the control directory, and their paths as the process knows them.
pub(crate) const API_SOCKET: &str = "api.sock";
pub(crate) const API_PATH: &str = "/control/api.sock";
pub(crate) const VSOCK_SOCKET: &str = "vsock.sock";
const VSOCK_PATH: &str = "/control/vsock.sock";

/// The card, and the device behind it in every network namespace.
const CARD: &str = "eth0";
const DEVICE: &str = "tap0";

/// The private disk.
const DISK: &str = "disk";

/// The guest's address on its vsock, the same in every VM: each has a host's end of its own.
const GUEST_CID: u32 = 3;

/// Seconds between the statistics that the guest sends of its own: each wakes it, and what the balloon holds is known without.
const STATS_INTERVAL: u32 = 300;

/// The kernel's command line.
///
/// `reboot=k` (the keyboard controller's reset) is the one way out of this machine, and `panic=-1` takes it at once; the
/// controller has nothing else (`i8042.*`), and there is no PCI. The console is kept for a panic's last words and is read
/// into a bounded buffer; `quiet` keeps everything else away from it. `extra` comes last and wins.
pub(crate) fn command_line(extra: &str) -> String {
    let mut line = format!(
        "console=ttyS0 8250.nr_uarts=1 reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd quiet audit=0 nowatchdog {}",
        guest_control::VSOCK_WORD
    );
    if !extra.trim().is_empty() {
        line.push(' ');
        line.push_str(extra.trim());
    }
    line
}

/// What describes a machine that is to be booted, but for its start.
pub(crate) fn describe(shape: Shape, extra_kernel_args: &str) -> Vec<Request> {
    let drive = |drive_id, file: JailName, is_read_only| {
        Request::PutDrive(Drive {
            drive_id,
            path_on_host: path(file),
            // guest-init mounts it; the kernel is told nothing.
            is_root_device: false,
            is_read_only,
            // The disk dies with the VM, so the guest's flushes need not reach the host's.
            cache_type: CacheType::Unsafe,
        })
    };
    vec![
        Request::PutMachineConfig(MachineConfig {
            vcpu_count: shape.vcpu,
            mem_size_mib: shape.memory_mb,
            smt: false,
        }),
        Request::PutBootSource(BootSource {
            kernel_image_path: path(JailName::Kernel),
            initrd_path: path(JailName::Initrd),
            boot_args: command_line(extra_kernel_args),
        }),
        // In this order they become /dev/vda and /dev/vdb.
        drive("root", JailName::Rootfs, true),
        drive(DISK, JailName::Disk, false),
        Request::PutNetworkInterface(NetworkInterface {
            iface_id: CARD,
            host_dev_name: DEVICE,
            guest_mac: GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":"),
        }),
        Request::PutVsock(Vsock {
            guest_cid: GUEST_CID,
            uds_path: VSOCK_PATH,
        }),
        Request::PutBalloon(Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: STATS_INTERVAL,
        }),
        Request::PutEntropy(Entropy {}),
    ]
}

/// What saves a stopped machine.
pub(crate) fn save() -> Request {
    Request::PutSnapshotCreate(SnapshotCreate {
        mem_file_path: path(JailName::Memory),
        snapshot_path: path(JailName::State),
        snapshot_type: SnapshotType::Full,
    })
}

/// What makes a clone and lets it run.
pub(crate) fn load(version: Version) -> Request {
    Request::PutSnapshotLoad(SnapshotLoad {
        snapshot_path: path(JailName::State),
        mem_backend: MemoryBackend {
            backend_type: BackendType::File,
            backend_path: path(JailName::Memory),
        },
        resume_vm: true,
        network_overrides: vec![NetworkOverride {
            iface_id: CARD,
            host_dev_name: DEVICE,
        }],
        vsock_override: (version >= OLDEST).then_some(VsockOverride {
            uds_path: VSOCK_PATH,
        }),
    })
}

/// What holds a clone to limits: nothing where there are none.
pub(crate) fn limit(limits: IoLimits) -> Vec<Request> {
    let bucket = |a_second: Option<u64>, unit: u64| {
        a_second.map(|amount| TokenBucket {
            size: amount.saturating_mul(unit),
            refill_time: 1000,
        })
    };
    let mut requests = Vec::new();
    if limits.disk_kib_s.is_some() || limits.disk_ops_s.is_some() {
        requests.push(Request::PatchDrive(DriveUpdate {
            drive_id: DISK,
            rate_limiter: RateLimiter {
                bandwidth: bucket(limits.disk_kib_s, 1024),
                ops: bucket(limits.disk_ops_s, 1),
            },
        }));
    }
    if limits.network_kib_s.is_some() {
        let each = RateLimiter {
            bandwidth: bucket(limits.network_kib_s, 1024),
            ops: None,
        };
        requests.push(Request::PatchNetworkInterface(NetworkInterfaceUpdate {
            iface_id: CARD,
            rx_rate_limiter: each,
            tx_rate_limiter: each,
        }));
    }
    requests
}

fn path(file: JailName) -> &'static str {
    // The process's working directory is its root.
    file.as_str()
}

/// The number of virtual CPUs that Firecracker accepts: 1, or an even number up to 32.
pub(crate) fn check(shape: Shape) -> Result<(), String> {
    let even = shape.vcpu.is_multiple_of(2) && (2..=32).contains(&shape.vcpu);
    if shape.vcpu == 1 || even {
        Ok(())
    } else {
        Err(format!(
            "Firecracker's VMs have 1, 2, 4 … or 32 virtual CPUs, and {} were asked for; change the profile's vcpu",
            shape.vcpu
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(vcpu: u32) -> Shape {
        Shape {
            vcpu,
            memory_mb: 512,
            disk_mb: 1024,
        }
    }

    #[test]
    fn further_kernel_arguments_come_last() {
        assert!(command_line("").ends_with(" vm0.control=vsock"));
        assert!(command_line(" noxsave ").ends_with(" vm0.control=vsock noxsave"));
    }

    #[test]
    fn an_older_version_is_not_sent_what_it_would_refuse() {
        let body = |version: &str| {
            let body = load(version.parse().unwrap()).body().unwrap().unwrap();
            serde_json::from_slice::<serde_json::Value>(&body).unwrap()
        };
        assert!(body("1.15.0").get("vsock_override").is_none());
        assert_eq!(
            body("1.16.1")["vsock_override"]["uds_path"],
            "/control/vsock.sock"
        );
    }

    #[test]
    fn limits_become_buckets_of_a_second_and_none_becomes_nothing() {
        assert!(limit(IoLimits::default()).is_empty());
        let limits = IoLimits {
            disk_kib_s: Some(2048),
            disk_ops_s: None,
            network_kib_s: Some(512),
        };
        let bodies: Vec<serde_json::Value> = limit(limits)
            .iter()
            .map(|request| serde_json::from_slice(&request.body().unwrap().unwrap()).unwrap())
            .collect();
        let bucket =
            |size: u64| serde_json::json!({"bandwidth": {"size": size, "refill_time": 1000}});
        assert_eq!(
            bodies,
            [
                serde_json::json!({"drive_id": "disk", "rate_limiter": bucket(2 << 20)}),
                serde_json::json!({
                    "iface_id": "eth0", "rx_rate_limiter": bucket(512 << 10), "tx_rate_limiter": bucket(512 << 10)
                }),
            ]
        );
    }

    #[test]
    fn odd_numbers_of_cpus_are_refused_before_they_are_asked_for() {
        for (vcpu, fine) in [
            (0, false),
            (1, true),
            (2, true),
            (3, false),
            (32, true),
            (34, false),
        ] {
            assert_eq!(check(shape(vcpu)).is_ok(), fine, "{vcpu}");
        }
    }

    #[test]
    fn the_root_file_system_is_the_first_drive_and_read_only() {
        let drives: Vec<_> = describe(shape(1), "")
            .into_iter()
            .filter_map(|request| match request {
                Request::PutDrive(drive) => Some((drive.path_on_host, drive.is_read_only)),
                _ => None,
            })
            .collect();
        assert_eq!(drives, [("rootfs", true), ("disk", false)]);
    }
}
