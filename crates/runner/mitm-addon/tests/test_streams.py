"""Bodies pass as they come, both ways, and are never gathered."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest

from world.world import ALLOW_ALL, DECOY, World, policy, read_response, rule

MEBIBYTE = 1024 * 1024


def memory(world: World) -> int:
    """Resident bytes of the proxy."""
    status = Path(f"/proc/{world.daemon.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found.group(1)) * 1024


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("host", ["a.test", "h1.test.example"])
def test_an_event_arrives_before_the_next_is_sent(world: World, version: str, host: str) -> None:
    world.register(ALLOW_ALL)
    # The server sends event n+1 only once somebody has acknowledged event n.
    command = ["curl", "--silent", "--no-buffer", "--max-time", "20", "--cacert", str(world.guest.trusted), version]
    command += ["--resolve", f"{host}:443:{DECOY}", f"https://{host}/sse"]
    with subprocess.Popen(world.guest.namespace.enter(*command), stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        for number in range(5):
            assert curl.stdout.readline() == f"data: {number}\n".encode()
            assert curl.stdout.readline() == b"\n"
            assert world.guest.curl("http://b.test/acknowledge").status == 200
        assert curl.wait() == 0


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_a_large_download_leaves_the_proxys_memory_as_it_was(world: World, version: str) -> None:
    run = world.register(ALLOW_ALL)
    size = 256 * MEBIBYTE
    world.guest.curl("https://a.test/echo", version)
    before = memory(world)
    reply = world.guest.curl(f"https://a.test/bytes/{size}", version, "--output", "/dev/null", "--limit-rate", "150M")
    assert reply.exit_code == 0
    assert memory(world) - before < 24 * MEBIBYTE
    assert run.lines(2)[1]["response_size"] == size


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_a_large_upload_leaves_the_proxys_memory_as_it_was(world: World, version: str) -> None:
    run = world.register(ALLOW_ALL)
    size = 128 * MEBIBYTE
    big = world.scratch / "upload"
    with big.open("wb") as file:
        file.truncate(size)
    world.guest.curl("https://a.test/echo", version)
    before = memory(world)
    reply = world.guest.curl("https://a.test/upload", version, "--data-binary", f"@{big}")
    assert reply.json()["size"] == size
    assert memory(world) - before < 24 * MEBIBYTE
    assert run.lines(2)[1]["request_size"] == size


def test_a_pinned_host_is_relayed_untouched_by_name_and_counted(world: World) -> None:
    run = world.register(policy(rule("pinned.test", "passthrough")))
    # The guest sees the server's own certificate, which the world's CA signed.
    reply = world.guest.curl("https://pinned.test/bytes/100000", "--cacert", str(world.trusted_upstream), "--output", "/dev/null")
    assert reply.exit_code == 0
    line = run.line()
    assert line["response_size"] > 100_000
    assert line["request_size"] > 0
    assert line["latency_ms"] >= 0
    shown = {name: line[name] for name in ("type", "action", "rule", "host", "port", "error")}
    assert shown == {
        "type": "tcp",
        "action": "ALLOW",
        "rule": "pinned.test",
        "host": "pinned.test",
        "port": 443,
        "error": None,
    }
    assert world.internet.wait_for("hello")["name"] == "pinned.test"


def test_a_guest_that_does_not_trust_the_runner_leaves_a_line(world: World) -> None:
    run = world.register(ALLOW_ALL)
    reply = world.guest.curl("https://a.test/", "--cacert", str(world.trusted_upstream))
    assert reply.exit_code == 60
    line = run.line()
    assert (line["type"], line["host"]) == ("tcp", "a.test")
    assert "unknown ca" in line["error"]


def test_a_download_that_the_guest_breaks_off_leaves_a_line_with_what_was_sent(world: World) -> None:
    run = world.register(ALLOW_ALL)
    with world.guest.tls("a.test") as sock:
        sock.sendall(b"GET /bytes/500000000 HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert sock.recv(1000)
    line = run.line()
    assert line["status"] == 200
    assert 0 < line["response_size"] < 500_000_000
    assert line["error"]


def test_many_requests_on_one_connection_use_one_server_connection(world: World) -> None:
    world.register(ALLOW_ALL)
    with world.guest.tls("a.test") as sock:
        for _ in range(20):
            sock.sendall(b"POST /upload HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\n\r\nabc")
            assert b" 200 " in read_response(sock)
    assert len([news for news in world.internet.news() if news["event"] == "connection"]) == 1


def test_chunked_uploads_pass(world: World) -> None:
    run = world.register(ALLOW_ALL)
    reply = world.guest.curl("https://a.test/upload", "--http1.1", "--header", "Transfer-Encoding: chunked", "--data", "x" * 9999)
    assert reply.json()["size"] == 9999
    assert run.line()["request_size"] == 9999


def test_a_guest_that_waits_to_be_told_to_go_on_is_told(world: World) -> None:
    world.register(ALLOW_ALL)
    reply = world.guest.curl("https://a.test/upload", "--http1.1", "--header", "Expect: 100-continue", "--data", "x" * 9999)
    assert reply.json()["size"] == 9999


class SlowReader:
    """An HTTP/2 guest that gives its windows back only when told to."""

    def __init__(self, world: World, host: str) -> None:
        self._host = host
        self.sock = world.guest.tls(host, "h2")
        self.sock.settimeout(2)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        # Room for several streams whose windows are used up.
        self._h2.increment_flow_control_window(MEBIBYTE)
        self.received: dict[int, int] = {}
        self._owed: dict[int, int] = {}
        self.ended: set[int] = set()

    def get(self, path: str) -> int:
        stream: int = self._h2.get_next_available_stream_id()
        names = {":method": "GET", ":scheme": "https", ":authority": self._host, ":path": path}
        self._h2.send_headers(stream, list(names.items()), end_stream=True)
        self.received[stream] = self._owed[stream] = 0
        self.sock.sendall(self._h2.data_to_send())
        return stream

    def read(self) -> bool:
        """Takes what comes, whatever stream it is for; False if nothing comes."""
        try:
            data = self.sock.recv(65536)
        except TimeoutError:
            return False
        for event in self._h2.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                self.received[event.stream_id] += len(event.data)
                self._owed[event.stream_id] += event.flow_controlled_length
            elif isinstance(event, h2.events.StreamEnded):
                self.ended.add(event.stream_id)
        self.sock.sendall(self._h2.data_to_send())
        return bool(data)

    def give_back(self, stream: int) -> None:
        if self._owed[stream]:
            self._h2.acknowledge_received_data(self._owed[stream], stream)
            self._owed[stream] = 0
            self.sock.sendall(self._h2.data_to_send())


@pytest.mark.parametrize("host", ["a.test", "h1.test.example"])
def test_what_a_guest_does_not_take_is_not_gathered_and_comes_when_it_does(world: World, host: str) -> None:
    world.register(ALLOW_ALL)
    size = 100 * MEBIBYTE
    before = memory(world)
    reader = SlowReader(world, host)
    with reader.sock:
        stream = reader.get(f"/bytes/{size}")
        while reader.read():
            pass
        assert 0 < reader.received[stream] < 100_000
        assert memory(world) - before < 16 * MEBIBYTE
        while stream not in reader.ended:
            reader.give_back(stream)
            assert reader.read()
        assert reader.received[stream] == size
    assert memory(world) - before < 16 * MEBIBYTE


def test_a_stream_that_is_not_taken_holds_up_no_other_of_its_connection(world: World) -> None:
    world.register(ALLOW_ALL)
    reader = SlowReader(world, "a.test")
    with reader.sock:
        stuck = reader.get(f"/bytes/{100 * MEBIBYTE}")
        while reader.received[stuck] < 30_000:
            assert reader.read()
        other = reader.get("/echo")
        while other not in reader.ended:
            # The connection's window is shared; only the stream's stays shut.
            reader.give_back(other)
            assert reader.read()
        assert stuck not in reader.ended
