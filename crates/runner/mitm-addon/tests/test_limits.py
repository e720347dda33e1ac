"""One guest that takes too much, too long or too slowly does not stop the others, nor fill the proxy's memory."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from test_escapes import received_until_close, status
from test_streams import MEBIBYTE, memory
from world.world import ALLOW_ALL, DECOY, World, read_response

REQUEST = b"GET /echo HTTP/1.1\r\nHost: a.test\r\n\r\n"


def is_served(world: World, guest: int) -> bool:
    begin = time.monotonic()
    reply = world.guests[guest].curl("https://a.test/echo", seconds=10)
    return reply.status == 200 and time.monotonic() - begin < 5


def test_ten_thousand_connections_of_one_guest_leave_another_served(world: World) -> None:
    run, _ = world.register(ALLOW_ALL, guest=0), world.register(ALLOW_ALL, guest=1)
    is_served(world, 1)
    before = memory(world)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(world.guest.namespace.connect(DECOY, 80))
        for number in range(10_000):
            sock = world.guest.namespace.connect(DECOY, 80)
            if number < 300:
                stack.enter_context(sock)
            else:
                sock.close()
            if number % 2500 == 0:
                assert is_served(world, 1)
        assert is_served(world, 1)
        assert memory(world) - before < 64 * MEBIBYTE
        # The first of them are served as well.
        first.sendall(REQUEST)
        assert status(read_response(first)) == 200
        run.unregister()
    lines = [entry["line"] for entry in world.daemon.lines if entry["generation"] == run.generation]
    refused = [line for line in lines if line["action"] == "DENY"]
    assert refused
    assert "256 connections at a time" in refused[0]["error"]
    assert len(refused) < 200


def test_a_guest_that_sends_a_byte_at_a_time_is_closed(world: World) -> None:
    with world.another_proxy("slow.log", runner_first_request_seconds=1, runner_idle_seconds=1) as impatient:
        run = impatient.register(ALLOW_ALL)
        with impatient.guest.namespace.connect(DECOY, 80) as sock:
            assert is_closed_while_dribbling(sock)
        assert run.line()["error"] == "No request came in time."
        with impatient.guest.tls("a.test") as sock:
            sock.sendall(REQUEST)
            assert status(read_response(sock)) == 200
            # The same with the second request of a connection.
            assert is_closed_while_dribbling(sock)


def is_closed_while_dribbling(sock: socket.socket) -> bool:
    sock.settimeout(0.1)
    end = time.monotonic() + 20
    with contextlib.suppress(ConnectionError, OSError):
        while time.monotonic() < end:
            sock.sendall(b"G")
            with contextlib.suppress(TimeoutError):
                if not sock.recv(100):
                    return True
        return False
    return True


@pytest.mark.parametrize("host", ["silent.test", "mute.test"])
def test_a_server_that_does_not_answer_is_given_up(world: World, host: str) -> None:
    with world.another_proxy("silent.log", runner_dial_seconds=1) as impatient:
        run = impatient.register(ALLOW_ALL)
        reply = impatient.guest.curl(f"https://{host}/", seconds=15)
        assert (reply.status, reply.json()["error"]) == (502, "upstream_failed")
        line = run.line()
        assert "no answer within 1 seconds" in line["error"] or "closed" in line["error"]


def test_what_waits_for_silent_servers_ends_when_its_turn_does_not_come(world: World) -> None:
    with world.another_proxy("turns.log", runner_dial_seconds=1) as impatient:
        run = impatient.register(ALLOW_ALL)
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(impatient.guest.namespace.connect(DECOY, 80)) for _ in range(50)]
            for sock in socks:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: silent.test\r\n\r\n")
            assert [status(read_response(sock)) for sock in socks] == [502] * 50
            run.unregister()


def test_trailers_that_mitmproxy_does_not_know_end_the_connection_and_leave_a_line(world: World) -> None:
    run = world.register(ALLOW_ALL)
    reply = world.guest.curl("https://h1.test.example/trailers", "--http1.1", seconds=10)
    assert reply.exit_code != 28
    assert run.line()["url"].endswith("/trailers")


def test_a_guest_that_waits_for_silent_servers_leaves_another_served(world: World) -> None:
    world.register(ALLOW_ALL, guest=0)
    world.register(ALLOW_ALL, guest=1)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(world.guest.namespace.connect(DECOY, 80))
            sock.sendall(b"GET / HTTP/1.1\r\nHost: silent.test\r\n\r\n")
        assert is_served(world, 1)


def test_a_head_without_end_is_refused(world: World) -> None:
    world.register(ALLOW_ALL)
    with world.guest.tls("a.test") as sock:
        with contextlib.suppress(OSError):
            for _ in range(64):
                sock.sendall(b"X" * 65536)
        answer = b""
        with contextlib.suppress(OSError):
            answer = received_until_close(sock)
        assert status(answer) in (0, 431)


def test_requests_sent_ahead_are_not_gathered_without_end(world: World) -> None:
    world.register(ALLOW_ALL)
    before = memory(world)
    with world.guest.tls("a.test") as sock:
        sock.sendall(b"GET /stall HTTP/1.1\r\nHost: a.test\r\n\r\n")
        world.internet.wait_for("request", path="/stall")
        with contextlib.suppress(OSError):
            for _ in range(1000):
                sock.sendall(REQUEST * 1000)
        assert received_until_close(sock) == b""
    assert memory(world) - before < 16 * MEBIBYTE


def test_an_upload_waits_while_its_server_is_being_reached(world: World) -> None:
    world.register(ALLOW_ALL)
    before = memory(world)
    for tls in (True, False):
        with world.guest.tls("silent.test") if tls else world.guest.namespace.connect(DECOY, 80) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: silent.test\r\nContent-Length: 1000000000\r\n\r\n")
            sock.settimeout(1)
            sent = 0
            with contextlib.suppress(TimeoutError):
                for _ in range(1000):
                    sock.sendall(bytes(65536))
                    sent += 65536
            assert sent < 32 * MEBIBYTE
    assert memory(world) - before < 16 * MEBIBYTE


def test_exchanges_wait_while_the_daemon_does_not_read_and_no_line_is_lost(world: World) -> None:
    with world.another_proxy("unread.log") as unread:
        run = unread.register(ALLOW_ALL)
        with unread.guest.namespace.connect(DECOY, 80) as sock:
            sock.settimeout(2)
            unread.daemon.pause()
            before, done = memory(unread), 0
            # Lines are sent until the daemon's end is full, then gathered up to the bound; then exchanges do not end.
            with contextlib.suppress(TimeoutError):
                for _ in range(20_000):
                    sock.sendall(b"GET / HTTP/1.1\r\nHost: refused.invalid:1\r\n\r\n")
                    read_response(sock)
                    done += 1
            assert 4096 < done < 20_000
            assert memory(unread) - before < 32 * MEBIBYTE
            unread.daemon.go_on()
            read_response(sock)
            assert len(run.lines(done + 1)) == done + 1
