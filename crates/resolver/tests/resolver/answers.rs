//! Where answers come from.

use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{MX, SRV};
use hickory_proto::rr::{RData, Record, RecordType};
use policy::Action;
use tokio::net::UdpSocket;

use crate::fixture::{
    Fixture, VM, With, addresses, query, question, receive, receive_framed, send_framed,
};
use crate::upstream::{Does, a, cname, name, txt, wrong};

#[tokio::test]
async fn types_that_a_guest_has_no_use_for_are_answered_with_no_record() {
    let fixture = Fixture::start().await;
    for kind in [
        RecordType::AAAA,
        RecordType::HTTPS,
        RecordType::SVCB,
        RecordType::ANY,
        RecordType::PTR,
        RecordType::NS,
        RecordType::AXFR,
        RecordType::NULL,
        RecordType::Unknown(65_280),
    ] {
        let answer = fixture.ask(VM, "a.example", kind).await;
        assert_eq!(
            (answer.metadata.response_code, answer.answers.len()),
            (ResponseCode::NoError, 0),
            "{kind}"
        );
    }
    assert_eq!(fixture.upstream.asked("a.example"), 0);
    assert_eq!(fixture.directory.lines().len(), 9);
}

#[tokio::test]
async fn programs_find_their_servers_by_txt_mx_and_srv() {
    let fixture = Fixture::start().await;
    let record = |data| vec![Record::from_rdata(name("_db._tcp.a.example"), 60, data)];
    for (kind, records) in [
        (RecordType::TXT, vec![txt("_db._tcp.a.example", "ssl=true")]),
        (
            RecordType::MX,
            record(RData::MX(MX::new(1, name("mail.a.example")))),
        ),
        (
            RecordType::SRV,
            record(RData::SRV(SRV::new(1, 2, 27017, name("db.a.example")))),
        ),
    ] {
        let alias = vec![
            cname("_db._tcp.a.example", "x.example", 60),
            a("_db._tcp.a.example", "10.0.0.1", 60),
        ];
        let all = [alias, records.clone()].concat();
        fixture
            .upstream
            .on("_db._tcp.a.example", kind, Does::Answers(all));
        let answer = fixture.ask(VM, "_db._tcp.a.example", kind).await;
        assert_eq!(
            answer.answers, records,
            "{kind}, and nothing that came with it"
        );
    }
    let missing = fixture.ask(VM, "none.example", RecordType::TXT).await;
    assert_eq!(missing.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn aliases_are_followed_inside_an_answer_and_beyond() {
    let fixture = Fixture::start().await;
    let whole = vec![
        a("unrelated.example", "198.18.66.66", 60),
        a("end.cdn.example", "198.18.0.1", 300),
        cname("mid.cdn.example", "end.cdn.example", 20),
        cname("whole.example", "MID.cdn.example", 300),
    ];
    fixture
        .upstream
        .on("whole.example", RecordType::A, Does::Answers(whole));
    fixture.upstream.on(
        "half.example",
        RecordType::A,
        Does::Answers(vec![cname("half.example", "rest.example", 30)]),
    );
    fixture.upstream.has("rest.example", &["198.18.0.2"]);
    fixture.upstream.on(
        "ring.example",
        RecordType::A,
        Does::Answers(vec![cname("ring.example", "ring.example", 60)]),
    );
    fixture.upstream.on(
        "off.example",
        RecordType::A,
        Does::Answers(vec![a("unrelated.example", "198.18.66.66", 60)]),
    );
    let answer = fixture.ask(VM, "whole.example", RecordType::A).await;
    assert_eq!(addresses(&answer), ["198.18.0.1"]);
    assert_eq!(answer.answers[0].name.to_ascii(), "whole.example.");
    assert_eq!(answer.answers[0].ttl, 20, "the shortest on the way");
    assert_eq!(fixture.addresses(VM, "half.example").await, ["198.18.0.2"]);
    assert!(fixture.addresses(VM, "ring.example").await.is_empty());
    assert!(
        fixture.addresses(VM, "off.example").await.is_empty(),
        "what was not asked for does not count"
    );
}

#[tokio::test]
async fn an_alias_to_a_private_address_is_no_way_in() {
    let fixture = Fixture::start().await;
    let records = vec![
        cname("a.example", "router.lan", 60),
        a("router.lan", "192.168.1.1", 60),
    ];
    fixture
        .upstream
        .on("a.example", RecordType::A, Does::Answers(records));
    let answer = fixture.ask(VM, "a.example", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_long_answer_is_fetched_and_given_over_tcp() {
    let fixture = Fixture::start().await;
    let records: Vec<_> = (0..60)
        .map(|last| a("a.example", &format!("198.18.0.{last}"), 60))
        .collect();
    fixture
        .upstream
        .on("a.example", RecordType::A, Does::Truncates(records));
    let mut small = query("a.example", RecordType::A);
    small.edns = None;
    let socket = fixture.socket(VM).await;
    socket.send(&small.to_vec().unwrap()).await.unwrap();
    let answer = receive(&socket).await;
    assert!(answer.metadata.truncation && answer.answers.is_empty());
    let mut stream = fixture.connect(VM).await;
    send_framed(&mut stream, &question("a.example", RecordType::A)).await;
    assert_eq!(
        addresses(&receive_framed(&mut stream).await.unwrap()).len(),
        60
    );
    assert_eq!(
        fixture.upstream.asked("a.example"),
        2,
        "UDP, then TCP, then the cache"
    );
}

#[tokio::test]
async fn answers_are_kept_as_long_as_they_say() {
    let fixture = Fixture::start().await;
    fixture.upstream.has("kept.example", &["198.18.0.1"]);
    fixture.upstream.on(
        "not.example",
        RecordType::A,
        Does::Answers(vec![a("not.example", "198.18.0.2", 0)]),
    );
    fixture.upstream.on(
        "never.example",
        RecordType::A,
        Does::Says(ResponseCode::NXDomain, 30),
    );
    fixture.upstream.on(
        "empty.example",
        RecordType::A,
        Does::Says(ResponseCode::NoError, 30),
    );
    for host in [
        "kept.example",
        "not.example",
        "never.example",
        "empty.example",
    ] {
        let first = fixture.ask(VM, host, RecordType::A).await;
        let second = fixture.ask(VM, host, RecordType::A).await;
        assert_eq!(first.metadata.response_code, second.metadata.response_code);
        assert_eq!(addresses(&first), addresses(&second));
        assert_eq!(
            fixture.upstream.asked(host),
            if host == "not.example" { 2 } else { 1 },
            "{host}"
        );
    }
    let never = fixture.ask(VM, "never.example", RecordType::A).await;
    assert_eq!(never.metadata.response_code, ResponseCode::NXDomain);
    let empty = fixture.ask(VM, "empty.example", RecordType::A).await;
    assert_eq!(empty.metadata.response_code, ResponseCode::NoError);
}

#[tokio::test]
async fn the_hosts_file_beats_servers_and_is_judged_like_them() {
    let hosts = "198.18.0.9 a.example\n127.0.1.1 thishost\n10.0.0.9 git.corp.example";
    let with = With {
        hosts,
        internal_allow: &["git.corp.example"],
        ..With::default()
    };
    let fixture = Fixture::with(with).await;
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.9"]);
    assert_eq!(
        fixture.addresses(VM, "git.corp.example").await,
        ["10.0.0.9"]
    );
    assert!(fixture.addresses(VM, "thishost").await.is_empty());
    assert_eq!(
        fixture.upstream.asked("a.example") + fixture.upstream.asked("thishost"),
        0
    );
}

#[tokio::test]
async fn a_dead_server_costs_the_first_query_only() {
    // Bound and never read: packets to it vanish.
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let before = vec![dead.local_addr().unwrap()];
    let wait = Duration::from_secs(1);
    let fixture = Fixture::with(With {
        before,
        timeout: wait,
        ..With::default()
    })
    .await;
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    fixture.upstream.has("b.example", &["198.18.0.2"]);
    let begin = Instant::now();
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.1"]);
    assert!(begin.elapsed() >= wait);
    assert_eq!(fixture.addresses(VM, "b.example").await, ["198.18.0.2"]);
    let mut buffer = [0; 512];
    let mut asked = 0;
    while dead.try_recv(&mut buffer).is_ok() {
        asked += 1;
    }
    assert_eq!(asked, 1);
}

#[tokio::test]
async fn where_nobody_answers_the_client_is_told_so() {
    let fixture = Fixture::with(With {
        timeout: Duration::from_millis(300),
        ..With::default()
    })
    .await;
    fixture
        .upstream
        .on("a.example", RecordType::A, Does::IsSilent);
    fixture.upstream.on(
        "b.example",
        RecordType::A,
        Does::Says(ResponseCode::ServFail, 0),
    );
    for (host, part) in [("a.example", "in time"), ("b.example", "Server Failure")] {
        let answer = fixture.ask(VM, host, RecordType::A).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        assert_eq!(
            fixture.upstream.asked(host),
            2,
            "as often as resolv.conf says"
        );
        let (_, line) = fixture.directory.lines().pop().unwrap();
        assert_eq!(line.action, Action::Allow);
        assert!(
            line.error
                .as_deref()
                .is_some_and(|error| error.contains(part)),
            "{line:?}"
        );
    }
}

#[tokio::test]
async fn forged_answers_are_passed_over() {
    let fixture = Fixture::start().await;
    fixture.upstream.on(
        "a.example",
        RecordType::A,
        Does::Forges(wrong, vec![a("a.example", "198.18.0.1", 60)]),
    );
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.1"]);
    assert_eq!(fixture.upstream.asked("a.example"), 1);
}

#[tokio::test]
async fn guessing_ends_the_question_and_poisons_nothing() {
    let flood = |right: &Message| {
        let mut other = right.clone();
        other.metadata.id = right.metadata.id.wrapping_add(7);
        other.answers = vec![a("a.example", "198.18.66.66", 60)];
        vec![other.to_vec().unwrap(); 64]
    };
    let fixture = Fixture::start().await;
    fixture.upstream.on(
        "a.example",
        RecordType::A,
        Does::Forges(flood, vec![a("a.example", "198.18.0.1", 60)]),
    );
    let answer = fixture.ask(VM, "a.example", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.1"]);
}

#[tokio::test]
async fn servers_that_take_edns_for_a_mistake_are_asked_without() {
    let fixture = Fixture::start().await;
    fixture.upstream.on(
        "a.example",
        RecordType::A,
        Does::IsOld(vec![a("a.example", "198.18.0.1", 60)]),
    );
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.1"]);
}
