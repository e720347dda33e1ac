//! Clients that mean harm.

use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use policy::Action;
use policy::log::Event;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use resolver::Limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};

use crate::fixture::{
    Fixture, OTHER, VM, addresses, question, receive, receive_framed, send_framed,
};
use crate::upstream::Does;

#[tokio::test]
async fn garbage_does_not_keep_the_next_query_from_its_answer() {
    let limits = Limits {
        burst: 10_000,
        in_flight: 10_000,
        ..Limits::default()
    };
    let fixture = Fixture::limited(limits).await;
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    let good = question("a.example", RecordType::A);
    let garbage = (
        proptest::collection::vec(proptest::num::u8::ANY, 0..300),
        0..good.len(),
        proptest::bool::ANY,
    );
    let mut runner = TestRunner::deterministic();
    let socket = fixture.socket(VM).await;
    for _ in 0..1000 {
        let (mut bytes, at, changed) = garbage.new_tree(&mut runner).unwrap().current();
        if changed {
            // A good query with a hole in it.
            let hole = bytes;
            bytes = good.clone();
            bytes.splice(
                at..(at + hole.len() / 8).min(good.len()),
                hole.into_iter().take(8),
            );
        }
        socket.send(&bytes).await.unwrap();
    }
    assert_eq!(fixture.addresses(VM, "a.example").await, ["198.18.0.1"]);
}

#[tokio::test]
async fn answers_sent_to_the_resolver_are_not_answered() {
    let fixture = Fixture::start().await;
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    let mut answer = question("b.example", RecordType::A);
    answer[2] |= 0x80;
    let socket = fixture.socket(VM).await;
    socket.send(&answer).await.unwrap();
    socket
        .send(&question("a.example", RecordType::A))
        .await
        .unwrap();
    assert_eq!(addresses(&receive(&socket).await), ["198.18.0.1"]);
    assert_eq!(fixture.upstream.asked("b.example"), 0);
}

#[tokio::test]
async fn who_floods_is_refused_logged_once_a_second_and_slows_nobody_else() {
    let limits = Limits {
        per_second: 1,
        burst: 5,
        ..Limits::default()
    };
    let fixture = Fixture::limited(limits).await;
    fixture.directory.register(OTHER, 1, "default: allow");
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    let mut codes = Vec::new();
    for _ in 0..20 {
        codes.push(
            fixture
                .ask(VM, "a.example", RecordType::A)
                .await
                .metadata
                .response_code,
        );
    }
    let refused = codes
        .iter()
        .filter(|code| **code == ResponseCode::Refused)
        .count();
    assert!(
        (1..=15).contains(&refused) && codes[..5].iter().all(|code| *code == ResponseCode::NoError),
        "{codes:?}"
    );
    assert_eq!(fixture.addresses(OTHER, "a.example").await, ["198.18.0.1"]);
    let limited: Vec<_> = fixture
        .directory
        .lines()
        .into_iter()
        .filter(|(_, line)| line.rule.as_deref() == Some("resolver:limit"))
        .collect();
    assert!(
        !limited.is_empty() && limited.len() < refused.max(2),
        "{limited:?}"
    );
    assert_eq!(limited[0].1.action, Action::Deny);
    assert!(
        limited[0]
            .1
            .error
            .as_deref()
            .unwrap()
            .starts_with("1 queries refused"),
        "{limited:?}"
    );
}

#[tokio::test]
async fn a_slow_name_server_holds_up_only_those_who_wait_for_it() {
    let limits = Limits {
        in_flight: 3,
        ..Limits::default()
    };
    let fixture = Fixture::limited(limits).await;
    fixture.directory.register(OTHER, 1, "default: allow");
    let permits = fixture.upstream.holds("slow.example", "198.18.0.1");
    fixture.upstream.has("fast.example", &["198.18.0.2"]);
    let socket = fixture.socket(VM).await;
    for _ in 0..3 {
        socket
            .send(&question("slow.example", RecordType::A))
            .await
            .unwrap();
    }
    fixture.upstream.wait_for_questions(3).await;
    let fourth = fixture.ask(VM, "fast.example", RecordType::A).await;
    assert_eq!(
        fourth.metadata.response_code,
        ResponseCode::Refused,
        "three are under way"
    );
    assert_eq!(
        fixture.addresses(OTHER, "fast.example").await,
        ["198.18.0.2"]
    );
    permits.add_permits(3);
    for _ in 0..3 {
        assert_eq!(addresses(&receive(&socket).await), ["198.18.0.1"]);
    }
    // Their places are given back a moment after their answers were sent.
    while fixture.addresses(VM, "fast.example").await.is_empty() {}
}

#[tokio::test]
async fn queries_over_one_connection_are_answered_in_turn() {
    let fixture = Fixture::start().await;
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    fixture.upstream.has("b.example", &["198.18.0.2"]);
    let mut stream = fixture.connect(VM).await;
    send_framed(&mut stream, &question("a.example", RecordType::A)).await;
    send_framed(&mut stream, &question("b.example", RecordType::A)).await;
    assert_eq!(
        addresses(&receive_framed(&mut stream).await.unwrap()),
        ["198.18.0.1"]
    );
    assert_eq!(
        addresses(&receive_framed(&mut stream).await.unwrap()),
        ["198.18.0.2"]
    );
    fixture.directory.register(VM, 2, "default: allow");
    send_framed(&mut stream, &question("a.example", RecordType::A)).await;
    assert!(
        receive_framed(&mut stream).await.is_none(),
        "it was the VM's before"
    );
}

#[tokio::test]
async fn a_vm_has_so_many_connections_and_no_more() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let fixture = Fixture::limited(limits).await;
    fixture.directory.register(OTHER, 1, "default: allow");
    fixture.upstream.has("a.example", &["198.18.0.1"]);
    let mut two = [fixture.connect(VM).await, fixture.connect(VM).await];
    for stream in &mut two {
        send_framed(stream, &question("a.example", RecordType::A)).await;
        assert_eq!(
            addresses(&receive_framed(stream).await.unwrap()),
            ["198.18.0.1"]
        );
    }
    assert!(
        receive_framed(&mut fixture.connect(VM).await)
            .await
            .is_none(),
        "two are there already"
    );
    for stream in [&mut fixture.connect(OTHER).await]
        .into_iter()
        .chain(&mut two)
    {
        send_framed(stream, &question("a.example", RecordType::A)).await;
        assert_eq!(
            addresses(&receive_framed(stream).await.unwrap()),
            ["198.18.0.1"]
        );
    }
}

#[tokio::test]
async fn connections_that_only_take_up_room_are_closed() {
    let limits = Limits {
        idle: Duration::from_millis(300),
        ..Limits::default()
    };
    let fixture = Fixture::limited(limits).await;
    // One says nothing, one sends a byte at a time and never gets to the end of a message.
    let mut silent = fixture.connect(VM).await;
    let (mut answers, mut questions) = fixture.connect(VM).await.into_split();
    let trickle = tokio::spawn(async move {
        while questions.write_all(&[1]).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(receive_framed(&mut silent).await.is_none());
    assert!(matches!(answers.read(&mut [0]).await, Ok(0) | Err(_)));
    trickle.await.unwrap();
}

#[tokio::test]
async fn messages_that_are_too_long_end_a_connection() {
    let fixture = Fixture::start().await;
    for length in [0_u16, 5, 4097, u16::MAX] {
        let mut stream = fixture.connect(VM).await;
        stream.write_u16(length).await.unwrap();
        // It may be closed while this is on its way.
        let _ = stream.write_all(&vec![0xff; length.into()]).await;
        assert!(receive_framed(&mut stream).await.is_none(), "{length}");
    }
}

#[tokio::test]
async fn odd_names_are_denied_and_cannot_break_a_log_line() {
    let fixture = Fixture::start().await;
    let mut bytes = question("aaaaaaaa.example", RecordType::A);
    bytes[13..21].copy_from_slice(b"a\n\x1b[31m.");
    let socket = fixture.socket(VM).await;
    socket.send(&bytes).await.unwrap();
    assert_eq!(
        receive(&socket).await.metadata.response_code,
        ResponseCode::NXDomain
    );
    let lines = fixture.directory.wait_for_lines(1).await;
    let line = &lines[0].1;
    assert_eq!(
        (line.action, line.rule.as_deref()),
        (Action::Deny, Some("invalid"))
    );
    assert!(
        line.host.is_ascii() && !line.host.contains(['\n', '\u{1b}']),
        "{}",
        line.host
    );
    assert!(matches!(&line.event, Event::Dns { query, .. } if query == "A"));
}

#[tokio::test]
async fn the_end_of_the_resolver_is_the_end_of_all_it_began() {
    let mut fixture = Fixture::start().await;
    fixture
        .upstream
        .on("slow.example", RecordType::A, Does::IsSilent);
    let mut stream = fixture.connect(VM).await;
    send_framed(&mut stream, &question("slow.example", RecordType::A)).await;
    fixture.upstream.wait_for_questions(1).await;
    fixture.stop().await;
    assert!(receive_framed(&mut stream).await.is_none());
    UdpSocket::bind(fixture.address)
        .await
        .expect("the port is free again");
    drop(stream);
    // Closed connections linger on the address, which is no listener.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(fixture.address).unwrap();
    socket.listen(1).expect("nobody listens any more");
}
