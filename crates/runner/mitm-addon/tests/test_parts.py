"""The small parts: the socket's queue, log lines, certificates, what is said on stderr."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from runner_proxy import lookups
from runner_proxy.answers import readable
from runner_proxy.certificates import Authority, CaError, Leaves
from runner_proxy.control import Outbox
from runner_proxy.lines import Verdict, http_line, timestamp
from runner_proxy.messages import MessageError, Ping, Register, parse_message
from runner_proxy.paths import request_path
from runner_proxy.policy import Action
from runner_proxy.quiet import Quiet
from runner_proxy.secrets import Vault, parse_secrets
from world.authority import TestAuthority
from world.world import ALLOW_ALL

NO_SECRETS = Vault(())


def test_whoever_has_something_to_send_waits_while_the_outbox_is_full() -> None:
    async def scenario() -> None:
        outbox = Outbox(most_lines=2)
        for number in (1, 2):
            await outbox.put({"n": number})
        waiting = [asyncio.ensure_future(outbox.put({"n": number})) for number in (3, 4, 5)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        assert await outbox.take() == b'{"n":1}\n{"n":2}\n'
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert [task.done() for task in waiting] == [True, True, False]
        assert await outbox.take() == b'{"n":3}\n{"n":4}\n'
        await waiting[2]
        assert await outbox.take() == b'{"n":5}\n'

    asyncio.run(scenario())


def test_timestamps_are_rfc_3339_with_milliseconds() -> None:
    assert timestamp(0.0) == "1970-01-01T00:00:00.000Z"
    assert timestamp(1_700_000_000.1239) == "2023-11-14T22:13:20.123Z"


def test_long_texts_are_cut_after_they_were_scrubbed() -> None:
    secret = {"name": "T", "value": "secret-value", "placeholder": "p" * 16, "hosts": []}
    vault = Vault(parse_secrets([secret]))
    url = "https://h/" + "x" * (8 * 1024 - 16) + "secret-value" + "y" * 20
    line = http_line(
        vault,
        Verdict(Action.DENY, "r", "h", 443, "ä" * 2000),
        begin=1.0,
        end=1.5,
        method="GET",
        url=url,
        status=None,
        request_size=0,
        response_size=0,
    )
    assert "secr" not in str(line["url"])
    assert str(line["url"]).endswith("…")
    assert len(str(line["error"]).encode()) <= 1024 + 3
    assert line["latency_ms"] == 500


def register(**changes: Any) -> bytes:
    order = {"id": 1, "op": "register", "address": "100.96.0.7", "generation": 1, "run_id": "r-1"}
    return json.dumps({**order, "policy": ALLOW_ALL, "secrets": [], **changes}).encode()


def test_orders_are_read() -> None:
    assert parse_message(b'{"id": 7, "op": "ping"}') == (7, Ping())
    message_id, order = parse_message(register())
    assert message_id == 1
    assert isinstance(order, Register)
    assert (order.address, order.generation, order.run_id) == ("100.96.0.7", 1, "r-1")


@pytest.mark.parametrize(
    ("line", "message_id"),
    [
        (b"", None),
        (b"[]", None),
        (b'{"op": "ping"}', None),
        (b'{"id": true, "op": "ping"}', None),
        (b'{"id": -1, "op": "ping"}', None),
        (b'{"id": 1, "op": "ping", "x": 1}', 1),
        (b'{"id": 1}', 1),
        (b"\xff", None),
        (b"[" * 100_000, None),
        (register(address="100.96.0.07"), 1),
        (register(address="::1"), 1),
        (register(generation="1"), 1),
        (register(run_id="../x"), 1),
        (register(policy={**ALLOW_ALL, "version": 2}), 1),
        (register(policy={**ALLOW_ALL, "rules": [{}]}), 1),
        (register(policy=None), 1),
        (register(secrets=[1]), 1),
    ],
)
def test_what_is_no_order_is_refused_with_its_id_and_a_sentence(line: bytes, message_id: int | None) -> None:
    with pytest.raises(MessageError) as refused:
        parse_message(line)
    assert refused.value.message_id == message_id
    assert str(refused.value).endswith(".")


def test_certificates_are_believed_by_openssl_and_strict_python(tmp_path: Path) -> None:
    ca = TestAuthority("runner")
    (tmp_path / "ca.pem").write_bytes(ca.certificate)
    leaves = Leaves(Authority(ca.pem))
    for host, option in (("api.example.com", "-verify_hostname"), ("198.18.0.1", "-verify_ip"), ("l" * 63 + ".example", None)):
        (tmp_path / "leaf.pem").write_bytes(leaves.get(host).cert.to_pem())
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "ca.pem"]
        command += [option, host] if option else []
        done = subprocess.run([*command, "leaf.pem"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_certificates_are_back_dated_kept_and_made_anew_in_time() -> None:
    now = datetime.now(UTC)
    leaves = Leaves(Authority(TestAuthority("runner").pem), lambda: now)
    first = leaves.get("a.example")
    assert first.cert.notbefore <= now - timedelta(days=1)
    assert leaves.get("a.example") is first
    now += timedelta(days=21)
    second = leaves.get("a.example")
    assert second is not first
    assert second.cert.notafter > now + timedelta(days=20)


def test_leaves_do_not_have_the_authoritys_key() -> None:
    ca = TestAuthority("runner")
    leaf = x509.load_pem_x509_certificate(Leaves(Authority(ca.pem)).get("a.example").cert.to_pem())
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key != x509.load_pem_x509_certificate(ca.certificate).public_key()


@pytest.mark.parametrize("make", [lambda ca: b"", lambda ca: ca.certificate, lambda ca: ca.pem.replace(b"BEGIN", b"END")])
def test_a_ca_that_cannot_be_used_is_refused(make: Any) -> None:
    with pytest.raises(CaError):
        Authority(make(TestAuthority("runner")))


def test_a_certificate_of_another_key_is_refused() -> None:
    one, other = TestAuthority("one"), TestAuthority("other")
    with pytest.raises(CaError):
        Authority(one.pem.replace(one.certificate, other.certificate))


def test_stderr_is_scrubbed_and_bounded() -> None:
    secret = {"name": "T", "value": "secret-value", "placeholder": "p" * 16, "hosts": []}
    vault = Vault(parse_secrets([secret]))
    now = 0.0
    quiet = Quiet(lambda: [vault], lambda: now)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "quoting %s", ("secret-value",), None)
    assert quiet.filter(record)
    assert record.getMessage() == "quoting ***"
    shown = [quiet.filter(logging.LogRecord("x", logging.WARNING, "", 0, "m", (), None)) for _ in range(100)]
    assert sum(shown) == 19
    now = 11.0
    assert quiet.filter(logging.LogRecord("x", logging.WARNING, "", 0, "m", (), None))


@pytest.mark.parametrize("end", ["/", "%20", "//x", "/.", "/..", "/x/../y", "?", "%", "\\", " ", "/é"])
@pytest.mark.parametrize("segment", ["a", "a" * 60, "a/", "a/b-1", "%41/", "a.b/"])
def test_the_longest_path_is_read_at_once_however_it_ends(segment: str, end: str) -> None:
    path = "/" + segment * (60_000 // len(segment)) + end
    begin = time.process_time()
    request_path(path)
    # One that could be read in two ways took longer than anybody has waited, from 30 characters on.
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("status", [None, -5, 0, 99, 100, 599, 600, 70_000, 1 << 80])
def test_a_line_has_a_status_of_http_or_none(status: int | None) -> None:
    verdict = Verdict(Action.ALLOW, "r", "h", 443)
    sizes = {"request_size": 0, "response_size": 0}
    line = http_line(NO_SECRETS, verdict, begin=1.0, end=1.5, method="GET", url="https://h/", status=status, **sizes)
    assert line["status"] == (status if status in (100, 599) else None)


def test_a_message_ends_where_it_would_quote_bytes() -> None:
    assert readable("Cannot parse HTTP response: Bad line: b'HTTP/1.1 x'") == "Cannot parse HTTP response: Bad line."
    assert readable('unexpected server response: b"it\'s"') == "unexpected server response."
    assert readable("bob's b is no quote") == "bob's b is no quote"


def test_a_lookups_place_is_free_when_its_thread_is() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        answered, begun = asyncio.Event(), []

        async def silent(host: str, port: int, **_options: object) -> list[object]:
            begun.append(host)
            await answered.wait()
            raise OSError(f"{host}:{port} is nowhere")

        loop.getaddrinfo = silent  # type: ignore[method-assign,assignment]
        lookups.install(loop)
        places = asyncio.Semaphore(2)

        async def dial(host: str) -> None:
            lookups.take_places_from(places)
            await asyncio.open_connection(host, 443)

        # Whoever gives up at once, again and again, holds no more than these two.
        for number in range(5):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await dial(f"host-{number}.test")
        assert begun == ["host-0.test", "host-1.test"]
        # Another guest has places of its own.
        last = asyncio.create_task(dial("host-5.test"))
        places = asyncio.Semaphore(2)
        await asyncio.sleep(0)
        answered.set()
        with pytest.raises(OSError, match="host-5"):
            await last

    asyncio.run(scenario())
