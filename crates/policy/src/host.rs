//! Host names: of requests, exactly as a client may send them, and patterns, as people write them.
//!
//! One spelling is left after parsing: lower case, no trailing dot, punycode. So comparing is comparing bytes.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a host was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("host {shown} is not valid: {rule}")]
pub struct HostError {
    shown: String,
    rule: &'static str,
}

fn refuse(text: &str, rule: &'static str) -> HostError {
    HostError {
        shown: crate::policy::shown(text),
        rule,
    }
}

const NAME_RULE: &str = "it is a name such as api.example.com (labels of 1 to 63 letters, digits, hyphens and \
                         underscores, together at most 253) or an IPv4 address such as 198.51.100.7";
const V6_RULE: &str = "VMs have no IPv6";

/// A host that somebody asks for: a name, or an IPv4 address written in the one usual way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// A DNS name in lower case without its trailing dot.
    Name(String),
    /// An address literal.
    Address(Ipv4Addr),
}

impl Host {
    /// The host as clients send it in a `Host` header, a server name or a query: ASCII only, since names travel in
    /// punycode. One trailing dot is dropped. What programs would read as an address in some other notation
    /// (`127.1`, `0x7f000001`, `017700000001`) is refused.
    pub fn parse(text: &str) -> Result<Self, HostError> {
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.contains(':') {
            return Err(refuse(text, V6_RULE));
        }
        let label_fits = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        };
        if name.len() > 253 || !name.split('.').all(label_fits) {
            return Err(refuse(text, NAME_RULE));
        }
        let name = name.to_ascii_lowercase();
        if !ends_in_a_number(&name) {
            return Ok(Self::Name(name));
        }
        // The standard library's parser knows no notation but four decimal numbers without leading zeros.
        match name.parse() {
            Ok(address) => Ok(Self::Address(address)),
            Err(_) => Err(refuse(
                text,
                "an address is four decimal numbers, such as 198.51.100.7",
            )),
        }
    }

    /// The host of a `Host` header, whose port, if it has one, must be the connection's.
    pub fn parse_authority(text: &str, port: u16) -> Result<Self, HostError> {
        match text.split_once(':') {
            None => Self::parse(text),
            Some((host, written)) => {
                // "+443" and "0443" are numbers to a parser, but no port that a client writes.
                if written == port.to_string() {
                    Self::parse(host)
                } else {
                    Err(refuse(text, "its port is not the connection's"))
                }
            }
        }
    }

    /// The name, unless it is an address.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Name(name) => Some(name),
            Self::Address(_) => None,
        }
    }
}

/// Whether URL parsers take the host for an address (WHATWG URL, "ends in a number").
fn ends_in_a_number(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    let hex = last.strip_prefix("0x");
    last.bytes().all(|b| b.is_ascii_digit())
        || hex.is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl FromStr for Host {
    type Err = HostError;
    fn from_str(text: &str) -> Result<Self, HostError> {
        Self::parse(text)
    }
}

/// Which hosts a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostPattern {
    /// `*`: every name and address.
    Any,
    /// `*.example.com`: every name below example.com, at any depth, and not example.com itself.
    Below(String),
    /// Just this one.
    Exactly(Host),
}

impl HostPattern {
    /// Whether the host is one of them.
    pub fn matches(&self, host: &Host) -> bool {
        match self {
            Self::Any => true,
            Self::Exactly(one) => one == host,
            Self::Below(parent) => host.name().is_some_and(|name| is_below(name, parent)),
        }
    }

    /// Whether some host is one of both.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, _) | (_, Self::Any) => true,
            (Self::Exactly(host), pattern) | (pattern, Self::Exactly(host)) => {
                pattern.matches(host)
            }
            (Self::Below(one), Self::Below(two)) => {
                one == two || is_below(one, two) || is_below(two, one)
            }
        }
    }
}

fn is_below(name: &str, parent: &str) -> bool {
    name.strip_suffix(parent)
        .is_some_and(|rest| rest.ends_with('.'))
}

impl FromStr for HostPattern {
    type Err = HostError;

    /// As a person writes it: also in Unicode, which becomes punycode here.
    fn from_str(text: &str) -> Result<Self, HostError> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let (below, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        if rest.contains('*') {
            return Err(refuse(
                text,
                "`*` stands alone or first, as in *.example.com",
            ));
        }
        if rest.contains("://") || rest.contains('/') {
            return Err(refuse(
                text,
                "a host has no scheme and no path; `base` takes a whole URL",
            ));
        }
        if rest.matches(':').count() == 1 {
            return Err(refuse(text, "a host has no port here; `port` takes it"));
        }
        let host = if rest.is_ascii() {
            Host::parse(rest)?
        } else {
            let ascii = idna::domain_to_ascii(rest).map_err(|_| {
                refuse(
                    text,
                    "it is no name that can be written in ASCII (punycode)",
                )
            })?;
            match Host::parse(&ascii)? {
                Host::Address(_) => {
                    return Err(refuse(text, "an address is written in ASCII digits"));
                }
                name @ Host::Name(_) => name,
            }
        };
        match (below, host) {
            (false, host) => Ok(Self::Exactly(host)),
            (true, Host::Name(parent)) => Ok(Self::Below(parent)),
            (true, Host::Address(_)) => Err(refuse(text, "no names lie below an address")),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Below(parent) => write!(f, "*.{parent}"),
            Self::Exactly(host) => host.fmt(f),
        }
    }
}

impl Serialize for HostPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HostPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}
