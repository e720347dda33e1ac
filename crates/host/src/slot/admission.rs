//! Whether one more reservation fits: a pure function of what is held.

use std::collections::BTreeMap;

use super::{HostLimits, HostUsage, LeaseKind, Resources, SlotRecord};

/// Whether `wanted` may be held beside `held`.
///
/// Only firm reservations are counted and only firm ones are refused: a revocable one is given back when the room is
/// wanted. Where nothing firm is held on the host a firm one is admitted whatever its size, so that one job always
/// runs. Refusal returns what is held.
pub fn admit<'a>(
    held: impl IntoIterator<Item = &'a SlotRecord>,
    wanted: &SlotRecord,
    limits: &HostLimits,
) -> Result<(), HostUsage> {
    let usage = HostUsage::of(held, &wanted.instance);
    if wanted.kind == LeaseKind::Revocable || usage.firm_count == 0 {
        return Ok(());
    }
    let sum = usage.firm + wanted.resources;
    if sum.fits_in(limits.total) {
        Ok(())
    } else {
        Err(usage)
    }
}

impl Resources {
    /// Whether it is no more than `total` in any dimension.
    pub fn fits_in(self, total: Resources) -> bool {
        self.vcpu <= total.vcpu
            && self.memory_mb <= total.memory_mb
            && self.disk_mb <= total.disk_mb
    }
}

impl HostUsage {
    /// The sum of these records as one instance sees it, whose limits leave out what itself has taken once.
    pub fn of<'a>(held: impl IntoIterator<Item = &'a SlotRecord>, instance: &str) -> HostUsage {
        let mut usage = HostUsage::default();
        let mut shared: BTreeMap<&str, u64> = BTreeMap::new();
        for record in held {
            if record.instance != instance {
                let most = shared.entry(&record.instance).or_default();
                *most = record.shared_mb.max(*most);
            }
            let (sum, count) = match record.kind {
                LeaseKind::Firm => (&mut usage.firm, &mut usage.firm_count),
                LeaseKind::Revocable => (&mut usage.revocable, &mut usage.revocable_count),
            };
            *sum = *sum + record.resources;
            *count = count.saturating_add(1);
        }
        for most in shared.into_values() {
            usage.firm.memory_mb = usage.firm.memory_mb.saturating_add(most);
        }
        usage
    }
}

/// Saturating, dimension by dimension.
impl std::ops::Add for Resources {
    type Output = Resources;
    fn add(self, other: Resources) -> Resources {
        Resources {
            vcpu: self.vcpu.saturating_add(other.vcpu),
            memory_mb: self.memory_mb.saturating_add(other.memory_mb),
            disk_mb: self.disk_mb.saturating_add(other.disk_mb),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: LeaseKind, vcpu: u32, memory_mb: u64, disk_mb: u64) -> SlotRecord {
        SlotRecord {
            instance: "i".to_owned(),
            kind,
            resources: Resources {
                vcpu,
                memory_mb,
                disk_mb,
            },
            run_id: None,
            shared_mb: 0,
        }
    }

    #[test]
    fn only_firm_reservations_are_counted_and_the_first_always_fits() {
        use LeaseKind::{Firm, Revocable};
        let limits = HostLimits {
            total: Resources {
                vcpu: 4,
                memory_mb: 4096,
                disk_mb: 1000,
            },
        };
        let vm = |kind| record(kind, 2, 2048, 500);
        let none: Vec<SlotRecord> = Vec::new();
        let table = [
            ("nothing held", none.clone(), vm(Firm), true),
            (
                "nothing held, larger than the host",
                none.clone(),
                record(Firm, 64, 1 << 20, 1 << 30),
                true,
            ),
            ("exactly full", vec![vm(Firm)], vm(Firm), true),
            ("one too many", vec![vm(Firm), vm(Firm)], vm(Firm), false),
            ("vcpu alone", vec![vm(Firm)], record(Firm, 3, 1, 1), false),
            (
                "memory alone",
                vec![vm(Firm)],
                record(Firm, 1, 2049, 1),
                false,
            ),
            ("disk alone", vec![vm(Firm)], record(Firm, 1, 1, 501), false),
            (
                "revocable ones are not counted",
                vec![vm(Revocable), vm(Revocable), vm(Revocable), vm(Firm)],
                vm(Firm),
                true,
            ),
            (
                "only revocable ones held, larger than the host",
                vec![vm(Revocable)],
                record(Firm, 64, 1, 1),
                true,
            ),
            (
                "a revocable one is never refused",
                vec![vm(Firm), vm(Firm)],
                vm(Revocable),
                true,
            ),
            (
                "sums saturate",
                vec![record(Firm, 1, u64::MAX, 1)],
                record(Firm, 1, u64::MAX, 1),
                false,
            ),
        ];
        for (name, held, wanted, admitted) in table {
            assert_eq!(admit(&held, &wanted, &limits).is_ok(), admitted, "{name}");
        }
    }

    #[test]
    fn usage_sums_each_kind() {
        let held = [
            record(LeaseKind::Firm, 2, 20, 200),
            record(LeaseKind::Revocable, 1, 10, 100),
            record(LeaseKind::Revocable, 1, 10, 100),
        ];
        let usage = HostUsage::of(&held, "i");
        assert_eq!((usage.firm_count, usage.revocable_count), (1, 2));
        assert_eq!(usage.firm.memory_mb, 20);
        assert_eq!(usage.revocable.disk_mb, 200);
    }

    #[test]
    fn what_other_runners_have_taken_once_is_counted_once_for_each() {
        let of = |instance: &str, shared_mb: u64| SlotRecord {
            instance: instance.to_owned(),
            shared_mb,
            ..record(LeaseKind::Firm, 1, 100, 1)
        };
        let held = [of("a", 1000), of("b", 500), of("b", 600), of("c", 0)];
        let seen_by = |instance: &str| HostUsage::of(&held, instance).firm.memory_mb;
        assert_eq!(seen_by("a"), 400 + 600);
        assert_eq!(seen_by("b"), 400 + 1000);
        assert_eq!(seen_by("none of them"), 400 + 1600);
        let limits = |memory_mb| HostLimits {
            total: Resources {
                vcpu: 9,
                memory_mb,
                disk_mb: 9,
            },
        };
        assert!(admit(&held, &of("a", 1000), &limits(1100)).is_ok());
        assert!(admit(&held, &of("b", 600), &limits(1100)).is_err());
    }
}
