//! The Web API of a runner's jobs: its webhooks can be reached by every job, and nothing else of it.

use std::collections::BTreeMap;

use crate::host::{Host, HostPattern};
use crate::policy::{
    Effect, Method, Policy, PolicyError, Request, Rule, RuleAction, RuleName, Scheme,
};

/// Where the guest agent's webhooks are, below the API's address.
const WEBHOOKS: &str = "/api/webhooks/agent";
/// What the guest agent posts to, below that.
const OPEN: [&str; 5] = [
    "/heartbeat",
    "/events",
    "/telemetry",
    "/checkpoints",
    "/complete",
];
const NAME: &str = "vm0-api";

/// What the runner itself admits for its jobs, whatever their policies say. No job file and no configuration of a
/// policy makes one: only the daemon, from the address at which it takes its jobs.
#[derive(Clone, Debug)]
pub struct ApiAccess {
    host: Host,
    port: u16,
    rules: [Rule; 2],
}

impl ApiAccess {
    /// The API at this address; `prefix` is the path before `/api`, mostly empty.
    ///
    /// # Errors
    ///
    /// A sentence about what of it no rule can be made of: an IPv6 address, a path that is no path.
    pub fn new(scheme: Scheme, host: &str, port: u16, prefix: &str) -> Result<Self, String> {
        let host = Host::parse(host).map_err(|error| error.to_string())?;
        let name: RuleName = NAME.parse().map_err(|_| "no name".to_owned())?;
        let path = format!("{}{WEBHOOKS}", prefix.trim_end_matches('/'));
        let webhooks = Rule {
            name: name.clone(),
            scheme: Some(scheme),
            host: HostPattern::Exactly(host.clone()),
            port: Some(port),
            path: path.parse().map_err(|error| format!("{path}: {error}"))?,
            action: RuleAction::Allow,
            requests: OPEN
                .iter()
                .map(|path| {
                    let path = path.parse().map_err(|error| format!("{path}: {error}"))?;
                    let method = Method::One("POST".to_owned());
                    Ok(Request {
                        action: Effect::Allow,
                        method,
                        path,
                    })
                })
                .collect::<Result<_, String>>()?,
            headers: BTreeMap::new(),
            query: BTreeMap::new(),
        };
        let rest = Rule {
            scheme: None,
            path: "".parse().map_err(|_| "no path".to_owned())?,
            action: RuleAction::Deny,
            requests: Vec::new(),
            ..webhooks.clone()
        };
        Ok(Self {
            host,
            port,
            rules: [webhooks, rest],
        })
    }

    /// Its name or address.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its port, which may be one that otherwise does not go through the proxy.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A job's policy with the API before everything else.
    ///
    /// # Errors
    ///
    /// The policy is as large as one may be already.
    pub fn over(&self, policy: &Policy) -> Result<Policy, PolicyError> {
        policy.with_rules_first(self.rules.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Action, Draft, HttpRequest};

    fn decide(policy: &Policy, scheme: Scheme, port: u16, method: &str, path: &str) -> Action {
        let request = HttpRequest {
            scheme,
            host: "api.example.com",
            port,
            method,
            path,
        };
        policy.decide(&request).action
    }

    #[test]
    fn the_webhooks_are_open_and_nothing_else_of_the_api_is() {
        // A job that may reach nothing, one that may reach all, one that names the API itself.
        for text in [
            "{default: deny}",
            "{default: allow}",
            "rules: [{host: api.example.com, port: 8443}]",
        ] {
            let own = Draft::from_yaml(text).unwrap().into_policy().unwrap();
            let api = ApiAccess::new(Scheme::Https, "API.example.com.", 8443, "/").unwrap();
            let policy = api.over(&own).unwrap();
            let decide =
                |method: &str, path: &str| decide(&policy, Scheme::Https, 8443, method, path);
            for name in OPEN {
                assert_eq!(decide("POST", &format!("{WEBHOOKS}{name}")), Action::Allow);
                assert_eq!(decide("GET", &format!("{WEBHOOKS}{name}")), Action::Deny);
                let deeper = format!("{WEBHOOKS}{name}/more");
                assert_eq!(decide("POST", &deeper), Action::Deny);
            }
            for path in [
                "/",
                "/api/runs",
                "/api/webhooks/agent",
                "/api/webhooks/agent/firewall/auth",
                "/api/webhooks/agent/heartbeat/../../../runs",
                "/api/webhooks/agent/%2e%2e%2fheartbeat",
                "//api/runners/poll",
            ] {
                assert_eq!(decide("POST", path), Action::Deny, "{text} {path}");
            }
            let clear = format!("{WEBHOOKS}/heartbeat");
            let clear = super::tests::decide(&policy, Scheme::Http, 8443, "POST", &clear);
            assert_eq!(clear, Action::Deny);
            // Through the proxy only, and its name resolves.
            assert!(policy.open_ports(api.host()).is_empty());
            assert!(policy.decide_name(api.host()).passes());
        }
    }

    #[test]
    fn an_api_below_a_path_and_one_at_an_address_are_understood() {
        let api = ApiAccess::new(Scheme::Http, "198.18.0.1", 8080, "/vm0").unwrap();
        let policy = api.over(&Policy::default()).unwrap();
        let decide = |path: &str| {
            let request = HttpRequest {
                scheme: Scheme::Http,
                host: "198.18.0.1:8080",
                port: 8080,
                method: "post",
                path,
            };
            policy.decide(&request).action
        };
        assert_eq!(decide("/vm0/api/webhooks/agent/events"), Action::Allow);
        assert_eq!(decide("/api/webhooks/agent/events"), Action::Deny);
        assert!(policy.open_addresses().is_empty());
        assert!(ApiAccess::new(Scheme::Http, "::1", 80, "").is_err());
    }
}
