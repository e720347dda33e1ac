"""Who may speak, and for how long."""

from __future__ import annotations

import contextlib
import json
import signal
import ssl

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from test_escapes import received_until_close, status
from world.world import ALLOW_ALL, DECOY, DENY_ALL, World, policy, read_response, rule


def test_a_guest_that_is_not_registered_is_closed_before_any_handshake(world: World) -> None:
    world.register(ALLOW_ALL, guest=1).unregister()
    world.internet.news()
    with world.guests[1].namespace.connect(DECOY, 443) as sock:
        assert received_until_close(sock) == b""
    with pytest.raises((ssl.SSLError, OSError)):
        world.guests[1].tls("a.test")
    assert world.internet.news() == []


def test_guests_are_told_apart_by_their_address(world: World) -> None:
    one, two = world.register(ALLOW_ALL, guest=0), world.register(DENY_ALL, guest=1)
    request = b"GET /echo HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For: 100.96.0.1\r\n\r\n"
    assert status(world.guests[0].talk(request, "a.test")) == 200
    assert status(world.guests[1].talk(request, "a.test")) == 403
    assert one.line()["action"] == "ALLOW"
    assert two.line()["action"] == "DENY"


def test_server_connections_are_never_shared_between_guests(world: World) -> None:
    for number in (0, 1):
        world.register(ALLOW_ALL, guest=number)
    request = b"GET /echo HTTP/1.1\r\nHost: a.test\r\n\r\n"
    numbers = set()
    for guest in (world.guests[0], world.guests[1], world.guests[0]):
        with guest.tls("a.test") as sock:
            for _ in range(2):
                sock.sendall(request)
                body = read_response(sock).partition(b"\r\n\r\n")[2]
                numbers.add((guest.address, json.loads(body)["connection"]))
    # Two requests of one guest's connection share one; nothing else does.
    assert len({number for _, number in numbers}) == 3
    assert len(numbers) == 3


def test_a_websocket_dies_with_its_generation(world: World) -> None:
    first = world.register(ALLOW_ALL)
    with connect("ws://a.test/websocket", sock=world.guest.tls("a.test"), close_timeout=1) as socket:
        socket.send("hello")
        assert socket.recv(timeout=10) == "hello"
        world.register(ALLOW_ALL)
        # The answer to the second registration came after the first's connections were gone and its lines sent.
        (line,) = [entry["line"] for entry in world.daemon.lines if entry["generation"] == first.generation]
        assert (line["status"], line["url"], line["error"]) == (101, "https://a.test/websocket", None)
        assert line["request_size"] > 0
        assert line["response_size"] > 0
        assert world.internet.wait_for("websocket closed")
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=10)


def test_unregistering_ends_what_is_under_way_and_answers_after_its_lines(world: World) -> None:
    run = world.register(ALLOW_ALL)
    with world.guest.tls("a.test") as sock:
        sock.sendall(b"GET /stall HTTP/1.1\r\nHost: a.test\r\n\r\n")
        world.internet.wait_for("request", path="/stall")
        run.unregister()
        lines = [entry["line"] for entry in world.daemon.lines if entry["generation"] == run.generation]
        assert [line["url"] for line in lines] == ["https://a.test/stall"]
        assert lines[0]["error"]
        assert world.internet.wait_for("closed")
        with contextlib.suppress(OSError):
            assert sock.recv(100) == b""


def test_an_exchange_that_nobody_may_continue_is_not_continued_by_a_new_registration(world: World) -> None:
    world.register(policy(rule("a.test")))
    with world.guest.tls("a.test") as sock:
        sock.sendall(b"GET /echo HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert status(read_response(sock)) == 200
        world.register(ALLOW_ALL)
        with contextlib.suppress(OSError):
            sock.sendall(b"GET /echo HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert received_until_close(sock) == b""


def test_the_daemons_end_of_the_socket_ends_the_proxy(world: World) -> None:
    daemon = world.start_proxy(8091, "hangs-up.log")
    daemon.hang_up()
    assert daemon.process.wait(10) == 0
    daemon.close()


def test_a_port_is_free_again_for_the_next_proxy(world: World) -> None:
    first = world.start_proxy(8092, "first.log")
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(10)
    first.close()
    world.start_proxy(8092, "second.log").close()


def test_orders_that_make_no_sense_are_answered_with_a_sentence(world: World) -> None:
    run = world.register(ALLOW_ALL)
    address = run.guest.address
    old = world.daemon.ask(op="register", address=address, generation=0, run_id="r", policy=ALLOW_ALL, secrets=[])
    assert "later than 0" in old["error"]
    assert "not 0" in world.daemon.ask(op="unregister", address=address, generation=0)["error"]
    assert "is not registered" in world.daemon.ask(op="unregister", address="100.96.9.9", generation=1)["error"]
    assert "'op'" in world.daemon.ask(op="dance")["error"]
    assert "has 'extra'" in world.daemon.ask(op="ping", extra=1)["error"]
    answers = world.daemon.expect_answer_without_id()
    world.daemon.send_raw(b"no json\n")
    assert answers.get(timeout=10) == {"id": None, "error": "The message is no JSON."}
    # It still serves.
    assert world.daemon.ask(op="ping") == {"id": world.daemon.last_id, "ok": True}


def test_a_policy_that_names_a_secret_nobody_has_is_refused(world: World) -> None:
    rules = policy(rule("a.test", headers={"X": "${{ secrets.NOBODYS }}"}))
    order = {"address": world.guest.address, "generation": 10**6, "run_id": "r", "policy": rules, "secrets": []}
    assert "NOBODYS" in world.daemon.ask(op="register", **order)["error"]
