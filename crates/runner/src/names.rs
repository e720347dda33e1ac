//! Names that users type, parsed once at the edge into types that cannot leave their directory or become shell.
//!
//! Those that other programs know too are theirs as well: `api-types`.

use std::fmt;
use std::str::FromStr;

pub(crate) use api_types::{GroupName, NameError, ProfileName, RunId, RunnerName, SessionId};
use serde::{Deserialize, Deserializer, Serialize};

/// The content address of an image or snapshot: 16 to 64 lowercase hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub(crate) struct ImageHash(String);

impl ImageHash {
    /// The text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ImageHash {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let digits = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if digits && (16..=64).contains(&text.len()) {
            Ok(Self(text.to_owned()))
        } else {
            let rule = "it is 16 to 64 lowercase hex digits";
            Err(NameError::new("image hash", text, rule))
        }
    }
}

impl fmt::Display for ImageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ImageHash {
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
    fn hashes_are_so_many_lowercase_digits() {
        let (good, long) = ("0123456789abcdef", "a".repeat(65));
        assert_eq!(good.parse::<ImageHash>().unwrap().as_str(), good);
        for bad in [
            "",
            "..",
            "0123456789abcde",
            "0123456789ABCDEF",
            "../456789abcdef0",
            &long,
        ] {
            assert!(bad.parse::<ImageHash>().is_err(), "{bad:?}");
        }
    }
}
