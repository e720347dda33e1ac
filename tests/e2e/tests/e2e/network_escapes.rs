//! Ways past the rules, tried from inside a VM as root: each is refused at once, told in the log, and reaches nobody.

use e2e::{Host, World};
use serde_json::{Value, json};

/// Tries destinations; prints `probe <what> <outcome> <milliseconds>` for each.
const PROBES: &str = r#"sudo python3 - <<'END'
import socket, struct, subprocess, time

def probe(what, attempt):
    begin = time.monotonic()
    try:
        outcome = attempt()
    except OSError as error:
        outcome = type(error).__name__ + (f":{error.errno}" if type(error) is OSError else "")
    print("probe", what, outcome, round((time.monotonic() - begin) * 1000), flush=True)

def tcp(address, port):
    def attempt():
        with socket.create_connection((address, port), timeout=10) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % address.encode())
            return "answer" if s.recv(1) else "closed"
    probe(f"tcp/{address}:{port}", attempt)

def udp(address, port, data=b"x" * 40):
    def attempt():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(10)
            s.connect((address, port))
            s.send(data)
            return f"answer:{len(s.recv(512))}"
    probe(f"udp/{address}:{port}", attempt)

def icmp(address):
    def attempt():
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s:
            s.settimeout(10)
            message = struct.pack("!BBHHH", 8, 0, 0, 7, 1)
            total = sum(struct.unpack("!4H", message))
            total = (total & 0xFFFF) + (total >> 16)
            s.sendto(struct.pack("!BBHHH", 8, 0, ~total & 0xFFFF, 7, 1), (address, 0))
            kind = s.recv(512)[20]
            return {0: "answer", 3: "unreachable"}.get(kind, f"icmp:{kind}")
    probe(f"icmp/{address}", attempt)

def spoofed():
    """From an address that is not the guest's: nothing comes back, so nothing is waited for."""
    subprocess.run(["ip", "address", "add", "198.18.0.77/32", "dev", "eth0"], check=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("198.18.0.77", 0))
        s.sendto(b"x", ("198.18.0.53", 53))
    subprocess.run(["ip", "address", "del", "198.18.0.77/32", "dev", "eth0"], check=True)

def ipv6():
    subprocess.run("sysctl -qw net.ipv6.conf.eth0.disable_ipv6=0; ip -6 address add fd00::2/64 dev eth0 nodad;"
                   "ip -6 neighbour add fd00::1 lladdr 02:76:6d:30:00:01 dev eth0;"
                   "ip -6 route add default via fd00::1", shell=True, stderr=subprocess.DEVNULL)
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as s:
        s.settimeout(1)
        s.connect(("2001:db8::1", 443))
        return "answer"

question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x07example\x03com\x00\x00\x01\x00\x01"
# These are looked for in the log, which is told of the first twenty at most.
tcp("169.254.169.254", 80)
tcp("10.9.9.9", 443)
tcp("198.18.0.2", 853)
tcp("198.18.0.53", 53)
udp("198.18.0.53", 53, question)
udp("198.18.0.2", 443)
icmp("198.18.0.2")
for address in ("169.254.169.254", "10.9.9.9"):
    for port in (22, 80, 443):
        tcp(address, port)
    udp(address, 53)
for port in (22, 80, 443, 8080):
    tcp("192.168.241.1", port)
for address in ("198.18.0.1", "100.127.0.1", "100.127.0.2"):
    for port in (22, 8080):
        tcp(address, port)
for port in (22, 8080, 9000, 9001):
    tcp("198.18.0.2", port)
udp("198.18.0.2", 853)
icmp("169.254.169.254")
for end in range(8):
    tcp(f"100.96.0.{end}", 80)
    tcp(f"100.96.0.{end}", 8080)
spoofed()
probe("ipv6", ipv6)
udp("192.168.241.1", 53, question)
END
"#;

/// Listens on two ports and writes down who comes; says when it is open.
const NEIGHBOUR: &str = r#"sudo python3 -c '
import select, socket
doors = [socket.create_server(("0.0.0.0", port)) for port in (80, 8080)]
visitors = open("/tmp/visitors", "w", buffering=1)
open("/tmp/open", "w").close()
while True:
    for door in select.select(doors, [], [])[0]:
        print(door.accept()[1], file=visitors)
'"#;

/// What a probe may end with: all but an answer and a wait.
const REFUSALS: [&str; 4] = [
    "ConnectionRefusedError",
    "ConnectionResetError",
    "unreachable",
    // EHOSTUNREACH: an ICMP error of the hub.
    "OSError:113",
];

#[test]
fn nothing_but_the_web_is_reached_from_inside_and_every_try_is_refused_at_once_and_told() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    // A neighbour with open doors.
    let neighbour = host.submit(NEIGHBOUR).spawn();
    let neighbour_run = neighbour.running();
    host.in_vm(&neighbour_run, "until [ -e /tmp/open ]; do sleep 0.2; done");
    let outcome = host.submit(PROBES).run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    let mut probes = 0;
    for line in log.lines().filter(|line| line.starts_with("probe ")) {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, what, result, milliseconds] = fields[..] else {
            panic!("{line} in {log}");
        };
        probes += 1;
        match what {
            // It answers: it is the way to the web, and the probe itself is right.
            "udp/192.168.241.1:53" => assert!(result.starts_with("answer"), "{line}"),
            // Nobody speaks it: the VM's namespace drops it.
            "ipv6" => assert!(!result.starts_with("answer"), "{line}"),
            _ => {
                assert!(REFUSALS.contains(&result), "{line} in {log}");
                let waited: u32 = milliseconds.parse().expect("a number");
                assert!(waited < 9000, "{line} in {log}");
            }
        }
    }
    assert_eq!(probes, 49, "{log}");
    assert_eq!(host.in_vm(&neighbour_run, "cat /tmp/visitors"), "");
    assert_eq!(world.arrived(), Vec::<Value>::new());
    assert_eq!(world.trespasses(), Vec::<Value>::new());
    let network = host.network_log(&outcome.run_id());
    for (protocol, host, port) in [
        ("tcp", "169.254.169.254", 80),
        ("tcp", "10.9.9.9", 443),
        ("tcp", "198.18.0.2", 853),
        ("tcp", "198.18.0.53", 53),
        ("udp", "198.18.0.53", 53),
        ("udp", "198.18.0.2", 443),
        ("icmp", "198.18.0.2", 0),
    ] {
        let line = network.one(&[
            ("type", json!("packet")),
            ("action", json!("DENY")),
            ("protocol", json!(protocol)),
            ("host", json!(host)),
            ("port", json!(port)),
        ]);
        assert!(line["count"].as_u64() >= Some(1), "{line}");
    }
    neighbour.signal(rustix::process::Signal::INT);
    neighbour.wait();
    host.finish();
    world.finish();
}

#[test]
fn what_a_job_says_about_a_host_opens_no_other() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    // To an address whose name was never asked for, with another name in TLS than in the request, without a name, and
    // with an allowed name in front of somebody else's address.
    let prompt = "
        say() { echo \"$@\"; }
        web() { what=$1; shift; say $what $(curl -sSk --max-time 20 -o /dev/null -w '%{http_code}' \"$@\" 2>&1); }
        web host -H 'Host: other.example.org' https://www.example.com/host
        web sni --connect-to www.example.com:443:other.example.org:443 --resolve other.example.org:443:198.18.0.2 \
            -H 'Host: www.example.com' https://other.example.org/sni
        web bare https://198.18.0.2/bare
        web plain -H 'Host: 169.254.169.254' http://198.18.0.2/plain
        web nameless -H 'Host:' http://198.18.0.2/nameless
        web elsewhere --resolve www.example.com:443:198.18.0.66 https://www.example.com/elsewhere";
    let outcome = host.submit(prompt).allow("www.example.com").run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    let network = host.network_log(&outcome.run_id());
    for what in ["host", "sni", "bare", "plain", "nameless"] {
        let line = log
            .lines()
            .find(|line| line.starts_with(&format!("{what} ")));
        let line = line.unwrap_or_else(|| panic!("no {what} in {log}"));
        assert!(
            ["000", "400", "403", "421"]
                .iter()
                .any(|code| line.contains(code)),
            "{line}\n{}",
            network.text()
        );
    }
    let denied = network.with(&[("type", json!("http")), ("action", json!("DENY"))]);
    assert!(denied.len() >= 4, "{}", network.text());
    // The name counts, and the proxy asks itself where that is.
    assert!(log.contains("elsewhere 200"), "{log}");
    let paths: Vec<Value> = world
        .arrived()
        .iter()
        .map(|one| one["path"].clone())
        .collect();
    assert_eq!(paths, ["/elsewhere"], "{}", network.text());

    // Names that lead to refused addresses, by whatever way, and the host's own address, where everything public is
    // allowed.
    let prompt = "
        web() { what=$1; shift; echo $what $(curl -sSk --max-time 20 -o /dev/null -w '%{http_code}' \"$@\" 2>&1); }
        for name in loopback metadata private; do
            python3 -c \"import socket; print('name', socket.gethostbyname('$name.example.com'))\" || echo $name unresolved
            web $name --resolve $name.example.com:80:198.18.0.2 http://$name.example.com/$name
            web $name --resolve $name.example.com:443:198.18.0.2 https://$name.example.com/$name
        done
        web host http://198.18.0.1/ ; web host https://198.18.0.1/";
    let outcome = host.submit(prompt).run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    let network = host.network_log(&outcome.run_id());
    assert!(!log.contains("\nname ") && !log.contains(" 200\n"), "{log}");
    for (name, range) in [
        ("loopback", "loopback"),
        ("metadata", "metadata"),
        ("private", "private"),
    ] {
        assert!(log.contains(&format!("{name} unresolved")), "{log}");
        let line = network.one(&[
            ("type", json!("dns")),
            ("action", json!("DENY")),
            ("host", json!(format!("{name}.example.com"))),
        ]);
        let rule = line["rule"].as_str().unwrap_or_default();
        assert!(
            rule.starts_with("resolver:") && rule.contains(range),
            "{line}"
        );
    }
    assert_eq!(world.arrived().len(), 1, "{:?}\n{log}", world.arrived());
    assert_eq!(world.trespasses(), Vec::<Value>::new());
    host.finish();
    world.finish();
}
