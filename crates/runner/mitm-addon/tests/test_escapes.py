"""Ways out that a guest may try. Nothing of any of them reaches a server that the policy does not allow."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from world.world import ALLOW_ALL, SERVER, World, policy, read_response, rule

ONLY_A = policy(rule("a.test"))


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1]) if response else 0


def answer(response: bytes) -> Any:
    # What stands behind the first answer's body is another answer, to what came behind the first request.
    body = response.partition(b"\r\n\r\n")[2].decode()
    found: dict[str, object] = json.JSONDecoder().raw_decode(body)[0]
    return found


def received_until_close(sock: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            received += piece
    return received


def reached(world: World) -> list[dict[str, Any]]:
    return [news for news in world.internet.news() if news["event"] in ("connection", "request")]


def test_a_host_header_that_is_not_the_server_name_is_misdirected(world: World) -> None:
    run = world.register(ALLOW_ALL)
    response = world.guest.talk(b"GET / HTTP/1.1\r\nHost: b.test\r\n\r\n", "a.test")
    assert status(response) == 421
    assert answer(response)["message"] == "The TLS connection was made to a.test, and the request is for b.test."
    line = run.line()
    assert (line["action"], line["rule"], line["host"], line["status"]) == ("DENY", "invalid", "a.test", 421)
    assert "b.test" in line["error"]
    assert reached(world) == []


def test_a_forged_server_name_does_not_lead_to_the_address_that_was_dialled(world: World) -> None:
    # The guest dials the server that has b.test, and claims to speak with a.test.
    world.register(ONLY_A)
    response = world.guest.talk(b"GET /echo HTTP/1.1\r\nHost: a.test\r\n\r\n", "a.test", host="198.18.0.12")
    assert status(response) == 200
    assert world.internet.wait_for("hello")["name"] == "a.test"


def test_a_forged_host_does_not_lead_to_the_address_that_was_dialled(world: World) -> None:
    world.register(policy(rule("refuses.test")))
    response = world.guest.talk(b"GET / HTTP/1.1\r\nHost: refuses.test\r\n\r\n", tls=False, host=SERVER)
    assert status(response) == 502
    assert reached(world) == []


@pytest.mark.parametrize("host", [SERVER, "a.test"])
def test_tls_without_a_server_name_is_denied(world: World, host: str) -> None:
    run = world.register(ALLOW_ALL)
    response = world.guest.talk(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host.encode(), None, host=SERVER)
    assert status(response) == 403
    assert run.line()["action"] == "DENY"
    assert reached(world) == []


def test_tls_without_a_server_name_is_for_an_address_that_a_rule_names(world: World) -> None:
    run = world.register(policy(rule(SERVER)))
    response = world.guest.talk(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % SERVER.encode(), None, host=SERVER)
    # It was dialled, and its certificate is for none of its addresses.
    assert status(response) == 502
    line = run.line()
    assert (line["action"], line["rule"]) == ("ALLOW", SERVER)
    assert "IP address mismatch" in line["error"]


@pytest.mark.parametrize(
    "request_text",
    [
        "GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nhost: a.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test:8443\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test, b.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: \r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "GET http://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "GET https://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "CONNECT b.test:443 HTTP/1.1\r\nHost: b.test\r\n\r\n",
        "CONNECT a.test:443 HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\n b.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nX: 1\r\n\tHost: b.test\r\n\r\n",
        "GET / HTTP/2.0\r\nHost: a.test\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: +5\r\n\r\nhello",
        "G(T / HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "GET a.test HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "GET /\x01 HTTP/1.1\r\nHost: a.test\r\n\r\n",
    ],
)
@pytest.mark.parametrize("tls", [True, False], ids=["https", "http"])
def test_what_two_programs_could_read_as_two_requests_goes_nowhere(world: World, request_text: str, tls: bool) -> None:
    run = world.register(ALLOW_ALL)
    response = world.guest.talk(request_text.encode(), "a.test", tls=tls)
    assert status(response) in (400, 421), response
    assert reached(world) == []
    assert answer(response)["denied_by"] == "runner network policy"
    line = run.line()
    assert (line["action"], line["rule"]) == ("DENY", "invalid")
    assert line["error"]


def test_a_target_that_names_its_own_host_becomes_a_plain_path(world: World) -> None:
    world.register(ONLY_A)
    response = world.guest.talk(b"GET http://a.test/echo HTTP/1.1\r\nHost: a.test\r\n\r\n", tls=False)
    assert (status(response), answer(response)["path"]) == (200, "/echo")


def http2_request(sock: ssl.SSLSocket, headers: list[tuple[str, str]]) -> int:
    """Sends a request that no library would, and gives its status; 0 if the stream or connection is ended."""
    config = h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False)
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    connection.send_headers(1, headers, end_stream=True)
    sock.sendall(connection.data_to_send())
    while data := sock.recv(65536):
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                return int(dict(event.headers)[":status"])
            if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                return 0
        sock.sendall(connection.data_to_send())
    return 0


BASE = {":method": "GET", ":scheme": "https", ":authority": "a.test", ":path": "/echo"}


@pytest.mark.parametrize(
    "more",
    [
        {":authority": "b.test"},
        {"host": "b.test"},
        {":path": "/echo HTTP/1.1\r\nHost: b.test\r\nX: "},
        {":path": "/a b"},
        {":path": "http://b.test/"},
        {":path": ""},
        {"x": "1\r\nHost: b.test"},
        {"x\r\nhost": "b.test"},
        {":method": "GET / HTTP/1.1\r\nHost: b.test\r\n\r\nGET"},
        {":method": "CONNECT"},
        {"transfer-encoding": "chunked"},
        {"connection": "upgrade"},
        {":authority": "a.test@b.test"},
        {":authority": "a.test:8443"},
    ],
)
def test_http2_that_would_be_two_requests_in_http1_goes_nowhere(world: World, more: dict[str, str]) -> None:
    world.register(ALLOW_ALL)
    with world.guest.tls("a.test", "h2") as sock:
        assert http2_request(sock, list({**BASE, **more}.items())) in (0, 400, 421)
    assert reached(world) == []


def test_http2_asked_for_in_the_clear_is_not_granted(world: World) -> None:
    world.register(ONLY_A)
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    response = world.guest.talk(b"GET /echo HTTP/1.1\r\nHost: a.test\r\n" + upgrade, tls=False)
    assert status(response) == 200
    assert not {"upgrade", "http2-settings"} & {name.lower() for name, _ in answer(response)["headers"]}


def test_the_proxys_own_port_answers_nobody(world: World) -> None:
    run = world.register(ALLOW_ALL)
    with world.guest.namespace.connect("100.96.0.0", 8080) as sock:
        sock.sendall(b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert received_until_close(sock) == b""
    assert run.line()["error"] == "The proxy's own port was spoken to, which nobody may do."
    assert reached(world) == []


def test_something_that_is_no_http_goes_nowhere(world: World) -> None:
    world.register(ALLOW_ALL)
    response = world.guest.talk(b"SSH-2.0-OpenSSH_9.2\r\n\r\n", tls=False)
    assert status(response) in (0, 400)
    assert reached(world) == []


def test_mitmproxys_own_pages_are_not_served(world: World) -> None:
    world.register(ALLOW_ALL)
    assert status(world.guest.talk(b"GET / HTTP/1.1\r\nHost: mitm.it\r\n\r\n", tls=False)) == 502


def test_two_hosts_on_one_plain_connection_get_a_server_connection_each(world: World) -> None:
    world.register(ALLOW_ALL)
    with world.guest.namespace.connect("203.0.113.9", 80) as sock:
        for host in (b"a.test", b"b.test"):
            sock.sendall(b"GET /echo HTTP/1.1\r\nHost: %s\r\n\r\n" % host)
            assert status(read_response(sock)) == 200
    assert world.internet.wait_for("request")["connection"] != world.internet.wait_for("request")["connection"]


def test_a_port_that_a_rule_lists_requests_for_is_spoken_on_and_no_other(world: World) -> None:
    """As the runner's own API's is: only that host, only those requests, however open the policy is."""
    listed = {"action": "allow", "method": "POST", "path": "/hook"}
    run = world.register(policy(rule("a.test", port=8080, requests=[listed]), default="allow"))
    with world.guest.namespace.connect("100.96.0.0", 8080) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: b.test:8080\r\nConnection: close\r\n\r\n")
        assert status(received_until_close(sock)) == 403
    assert run.line()["rule"] == "default"
    with world.guest.namespace.connect("100.96.0.0", 8080) as sock:
        sock.sendall(b"GET /other HTTP/1.1\r\nHost: a.test:8080\r\nConnection: close\r\n\r\n")
        assert status(received_until_close(sock)) == 403
    assert reached(world) == []
