//! Who may ask what.

use std::net::Ipv4Addr;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use policy::Action;
use policy::log::{Event, Line};
use policy::ranges::Reach;
use resolver::Limits;

use crate::fixture::{Fixture, OTHER, Opened, PROXY, STRANGER, VM, With, question, receive};

fn shown(line: &Line) -> (Action, Option<&str>, &str, u16, Option<&str>) {
    (
        line.action,
        line.rule.as_deref(),
        &line.host,
        line.port,
        line.error.as_deref(),
    )
}

#[tokio::test]
async fn an_allowed_name_is_opened_logged_and_answered() {
    let fixture = Fixture::start().await;
    fixture
        .upstream
        .has("a.example", &["198.18.0.1", "198.18.0.2"]);
    let answer = fixture.ask(VM, "A.Example", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert!(answer.metadata.recursion_available);
    assert_eq!(
        answer.queries[0].name().to_ascii(),
        "A.Example.",
        "the spelling of the question"
    );
    let addresses = [Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 18, 0, 2)];
    // The answer is here, so all this has happened.
    assert_eq!(
        fixture.directory.opened(),
        [Opened {
            client: Some(VM),
            name: "a.example".to_owned(),
            addresses: addresses.map(Reach::Public).to_vec(),
            ttl: Duration::from_secs(60),
        }]
    );
    let lines = fixture.directory.lines();
    let (run, line) = &lines[0];
    assert_eq!((lines.len(), run.as_str()), (1, "127.0.0.2#1"));
    assert_eq!(
        shown(line),
        (Action::Allow, Some("default"), "a.example", 53, None)
    );
    let Event::Dns { query, answers, .. } = &line.event else {
        panic!("{line:?}")
    };
    assert_eq!((query.as_str(), answers.len()), ("A", 2));
}

#[tokio::test]
async fn two_vms_with_two_policies_get_two_answers() {
    let fixture = Fixture::start().await;
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    fixture.upstream.has("b.example", &["198.18.0.2"]);
    fixture
        .directory
        .register(VM, 1, "rules: [{host: a.example}]");
    fixture.directory.register(
        OTHER,
        1,
        "rules: [{name: db, host: b.example, port: 5432}]\ndefault: deny",
    );
    let none = Vec::<String>::new();
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.1"]);
    assert_eq!(fixture.addresses(VM, "b.example").await, none);
    assert_eq!(fixture.addresses(OTHER, "a.example").await, none);
    assert_eq!(fixture.addresses(OTHER, "b.example").await, ["198.18.0.2"]);
    let lines = fixture.directory.lines();
    let shown: Vec<_> = lines
        .iter()
        .map(|(run, line)| (run.as_str(), shown(line)))
        .collect();
    assert_eq!(
        shown,
        [
            (
                "127.0.0.2#1",
                (Action::Allow, Some("a.example"), "a.example", 53, None)
            ),
            (
                "127.0.0.2#1",
                (Action::Deny, Some("default"), "b.example", 53, None)
            ),
            (
                "127.0.0.3#1",
                (Action::Deny, Some("default"), "a.example", 53, None)
            ),
            (
                "127.0.0.3#1",
                (Action::Allow, Some("db"), "b.example", 53, None)
            ),
        ]
    );
}

#[tokio::test]
async fn a_denied_name_does_not_leave_the_host_whatever_the_type() {
    let fixture = Fixture::start().await;
    fixture.upstream.has("secret.evil.example", &["198.18.0.1"]);
    fixture.directory.register(VM, 1, "default: deny");
    for kind in [
        RecordType::A,
        RecordType::AAAA,
        RecordType::TXT,
        RecordType::ANY,
        RecordType::NS,
    ] {
        let answer = fixture.ask(VM, "secret.evil.example", kind).await;
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::NXDomain,
            "{kind}"
        );
        assert!(answer.authorities.is_empty(), "nobody may keep this");
        let edns = format!("{:?}", answer.edns);
        assert!(edns.contains("Unknown(15"), "the reason: {edns}");
    }
    assert_eq!(fixture.upstream.asked("secret.evil.example"), 0);
    assert!(fixture.directory.opened().is_empty());
    assert!(
        fixture
            .directory
            .lines()
            .iter()
            .all(|(_, line)| line.action == Action::Deny)
    );
}

#[tokio::test]
async fn an_audit_resolves_what_it_would_deny_and_says_so() {
    let fixture = Fixture::start().await;
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    fixture
        .directory
        .register(VM, 1, "{default: deny, mode: audit}");
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.1"]);
    assert_eq!(fixture.directory.lines()[0].1.action, Action::Audit);
}

#[tokio::test]
async fn a_changed_policy_counts_from_the_next_query() {
    let fixture = Fixture::start().await;
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    fixture.directory.register(VM, 1, "default: deny");
    assert!(fixture.addresses(VM, "a.example").await.is_empty());
    fixture.directory.register(VM, 1, "default: allow");
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.1"]);
}

#[tokio::test]
async fn the_proxy_may_ask_for_everything_and_has_no_log() {
    let fixture = Fixture::with(With {
        internal_allow: &["git.corp.example"],
        ..With::default()
    })
    .await;
    fixture.upstream.has("git.corp.example", &["10.0.0.7"]);
    fixture.upstream.has("evil.example", &["127.0.0.1"]);
    assert_eq!(
        fixture.addresses(PROXY, "git.corp.example").await,
        ["10.0.0.7"]
    );
    assert_eq!(fixture.directory.opened()[0].client, None);
    let refused = fixture.ask(PROXY, "evil.example", RecordType::A).await;
    assert_eq!(
        refused.metadata.response_code,
        ResponseCode::NXDomain,
        "the proxy is not sent to loopback either"
    );
    assert!(fixture.directory.lines().is_empty());
}

#[tokio::test]
async fn strangers_are_refused() {
    let fixture = Fixture::start().await;
    let answer = fixture.ask(STRANGER, "a.example", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert_eq!(fixture.upstream.asked("a.example"), 0);
}

#[tokio::test]
async fn names_that_lead_to_refused_addresses_do_not_resolve() {
    let fixture = Fixture::start().await;
    for (host, address, range) in [
        ("a.example", "127.0.0.1", "loopback"),
        ("b.example", "169.254.169.254", "metadata"),
        ("c.example", "10.1.2.3", "private"),
        ("d.example", "100.96.0.9", "shared"),
        ("e.example", "100.127.0.1", "shared"),
        ("f.example", "0.0.0.0", "unspecified"),
        ("g.example", "192.168.241.1", "private"),
    ] {
        fixture.upstream.has(host, &[address]);
        let answer = fixture.ask(VM, host, RecordType::A).await;
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::NXDomain,
            "{host}"
        );
        let lines = fixture.directory.lines();
        let line = &lines.last().unwrap().1;
        assert_eq!(
            shown(line),
            (
                Action::Deny,
                Some(format!("resolver:{range}").as_str()),
                host,
                53,
                None
            )
        );
    }
    assert!(fixture.directory.opened().is_empty());
}

#[tokio::test]
async fn of_a_mixed_answer_only_the_public_addresses_are_passed_on() {
    let fixture = Fixture::start().await;
    fixture
        .upstream
        .has("a.example", &["127.0.0.1", "198.18.0.1", "10.0.0.1"]);
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.1"]);
    assert_eq!(
        fixture.directory.opened()[0].addresses,
        [Reach::Public(Ipv4Addr::new(198, 18, 0, 1))]
    );
    let lines = fixture.directory.lines();
    assert_eq!(
        lines[0].1.error.as_deref(),
        Some("left out: 127.0.0.1 (loopback), 10.0.0.1 (private)")
    );
}

#[tokio::test]
async fn the_operators_exceptions_resolve_and_are_told_apart() {
    let with = With {
        internal_allow: &["*.corp.example", "10.9.0.0/16"],
        ..With::default()
    };
    let fixture = Fixture::with(with).await;
    fixture.upstream.has("git.corp.example", &["10.0.0.7"]);
    fixture.upstream.has("other.example", &["10.9.0.7"]);
    fixture.upstream.has("third.example", &["10.0.0.7"]);
    fixture.upstream.has("self.corp.example", &["127.0.0.1"]);
    assert_eq!(
        fixture.addresses(VM, "git.corp.example").await,
        ["10.0.0.7"]
    );
    assert_eq!(fixture.addresses(VM, "other.example").await, ["10.9.0.7"]);
    assert!(fixture.addresses(VM, "third.example").await.is_empty());
    assert!(fixture.addresses(VM, "self.corp.example").await.is_empty());
    let opened: Vec<_> = fixture
        .directory
        .opened()
        .into_iter()
        .map(|opened| opened.addresses[0])
        .collect();
    assert_eq!(
        opened,
        [[10, 0, 0, 7], [10, 9, 0, 7]].map(|address| Reach::Internal(address.into()))
    );
}

#[tokio::test]
async fn what_a_gone_vm_asked_is_neither_opened_nor_logged_nor_answered_to_the_next() {
    let limits = Limits {
        in_flight: 1,
        ..Limits::default()
    };
    let fixture = Fixture::limited(limits).await;
    let permits = fixture.upstream.holds("slow.example", "198.18.0.1");
    fixture.upstream.has("new.example", &["198.18.0.2"]);
    let socket = fixture.socket(VM).await;
    socket
        .send(&question("slow.example", RecordType::A))
        .await
        .unwrap();
    fixture.upstream.wait_for_questions(1).await;
    fixture.directory.unregister(VM);
    fixture.directory.register(VM, 2, "default: allow");
    permits.add_permits(1);
    // The address has one place: once the next VM gets it, the query of the one before is over.
    loop {
        socket
            .send(&question("new.example", RecordType::A))
            .await
            .unwrap();
        let answer = receive(&socket).await;
        assert_eq!(answer.queries[0].name().to_ascii(), "new.example.");
        if answer.metadata.response_code == ResponseCode::NoError {
            break;
        }
    }
    let opened = fixture.directory.opened();
    assert_eq!((opened.len(), opened[0].name.as_str()), (1, "new.example"));
    let lines = fixture.directory.lines();
    assert!(
        lines
            .iter()
            .all(|(run, line)| run == "127.0.0.2#2" && line.host == "new.example"),
        "{lines:?}"
    );
}

#[tokio::test]
async fn an_address_that_cannot_be_opened_is_not_given_out() {
    let fixture = Fixture::start().await;
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    fixture.directory.fail("the kernel's set is full");
    let answer = fixture.ask(VM, "a.example", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    let lines = fixture.directory.lines();
    assert_eq!(
        lines[0].1.error.as_deref(),
        Some("the answer could not be used: the kernel's set is full")
    );
}
