//! What this host has of QEMU and KVM.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::machine::Arch;

/// Findings about this host, for the choice of an engine and for `doctor`.
#[derive(Clone, Debug)]
pub struct Findings {
    /// The QEMU program, or one sentence why there is none to use.
    pub qemu: Result<Qemu, String>,
    /// What `/dev/kvm` is.
    pub kvm: Kvm,
}

/// A QEMU program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// Absolute path.
    pub path: PathBuf,
    /// Its version with the distribution's, part of every snapshot's key.
    pub version: String,
}

/// What `/dev/kvm` is. Even [`Kvm::Hardware`] is only a reason to try a boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kvm {
    /// It does not exist.
    Missing,
    /// It cannot be opened: the system's words.
    Denied(String),
    /// It opens, but the CPU has no virtualization extensions: a paravirtual KVM that runs only kernels built for it.
    NotHardware,
    /// It opens and the CPU has the extensions.
    Hardware,
}

impl fmt::Display for Kvm {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kvm::Missing => formatter.write_str("there is no /dev/kvm"),
            Kvm::Denied(why) => write!(formatter, "/dev/kvm cannot be opened: {why}"),
            Kvm::NotHardware => formatter.write_str(
                "/dev/kvm opens, but this CPU has no virtualization extensions (vmx or svm): it is a KVM without \
                 hardware support, which cannot run a distribution's kernel",
            ),
            Kvm::Hardware => formatter.write_str("/dev/kvm is backed by the CPU's virtualization extensions"),
        }
    }
}

impl Kvm {
    /// Looks.
    pub fn of_host() -> Kvm {
        let device = Path::new("/dev/kvm");
        if let Err(error) = File::options().read(true).write(true).open(device) {
            return match error.kind() {
                std::io::ErrorKind::NotFound => Kvm::Missing,
                _ => Kvm::Denied(error.to_string()),
            };
        }
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        if Arch::of_host() == Some(Arch::X86_64) && !has_extensions(&cpuinfo) {
            return Kvm::NotHardware;
        }
        Kvm::Hardware
    }
}

impl Kvm {
    /// Why a kernel does not boot with it, as far as that can be told from outside; nothing where it should.
    pub fn suspect(&self) -> Option<String> {
        match self {
            Kvm::Missing | Kvm::Denied(_) | Kvm::NotHardware => Some(self.to_string()),
            Kvm::Hardware => {
                let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
                has_flag(&cpuinfo, &["hypervisor"]).then(|| {
                    "this machine is a virtual machine itself: its nested KVM opens, but does not run the guest's kernel. \
                     Use a machine whose hypervisor passes vmx or svm through completely, or bare metal"
                        .to_owned()
                })
            }
        }
    }
}

fn has_extensions(cpuinfo: &str) -> bool {
    has_flag(cpuinfo, &["vmx", "svm"])
}

fn has_flag(cpuinfo: &str, wanted: &[&str]) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| wanted.contains(&flag))
}

impl Findings {
    pub(crate) fn probe() -> Findings {
        Findings {
            qemu: Arch::of_host()
                .ok_or_else(|| {
                    format!("{} is not a supported architecture", std::env::consts::ARCH)
                })
                .and_then(find_qemu),
            kvm: Kvm::of_host(),
        }
    }
}

/// The QEMU for guests of an architecture.
pub(crate) fn find_qemu(arch: Arch) -> Result<Qemu, String> {
    let program = arch.program();
    // Not PATH: the launcher starts it as root does, and root's PATH must not come from a user's environment.
    let path = ["/usr/bin", "/usr/local/bin"]
        .map(|dir| Path::new(dir).join(program))
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| {
            format!(
                "{program} is not installed (Debian and Ubuntu: apt-get install {})",
                match arch {
                    Arch::X86_64 => "qemu-system-x86",
                    Arch::Aarch64 => "qemu-system-arm",
                }
            )
        })?;
    let output = Command::new(&path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{} cannot be started: {error}", path.display()))?;
    let version = parse_version(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| format!("{} --version says nothing of a version", path.display()))?;
    // 7.2 is the oldest this was measured with (Debian 12); it lacks nothing we use.
    if major_minor(&version).is_some_and(|found| found < (7, 2)) {
        return Err(format!(
            "QEMU {version} is too old: 7.2 is the oldest that works"
        ));
    }
    Ok(Qemu { path, version })
}

/// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)` without its first words.
fn parse_version(output: &str) -> Option<String> {
    let version = output.lines().next()?.split_once(" version ")?.1.trim();
    (!version.is_empty()).then(|| version.to_owned())
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(['.', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_with_the_distributions_part() {
        let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright\n";
        let version = parse_version(text).unwrap();
        assert_eq!(version, "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)");
        assert_eq!(major_minor(&version), Some((7, 2)));
        assert_eq!(major_minor("10.0.2"), Some((10, 0)));
        assert_eq!(parse_version("garbage"), None);
    }

    #[test]
    fn extensions_are_flags_and_not_parts_of_words() {
        assert!(has_extensions("flags\t\t: fpu svm sse\n"));
        assert!(has_extensions("flags\t\t: vmx\n"));
        assert!(!has_extensions(
            "flags\t\t: fpu npt svm_lock\nmodel name : svm\n"
        ));
    }
}
