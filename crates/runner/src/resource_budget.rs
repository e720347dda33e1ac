//! Admission: how many jobs this host carries.
//!
//! Effective resources are the host's times `concurrency_factor`. A job takes a *firm* lease before it is claimed, of
//! its profile's size and what the engine takes beside it ([`of_vm`]); warm and idle VMs hold *revocable* ones.
//! Admission counts firm leases only, over every runner of the host (they are flocks, see `host::slot`), and the first
//! job is always admitted. When firm and revocable leases together are more than the host has, the least recently used
//! revocable ones are given up ([`to_revoke`]).
//!
//! A [`Lease`] is the only way to hold a slot: it cannot leak, because dropping it releases the slot, and it cannot
//! be released twice, because releasing it consumes it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use host::launcher::{Launcher, LauncherError};
use host::net::{Network, NetworkPool};
use host::slot::{HostLimits, HostUsage, LeaseKind, Resources, SlotId, SlotRecord};
use sandbox::{Shape, Template};
use tokio::sync::mpsc;

use crate::host_size::HostSize;
use crate::names::{ProfileName, RunId};

/// What a VM takes of the host, and its job reserves: its profile's CPUs, memory and disk, and beside its memory what
/// the engine's process may take for itself.
pub(crate) fn of_vm(shape: Shape, overhead_mb: u64) -> Resources {
    Resources {
        vcpu: shape.vcpu,
        memory_mb: shape.memory_mb.saturating_add(overhead_mb),
        disk_mb: shape.disk_mb,
    }
}

/// What a VM of each of these profiles takes.
pub(crate) fn of_profiles(
    templates: &BTreeMap<ProfileName, Arc<dyn Template>>,
) -> impl Iterator<Item = (ProfileName, Resources)> {
    templates.iter().map(|(name, template)| {
        let takes = of_vm(template.shape(), template.overhead_mb());
        (name.clone(), takes)
    })
}

/// What a warm or idle VM takes: it is paused, so no CPU.
fn paused(resources: Resources) -> Resources {
    Resources {
        vcpu: 0,
        ..resources
    }
}

/// Floor of `value * factor`, saturating. The factor is finite and above 0 (`runner.yaml` is checked for it).
fn scaled(value: u64, factor: f64) -> u64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts of CPUs and MiB are far below 2^52, and a float cast saturates"
    )]
    let scaled = (value as f64 * factor).floor() as u64;
    scaled
}

/// What jobs may take of the host: (host − reserve) × factor, rounded down.
///
/// `reserve_mb` is kept for the host itself, `resident_mb` is what opened templates take once.
pub(crate) fn effective(
    host: HostSize,
    factor: f64,
    reserve_mb: u64,
    resident_mb: u64,
) -> HostLimits {
    let memory_mb = host
        .memory_mb
        .saturating_sub(reserve_mb)
        .saturating_sub(resident_mb);
    HostLimits {
        total: Resources {
            vcpu: u32::try_from(scaled(u64::from(host.vcpu), factor)).unwrap_or(u32::MAX),
            memory_mb: scaled(memory_mb, factor),
            disk_mb: scaled(host.disk_mb, factor),
        },
    }
}

/// How many jobs of the smallest profile fit at once, at least 1: `status.json` shows it as `max_concurrent`.
pub(crate) fn estimated_capacity(
    limits: HostLimits,
    profiles: impl IntoIterator<Item = Resources>,
    max_concurrent: u32,
) -> u32 {
    let fits = |of: Resources| {
        let by_vcpu = limits.total.vcpu.checked_div(of.vcpu);
        let by_memory = limits.total.memory_mb.checked_div(of.memory_mb);
        let by_disk = limits.total.disk_mb.checked_div(of.disk_mb);
        let clamp = |n: Option<u64>| u32::try_from(n.unwrap_or(u64::MAX)).unwrap_or(u32::MAX);
        by_vcpu
            .unwrap_or(u32::MAX)
            .min(clamp(by_memory))
            .min(clamp(by_disk))
    };
    let most = profiles.into_iter().map(fits).max().unwrap_or(0);
    let capped = if max_concurrent == 0 {
        most
    } else {
        most.min(max_concurrent)
    };
    capped.max(1)
}

/// Whether `a` stays within `b` in every dimension.
fn within(a: Resources, b: Resources) -> bool {
    a.vcpu <= b.vcpu && a.memory_mb <= b.memory_mb && a.disk_mb <= b.disk_mb
}

/// Which of our revocable leases to give up so that everything held fits the host: the least recently used first
/// (`lru` is in that order), as few as possible. All of them, where even that is not enough (the first job is
/// admitted whatever its size).
pub(crate) fn to_revoke(
    usage: HostUsage,
    limits: HostLimits,
    lru: &[(SlotId, Resources)],
) -> Vec<SlotId> {
    // Firm leases alone may exceed the CPUs (the first job's); paused VMs take none and giving them up gains none.
    let mut held = paused(usage.firm + usage.revocable);
    let mut revoked = Vec::new();
    for (slot, resources) in lru {
        if within(held, limits.total) {
            break;
        }
        held = Resources {
            vcpu: held.vcpu.saturating_sub(resources.vcpu),
            memory_mb: held.memory_mb.saturating_sub(resources.memory_mb),
            disk_mb: held.disk_mb.saturating_sub(resources.disk_mb),
        };
        revoked.push(*slot);
    }
    revoked
}

/// The runner's hand on the host's budget. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    launcher: Launcher,
    instance: String,
    limits: HostLimits,
    /// What the limits leave out for templates and proxies, MiB.
    shared_mb: u64,
    /// Most jobs of this runner at once; `u32::MAX` without a cap.
    max_concurrent: u32,
    /// Firm leases of this runner.
    firm: AtomicU32,
    /// Where the networks of VMs come from; VMs have none without it.
    networks: Option<NetworkPool>,
    /// Slots whose lease was dropped, with their networks; the release task works them off.
    dropped: mpsc::UnboundedSender<(SlotId, Option<Network>)>,
}

/// One of the runner's places among `max_concurrent`, given back on drop.
#[derive(Debug)]
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let mut held = shared.firm.load(Ordering::Acquire);
        while held < shared.max_concurrent {
            let taken = shared.firm.compare_exchange(
                held,
                held.saturating_add(1),
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match taken {
                Ok(_) => return Some(Self(Arc::clone(shared))),
                Err(other) => held = other,
            }
        }
        None
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.firm.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Budget {
    /// `max_concurrent` 0 means no cap on the number of jobs; `shared_mb` is what `limits` leave out for what we have taken
    /// once, and what other runners of the host reckon with while we hold anything. Spawns the task that releases dropped leases on the
    /// current runtime; it ends with the last clone and the last lease.
    pub(crate) fn new(
        launcher: Launcher,
        instance: String,
        limits: HostLimits,
        shared_mb: u64,
        max_concurrent: u32,
        networks: Option<NetworkPool>,
    ) -> Self {
        let (dropped, mut to_release) = mpsc::unbounded_channel::<(SlotId, Option<Network>)>();
        let releasing = launcher.clone();
        tokio::spawn(async move {
            while let Some((slot, network)) = to_release.recv().await {
                if let Err(error) = releasing.release(slot).await {
                    tracing::error!(slot = slot.0, %error, "a slot could not be released");
                }
                // Only now, when nobody is in it.
                drop(network);
            }
        });
        Self {
            shared: Arc::new(Shared {
                launcher,
                instance,
                limits,
                shared_mb,
                max_concurrent: if max_concurrent == 0 {
                    u32::MAX
                } else {
                    max_concurrent
                },
                firm: AtomicU32::new(0),
                networks,
                dropped,
            }),
        }
    }

    /// The limits admission goes by.
    pub(crate) fn limits(&self) -> HostLimits {
        self.shared.limits
    }

    /// What all runners of the host hold now.
    pub(crate) async fn usage(&self) -> Result<HostUsage, LauncherError> {
        self.shared.launcher.usage().await
    }

    /// Takes a lease, or says with `None` that there is no room for it now. A revocable one is refused as well
    /// when it would not fit beside everything held: warm VMs never push anybody out.
    pub(crate) async fn try_reserve(
        &self,
        resources: Resources,
        kind: LeaseKind,
        run: Option<RunId>,
    ) -> Result<Option<Lease>, LauncherError> {
        let place = match kind {
            LeaseKind::Firm => match Place::take(&self.shared) {
                Some(place) => Some(place),
                None => return Ok(None),
            },
            LeaseKind::Revocable => {
                let usage = self.usage().await?;
                let wanted = usage.firm + usage.revocable + paused(resources);
                if !within(paused(wanted), self.limits().total) {
                    return Ok(None);
                }
                None
            }
        };
        let record = self.shared.record(resources, kind, run);
        let mut lease = match self.shared.launcher.reserve(record, self.limits()).await {
            Ok(slot) => Lease {
                slot,
                network: None,
                resources,
                place,
                shared: Some(Arc::clone(&self.shared)),
            },
            Err(LauncherError::NoRoom(_) | LauncherError::NoSlot(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        if let Some(networks) = &self.shared.networks {
            lease.network = Some(networks.take().await?);
        }
        Ok(Some(lease))
    }
}

impl Shared {
    fn record(&self, resources: Resources, kind: LeaseKind, run: Option<RunId>) -> SlotRecord {
        SlotRecord {
            instance: self.instance.clone(),
            kind,
            resources: match kind {
                LeaseKind::Firm => resources,
                LeaseKind::Revocable => paused(resources),
            },
            run_id: run.map(|run| run.to_string()),
            shared_mb: self.shared_mb,
        }
    }
}

/// A held slot and what it takes of the host. Dropping it kills what runs in the slot and gives it back.
#[derive(Debug)]
pub(crate) struct Lease {
    slot: SlotId,
    network: Option<Network>,
    resources: Resources,
    place: Option<Place>,
    /// `None` once released.
    shared: Option<Arc<Shared>>,
}

impl Lease {
    /// The slot.
    pub(crate) fn slot(&self) -> SlotId {
        self.slot
    }

    /// Where the VM of this lease goes.
    pub(crate) fn vm_place(&self) -> sandbox::Place {
        sandbox::Place {
            slot: self.slot,
            network: self.network.as_ref().map(Network::id),
        }
    }

    /// Turns a warm or idle VM's lease into a job's. `false`: no room for one more job now; nothing changed.
    pub(crate) async fn make_firm(&mut self, run: RunId) -> Result<bool, LauncherError> {
        let Some(shared) = &self.shared else {
            return Ok(false);
        };
        let place = match self.place.take() {
            Some(place) => place,
            None => match Place::take(shared) {
                Some(place) => place,
                None => return Ok(false),
            },
        };
        let record = shared.record(self.resources, LeaseKind::Firm, Some(run));
        match shared
            .launcher
            .update(self.slot, record, shared.limits)
            .await
        {
            Ok(()) => {
                self.place = Some(place);
                Ok(true)
            }
            Err(LauncherError::NoRoom(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Turns a job's lease into a parked VM's.
    pub(crate) async fn make_revocable(&mut self) -> Result<(), LauncherError> {
        let Some(shared) = &self.shared else {
            return Ok(());
        };
        let record = shared.record(self.resources, LeaseKind::Revocable, None);
        shared
            .launcher
            .update(self.slot, record, shared.limits)
            .await?;
        self.place = None;
        Ok(())
    }

    /// Gives it back; when this returns whatever ran in the slot is reaped.
    pub(crate) async fn release(mut self) -> Result<(), LauncherError> {
        match self.shared.take() {
            // Place and network are kept until the slot is free: dropped with `self`, after the release.
            Some(shared) => shared.launcher.release(self.slot).await,
            None => Ok(()),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            // The receiver lives as long as any lease or budget; a refusal means the runtime is gone, and with it
            // the launcher, whose end frees every slot.
            let _ = shared.dropped.send((self.slot, self.network.take()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostSize = HostSize {
        vcpu: 16,
        memory_mb: 32 * 1024,
        disk_mb: 400 * 1024,
    };
    const DEFAULT: Shape = Shape {
        vcpu: 2,
        memory_mb: 2048,
        disk_mb: 8192,
    };
    /// What the engine takes beside a VM's memory: under emulation, and with KVM.
    const OVERHEADS: [u64; 2] = [160, 96];

    fn limits(vcpu: u32, memory_mb: u64, disk_mb: u64) -> HostLimits {
        HostLimits {
            total: Resources {
                vcpu,
                memory_mb,
                disk_mb,
            },
        }
    }

    #[test]
    fn a_host_of_16_cpus_and_32_gb_runs_8_default_vms() {
        for (factor, cap, expected) in [
            (1.0, 0, 8),
            (2.0, 0, 16),
            (0.5, 0, 4),
            (1.0, 3, 3),
            (0.01, 0, 1),
        ] {
            let limits = effective(HOST, factor, 512, DEFAULT.memory_mb);
            for overhead in OVERHEADS {
                assert_eq!(
                    estimated_capacity(limits, [of_vm(DEFAULT, overhead)], cap),
                    expected,
                    "factor {factor}, max_concurrent {cap}, overhead {overhead}"
                );
            }
        }
    }

    #[test]
    fn where_memory_binds_the_engine_s_own_is_counted_for_every_vm() {
        // (the host's MiB, the engine's for a VM, how many default VMs): 512 MiB are kept, 2048 hold the template.
        for (memory_mb, overhead_mb, expected) in [
            (20_224, 0, 8),
            (20_224, 96, 8),
            (20_224, 160, 8),
            (20_223, 160, 7),
            (18_944, 0, 8),
            (18_944, 160, 7),
            (4_768, 160, 1),
        ] {
            let host = HostSize {
                vcpu: 64,
                memory_mb,
                disk_mb: HOST.disk_mb,
            };
            let limits = effective(host, 1.0, 512, DEFAULT.memory_mb);
            let vm = of_vm(DEFAULT, overhead_mb);
            let fit = estimated_capacity(limits, [vm], 0);
            assert_eq!(fit, expected, "{memory_mb} MiB, {overhead_mb} each");
            // What is promised is there: every VM at its limit, the template and the reserve fit the host.
            let taken = u64::from(fit) * vm.memory_mb + DEFAULT.memory_mb + 512;
            assert!(taken <= memory_mb, "{taken} of {memory_mb}");
        }
    }

    #[test]
    fn the_factor_rounds_down_and_the_reserve_comes_off_first() {
        let host = HostSize {
            vcpu: 3,
            memory_mb: 1001,
            disk_mb: 101,
        };
        assert_eq!(effective(host, 1.5, 0, 0), limits(4, 1501, 151));
        assert_eq!(effective(host, 0.5, 100, 1), limits(1, 450, 50));
        assert_eq!(effective(host, 1.0, 5000, 0), limits(3, 0, 101));
    }

    #[test]
    fn as_few_revocable_leases_as_possible_go_and_the_least_recently_used_first() {
        let small = Resources {
            vcpu: 1,
            memory_mb: 256,
            disk_mb: 0,
        };
        let lru: Vec<_> = (0..4).map(|n| (SlotId(n), small)).collect();
        let usage = |firm: u32| HostUsage {
            firm: Resources {
                vcpu: firm,
                memory_mb: u64::from(firm) * 256,
                disk_mb: 0,
            },
            firm_count: firm,
            revocable: Resources {
                vcpu: 0,
                memory_mb: 1024,
                disk_mb: 0,
            },
            revocable_count: 4,
        };
        let host = limits(2, 6 * 256, 1 << 20);
        for (firm, expected) in [(0, 0), (2, 0), (3, 1), (5, 3), (6, 4), (9, 4)] {
            let revoked = to_revoke(usage(firm), host, &lru);
            let slots: Vec<u16> = revoked.iter().map(|slot| slot.0).collect();
            assert_eq!(slots, (0..expected).collect::<Vec<u16>>(), "{firm} firm");
        }
    }
}
