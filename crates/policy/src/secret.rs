//! Secrets: what the VM holds is a placeholder, what the proxy puts in its place is the value.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::host::{Host, HostPattern};

/// Longest value, bytes: more does not fit into a header that servers take.
const MAX_VALUE: usize = 16 * 1024;
/// Shortest value: shorter ones could not be replaced in log lines without making these unreadable.
const MIN_VALUE: usize = 4;
/// Most hosts of a secret.
const MAX_HOSTS: usize = 100;

/// Why a secret was refused. No message repeats a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Not a variable's name.
    #[error(
        "secret name {0} is not valid: it is a variable's name, 1 to 100 letters, digits and underscores, not \
         beginning with a digit"
    )]
    Name(String),
    /// A value that cannot be a header's.
    #[error(
        "the secret's value is not usable: it must have {MIN_VALUE} to {MAX_VALUE} bytes and no line break or NUL; \
         cut off a trailing newline where it comes from a file"
    )]
    Value,
    /// A placeholder that could not be told from other text.
    #[error(
        "the placeholder is not usable: it must have 16 to 256 letters, digits, hyphens and underscores"
    )]
    Placeholder,
    /// Too many hosts.
    #[error("the secret names more than {MAX_HOSTS} hosts")]
    Hosts,
}

/// The environment variable under which the guest finds the placeholder, and the name in templates.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct SecretName(String);

impl SecretName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SecretName {
    type Err = SecretError;
    fn from_str(text: &str) -> Result<Self, SecretError> {
        let fits = (1..=100).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !text.starts_with(|c: char| c.is_ascii_digit());
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(SecretError::Name(crate::policy::shown(text)))
        }
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for SecretName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// What must stay outside the VM. Wiped when dropped, not printed by `Debug`, not serialisable: who sends it calls
/// [`SecretValue::expose`] and can be found by that word.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretValue(Zeroizing<String>);

impl SecretValue {
    /// Takes a value.
    pub fn new(value: String) -> Result<Self, SecretError> {
        let value = Zeroizing::new(value);
        let fits =
            (MIN_VALUE..=MAX_VALUE).contains(&value.len()) && !value.contains(['\r', '\n', '\0']);
        if fits {
            Ok(Self(value))
        } else {
            Err(SecretError::Value)
        }
    }

    /// The value.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What the guest holds instead of a secret.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Placeholder(String);

/// Beginnings of well-known kinds of tokens, which clients look for before they send anything. They are no secrets.
const KINDS: [&str; 10] = [
    "sk-ant-api03-",
    "sk-ant-oat01-",
    "sk-proj-",
    "sk-",
    "github_pat_",
    "ghp_",
    "gho_",
    "ghs_",
    "glpat-",
    "xoxb-",
];

impl Placeholder {
    /// A placeholder for the value: it begins like tokens of its kind, if that is known, and is of the same alphabet
    /// that survives URLs, JSON and shells. `entropy` makes it unlike any text that the guest could send by chance.
    pub fn generate(value: &SecretValue, entropy: [u8; 16]) -> Self {
        let kind = KINDS
            .into_iter()
            .find(|kind| value.expose().starts_with(kind))
            .unwrap_or_default();
        Self(format!("{kind}placeholder{}", hex::encode(entropy)))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Placeholder {
    type Err = SecretError;
    fn from_str(text: &str) -> Result<Self, SecretError> {
        let fits = (16..=256).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(SecretError::Placeholder)
        }
    }
}

impl<'de> Deserialize<'de> for Placeholder {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// One secret of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    name: SecretName,
    value: SecretValue,
    placeholder: Placeholder,
    hosts: Vec<HostPattern>,
}

impl Secret {
    /// Puts one together.
    pub fn new(
        name: SecretName,
        value: SecretValue,
        placeholder: Placeholder,
        hosts: Vec<HostPattern>,
    ) -> Result<Self, SecretError> {
        if hosts.len() > MAX_HOSTS {
            return Err(SecretError::Hosts);
        }
        Ok(Self {
            name,
            value,
            placeholder,
            hosts,
        })
    }

    /// Its name.
    pub fn name(&self) -> &SecretName {
        &self.name
    }

    /// Its value.
    pub fn value(&self) -> &SecretValue {
        &self.value
    }

    /// What the guest holds.
    pub fn placeholder(&self) -> &Placeholder {
        &self.placeholder
    }

    /// Hosts to which it may go; none: wherever an allowing rule names it.
    pub fn hosts(&self) -> &[HostPattern] {
        &self.hosts
    }

    /// Whether one of its hosts is this one.
    pub fn is_for(&self, host: &Host) -> bool {
        self.hosts.iter().any(|pattern| pattern.matches(host))
    }
}

/// Serialises a secret with its value: for the proxy's socket alone (see [`crate::wire`]).
pub(crate) struct Exposed<'a>(pub(crate) &'a Secret);

impl Serialize for Exposed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let Secret {
            name,
            value,
            placeholder,
            hosts,
        } = self.0;
        let mut secret = serializer.serialize_struct("Secret", 4)?;
        secret.serialize_field("name", name)?;
        secret.serialize_field("value", value.expose())?;
        secret.serialize_field("placeholder", placeholder)?;
        secret.serialize_field("hosts", hosts)?;
        secret.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(value: &str) -> Secret {
        let value = SecretValue::new(value.to_owned()).unwrap();
        let placeholder = Placeholder::generate(&value, [7; 16]);
        let hosts = vec!["api.example.com".parse().unwrap()];
        Secret::new("TOKEN".parse().unwrap(), value, placeholder, hosts).unwrap()
    }

    #[test]
    fn nothing_but_expose_shows_a_value() {
        let secret = secret("ghp_very-secret");
        let shown = format!("{secret:?}");
        assert!(!shown.contains("very-secret"), "{shown}");
        assert!(
            SecretValue::new("with\nnewline".to_owned())
                .is_err_and(|e| !e.to_string().contains("with\n"))
        );
        assert_eq!(
            serde_json::to_value(Exposed(&secret)).unwrap()["value"],
            "ghp_very-secret"
        );
    }

    #[test]
    fn placeholders_look_like_their_kind_differ_by_entropy_and_hold_nothing_of_the_value() {
        let value = SecretValue::new("sk-ant-api03-abcdefghijkl".to_owned()).unwrap();
        let one = Placeholder::generate(&value, [1; 16]);
        assert!(one.as_str().starts_with("sk-ant-api03-placeholder"));
        assert!(!one.as_str().contains("abcdefgh"));
        assert_ne!(one, Placeholder::generate(&value, [2; 16]));
        assert_eq!(one.as_str().parse::<Placeholder>().unwrap(), one);
    }

    #[test]
    fn values_that_no_header_can_carry_and_names_that_no_variable_can_have_are_refused() {
        for bad in [
            "",
            "abc",
            "line\nbreak",
            "nul\0here",
            &"x".repeat(MAX_VALUE + 1),
        ] {
            assert_eq!(
                SecretValue::new(bad.to_owned()).unwrap_err(),
                SecretError::Value
            );
        }
        for bad in ["", "1A", "A-B", "A B", "A=", "Ä", &"A".repeat(101)] {
            assert!(bad.parse::<SecretName>().is_err(), "{bad}");
        }
    }
}
