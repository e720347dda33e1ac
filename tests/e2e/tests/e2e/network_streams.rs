//! What flows both ways for long: server-sent events, WebSockets.

use e2e::{Host, LONG, World, eventually};
use serde_json::{Value, json};

/// Confirms each event before it reads the next; the world sends none that nobody asked for by that.
const EVENTS: &str = r#"
for version in http1.1 http2; do
    curl -sSN --$version -w 'data: %{http_version} %{http_code}\n' https://www.example.com/events/$version |
    while read -r field number code; do
        [ "$field" = data: ] || continue
        if [ -n "$code" ]; then echo "$version: $number $code after $last"; continue; fi
        last=$number
        curl -sS --$version -o /dev/null https://www.example.com/confirm/$version/$number
    done
done"#;

#[test]
fn each_server_sent_event_arrives_before_the_next_is_sent() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let outcome = host.submit(EVENTS).allow("www.example.com").run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    let network = host.network_log(&outcome.run_id());
    for (version, spoken) in [("http1.1", "1.1"), ("http2", "2")] {
        assert!(
            log.contains(&format!("{version}: {spoken} 200 after 5\n")),
            "{log}\n{}",
            network.text()
        );
        let url = format!("https://www.example.com/events/{version}");
        let line = network.one(&[("url", json!(url)), ("action", json!("ALLOW"))]);
        assert_eq!(line["response_size"], "data: 1\n\n".len() * 5);
        assert!(line["error"].is_null(), "{line}");
    }
    let arrived = world.arrived();
    assert!(
        !arrived.iter().any(|one| one["unconfirmed"].is_number()),
        "{arrived:?}"
    );
    host.finish();
    world.finish();
}

/// A WebSocket by hand: says `open`, sends a frame when told to by a file, and prints what comes back.
const WEB_SOCKET: &str = r#"
cat > /tmp/frames.py <<'END'
import os, socket, ssl, sys, time

def receive(stream, size):
    data = b""
    while len(data) < size:
        more = stream.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data

def exchange(stream, text):
    mask = os.urandom(4)
    data = bytes(byte ^ mask[i % 4] for i, byte in enumerate(text))
    stream.sendall(bytes([0x81, 0x80 | len(text)]) + mask + data)
    head = receive(stream, 2)
    return receive(stream, head[1] & 0x7F).decode()

plain = socket.create_connection(("www.example.com", 443))
stream = ssl.create_default_context().wrap_socket(plain, server_hostname="www.example.com")
stream.sendall(b"GET /socket HTTP/1.1\r\nHost: www.example.com\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
               b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
answer = b""
while not answer.endswith(b"\r\n\r\n"):
    answer += receive(stream, 1)
# The key and its answer are those of RFC 6455, section 1.3.
print("status", answer.split()[1].decode(), b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in answer, flush=True)
for number in range(3):
    print(exchange(stream, b"frame %d" % number), flush=True)
if sys.argv[1:] == ["stay"]:
    open("/tmp/open", "w").close()
    # Until it fails.
    try:
        while True:
            exchange(stream, b"still here")
            time.sleep(0.05)
    except (OSError, EOFError) as error:
        print("ended by", type(error).__name__, file=open("/tmp/ended", "w"))
END
"#;

/// Waits until the session's VM waits for the session's next job.
fn until_kept(host: &Host) {
    host.until_status("the VM is kept", |status| {
        status["idle_vms"]
            .as_array()
            .is_some_and(|kept| !kept.is_empty())
    });
}

#[test]
fn a_web_socket_carries_frames_both_ways_and_dies_with_its_job() {
    let Some(world) = World::new() else { return };
    let builder = Host::new().sandbox("idle_timeout_secs", 300);
    let Some(host) = builder.world(&world).start() else {
        return;
    };
    let prompt = format!(
        "{WEB_SOCKET}
python3 /tmp/frames.py
setsid python3 /tmp/frames.py stay > /dev/null 2>&1 < /dev/null &
until [ -e /tmp/open ]; do sleep 0.1; done"
    );
    let outcome = host
        .submit(&prompt)
        .session("s1")
        .allow("www.example.com")
        .run();
    outcome.expect_exit(0);
    let run = outcome.run_id();
    let log = host.log(&run);
    assert!(
        log.contains("status 101 True\nframe 0\nframe 1\nframe 2\n"),
        "{log}"
    );
    let network = host.network_log(&run);
    let sockets = network.with(&[
        ("url", json!("https://www.example.com/socket")),
        ("action", json!("ALLOW")),
        ("status", json!(101)),
    ]);
    assert_eq!(sockets.len(), 2, "{}", network.text());
    eventually("the server saw both end", LONG, || {
        let arrived = world.arrived();
        arrived.iter().filter(|one| one["ended"] == true).count() == 2
    });
    let frames = |world: &World| {
        let arrived: Vec<Value> = world.arrived();
        arrived
            .iter()
            .filter(|one| one["at"] == "https socket")
            .count()
    };
    let before = frames(&world);
    assert!(before >= 6);

    until_kept(&host);

    // The next job, in the same VM: a socket of its own works, and not one more frame came by the old one.
    let prompt = "
        cat /tmp/ended; python3 /tmp/frames.py";
    let outcome = host
        .submit(prompt)
        .session("s1")
        .allow("www.example.com")
        .run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    assert!(
        log.contains("status 101 True\nframe 0\nframe 1\nframe 2\n"),
        "{log}"
    );
    assert_eq!(frames(&world), before + 3);
    let network = host.network_log(&outcome.run_id());
    let sockets = network.with(&[("url", json!("https://www.example.com/socket"))]);
    assert_eq!(sockets.len(), 1, "{}", network.text());
    host.finish();
    world.finish();
}
