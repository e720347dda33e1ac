//! What a user writes: a firewall file, a profile's `policy` in `runner.yaml`, `--allow` and `--deny`.
//!
//! The canonical form is a draft too, the one without shorthands, so there is one way in for both.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::fields::{Bad, headers, query};
use crate::host::HostPattern;
use crate::path::RulePath;
use crate::policy::{
    Effect, Mode, Policy, PolicyError, Request, Rule, RuleAction, RuleName, Scheme, WEB_PORTS,
    shown,
};

/// Largest firewall file, bytes.
pub const MAX_FILE_BYTES: usize = 1 << 20;

/// Why a draft was refused.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// No YAML or JSON, an unknown key, a value of a wrong type.
    #[error("the policy cannot be understood: {0}")]
    Syntax(String),
    /// A format of a later runner.
    #[error("the policy has version {0}; this runner knows version 1")]
    Version(u32),
    /// Too large to be one.
    #[error("the policy is larger than {MAX_FILE_BYTES} bytes")]
    TooLarge,
    /// A rule makes no sense.
    #[error("the policy's `{key}` is not usable: {reason}")]
    Value {
        /// Where, as `rules[2].allow[0]`.
        key: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// `HOST[:PORT]` of a command line.
    #[error("{0}")]
    Argument(String),
    /// Bounds of the whole.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

/// A policy whose default and mode may still be open: a job's, or a profile's in `runner.yaml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Draft {
    /// What happens where no rule decides, if it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default: Option<Effect>,
    /// Whether denials are carried out, if it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

impl Draft {
    /// Reads a firewall file.
    pub fn from_yaml(text: &str) -> Result<Self, DraftError> {
        if text.len() > MAX_FILE_BYTES {
            return Err(DraftError::TooLarge);
        }
        let written: Written =
            serde_saphyr::from_str(text).map_err(|error| DraftError::Syntax(error.to_string()))?;
        written.parse()
    }

    /// Reads JSON: the canonical form, or one with a user's shorthands.
    pub fn from_json(text: &str) -> Result<Self, DraftError> {
        // A canonical form is within this by its own bound.
        if text.len() > MAX_FILE_BYTES {
            return Err(DraftError::TooLarge);
        }
        let written: Written =
            serde_json::from_str(text).map_err(|error| DraftError::Syntax(error.to_string()))?;
        written.parse()
    }

    /// The policy, where nothing else has a say.
    pub fn into_policy(self) -> Result<Policy, DraftError> {
        let default = self.default.unwrap_or_else(|| implied_default(&self.rules));
        Ok(Policy::new(
            default,
            self.mode.unwrap_or_default(),
            self.rules,
        )?)
    }
}

/// Where nobody says what the default is: who lists what may be reached on the web means that nothing else may.
pub(crate) fn implied_default(rules: &[Rule]) -> Effect {
    let admits_web = |rule: &Rule| {
        rule.action != RuleAction::Deny
            && rule.port.is_none_or(|port| WEB_PORTS.contains(&port))
            && (rule.requests.is_empty() || rule.lists(Effect::Allow))
    };
    if rules.iter().any(admits_web) {
        Effect::Deny
    } else {
        Effect::Allow
    }
}

impl<'de> Deserialize<'de> for Draft {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Written::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// `HOST[:PORT]`, as `--allow` and `--deny` take it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RuleArgument {
    host: HostPattern,
    port: Option<u16>,
}

impl FromStr for RuleArgument {
    type Err = DraftError;

    fn from_str(text: &str) -> Result<Self, DraftError> {
        let refuse = |reason: String| {
            DraftError::Argument(format!(
                "{} is not HOST[:PORT], such as api.example.com, *.example.com or git.example.com:22: {reason}",
                shown(text)
            ))
        };
        if text.contains('/') {
            return Err(refuse(
                "rules for paths and methods go into a file, see `--firewall`".to_owned(),
            ));
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (
                host,
                Some(parse_port(port).ok_or_else(|| refuse(PORT_RULE.to_owned()))?),
            ),
            None => (text, None),
        };
        let host = host.parse().map_err(|error| refuse(format!("{error}")))?;
        Ok(Self { host, port })
    }
}

impl fmt::Display for RuleArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}:{port}", self.host),
            None => write!(f, "{}", self.host),
        }
    }
}

impl From<RuleArgument> for String {
    fn from(argument: RuleArgument) -> Self {
        argument.to_string()
    }
}

impl TryFrom<String> for RuleArgument {
    type Error = DraftError;

    fn try_from(text: String) -> Result<Self, DraftError> {
        text.parse()
    }
}

impl RuleArgument {
    /// The rule that allows it.
    pub fn allow(&self) -> Rule {
        self.rule(RuleAction::Allow)
    }

    /// The rule that denies it.
    pub fn deny(&self) -> Rule {
        self.rule(RuleAction::Deny)
    }

    fn rule(&self, action: RuleAction) -> Rule {
        let Self { host, port } = self;
        Rule {
            name: derived_name(host, *port),
            scheme: None,
            host: host.clone(),
            port: *port,
            path: RulePath::default(),
            action,
            requests: Vec::new(),
            headers: BTreeMap::new(),
            query: BTreeMap::new(),
        }
    }
}

const PORT_RULE: &str = "a port is a number from 1 to 65535";

fn parse_port(text: &str) -> Option<u16> {
    let digits = !text.starts_with('+') && !text.starts_with('0');
    text.parse().ok().filter(|_| digits)
}

/// A rule that its author gave no name is called by its host.
fn derived_name(host: &HostPattern, port: Option<u16>) -> RuleName {
    let mut name = host.to_string();
    if let Some(port) = port {
        name.push_str(&format!(":{port}"));
    }
    // A host may be called like a decision of ours, or be longer than a name.
    let marked = format!("host:{}", name.chars().take(120).collect::<String>());
    [name, marked]
        .iter()
        .find_map(|name| name.parse().ok())
        .unwrap_or_else(RuleName::unnamed)
}

/// The text's shape; every string is parsed in [`Written::parse`], where its place is known.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: Option<u32>,
    default: Option<Effect>,
    mode: Option<Mode>,
    #[serde(default)]
    rules: Vec<WrittenRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRule {
    name: Option<String>,
    base: Option<String>,
    scheme: Option<Scheme>,
    host: Option<String>,
    port: Option<i64>,
    path: Option<String>,
    action: Option<RuleAction>,
    #[serde(default)]
    requests: Vec<WrittenRequest>,
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    deny: Vec<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(default)]
    query: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRequest {
    action: Effect,
    method: String,
    path: String,
}

impl Written {
    fn parse(self) -> Result<Draft, DraftError> {
        if let Some(version) = self.version.filter(|version| *version != 1) {
            return Err(DraftError::Version(version));
        }
        let rule = |(at, written): (usize, WrittenRule)| {
            written.parse().map_err(|Bad(key, reason)| {
                let key = if key.is_empty() {
                    format!("rules[{at}]")
                } else {
                    format!("rules[{at}].{key}")
                };
                DraftError::Value { key, reason }
            })
        };
        let rules = self
            .rules
            .into_iter()
            .enumerate()
            .map(rule)
            .collect::<Result<_, _>>()?;
        Ok(Draft {
            default: self.default,
            mode: self.mode,
            rules,
        })
    }
}

impl WrittenRule {
    fn parse(mut self) -> Result<Rule, Bad> {
        self.unfold_base()?;
        let host = self.host.as_deref().ok_or_else(|| {
            Bad::new("", "it names no host; write `host: api.example.com` or `base: https://api.example.com/path`")
        })?;
        let host: HostPattern = host.parse().map_err(|error| Bad::new("host", error))?;
        let port = match self.port {
            None => None,
            Some(port) => {
                let port = u16::try_from(port).ok().filter(|port| *port != 0);
                Some(port.ok_or_else(|| Bad::new("port", PORT_RULE))?)
            }
        };
        let name = match &self.name {
            Some(name) => name.parse().map_err(|error| Bad::new("name", error))?,
            None => derived_name(&host, port),
        };
        let path = self
            .path
            .as_deref()
            .unwrap_or_default()
            .parse()
            .map_err(|error| Bad::new("path", error))?;
        let rule = Rule {
            name,
            scheme: self.scheme,
            host,
            port,
            path,
            action: self.action.unwrap_or_default(),
            requests: self.requests()?,
            headers: headers(&self.headers)?,
            query: query(&self.query)?,
        };
        sensible(rule)
    }

    /// `base` says in one what `scheme`, `host`, `port` and `path` say apart.
    fn unfold_base(&mut self) -> Result<(), Bad> {
        let Some(base) = self.base.take() else {
            return Ok(());
        };
        let refuse = |reason: &str| {
            Bad::new(
                "base",
                format!(
                    "{} is not a URL such as https://api.example.com/v1: {reason}",
                    shown(&base)
                ),
            )
        };
        if self.scheme.is_some()
            || self.host.is_some()
            || self.port.is_some()
            || self.path.is_some()
        {
            return Err(refuse(
                "where there is a `base`, scheme, host, port and path are part of it",
            ));
        }
        let (scheme, rest) = base
            .split_once("://")
            .ok_or_else(|| refuse("it begins with https:// or http://"))?;
        let (scheme, usual_port) = match scheme.to_ascii_lowercase().as_str() {
            "https" => (Scheme::Https, 443),
            "http" => (Scheme::Http, 80),
            _ => return Err(refuse("it begins with https:// or http://")),
        };
        if rest.contains(['@', '?', '#', '\\']) {
            return Err(refuse(
                "it has no user, query or fragment; `headers` and `query` set what requests need",
            ));
        }
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (host, parse_port(port).ok_or_else(|| refuse(PORT_RULE))?),
            None => (authority, usual_port),
        };
        self.scheme = Some(scheme);
        self.host = Some(host.to_owned());
        self.port = Some(port.into());
        self.path = Some(path.to_owned());
        Ok(())
    }

    /// `requests`, then what `deny` and `allow` list: in a rule, denials win whatever their place.
    fn requests(&self) -> Result<Vec<Request>, Bad> {
        let mut requests = Vec::new();
        for (
            at,
            WrittenRequest {
                action,
                method,
                path,
            },
        ) in self.requests.iter().enumerate()
        {
            let bad = |key: &str, error: String| Bad::new(&format!("requests[{at}].{key}"), error);
            requests.push(Request {
                action: *action,
                method: method
                    .parse()
                    .map_err(|error: PolicyError| bad("method", error.to_string()))?,
                path: path
                    .parse()
                    .map_err(|error: crate::path::PathError| bad("path", error.to_string()))?,
            });
        }
        for (key, action, lines) in [
            ("deny", Effect::Deny, &self.deny),
            ("allow", Effect::Allow, &self.allow),
        ] {
            for (at, line) in lines.iter().enumerate() {
                let bad = |reason: String| Bad::new(&format!("{key}[{at}]"), reason);
                let (method, path) = line.split_once(' ').ok_or_else(|| {
                    bad(format!(
                        "{} is not a method and a path such as `GET /items/{{id}}`",
                        shown(line)
                    ))
                })?;
                requests.push(Request {
                    action,
                    method: method
                        .parse()
                        .map_err(|error: PolicyError| bad(error.to_string()))?,
                    path: path
                        .trim_start()
                        .parse()
                        .map_err(|error: crate::path::PathError| bad(error.to_string()))?,
                });
            }
        }
        Ok(requests)
    }
}

/// Refuses combinations that could not do what they say.
fn sensible(mut rule: Rule) -> Result<Rule, Bad> {
    let sets_fields = !rule.headers.is_empty() || !rule.query.is_empty();
    if let Some(port) = rule.port.filter(|port| !WEB_PORTS.contains(port)) {
        if rule.scheme.is_some()
            || !rule.path.is_empty()
            || !rule.requests.is_empty()
            || sets_fields
        {
            return Err(Bad::new(
                "port",
                format!(
                    "only ports 80 and 443 go through the proxy, so a rule for port {port} opens or closes it as a \
                     whole: it has no base, scheme, path, requests, headers and query"
                ),
            ));
        }
        if rule.action == RuleAction::Passthrough {
            return Err(Bad::new(
                "action",
                format!("connections to port {port} are not intercepted; write `allow`"),
            ));
        }
    }
    match rule.action {
        RuleAction::Allow => {}
        RuleAction::Deny if !rule.requests.is_empty() => {
            return Err(Bad::new(
                "action",
                "a rule that denies everything lists no requests; leave one of them out",
            ));
        }
        RuleAction::Deny if sets_fields => {
            return Err(Bad::new(
                "action",
                "what is denied gets no headers and no query",
            ));
        }
        RuleAction::Deny => {}
        RuleAction::Passthrough => {
            let sees_requests = !rule.path.is_empty() || !rule.requests.is_empty() || sets_fields;
            if sees_requests || rule.scheme == Some(Scheme::Http) || rule.port == Some(80) {
                return Err(Bad::new(
                    "action",
                    "passthrough forwards TLS unseen, so the rule has no http, path, requests, headers and query",
                ));
            }
            rule.scheme = Some(Scheme::Https);
        }
    }
    if rule.scheme == Some(Scheme::Http) && rule.secrets().next().is_some() {
        return Err(Bad::new(
            "headers",
            "secrets are never sent over http; write the base with https",
        ));
    }
    Ok(rule)
}
