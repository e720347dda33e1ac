//! The canonical policy: what proxy and resolver see. A value of these types is valid; [`crate::Draft`] makes them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::draft::{Draft, DraftError};
use crate::host::{Host, HostPattern};
use crate::path::{PathPattern, RulePath};
use crate::secret::SecretName;
use crate::template::Template;

/// Most rules of a policy.
pub const MAX_RULES: usize = 1000;
/// Most requests of all rules together.
pub const MAX_REQUESTS: usize = 5000;
/// Largest canonical form, bytes of JSON: a registration, with its secrets, must fit into one message.
pub const MAX_BYTES: usize = 1 << 20;
/// The ports whose connections go through the proxy.
pub const WEB_PORTS: [u16; 2] = [80, 443];

/// At most 60 characters of what somebody wrote, quoted, control characters escaped.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(60).flat_map(char::escape_debug).collect();
    if text.chars().count() > 60 {
        shown.push('…');
    }
    format!("\"{shown}\"")
}

/// Why a policy or rule was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// More rules than a decision should have to look at.
    #[error("the policy has {0} rules; it may have {MAX_RULES}")]
    TooManyRules(usize),
    /// The same for requests.
    #[error("the policy's rules list {0} requests; together they may list {MAX_REQUESTS}")]
    TooManyRequests(usize),
    /// The canonical form is too large.
    #[error("the policy has {0} bytes in its canonical form; it may have {MAX_BYTES}")]
    TooLarge(usize),
    /// A rule's name.
    #[error(
        "rule name {0} is not valid: it has 1 to 128 letters, digits and the characters . _ - * : and is not \
         `default`, `invalid` or something that begins with `kernel:` or `resolver:`"
    )]
    Name(String),
    /// A request's method.
    #[error(
        "method {0} is not valid: it is ANY or a method such as GET, at most 32 letters and hyphens"
    )]
    Method(String),
}

/// What happens where no rule decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// It passes.
    Allow,
    /// It is refused.
    Deny,
}

/// Whether denials are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// They are.
    #[default]
    Enforce,
    /// They are only logged.
    Audit,
}

/// How a request travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// In the clear.
    Http,
    /// Through TLS.
    Https,
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuleAction {
    /// Lets it pass, or what its requests say.
    #[default]
    Allow,
    /// Refuses all of it.
    Deny,
    /// Forwards TLS untouched.
    Passthrough,
}

/// How a rule is called in logs and answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct RuleName(String);

impl RuleName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What a rule is called that nothing else could name.
    pub(crate) fn unnamed() -> Self {
        Self("unnamed".to_owned())
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RuleName {
    type Err = PolicyError;
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        // A slash would be taken for the one before a request; the rest are names that decisions of ours have.
        let reserved = matches!(text, "default" | "invalid")
            || ["kernel:", "resolver:"]
                .iter()
                .any(|prefix| text.starts_with(prefix));
        let fits = (1..=128).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-*:".contains(&b));
        if fits && !reserved {
            Ok(Self(text.to_owned()))
        } else {
            Err(PolicyError::Name(shown(text)))
        }
    }
}

/// The method of a listed request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Every method.
    Any,
    /// This one, in upper case; requests match whatever their case.
    One(String),
}

impl Method {
    /// Whether a request with this method is meant.
    pub fn matches(&self, method: &str) -> bool {
        match self {
            Self::Any => true,
            Self::One(one) => one.eq_ignore_ascii_case(method),
        }
    }
}

impl FromStr for Method {
    type Err = PolicyError;
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let fits = (1..=32).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphabetic() || b == b'-');
        match text.to_ascii_uppercase() {
            _ if !fits => Err(PolicyError::Method(shown(text))),
            any if any == "ANY" => Ok(Self::Any),
            one => Ok(Self::One(one)),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "ANY",
            Self::One(one) => one,
        })
    }
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A request that a rule lists.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Request {
    /// What happens to it.
    pub action: Effect,
    /// Its method.
    pub method: Method,
    /// Its path below the rule's.
    pub path: PathPattern,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

/// One rule. Only [`Draft`] makes one, after checking that its parts make sense together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    pub(crate) name: RuleName,
    pub(crate) scheme: Option<Scheme>,
    pub(crate) host: HostPattern,
    pub(crate) port: Option<u16>,
    pub(crate) path: RulePath,
    pub(crate) action: RuleAction,
    pub(crate) requests: Vec<Request>,
    pub(crate) headers: BTreeMap<String, Template>,
    pub(crate) query: BTreeMap<String, Template>,
}

impl Rule {
    /// Its name.
    pub fn name(&self) -> &RuleName {
        &self.name
    }

    /// The hosts it is about.
    pub fn host(&self) -> &HostPattern {
        &self.host
    }

    /// What it does.
    pub fn action(&self) -> RuleAction {
        self.action
    }

    /// The port it is about; `None`: 80 and 443, or every port if it denies.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// The secrets that its headers and query need.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        self.headers
            .values()
            .chain(self.query.values())
            .flat_map(Template::secrets)
    }

    /// Whether it is about this connection at all.
    pub(crate) fn is_about(&self, host: &Host, port: u16) -> bool {
        let port_matches = match (self.port, self.action) {
            (Some(one), _) => one == port,
            (None, RuleAction::Deny) => true,
            (None, _) => WEB_PORTS.contains(&port),
        };
        port_matches && self.host.matches(host)
    }

    pub(crate) fn lists(&self, effect: Effect) -> bool {
        self.requests.iter().any(|request| request.action == effect)
    }
}

/// A policy: its rules in order, and what happens where none decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    default: Effect,
    mode: Mode,
    rules: Vec<Rule>,
}

impl Default for Policy {
    /// Where nobody wrote anything: the public web, logged.
    fn default() -> Self {
        Self {
            default: Effect::Allow,
            mode: Mode::Enforce,
            rules: Vec::new(),
        }
    }
}

impl Policy {
    /// Puts one together, within the bounds.
    pub fn new(default: Effect, mode: Mode, rules: Vec<Rule>) -> Result<Self, PolicyError> {
        if rules.len() > MAX_RULES {
            return Err(PolicyError::TooManyRules(rules.len()));
        }
        let requests = rules.iter().map(|rule| rule.requests.len()).sum();
        if requests > MAX_REQUESTS {
            return Err(PolicyError::TooManyRequests(requests));
        }
        let policy = Self {
            default,
            mode,
            rules,
        };
        match policy.to_json().len() {
            bytes if bytes > MAX_BYTES => Err(PolicyError::TooLarge(bytes)),
            _ => Ok(policy),
        }
    }

    /// What happens where no rule decides.
    pub fn default_effect(&self) -> Effect {
        self.default
    }

    /// Whether denials are carried out.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The rules, in order.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The secrets that its rules name: all of them must be there before the policy can be used.
    pub fn secrets(&self) -> BTreeSet<&SecretName> {
        self.rules.iter().flat_map(Rule::secrets).collect()
    }

    /// The same policy with further rules before its own: how a running job's policy is changed.
    pub fn with_rules_first(&self, mut first: Vec<Rule>) -> Result<Self, PolicyError> {
        first.extend(self.rules.iter().cloned());
        Self::new(self.default, self.mode, first)
    }

    /// The canonical form.
    pub fn to_json(&self) -> String {
        // Serialising strings, numbers and lists into memory cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads the canonical form.
    pub fn from_json(text: &str) -> Result<Self, DraftError> {
        Draft::from_json(text)?.into_policy()
    }
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Canonical<'a> {
            version: u32,
            default: Effect,
            mode: Mode,
            rules: &'a [Rule],
        }
        let Self {
            default,
            mode,
            rules,
        } = self;
        Canonical {
            version: 1,
            default: *default,
            mode: *mode,
            rules,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Draft::deserialize(deserializer)?
            .into_policy()
            .map_err(serde::de::Error::custom)
    }
}
