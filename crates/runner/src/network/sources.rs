//! What a running job's policy is made of: kept apart, so that a change of one part leaves the others as they are.

use policy::{Draft, MergeError, Policy, Rule, merge_under};

/// The parts, in the order in which they hold: rules set on this host, operators, the job.
#[derive(Clone, Debug, Default)]
pub(super) struct Sources {
    /// Rules put before all others while the job ran (`runner policy`), the latest first.
    pub(super) first: Vec<Rule>,
    /// This runner's policy for the profile.
    pub(super) profile: Option<Draft>,
    /// The Web API's, for the group.
    pub(super) group: Option<Draft>,
    /// The job's own, as submitted or as last replaced through the Web API.
    pub(super) wanted: Draft,
}

impl Sources {
    /// What holds.
    pub(super) fn policy(&self) -> Result<Policy, MergeError> {
        let operators: Vec<&Draft> = self.profile.iter().chain(&self.group).collect();
        let merged = merge_under(&operators, &self.wanted)?;
        Ok(merged.with_rules_first(self.first.clone())?)
    }
}

#[cfg(test)]
mod tests {
    use policy::{Action, HttpRequest, RuleArgument, Scheme};

    use super::*;

    fn draft(text: &str) -> Draft {
        Draft::from_yaml(text).unwrap()
    }

    fn reaches(sources: &Sources, host: &str) -> bool {
        let request = HttpRequest {
            scheme: Scheme::Https,
            host,
            port: 443,
            method: "GET",
            path: "/",
        };
        sources.policy().unwrap().decide(&request).action == Action::Allow
    }

    #[test]
    fn what_the_host_and_the_operators_deny_outlives_another_policy_of_the_job() {
        let denied: RuleArgument = "bad.example.com".parse().unwrap();
        let mut sources = Sources {
            first: vec![denied.deny()],
            profile: Some(draft(
                "{default: allow, rules: [{host: never.example.com, action: deny}]}",
            )),
            group: Some(draft("rules: [{host: nor.example.com, action: deny}]")),
            wanted: draft("{default: allow}"),
        };
        for wanted in ["{default: allow}", "rules: [{host: '*.example.com'}]"] {
            sources.wanted = draft(wanted);
            for host in ["bad.example.com", "never.example.com", "nor.example.com"] {
                assert!(!reaches(&sources, host), "{wanted} {host}");
            }
            assert!(reaches(&sources, "good.example.com"));
        }
        // And what the host allows outlives a stricter one.
        let allowed: RuleArgument = "nor.example.com".parse().unwrap();
        sources.first.insert(0, allowed.allow());
        sources.wanted = draft("{default: deny}");
        assert!(reaches(&sources, "nor.example.com"));
        assert!(!reaches(&sources, "good.example.com"));
    }
}
