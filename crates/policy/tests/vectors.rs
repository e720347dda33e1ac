//! The vectors that this crate and the proxy's addon share (`vectors/*.json`).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::path::Path;

use policy::{
    Draft, Host, HostPattern, HttpRequest, PathPattern, Policy, RequestPath, RuleArgument,
    RulePath, Tls, merge,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn vectors<T: DeserializeOwned>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("vectors")
        .join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// All that went wrong at once: a change of meaning shows in more than one vector.
#[derive(Default)]
struct Report(Vec<String>, usize);

impl Report {
    fn same<T: PartialEq + std::fmt::Debug>(
        &mut self,
        what: impl std::fmt::Debug,
        got: T,
        want: T,
    ) {
        self.1 += 1;
        if got != want {
            self.0
                .push(format!("{what:?}\n  got  {got:?}\n  want {want:?}"));
        }
    }

    fn end(self, at_least: usize) {
        assert!(
            self.0.is_empty(),
            "{} vectors fail:\n{}",
            self.0.len(),
            self.0.join("\n")
        );
        assert!(
            self.1 >= at_least,
            "only {} vectors: were some lost?",
            self.1
        );
    }
}

#[derive(Debug, Deserialize)]
struct Outcome {
    canonical: Option<Value>,
    rule: Option<Value>,
    error: Option<String>,
}

impl Outcome {
    fn compare(&self, report: &mut Report, what: &str, got: Result<Value, String>) {
        match (&self.error, got) {
            (None, got) => report.same(
                what,
                got,
                Ok(self.canonical.clone().or(self.rule.clone()).unwrap()),
            ),
            (Some(part), Err(error)) => {
                report.same((what, &error), error.contains(part.as_str()), true)
            }
            (Some(part), Ok(policy)) => report.same(what, Ok(policy), Err(part.clone())),
        }
    }
}

#[test]
fn what_users_write_becomes_the_canonical_form_or_an_error_that_says_where() {
    #[derive(Deserialize)]
    struct Canonical {
        files: Vec<File>,
        arguments: Vec<Argument>,
        merges: Vec<Merge>,
    }
    #[derive(Deserialize)]
    struct File {
        yaml: String,
        #[serde(flatten)]
        outcome: Outcome,
    }
    #[derive(Deserialize)]
    struct Argument {
        argument: String,
        #[serde(flatten)]
        outcome: Outcome,
    }
    #[derive(Deserialize)]
    struct Merge {
        operator: String,
        job: String,
        #[serde(flatten)]
        outcome: Outcome,
    }
    let Canonical {
        files,
        arguments,
        merges,
    } = vectors("canonical.json");
    let mut report = Report::default();
    let value = |policy: &Policy| serde_json::to_value(policy).unwrap();
    for File { yaml, outcome } in &files {
        let parsed = Draft::from_yaml(yaml).and_then(Draft::into_policy);
        outcome.compare(
            &mut report,
            yaml,
            parsed.as_ref().map(value).map_err(ToString::to_string),
        );
        if let Ok(policy) = parsed {
            let text = policy.to_json();
            report.same(
                ("as JSON", yaml),
                Policy::from_json(&text).unwrap(),
                policy.clone(),
            );
            report.same(
                ("as YAML", yaml),
                Draft::from_yaml(&text).unwrap().into_policy().unwrap(),
                policy,
            );
        }
    }
    for Argument { argument, outcome } in &arguments {
        let rule = argument
            .parse::<RuleArgument>()
            .map(|argument| serde_json::to_value(argument.allow()).unwrap());
        outcome.compare(
            &mut report,
            argument,
            rule.map_err(|error| error.to_string()),
        );
    }
    for Merge {
        operator,
        job,
        outcome,
    } in &merges
    {
        let merged = merge(
            &Draft::from_yaml(operator).unwrap(),
            &Draft::from_yaml(job).unwrap(),
        );
        let merged = merged.as_ref().map(value).map_err(ToString::to_string);
        outcome.compare(&mut report, &format!("{operator} + {job}"), merged);
    }
    report.end(120);
}

#[derive(Deserialize)]
struct Decided {
    policy: String,
    #[serde(alias = "name")]
    host: String,
    #[serde(default)]
    port: u16,
    action: Value,
    rule: String,
}

#[test]
fn requests_connections_and_server_names_are_decided_as_the_vectors_say() {
    #[derive(Deserialize)]
    struct Decide {
        policies: BTreeMap<String, Policy>,
        requests: Vec<Request>,
        tls: Vec<ServerName>,
        connections: Vec<Decided>,
    }
    #[derive(Deserialize)]
    struct Request {
        #[serde(flatten)]
        decided: Decided,
        scheme: policy::Scheme,
        method: String,
        path: String,
    }
    #[derive(Deserialize)]
    struct ServerName {
        policy: String,
        server_name: Option<String>,
        port: u16,
        passthrough: Option<String>,
    }
    let Decide {
        policies,
        requests,
        tls,
        connections,
    } = vectors("decide.json");
    let mut report = Report::default();
    for Request {
        decided:
            Decided {
                policy,
                host,
                port,
                action,
                rule,
            },
        scheme,
        method,
        path,
    } in requests
    {
        let request = HttpRequest {
            scheme,
            host: &host,
            port,
            method: &method,
            path: &path,
        };
        let decision = policies[&policy].decide(&request);
        let got = (
            serde_json::to_value(decision.action).unwrap(),
            decision.by.to_string(),
        );
        report.same(
            (&policy, &method, scheme, &host, &path),
            got,
            (action, rule),
        );
    }
    for ServerName {
        policy,
        server_name,
        port,
        passthrough,
    } in tls
    {
        let got = match policies[&policy].decide_tls(server_name.as_deref(), port) {
            Tls::Intercept => None,
            Tls::Passthrough(rule) => Some(rule.name().to_string()),
        };
        report.same((policy, server_name), got, passthrough);
    }
    for Decided {
        policy,
        host,
        port,
        action,
        rule,
    } in connections
    {
        let policy = &policies[&policy];
        let parsed: Host = host.parse().unwrap();
        let decision = policy.decide_connection(&parsed, port);
        let got = (
            serde_json::to_value(decision.action).unwrap(),
            decision.by.to_string(),
        );
        report.same(
            (&host, port),
            policy.open_ports(&parsed).contains(&port),
            action == "ALLOW",
        );
        report.same((&host, port), got, (action, rule));
    }
    let open: Vec<_> = policies["ports"]
        .open_addresses()
        .into_iter()
        .map(|(a, p)| format!("{a}:{p}"))
        .collect();
    report.same(
        "ports",
        open,
        vec!["198.18.0.9:5432".to_owned(), "198.18.0.9:6379".to_owned()],
    );
    report.end(220);
}

#[test]
fn names_have_one_spelling_match_patterns_and_resolve_as_the_vectors_say() {
    #[derive(Deserialize)]
    struct Names {
        hosts: Vec<Authority>,
        matches: Vec<Match>,
        policies: BTreeMap<String, Policy>,
        resolve: Vec<Decided>,
    }
    #[derive(Deserialize)]
    struct Authority {
        host: String,
        port: u16,
        canonical: Option<String>,
    }
    #[derive(Deserialize)]
    struct Match {
        pattern: HostPattern,
        host: String,
        matches: bool,
    }
    let Names {
        hosts,
        matches,
        policies,
        resolve,
    } = vectors("names.json");
    let mut report = Report::default();
    for Authority {
        host,
        port,
        canonical,
    } in hosts
    {
        let got = Host::parse_authority(&host, port)
            .ok()
            .map(|host| host.to_string());
        report.same(host, got, canonical);
    }
    for Match {
        pattern,
        host,
        matches,
    } in matches
    {
        report.same(
            (&pattern, &host),
            pattern.matches(&host.parse().unwrap()),
            matches,
        );
    }
    for Decided {
        policy,
        host,
        port: _,
        action,
        rule,
    } in resolve
    {
        let decision = policies[&policy].decide_name(&host.parse().unwrap());
        let got = (
            serde_json::to_value(decision.action).unwrap(),
            decision.by.to_string(),
        );
        report.same((policy, host), got, (action, rule));
    }
    report.end(110);
}

#[test]
fn paths_have_one_spelling_or_none_and_match_patterns_as_the_vectors_say() {
    #[derive(Deserialize)]
    struct Paths {
        normal: Vec<Normal>,
        patterns: Vec<Match>,
        prefixes: Vec<Prefix>,
        bad_patterns: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Normal {
        path: String,
        normal: Option<String>,
    }
    #[derive(Deserialize)]
    struct Match {
        pattern: String,
        path: String,
        matches: bool,
    }
    #[derive(Deserialize)]
    struct Prefix {
        prefix: String,
        path: String,
        rest: Option<String>,
    }
    let Paths {
        normal,
        patterns,
        prefixes,
        bad_patterns,
    } = vectors("paths.json");
    let mut report = Report::default();
    let joined = |segments: &[String]| format!("/{}", segments.join("/"));
    let segments = |path: &str| match RequestPath::parse(path) {
        RequestPath::Segments(segments) => Some(segments),
        RequestPath::Ambiguous => None,
    };
    for Normal { path, normal } in normal {
        report.same(
            &path,
            segments(&path).map(|segments| joined(&segments)),
            normal,
        );
    }
    for Match {
        pattern,
        path,
        matches,
    } in patterns
    {
        let parsed: PathPattern = pattern.parse().unwrap();
        report.same(
            (pattern, &path),
            parsed.matches(&segments(&path).unwrap()),
            matches,
        );
    }
    for Prefix { prefix, path, rest } in prefixes {
        let parsed: RulePath = prefix.parse().unwrap();
        report.same(
            (prefix, &path),
            parsed.rest(&segments(&path).unwrap()).map(joined),
            rest,
        );
    }
    for pattern in bad_patterns {
        report.same(&pattern, pattern.parse::<PathPattern>().is_err(), true);
    }
    report.end(190);
}
