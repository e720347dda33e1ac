//! What holds for every policy and every request.
#![cfg(test)]

mod arbitrary;

use arbitrary::{file, host, method, path};
use policy::{
    Action, By, Draft, Effect, Host, HostPattern, HttpRequest, Mode, PathPattern, Policy,
    RequestPath, Scheme, Tls, merge,
};
use proptest::prelude::*;

fn parsed(text: &str) -> Policy {
    Draft::from_yaml(text)
        .unwrap_or_else(|error| panic!("{error}: {text}"))
        .into_policy()
        .unwrap()
}

proptest! {
    /// Whatever a user may write, its canonical form is itself a policy that means the same.
    #[test]
    fn the_canonical_form_is_read_back_as_it_is(text in file()) {
        let policy = parsed(&text);
        let canonical = policy.to_json();
        prop_assert_eq!(&Policy::from_json(&canonical).unwrap(), &policy);
        prop_assert_eq!(parsed(&canonical).to_json(), canonical);
    }

    #[test]
    fn every_decision_is_one_and_the_same_twice(
        text in file(), host in host(), port: u16, method in method(), path in path(), tls: bool,
    ) {
        let policy = parsed(&text);
        let scheme = if tls { Scheme::Https } else { Scheme::Http };
        for port in [80, 443, port] {
            let request = HttpRequest { scheme, host: &host, port, method: &method, path: &path };
            let decision = policy.decide(&request);
            prop_assert_eq!(decision, policy.decide(&request));
            // Nothing passes that has no name, and nothing is denied by an audit but that and what is not the web.
            let valid = Host::parse_authority(&host, port).is_ok();
            prop_assert_eq!(decision.by == By::Invalid, !valid);
            prop_assert!(valid || decision.action == Action::Deny);
            let web = [80, 443].contains(&port);
            prop_assert!(policy.mode() == Mode::Enforce || !valid || !web || decision.action != Action::Deny);
            prop_assert!(web || decision.by != By::Default || decision.action == Action::Deny);
            // What passes was allowed by somebody.
            if decision.action == Action::Allow {
                prop_assert!(decision.by.rule().is_some() || policy.default_effect() == Effect::Allow);
            }
            if let Tls::Passthrough(_) = policy.decide_tls(Some(&host), port) {
                prop_assert!(Host::parse(&host).is_ok());
            }
        }
    }

    /// A name that does not resolve belongs to no request that would pass.
    #[test]
    fn what_may_be_asked_for_can_be_resolved(
        text in file(), host in host(), method in method(), path in path(), tls: bool,
    ) {
        let policy = parsed(&text);
        let scheme = if tls { Scheme::Https } else { Scheme::Http };
        let (Ok(name), port) = (Host::parse(&host), if tls { 443 } else { 80 }) else { return Ok(()) };
        let request = HttpRequest { scheme, host: &host, port, method: &method, path: &path };
        if policy.decide(&request).passes() || !policy.open_ports(&name).is_empty() {
            prop_assert!(policy.decide_name(&name).passes());
        }
        for port in policy.open_ports(&name) {
            prop_assert_eq!(policy.decide_connection(&name, port).action, Action::Allow);
        }
    }

    #[test]
    fn without_a_job_an_operators_policy_means_what_it_says(
        operator in file(), host in host(), method in method(), path in path(), tls: bool, port in "(22|443|5432)",
    ) {
        let draft = Draft::from_yaml(&operator).unwrap();
        let [alone, merged] = [draft.clone().into_policy().unwrap(), merge(&draft, &Draft::default()).unwrap()];
        let (scheme, web) = if tls { (Scheme::Https, 443) } else { (Scheme::Http, 80) };
        let request = HttpRequest { scheme, host: &host, port: web, method: &method, path: &path };
        let told = |policy: &Policy| {
            let decision = policy.decide(&request);
            let tls = matches!(policy.decide_tls(Some(&host), 443), Tls::Passthrough(_));
            let name = Host::parse(&host).ok();
            let connection = name.as_ref().map(|name| policy.decide_connection(name, port.parse().unwrap()).action);
            let resolved = name.as_ref().map(|name| policy.decide_name(name).action);
            (decision.action, decision.by.to_string(), tls, connection, resolved)
        };
        prop_assert_eq!(told(&alone), told(&merged));
    }

    /// What the operator denies in so many words stays denied, whatever the job brings.
    #[test]
    fn no_job_lifts_an_operators_denial(
        operator in file(), job in file(), host in host(), method in method(), path in path(), tls: bool,
    ) {
        let [operator, job] = [operator, job].map(|text| Draft::from_yaml(&text).unwrap());
        let (scheme, port) = if tls { (Scheme::Https, 443) } else { (Scheme::Http, 80) };
        let request = HttpRequest { scheme, host: &host, port, method: &method, path: &path };
        let Ok(merged) = merge(&operator, &job) else { return Ok(()) };
        let alone = merge(&operator, &Draft::default()).unwrap();
        let before = alone.decide(&request);
        let in_so_many_words = match before.by {
            By::Rule(rule) => rule.action() == policy::RuleAction::Deny,
            By::Request(_, listed) => listed.action == Effect::Deny,
            By::Default | By::Invalid => false,
        };
        if in_so_many_words && before.action == Action::Deny {
            prop_assert_eq!(merged.decide(&request).action, Action::Deny);
            // Nor does it pass unseen. What an operator passes through on 443 may be denied on 80.
            if tls {
                prop_assert_eq!(merged.decide_tls(Some(&host), 443), Tls::Intercept);
            }
        }
    }

    /// Spelling a path in another way changes no decision about it.
    #[test]
    fn a_path_spelled_normally_is_the_same_path(path in path()) {
        if let RequestPath::Segments(segments) = RequestPath::parse(&path) {
            for segment in &segments {
                prop_assert!(!matches!(segment.as_str(), "" | "." | "..") && !segment.contains('/'));
            }
            let normal = format!("/{}", segments.join("/"));
            prop_assert_eq!(RequestPath::parse(&normal), RequestPath::Segments(segments.clone()));
            let encoded: String = segments
                .iter()
                .map(|segment| {
                    let bytes = segment.bytes().map(|b| if b.is_ascii_alphabetic() { format!("%{b:02x}") } else { char::from(b).to_string() });
                    // What is encoded already stays so.
                    if segment.contains('%') { format!("/{segment}") } else { format!("/{}", bytes.collect::<String>()) }
                })
                .collect();
            prop_assert_eq!(RequestPath::parse(&encoded), RequestPath::Segments(segments));
        }
    }

    #[test]
    fn names_and_patterns_are_read_back_as_they_are_shown(text in "\\PC{0,40}", host in host()) {
        for text in [text, host] {
            if let Ok(host) = Host::parse(&text) {
                prop_assert_eq!(Host::parse(&host.to_string()).unwrap(), host);
            }
            if let Ok(pattern) = text.parse::<HostPattern>() {
                prop_assert_eq!(pattern.to_string().parse::<HostPattern>().unwrap(), pattern);
            }
            if let Ok(pattern) = text.parse::<PathPattern>() {
                prop_assert_eq!(pattern.to_string().parse::<PathPattern>().unwrap(), pattern);
            }
        }
    }

    #[test]
    fn no_text_makes_a_reader_panic(text in "\\PC{0,200}", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        drop(Draft::from_yaml(&text));
        drop(Draft::from_json(&text));
        drop(text.parse::<policy::RuleArgument>());
        drop(policy::InternalAllow::parse(&[&text]));
        drop(policy::log::Line::parse(&text));
        drop(policy::wire::FromProxy::parse(&bytes));
    }
}

#[test]
fn policies_beyond_the_bounds_are_refused() {
    let rules =
        |count: usize, rule: &str| format!("rules:\n{}", format!("- {rule}\n").repeat(count));
    let refused = |text: &str| match Draft::from_yaml(text).and_then(Draft::into_policy) {
        Ok(_) => "it was taken".to_owned(),
        Err(error) => error.to_string(),
    };
    parsed(&rules(1000, "host: a.example"));
    let text = refused(&rules(1001, "host: a.example"));
    assert!(text.contains("1001 rules"), "{text}");
    let requests = "{host: a.example, allow: [GET /a, GET /b, GET /c, GET /d, GET /e, GET /f]}";
    let text = refused(&rules(900, requests));
    assert!(text.contains("5400 requests"), "{text}");
    let text = refused(&format!("#{}", "x".repeat(1 << 20)));
    assert!(text.contains("larger than"), "{text}");

    // Two files that are within the bounds each and not together.
    let header = format!("{{host: a.example, headers: {{X: {}}}}}", "x".repeat(8000));
    let large = parsed(&rules(120, &header));
    let text = match large.with_rules_first(large.rules().to_vec()) {
        Ok(_) => "it was taken".to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(text.contains("bytes in its canonical form"), "{text}");
}
