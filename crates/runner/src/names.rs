//! Names that users type, parsed once at the edge into types that cannot leave their directory or become shell.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {shown} is not valid: {rule}")]
pub(crate) struct NameError {
    kind: &'static str,
    shown: String,
    rule: &'static str,
}

fn refuse(kind: &'static str, text: &str, rule: &'static str) -> NameError {
    let mut shown: String = text.chars().take(60).flat_map(char::escape_debug).collect();
    if text.chars().count() > 60 {
        shown.push('…');
    }
    NameError {
        kind,
        shown: format!("\"{shown}\""),
        rule,
    }
}

/// Lowercase letters, digits and inner hyphens, 1 to 64 characters.
fn is_label(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub(crate) struct $name(String);

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(text.to_owned())) } else { Err(refuse($kind, text, $rule)) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

fn is_two_labels(text: &str) -> bool {
    match text.split_once('/') {
        Some((org, name)) => is_label(org) && is_label(name),
        None => false,
    }
}

name_type!(
    /// A profile, `org/name`.
    ProfileName,
    "profile",
    "it is `org/name`, each part 1 to 64 lowercase letters, digits and inner hyphens",
    is_two_labels
);
name_type!(
    /// A group of jobs, `org/name`.
    GroupName,
    "group",
    "it is `org/name`, each part 1 to 64 lowercase letters, digits and inner hyphens",
    is_two_labels
);
name_type!(
    /// A runner's own name: its directory, its service unit.
    RunnerName,
    "runner name",
    "it is 1 to 64 lowercase letters, digits and inner hyphens",
    is_label
);
name_type!(
    /// What ties the jobs of one conversation to one VM.
    SessionId,
    "session id",
    "it is 1 to 128 letters, digits, dots, underscores and hyphens and starts with a letter or digit",
    |text| {
        (1..=128).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
            && text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
    }
);
name_type!(
    /// The content address of an image or snapshot: 16 to 64 lowercase hex digits.
    ImageHash,
    "image hash",
    "it is 16 to 64 lowercase hex digits",
    |text| (16..=64).contains(&text.len()) && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
);

macro_rules! as_str {
    ($($name:ident),+) => {
        $(impl $name {
            /// The text.
            pub(crate) fn as_str(&self) -> &str {
                &self.0
            }
        })+
    };
}

as_str!(ProfileName, GroupName, RunnerName, ImageHash);

/// A run (and its job): a UUID in its canonical lowercase form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RunId(uuid::Uuid);

impl RunId {
    /// A new random one.
    pub(crate) fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }
}

impl FromStr for RunId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let rule = "it is a UUID such as 6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f";
        let id = uuid::Uuid::try_parse(text).map_err(|_| refuse("run id", text, rule))?;
        if id.hyphenated().to_string() == text {
            Ok(Self(id))
        } else {
            Err(refuse("run id", text, rule))
        }
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.hyphenated())
    }
}

impl Serialize for RunId {
    // Always as text, also in binary formats: that is what deserialising accepts.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RunId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_or_become_shell_are_refused() {
        let long = "a".repeat(10_000);
        for bad in [
            "", "..", "../x", "a/../b", "a/b/c", "/a", "a/", "a", "a/b\0", "a/b\n", "A/b", "a/-b",
            "a/b-", "a/$(x)", &long,
        ] {
            assert!(bad.parse::<ProfileName>().is_err(), "{bad:?}");
            assert!(bad.parse::<GroupName>().is_err(), "{bad:?}");
        }
        for bad in ["", "..", ".hidden", "a/b", "a b", "a\0", &long] {
            assert!(bad.parse::<SessionId>().is_err(), "{bad:?}");
        }
        for bad in [
            "",
            "..",
            "6F1C2F0E-3A7B-4C1D-9E55-0A1B2C3D4E5F",
            "6f1c2f0e3a7b4c1d9e550a1b2c3d4e5f",
        ] {
            assert!(bad.parse::<RunId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn good_names_pass_and_errors_show_the_text_escaped() {
        assert_eq!(
            "vm0/default".parse::<ProfileName>().unwrap().as_str(),
            "vm0/default"
        );
        let id = RunId::random();
        assert_eq!(id.to_string().parse::<RunId>().unwrap(), id);
        let error = "x\u{1b}[31m"
            .parse::<ProfileName>()
            .unwrap_err()
            .to_string();
        assert!(error.contains("\\u{1b}"), "{error}");
    }
}
