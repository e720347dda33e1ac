//! Decisions. Rules are looked at in order and the first decision stands (`docs/network.md`).

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::host::{Host, HostPattern};
use crate::path::RequestPath;
use crate::policy::{Effect, Mode, Policy, Request, Rule, RuleAction, Scheme, WEB_PORTS};

/// What becomes of a request, connection or query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// It passes.
    Allow,
    /// It is refused.
    Deny,
    /// It passes, and would not if the policy were enforced. No secret goes with it.
    Audit,
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By<'p> {
    /// A rule as a whole.
    Rule(&'p Rule),
    /// A request that the rule lists.
    Request(&'p Rule, &'p Request),
    /// No rule, so the default.
    Default,
    /// Nothing had to: it is not a request that could be sent anywhere, and denied in every mode.
    Invalid,
}

impl<'p> By<'p> {
    /// The rule.
    pub fn rule(&self) -> Option<&'p Rule> {
        match *self {
            Self::Rule(rule) | Self::Request(rule, _) => Some(rule),
            Self::Default | Self::Invalid => None,
        }
    }
}

/// As it is logged: `github`, `github/GET /{owner}/{repo}`, `default`, `invalid`.
impl fmt::Display for By<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => rule.name.fmt(f),
            Self::Request(rule, request) => write!(f, "{}/{request}", rule.name),
            Self::Default => f.write_str("default"),
            Self::Invalid => f.write_str("invalid"),
        }
    }
}

/// A decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision<'p> {
    /// What becomes of it.
    pub action: Action,
    /// What decided.
    pub by: By<'p>,
}

impl Decision<'_> {
    /// Whether it passes, if only for an audit.
    pub fn passes(&self) -> bool {
        self.action != Action::Deny
    }
}

/// A request as the proxy sees it.
#[derive(Clone, Copy, Debug)]
pub struct HttpRequest<'a> {
    /// Through TLS or not.
    pub scheme: Scheme,
    /// The `Host` header or authority, as it was sent.
    pub host: &'a str,
    /// The connection's port.
    pub port: u16,
    /// The method, as it was sent.
    pub method: &'a str,
    /// The target's path, as it was sent; a query may follow.
    pub path: &'a str,
}

/// What the proxy does with a TLS connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls<'p> {
    /// Ends it and looks at the requests.
    Intercept,
    /// Forwards it untouched, by this rule.
    Passthrough(&'p Rule),
}

impl Policy {
    /// Decides about a request.
    pub fn decide(&self, request: &HttpRequest<'_>) -> Decision<'_> {
        let Ok(host) = Host::parse_authority(request.host, request.port) else {
            return Decision {
                action: Action::Deny,
                by: By::Invalid,
            };
        };
        let path = RequestPath::parse(request.path);
        self.rules()
            .iter()
            .filter(|rule| rule.scheme.is_none_or(|scheme| scheme == request.scheme))
            .filter(|rule| rule.is_about(&host, request.port))
            .find_map(|rule| rule.decide(request.method, &path))
            .map_or_else(
                || self.by_default(request.port),
                |(effect, by)| self.decision(effect, by),
            )
    }

    /// Where no rule decides: ports that are not the web's are opened by rules only, neither by default nor by audit.
    fn by_default(&self, port: u16) -> Decision<'_> {
        if WEB_PORTS.contains(&port) {
            return self.decision(self.default_effect(), By::Default);
        }
        Decision {
            action: Action::Deny,
            by: By::Default,
        }
    }

    /// Decides what to do with a TLS connection that names this server.
    ///
    /// The first rule about the server decides: behind one that may deny some of its requests, nothing may pass
    /// unseen.
    pub fn decide_tls(&self, server_name: Option<&str>, port: u16) -> Tls<'_> {
        let host = server_name.and_then(|name| Host::parse(name).ok());
        let first = host.and_then(|host| {
            self.rules()
                .iter()
                .filter(|rule| rule.scheme != Some(Scheme::Http))
                .find(|rule| rule.is_about(&host, port))
        });
        match first {
            Some(rule) if rule.action == RuleAction::Passthrough => Tls::Passthrough(rule),
            _ => Tls::Intercept,
        }
    }

    /// Decides whether a name may be resolved. With default `allow` every name may: whoever connects is answered
    /// by the proxy with the reason. With default `deny` only those that some rule could let pass; a query for any
    /// other could carry data away.
    pub fn decide_name(&self, name: &Host) -> Decision<'_> {
        if self.default_effect() == Effect::Allow {
            return self.decision(Effect::Allow, By::Default);
        }
        for rule in self.rules().iter().filter(|rule| rule.host.matches(name)) {
            match rule.action {
                RuleAction::Deny
                    if rule.scheme.is_none() && rule.port.is_none() && rule.path.is_empty() =>
                {
                    return self.decision(Effect::Deny, By::Rule(rule));
                }
                RuleAction::Deny => {}
                RuleAction::Allow if !rule.requests.is_empty() && !rule.lists(Effect::Allow) => {}
                RuleAction::Allow | RuleAction::Passthrough => {
                    return self.decision(Effect::Allow, By::Rule(rule));
                }
            }
        }
        self.decision(Effect::Deny, By::Default)
    }

    /// Decides about a connection that does not go through the proxy: a port other than 80 and 443. Only a rule opens
    /// one; neither the default nor audit mode does, since the kernel refuses them.
    pub fn decide_connection(&self, host: &Host, port: u16) -> Decision<'_> {
        let first = if WEB_PORTS.contains(&port) {
            None
        } else {
            self.rules().iter().find(|rule| rule.is_about(host, port))
        };
        match first {
            Some(rule) if rule.action == RuleAction::Allow => Decision {
                action: Action::Allow,
                by: By::Rule(rule),
            },
            Some(rule) => Decision {
                action: Action::Deny,
                by: By::Rule(rule),
            },
            None => Decision {
                action: Action::Deny,
                by: By::Default,
            },
        }
    }

    /// The tcp ports that rules open at a host, in ascending order.
    pub fn open_ports(&self, host: &Host) -> Vec<u16> {
        let mut decided = BTreeSet::new();
        let mut open = BTreeSet::new();
        for rule in self.rules().iter().filter(|rule| rule.host.matches(host)) {
            match rule.port {
                None if rule.action == RuleAction::Deny => break,
                Some(port)
                    if !WEB_PORTS.contains(&port)
                        && decided.insert(port)
                        && rule.action == RuleAction::Allow
                        // The runner's API: whoever sees requests is the proxy.
                        && rule.requests.is_empty() =>
                {
                    open.insert(port);
                }
                _ => {}
            }
        }
        open.into_iter().collect()
    }

    /// The addresses and ports that rules open without a name: no query announces them.
    pub fn open_addresses(&self) -> BTreeSet<(Ipv4Addr, u16)> {
        let addresses: BTreeSet<Ipv4Addr> = self
            .rules()
            .iter()
            .filter_map(|rule| match &rule.host {
                HostPattern::Exactly(Host::Address(address)) => Some(*address),
                _ => None,
            })
            .collect();
        addresses
            .into_iter()
            .flat_map(|address| {
                self.open_ports(&Host::Address(address))
                    .into_iter()
                    .map(move |port| (address, port))
            })
            .collect()
    }

    fn decision<'p>(&self, effect: Effect, by: By<'p>) -> Decision<'p> {
        let action = match (effect, self.mode()) {
            (Effect::Allow, _) => Action::Allow,
            (Effect::Deny, Mode::Enforce) => Action::Deny,
            (Effect::Deny, Mode::Audit) => Action::Audit,
        };
        Decision { action, by }
    }
}

impl Rule {
    /// What the rule says to a request to its host; nothing if it leaves the decision to the next.
    fn decide(&self, method: &str, path: &RequestPath) -> Option<(Effect, By<'_>)> {
        // The segments below the rule's own path; of an ambiguous path nobody can say.
        let below = match path {
            RequestPath::Segments(segments) => Some(self.path.rest(segments)?),
            RequestPath::Ambiguous => None,
        };
        let whole_host = self.path.is_empty();
        match self.action {
            RuleAction::Deny => return Some((Effect::Deny, By::Rule(self))),
            RuleAction::Allow if !self.requests.is_empty() => {}
            RuleAction::Allow | RuleAction::Passthrough => {
                return (below.is_some() || whole_host).then_some((Effect::Allow, By::Rule(self)));
            }
        }
        let listed = |effect: Effect| {
            self.requests
                .iter()
                .filter(move |request| request.action == effect && request.method.matches(method))
                .find(|request| match below {
                    Some(segments) => request.path.matches(segments),
                    None => effect == Effect::Deny || (whole_host && request.path.is_everything()),
                })
                .map(|request| (effect, By::Request(self, request)))
        };
        let otherwise = || {
            self.lists(Effect::Allow)
                .then_some((Effect::Deny, By::Rule(self)))
        };
        listed(Effect::Deny)
            .or_else(|| listed(Effect::Allow))
            .or_else(otherwise)
    }
}
