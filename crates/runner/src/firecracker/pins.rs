//! Which Firecracker this runner is made for: every file by its SHA-256.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::FirecrackerError;

/// A SHA-256, 64 hex digits in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Sha256Hex(String);

impl Sha256Hex {
    /// The digits.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Sha256Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Sha256Hex {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        match text.len() == 64 && text.bytes().all(digit) {
            true => Ok(Self(text.to_owned())),
            false => Err(format!(
                "\"{text}\" is no SHA-256: that has 64 hex digits in lower case"
            )),
        }
    }
}

impl TryFrom<String> for Sha256Hex {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Sha256Hex> for String {
    fn from(hash: Sha256Hex) -> String {
        hash.0
    }
}

/// A version or the name of a file: what can stand in a path and in a URL as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct PlainName(String);

impl PlainName {
    /// The text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PlainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for PlainName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let usable = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte);
        let good = (1..=100).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.bytes().all(usable);
        match good {
            true => Ok(Self(text)),
            false => Err(format!(
                "\"{text}\" is not usable: letters, digits and . _ - + only"
            )),
        }
    }
}

impl From<PlainName> for String {
    fn from(name: PlainName) -> String {
        name.0
    }
}

/// Whose hashes these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Origin {
    /// This runner's.
    BuiltIn,
    /// The operator's, of builds of his own.
    Own,
}

/// One architecture's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pins {
    /// Firecracker's version, such as `1.16.1`.
    pub(crate) version: PlainName,
    /// The release's archive.
    pub(crate) archive_sha256: Sha256Hex,
    /// The program `firecracker` in it.
    pub(crate) firecracker_sha256: Sha256Hex,
    /// The program `jailer` in it.
    pub(crate) jailer_sha256: Sha256Hex,
    /// The guest kernel's file name.
    pub(crate) kernel: PlainName,
    /// The guest kernel.
    pub(crate) kernel_sha256: Sha256Hex,
    /// What stands on the guest kernel's command line beside the engine's own words.
    #[serde(default)]
    pub(crate) kernel_args: String,
}

/// Largest file of pins, bytes.
const MAX_PINS: u64 = 64 << 10;
/// Longest `kernel_args`, bytes: x86_64's command line has 2048 in all (kernel: `COMMAND_LINE_SIZE`).
const MAX_ARGS: usize = 1024;

impl Pins {
    /// This runner's, for the architecture it was built for; nothing where Firecracker has no release.
    ///
    /// The archive's hashes stand in the release's `SHA256SUMS`; the kernel is the one that Firecracker's own CI boots.
    pub(crate) fn built_in() -> Option<Self> {
        let (archive, firecracker, jailer, kernel) = match std::env::consts::ARCH {
            "x86_64" => (
                "382a02a869e4d6d5cb14c40577f9545e8458021ea8b0b2d3fc10ec14d9c242e6",
                "2fd0171309af7e24cf8dafc8a6f921c1434c49b5f9349bb996b7ed0a4deb8aa7",
                "1f3a0c1fe86212d0001819bfe0819071c01208b3ccc9398c3b3bc1b84cf21edd",
                "e41c7048bd2475e7e788153823fcb9166a7e0b78c4c443bd6446d015fa735f53",
            ),
            "aarch64" => (
                "8d0e69f6d6f9a1724551f607f18504052c16c1828ee3d4d7b6e6c73380871e0e",
                "71ca0733576579a75cef268a8fd0ae0629b761b9844559c611f144132ac6038a",
                "7db39d34991ccdd8d12aacab384b1dcbe35e79c27823e4e4d33725d4b504edd7",
                "61baeae1ac6197be4fc5c71fa78df266acdc33c54570290d2f611c2b42c105be",
            ),
            _ => return None,
        };
        let hash = |text: &str| Sha256Hex(text.to_owned());
        Some(Self {
            version: PlainName("1.16.1".to_owned()),
            archive_sha256: hash(archive),
            firecracker_sha256: hash(firecracker),
            jailer_sha256: hash(jailer),
            kernel: PlainName("vmlinux-6.1.155".to_owned()),
            kernel_sha256: hash(kernel),
            kernel_args: String::new(),
        })
    }

    /// The operator's own, from a JSON file.
    pub(crate) fn read(path: &Path) -> Result<Self, FirecrackerError> {
        use std::io::Read;
        let unusable = |reason: String| FirecrackerError::Pins {
            path: path.to_owned(),
            reason,
        };
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_PINS).read_to_string(&mut text))
            .map_err(|error| unusable(error.to_string()))?;
        let pins: Self =
            serde_json::from_str(&text).map_err(|error| unusable(error.to_string()))?;
        let printable = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
        if pins.kernel_args.len() > MAX_ARGS || !pins.kernel_args.bytes().all(printable) {
            return Err(unusable(format!(
                "kernel_args must be at most {MAX_ARGS} printable characters"
            )));
        }
        Ok(pins)
    }

    /// Name of the directory they are installed in: another set of files is another directory.
    pub(super) fn directory(&self) -> String {
        let hashes = [
            &self.archive_sha256,
            &self.firecracker_sha256,
            &self.jailer_sha256,
            &self.kernel_sha256,
        ];
        let mut text: String = hashes.iter().map(|hash| hash.as_str()).collect();
        text.push_str(&self.kernel_args);
        let hash = crate::image::sha256(text.as_bytes());
        format!("{}-{}", self.version, hash.get(..16).unwrap_or(&hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(change: impl Fn(&str) -> String) -> Result<Pins, String> {
        let pins = serde_json::to_string(&Pins::built_in().unwrap()).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), change(&pins)).unwrap();
        Pins::read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_of_pins_is_read_as_it_was_written() {
        assert_eq!(text(str::to_owned).unwrap(), Pins::built_in().unwrap());
    }

    #[test]
    fn pins_that_would_pin_nothing_or_lead_elsewhere_are_refused() {
        let whole = Pins::built_in().unwrap().jailer_sha256.to_string();
        for (from, to, word) in [
            (whole.as_str(), "", "no SHA-256"),
            (whole.as_str(), &whole[1..], "no SHA-256"),
            (whole.as_str(), &whole.to_uppercase(), "no SHA-256"),
            ("jailer_sha256", "jailor_sha256", "jailor_sha256"),
            ("1.16.1", "../1.16.1", "not usable"),
            ("vmlinux-6.1.155", "a/b", "not usable"),
            ("kernel_args\":\"", "kernel_args\":\"a\\n", "printable"),
        ] {
            let error = text(|pins| pins.replace(from, to)).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        assert!(text(|pins| pins[1..].to_owned()).is_err());
    }

    #[test]
    fn another_file_or_another_command_line_is_another_directory() {
        let base = Pins::built_in().unwrap();
        assert!(base.directory().starts_with("1.16.1-"));
        let mut kernel = base.clone();
        kernel.kernel_sha256 = base.jailer_sha256.clone();
        let mut args = base.clone();
        args.kernel_args = "quiet".to_owned();
        assert_ne!(kernel.directory(), base.directory());
        assert_ne!(args.directory(), base.directory());
    }
}
