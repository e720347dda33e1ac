//! Whether this machine's processor is software.

/// What software emulation by QEMU puts into CPUID's hypervisor leaf.
#[cfg(target_arch = "x86_64")]
const TCG_SIGNATURE: [u8; 12] = *b"TCGTCGTCGTCG";

/// Whether QEMU emulates this processor. Other emulators, and emulated processors without CPUID, are not recognised.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_emulated() -> bool {
    use std::arch::x86_64::__cpuid;

    /// Leaf 1, ECX bit 31: there is a hypervisor, and with it the leaf of its signature.
    const HYPERVISOR: u32 = 1 << 31;

    if __cpuid(1).ecx & HYPERVISOR == 0 {
        return false;
    }
    let leaf = __cpuid(0x4000_0000);
    signature(leaf.ebx, leaf.ecx, leaf.edx) == TCG_SIGNATURE
}

/// Whether QEMU emulates this processor: cannot be told here.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn is_emulated() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
fn signature(ebx: u32, ecx: u32, edx: u32) -> [u8; 12] {
    let mut text = [0; 12];
    let bytes = [ebx, ecx, edx].into_iter().flat_map(u32::to_le_bytes);
    text.iter_mut()
        .zip(bytes)
        .for_each(|(place, byte)| *place = byte);
    text
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_read_in_cpuids_order() {
        assert_eq!(
            signature(0x5447_4354, 0x4354_4743, 0x4743_5447),
            TCG_SIGNATURE
        );
        // KVM's, which a VM on hardware shows.
        assert_ne!(signature(0x4b4d_564b, 0x564b_4d56, 0x4d), TCG_SIGNATURE);
    }
}
