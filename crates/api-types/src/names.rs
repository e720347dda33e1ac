//! Names, parsed once into types that cannot be wrong.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {shown} is not valid: {rule}")]
pub struct NameError {
    kind: &'static str,
    shown: String,
    rule: &'static str,
}

impl NameError {
    /// `text` is no `kind`, because of what the rule says; of a long text only the beginning is shown, escaped.
    pub fn new(kind: &'static str, text: &str, rule: &'static str) -> Self {
        let mut shown: String = text.chars().take(60).flat_map(char::escape_debug).collect();
        if text.chars().count() > 60 {
            shown.push('…');
        }
        Self {
            kind,
            shown: format!("\"{shown}\""),
            rule,
        }
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

fn is_two_labels(text: &str) -> bool {
    match text.split_once('/') {
        Some((org, name)) => is_label(org) && is_label(name),
        None => false,
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $rule:literal, $pattern:literal, $example:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        #[cfg_attr(feature = "openapi", schema(value_type = String, pattern = $pattern, example = $example))]
        pub struct $name(String);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(text.to_owned())) } else { Err(NameError::new($kind, text, $rule)) }
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

name_type!(
    /// A profile, `org/name`.
    ProfileName,
    "profile",
    "it is `org/name`, each part 1 to 64 lowercase letters, digits and inner hyphens",
    "^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?/[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$",
    "vm0/default",
    is_two_labels
);
name_type!(
    /// A group of runs, `org/name`.
    GroupName,
    "group",
    "it is `org/name`, each part 1 to 64 lowercase letters, digits and inner hyphens",
    "^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?/[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$",
    "vm0/demo",
    is_two_labels
);
name_type!(
    /// A runner's own name, as people know it: its directory, its service unit.
    RunnerName,
    "runner name",
    "it is 1 to 64 lowercase letters, digits and inner hyphens",
    "^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$",
    "metal-1",
    is_label
);
name_type!(
    /// Which agent CLI.
    AgentType,
    "agent type",
    "it is 1 to 64 lowercase letters, digits and inner hyphens, such as claude-code",
    "^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$",
    "claude-code",
    is_label
);
name_type!(
    /// What ties the runs of one conversation to one VM.
    SessionId,
    "session id",
    "it is 1 to 128 letters, digits, dots, underscores and hyphens and starts with a letter or digit",
    "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
    "s-1",
    |text| {
        (1..=128).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
            && text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
    }
);
name_type!(
    /// The environment variable under which the guest finds a secret's placeholder.
    SecretName,
    "secret name",
    "it is a variable's name: 1 to 100 letters, digits and underscores, not beginning with a digit",
    "^[A-Za-z_][A-Za-z0-9_]{0,99}$",
    "API_KEY",
    |text| {
        (1..=100).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !text.starts_with(|c: char| c.is_ascii_digit())
    }
);

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = "uuid",
            pattern = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
            example = "6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f"))]
        pub struct $name(uuid::Uuid);

        impl $name {
            /// A new random one.
            pub fn random() -> Self {
                Self(uuid::Uuid::new_v4())
            }

            /// The one that 16 bytes of a hash stand for (UUID version 8, RFC 9562).
            pub fn from_hash(bytes: [u8; 16]) -> Self {
                Self(uuid::Builder::from_custom_bytes(bytes).into_uuid())
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let rule = "it is a lowercase UUID such as 6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f";
                let id = uuid::Uuid::try_parse(text).map_err(|_| NameError::new($kind, text, rule))?;
                if id.hyphenated().to_string() == text { Ok(Self(id)) } else { Err(NameError::new($kind, text, rule)) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0.hyphenated())
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id_type!(
    /// A run.
    RunId,
    "run id"
);
id_type!(
    /// A runner's life: a new one each time that it starts, so that leases of an earlier life are not taken for its own.
    RunnerId,
    "runner id"
);
id_type!(
    /// One attempt to claim. A claim sent again under the same id gets the same answer.
    ClaimId,
    "claim id"
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_could_leave_their_place_are_refused() {
        let long = "a".repeat(10_000);
        for bad in [
            "", "..", "../x", "a/../b", "a/b/c", "/a", "a/", "a", "a/b\0", "a/b\n", "A/b", "a/-b",
            "a/b-", "a/$(x)", "a/b.>", "a/*", &long,
        ] {
            assert!(bad.parse::<ProfileName>().is_err(), "{bad:?}");
            assert!(bad.parse::<GroupName>().is_err(), "{bad:?}");
        }
        for bad in ["", "..", ".hidden", "a/b", "a b", "a\0", &long] {
            assert!(bad.parse::<SessionId>().is_err(), "{bad:?}");
        }
        for bad in ["", "1A", "A-B", "A=B", "A\n", &long] {
            assert!(bad.parse::<SecretName>().is_err(), "{bad:?}");
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

    proptest! {
        #[test]
        fn what_is_accepted_comes_back(text in "\\PC{0,40}") {
            if let Ok(name) = text.parse::<GroupName>() {
                prop_assert_eq!(serde_json::to_string(&name).unwrap(), format!("\"{text}\""));
            }
            let _ = text.parse::<RunId>();
        }

        #[test]
        fn hashes_become_ids(bytes in any::<[u8; 16]>()) {
            let id = RunId::from_hash(bytes);
            prop_assert_eq!(id.to_string().parse::<RunId>().unwrap(), id);
        }
    }
}
