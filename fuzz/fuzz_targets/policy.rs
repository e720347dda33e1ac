//! Whatever a user writes as a policy, and whatever a guest sends as a request, name or log line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use policy::{Draft, Host, HttpRequest, Policy, Scheme};

fuzz_target!(|input: (&str, &str, &str, &str, u16, bool)| {
    let (text, host, method, path, port, tls) = input;
    drop(policy::log::Line::parse(text));
    drop(policy::wire::FromProxy::parse(text.as_bytes()));
    let Ok(policy) = Draft::from_yaml(text).and_then(Draft::into_policy) else { return };
    assert_eq!(Policy::from_json(&policy.to_json()).expect("its canonical form"), policy);
    let scheme = if tls { Scheme::Https } else { Scheme::Http };
    let decision = policy.decide(&HttpRequest { scheme, host, port, method, path });
    policy.decide_tls(Some(host), port);
    if let Ok(name) = Host::parse(host) {
        assert!(!decision.passes() || port == 0 || policy.decide_name(&name).passes());
        policy.open_ports(&name);
    }
});
