//! Profiles: the size of a VM and the image it boots. Some are built in; `runner.yaml` may define more.

use std::fmt::{self, Display};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::names::ProfileName;

/// Which root file system a profile boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Flavour {
    /// The real agent CLI, Node, Python, git, ripgrep, Chromium and agent-browser.
    Full,
    /// bash, coreutils, procps, curl, git and python3, for tests and quick starts.
    Small,
}

/// A VM's size and image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Profile {
    /// Virtual CPUs.
    pub(crate) vcpu: u32,
    /// Memory, MiB.
    pub(crate) memory_mb: u64,
    /// Writable disk, MiB (sparse: it takes what is written).
    pub(crate) disk_mb: u64,
    /// The image.
    pub(crate) flavour: Flavour,
}

/// `vm0/default`: what an agent with a browser needs.
const DEFAULT: Profile = Profile {
    vcpu: 2,
    memory_mb: 2048,
    disk_mb: 8192,
    flavour: Flavour::Full,
};

/// `vm0/small`: tests and quick starts.
const SMALL: Profile = Profile {
    vcpu: 1,
    memory_mb: 256,
    disk_mb: 1024,
    flavour: Flavour::Small,
};

/// The names of the built-in profiles.
pub(crate) const BUILT_IN: [&str; 2] = ["vm0/default", "vm0/small"];

/// Most virtual CPUs a VM may have.
pub(crate) const MAX_VCPU: u32 = 64;
/// Least memory in which the guest boots, MiB.
pub(crate) const MIN_MEMORY_MB: u64 = 128;
/// Most memory of a VM, MiB.
pub(crate) const MAX_MEMORY_MB: u64 = 1 << 20;
/// Least writable disk: room for ext4's own tables, MiB.
pub(crate) const MIN_DISK_MB: u64 = 64;
/// Most writable disk, MiB.
pub(crate) const MAX_DISK_MB: u64 = 16 << 20;

impl Profile {
    /// The built-in profile of this name.
    pub(crate) fn built_in(name: &ProfileName) -> Option<Self> {
        match name.as_str() {
            "vm0/default" => Some(DEFAULT),
            "vm0/small" => Some(SMALL),
            _ => None,
        }
    }

    /// Under this name on a command line.
    pub(crate) fn named(self, name: &ProfileName) -> ProfileSpec {
        ProfileSpec {
            name: name.clone(),
            profile: self,
        }
    }

    /// As a [`ProfileSpec`] says it after the name.
    pub(crate) fn keys(&self) -> String {
        let Self {
            vcpu,
            memory_mb,
            disk_mb,
            flavour,
        } = self;
        let flavour = flavour.name();
        format!("vcpu={vcpu},memory_mb={memory_mb},disk_mb={disk_mb},flavour={flavour}")
    }

    fn with_flavour(self, flavour: Flavour) -> Self {
        Self { flavour, ..self }
    }

    /// Checks the bounds; the error names the key and the range.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Self {
            vcpu,
            memory_mb,
            disk_mb,
            flavour: _,
        } = *self;
        if !(1..=MAX_VCPU).contains(&vcpu) {
            return Err(format!("vcpu is {vcpu}; it must be 1 to {MAX_VCPU}"));
        }
        if !(MIN_MEMORY_MB..=MAX_MEMORY_MB).contains(&memory_mb) {
            return Err(format!(
                "memory_mb is {memory_mb}; it must be {MIN_MEMORY_MB} to {MAX_MEMORY_MB}"
            ));
        }
        if !(MIN_DISK_MB..=MAX_DISK_MB).contains(&disk_mb) {
            return Err(format!(
                "disk_mb is {disk_mb}; it must be {MIN_DISK_MB} to {MAX_DISK_MB}"
            ));
        }
        Ok(())
    }
}

/// A profile on a command line: `vm0/small`, or `org/name:vcpu=4,memory_mb=8192,disk_mb=4096,flavour=full`. Keys left
/// out are those of the built-in profile of that name, or of the flavour's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProfileSpec {
    /// Its name.
    pub(crate) name: ProfileName,
    /// Its size and image, within the bounds.
    pub(crate) profile: Profile,
}

impl Display for ProfileSpec {
    /// So that it can be copied to a command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, profile } = self;
        match Profile::built_in(name) {
            Some(built_in) if built_in == *profile => write!(f, "{name}"),
            _ => write!(f, "{name}:{}", profile.keys()),
        }
    }
}

impl FromStr for ProfileSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, keys) = match text.split_once(':') {
            Some((name, keys)) => (name, Some(keys)),
            None => (text, None),
        };
        let name: ProfileName = name.parse().map_err(|error| format!("{error}"))?;
        let mut base = Profile::built_in(&name);
        let pairs: Vec<(&str, &str)> = keys
            .into_iter()
            .flat_map(|keys| keys.split(','))
            .map(|pair| {
                pair.split_once('=')
                    .ok_or_else(|| format!("\"{}\" is not KEY=VALUE", pair.escape_debug()))
            })
            .collect::<Result<_, _>>()?;
        // The flavour first: it decides what the other keys' defaults are.
        for (_, value) in pairs.iter().filter(|(key, _)| *key == "flavour") {
            base = Some(match *value {
                "full" => base.unwrap_or(DEFAULT).with_flavour(Flavour::Full),
                "small" => base.unwrap_or(SMALL).with_flavour(Flavour::Small),
                _ => return Err("flavour is full or small".to_owned()),
            });
        }
        let Some(mut profile) = base else {
            return Err(format!(
                "{name} is not built in ({}); give its size as \
                 {name}:vcpu=2,memory_mb=2048,disk_mb=8192,flavour=full",
                BUILT_IN.join(", ")
            ));
        };
        for (key, value) in pairs {
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|_| format!("{key} is not a number: \"{}\"", value.escape_debug()))
            };
            match key {
                "vcpu" => profile.vcpu = u32::try_from(number()?).unwrap_or(u32::MAX),
                "memory_mb" => profile.memory_mb = number()?,
                "disk_mb" => profile.disk_mb = number()?,
                "flavour" => {}
                _ => {
                    return Err(format!(
                        "there is no key \"{}\": they are vcpu, memory_mb, disk_mb and flavour",
                        key.escape_debug()
                    ));
                }
            }
        }
        profile.check()?;
        Ok(Self { name, profile })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_profiles_exist_and_keep_the_bounds() {
        for name in BUILT_IN {
            let profile = Profile::built_in(&name.parse().unwrap()).unwrap();
            profile.check().unwrap();
        }
        assert_eq!(DEFAULT.vcpu, 2);
        assert_eq!(DEFAULT.memory_mb, 2048);
        assert_eq!(Profile::built_in(&"vm0/other".parse().unwrap()), None);
    }

    #[test]
    fn sizes_outside_the_bounds_are_refused_with_the_key() {
        for (profile, key) in [
            (Profile { vcpu: 0, ..SMALL }, "vcpu"),
            (Profile { vcpu: 65, ..SMALL }, "vcpu"),
            (
                Profile {
                    memory_mb: 127,
                    ..SMALL
                },
                "memory_mb",
            ),
            (
                Profile {
                    disk_mb: u64::MAX,
                    ..SMALL
                },
                "disk_mb",
            ),
        ] {
            assert!(profile.check().unwrap_err().starts_with(key));
        }
    }

    #[test]
    fn profiles_of_the_command_line_start_from_the_built_in_ones() {
        let profile = |text: &str| text.parse::<ProfileSpec>().map(|spec| spec.profile);
        assert_eq!(profile("vm0/small"), Ok(SMALL));
        assert_eq!(
            profile("vm0/small:vcpu=2"),
            Ok(Profile { vcpu: 2, ..SMALL })
        );
        assert_eq!(
            profile("acme/big:vcpu=8,flavour=full,memory_mb=16384"),
            Ok(Profile {
                vcpu: 8,
                memory_mb: 16384,
                ..DEFAULT
            })
        );
        for (text, shown) in [
            ("vm0/small", "vm0/small"),
            ("vm0/small:memory_mb=256", "vm0/small"),
            (
                "vm0/small:vcpu=2",
                "vm0/small:vcpu=2,memory_mb=256,disk_mb=1024,flavour=small",
            ),
            (
                "acme/big:flavour=full",
                "acme/big:vcpu=2,memory_mb=2048,disk_mb=8192,flavour=full",
            ),
        ] {
            let spec: ProfileSpec = text.parse().unwrap();
            assert_eq!(spec.to_string(), shown);
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
        for bad in [
            "acme/big",
            "acme/big:vcpu=8",
            "vm0/small:",
            "vm0/small:cpus=2",
            "vm0/small:vcpu=x",
            "vm0/small:vcpu=99999999999999999999",
            "vm0/small:vcpu=4294967297",
            "vm0/small:flavour=medium",
            "../x:vcpu=1",
        ] {
            profile(bad).unwrap_err();
        }
    }
}
