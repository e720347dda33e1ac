//! The command line: everything the guest can see of its machine.
//!
//! A clone is restored into a machine that must equal the template's to the last device, so one function makes both
//! lines and only the memory's sharing and `-incoming` differ. Files arrive as inherited descriptors under fixed
//! numbers: the process sees no path of the home, and the line is the same for every VM of a template.

use std::ffi::OsString;

use sandbox::Shape;

/// Descriptor numbers in the QEMU process.
pub(crate) mod fd {
    /// QMP monitor, a socketpair end. Its end of file is the process's death notice.
    pub(crate) const QMP: i32 = 3;
    /// The agent port, a socketpair end.
    pub(crate) const AGENT: i32 = 4;
    /// The serial console, a socketpair end: a full one never blocks QEMU, as a pipe or a file would.
    pub(crate) const CONSOLE: i32 = 5;
    /// Guest memory, a memfd.
    pub(crate) const RAM: i32 = 6;
    /// Kernel.
    pub(crate) const KERNEL: i32 = 7;
    /// Initramfs.
    pub(crate) const INITRD: i32 = 8;
    /// Root file system, read-only.
    pub(crate) const ROOTFS: i32 = 9;
    /// The private disk for reading and writing.
    pub(crate) const DISK_RW: i32 = 10;
    /// The same disk opened read-only: QEMU opens a disk that way until the incoming state is loaded.
    pub(crate) const DISK_RO: i32 = 11;
    /// Device state that a clone is restored from.
    pub(crate) const STATE: i32 = 12;
    /// The tap behind the network card.
    pub(crate) const TAP: i32 = 13;
}

/// Name of the virtio-serial port that carries guest-control.
const AGENT_PORT: &str = "agent";

/// Translated-code cache of one VM under emulation, MiB. Without a limit it grows to about 1 GiB a VM; 64 MiB runs
/// the same workloads at the same speed.
pub(crate) const TB_SIZE_MB: u32 = 64;

/// Instruction set of host and guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// `qemu-system-x86_64 -M microvm`.
    X86_64,
    /// `qemu-system-aarch64 -M virt`.
    Aarch64,
}

impl Arch {
    /// This host's, if the engine knows it.
    pub fn of_host() -> Option<Arch> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Arch::X86_64),
            "aarch64" => Some(Arch::Aarch64),
            _ => None,
        }
    }

    /// Name of the QEMU program.
    pub fn program(self) -> &'static str {
        match self {
            Arch::X86_64 => "qemu-system-x86_64",
            Arch::Aarch64 => "qemu-system-aarch64",
        }
    }
}

/// How the virtual CPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Software emulation.
    Tcg,
    /// Hardware virtualization.
    Kvm,
}

/// Which of the two lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Boot the kernel; memory is written through to its memfd.
    Boot,
    /// Wait for `migrate-incoming`; memory is a private copy of the memfd.
    Clone,
}

/// The machine a guest sees.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) arch: Arch,
    pub(crate) accel: Accel,
    pub(crate) shape: Shape,
    /// Frequency of the time stamp counter that the guest is told instead of calibrating it; x86_64 emulation only.
    pub(crate) tsc_khz: Option<u32>,
}

impl Machine {
    /// The machine type with its options.
    pub(crate) fn machine_type(&self) -> &'static str {
        match self.arch {
            // The RTC is what a cold boot takes its date from.
            Arch::X86_64 => "microvm,rtc=on",
            Arch::Aarch64 => "virt,gic-version=3",
        }
    }

    /// The CPU model.
    pub(crate) fn cpu(&self) -> &'static str {
        match self.accel {
            // Without "enhanced" and "fast short" `rep movsb`: they promise that copying by bytes is fast, the guest's kernel
            // believes it for every page it copies or clears, and emulation then takes one step a byte. Eight bytes a
            // step: output of a guest process 3 times as fast, writing files 2 to 3 times.
            Accel::Tcg if self.arch == Arch::X86_64 => "max,-erms,-fsrm",
            Accel::Tcg => "max",
            Accel::Kvm => "host",
        }
    }

    fn accel(&self) -> String {
        match self.accel {
            Accel::Tcg => format!("tcg,thread=multi,tb-size={TB_SIZE_MB}"),
            Accel::Kvm => "kvm".to_owned(),
        }
    }

    /// A device at the `place`th transport. Left to itself `virt` fills its transports from the last to the first, and the
    /// guest, which finds them from the first to the last, would call the root's disk `vdb`.
    fn virtio(&self, place: u32, device: &str) -> String {
        match self.arch {
            Arch::X86_64 => device.to_owned(),
            Arch::Aarch64 => format!("{device},bus=virtio-mmio-bus.{place}"),
        }
    }

    /// The kernel's command line.
    ///
    /// `panic=-1` with a reset that QEMU turns into an exit (`-no-reboot`) makes a guest panic end the VM at once.
    /// Without `tsc_early_khz` a boot under host load hangs calibrating; without `tsc=reliable` a template booted
    /// under load marks its counter unstable and every clone drifts. `norandmaps` lets emulation reuse translated
    /// code between runs of a program (120 → 18 ms a job); address randomisation inside the guest is the price, so
    /// never under KVM.
    pub(crate) fn append(&self) -> String {
        let mut line = String::new();
        line.push_str(match self.arch {
            Arch::X86_64 => "console=ttyS0 8250.nr_uarts=1 reboot=t",
            Arch::Aarch64 => "console=ttyAMA0",
        });
        line.push_str(" panic=-1 quiet nokaslr mitigations=off audit=0 nowatchdog");
        if self.accel == Accel::Tcg {
            line.push_str(" norandmaps");
        }
        if let Some(khz) = self.tsc_khz {
            // Delay loops: jiffies at 250 Hz, so lpj is cycles per 4 ms.
            let lpj = u64::from(khz) * 4;
            line.push_str(&format!(
                " no_timer_check tsc_early_khz={khz} tsc=reliable lpj={lpj}"
            ));
        }
        line
    }

    /// The whole command line.
    pub(crate) fn args(&self, start: Start) -> Vec<OsString> {
        let share = match start {
            Start::Boot => "on",
            Start::Clone => "off",
        };
        let mut line = Line::default();
        line.flag("-nodefaults")
            .flag("-no-user-config")
            .flag("-no-reboot")
            .opt("-display", "none")
            .opt(
                "-sandbox",
                "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            )
            .opt(
                "-machine",
                format!("{},memory-backend=ram", self.machine_type()),
            )
            .opt("-accel", self.accel())
            .opt("-cpu", self.cpu())
            .opt("-smp", self.shape.vcpu.to_string())
            .opt("-m", format!("{}M", self.shape.memory_mb))
            .opt(
                "-object",
                format!(
                    "memory-backend-file,id=ram,size={}M,mem-path=/proc/self/fd/{},share={share},prealloc=off",
                    self.shape.memory_mb,
                    fd::RAM
                ),
            )
            .opt("-chardev", format!("socket,id=qmp,fd={}", fd::QMP))
            .opt("-mon", "chardev=qmp,mode=control")
            .opt("-chardev", format!("socket,id=console,fd={}", fd::CONSOLE))
            .opt("-serial", "chardev:console")
            .opt("-kernel", format!("/proc/self/fd/{}", fd::KERNEL))
            .opt("-initrd", format!("/proc/self/fd/{}", fd::INITRD))
            .opt("-append", self.append())
            // Descriptor sets: QEMU picks the member whose access mode it wants. Locks are off because all VMs of a
            // profile hold the same root file, and because a lock would need the file to be opened anew.
            .opt("-add-fd", format!("fd={},set=1", fd::ROOTFS))
            .opt(
                "-drive",
                "id=root,if=none,format=raw,readonly=on,file.filename=/dev/fdset/1,file.locking=off",
            )
            .opt("-device", self.virtio(0, "virtio-blk-device,drive=root,id=vda"))
            .opt("-add-fd", format!("fd={},set=2", fd::DISK_RW))
            .opt("-add-fd", format!("fd={},set=2", fd::DISK_RO))
            // The disk dies with the VM, so the guest's flushes need not reach the host's disk.
            .opt(
                "-drive",
                "id=disk,if=none,format=raw,cache=unsafe,file.filename=/dev/fdset/2,file.locking=off",
            )
            // A write that finds no room on the host fails in the guest, as under Firecracker. Left alone, QEMU stops the
            // VM there, and its job would hang until its limit of time.
            .opt(
                "-device",
                self.virtio(1, "virtio-blk-device,drive=disk,id=vdb,werror=report"),
            )
            .opt("-device", self.virtio(2, "virtio-rng-device"))
            .opt("-netdev", format!("tap,id=net,fd={}", fd::TAP))
            .opt(
                "-device",
                self.virtio(
                    3,
                    &format!("virtio-net-device,netdev=net,mac={}", mac(host::net::GUEST_MAC)),
                ),
            )
            .opt("-chardev", format!("socket,id=agent,fd={}", fd::AGENT))
            .opt("-device", self.virtio(4, "virtio-serial-device"))
            .opt(
                "-device",
                // With an id QEMU says when the guest opens and closes it.
                format!("virtserialport,chardev=agent,name={AGENT_PORT},id={AGENT_PORT}"),
            );
        if start == Start::Clone {
            line.opt("-incoming", "defer");
        }
        line.0
    }
}

fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

/// A command line in the making.
#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn opt(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(arch: Arch, accel: Accel) -> Machine {
        Machine {
            arch,
            accel,
            shape: Shape {
                vcpu: 2,
                memory_mb: 2048,
                disk_mb: 4096,
            },
            tsc_khz: (arch == Arch::X86_64 && accel == Accel::Tcg).then_some(2_000_000),
        }
    }

    fn text(machine: &Machine, start: Start) -> String {
        machine
            .args(start)
            .iter()
            .map(|arg| arg.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn template_and_clone_differ_only_in_sharing_and_incoming() {
        for arch in [Arch::X86_64, Arch::Aarch64] {
            let machine = machine(arch, Accel::Tcg);
            let boot = text(&machine, Start::Boot);
            let clone = text(&machine, Start::Clone);
            assert_eq!(
                boot.replace("share=on", "share=off") + " -incoming defer",
                clone
            );
        }
    }

    #[test]
    fn emulation_on_x86_64_is_told_its_clock_and_may_reuse_translated_code() {
        let line = machine(Arch::X86_64, Accel::Tcg).append();
        assert!(line.contains("tsc_early_khz=2000000 tsc=reliable lpj=8000000"));
        assert!(line.contains(" norandmaps"));
        let text = text(&machine(Arch::X86_64, Accel::Tcg), Start::Clone);
        assert!(
            text.contains(
                "-accel tcg,thread=multi,tb-size=64 -cpu max,-erms,-fsrm -smp 2 -m 2048M"
            )
        );
    }

    #[test]
    fn kvm_keeps_address_randomisation_and_its_own_clock() {
        let machine = machine(Arch::X86_64, Accel::Kvm);
        assert!(!machine.append().contains("norandmaps"));
        assert!(!machine.append().contains("tsc"));
        assert!(text(&machine, Start::Boot).contains("-accel kvm -cpu host"));
    }

    #[test]
    fn aarch64_uses_the_virt_machine_and_its_own_console() {
        let machine = machine(Arch::Aarch64, Accel::Tcg);
        assert!(machine.append().starts_with("console=ttyAMA0 "));
        assert!(!machine.append().contains("tsc"));
        let text = text(&machine, Start::Boot);
        assert!(text.contains("-machine virt,gic-version=3,memory-backend=ram -accel tcg"));
        assert!(
            text.contains("drive=root,id=vda,bus=virtio-mmio-bus.0 "),
            "{text}"
        );
    }

    #[test]
    fn there_is_one_network_card_no_balloon_and_no_path_of_the_home() {
        for start in [Start::Boot, Start::Clone] {
            let text = text(&machine(Arch::X86_64, Accel::Tcg), start);
            let card = "-netdev tap,id=net,fd=13 -device virtio-net-device,netdev=net,mac=02:76:6d:30:00:02";
            assert!(text.contains(card), "{text}");
            for word in ["script", "helper", "balloon", "vhost", "/home", "free-page"] {
                assert!(!text.contains(word), "{word} in {text}");
            }
            assert!(text.contains("spawn=deny"));
        }
    }
}
