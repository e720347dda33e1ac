"""Bodies pass as they come, both ways, and are never gathered."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

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
