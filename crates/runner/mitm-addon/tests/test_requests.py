"""What becomes of requests, seen by a guest, by servers and in the log."""

from __future__ import annotations

import pytest

from world.world import DENY_ALL, World, policy, rule

VERSIONS = pytest.mark.parametrize("version", ["--http1.1", "--http2"])


@VERSIONS
def test_an_allowed_request_reaches_the_server_that_the_proxy_looked_up(world: World, version: str) -> None:
    run = world.register(policy(rule("a.test")))
    reply = world.guest.curl("https://a.test/echo?x=1", version)
    assert reply.status == 200, reply
    assert reply.json()["path"] == "/echo?x=1"
    line = run.line()
    assert line["timestamp"].endswith("Z")
    assert 0 <= line.pop("latency_ms") < 30_000
    assert line.pop("response_size") == len(reply.body)
    del line["timestamp"]
    assert line == {
        "type": "http",
        "action": "ALLOW",
        "rule": "a.test",
        "host": "a.test",
        "port": 443,
        "error": None,
        "method": "GET",
        "url": "https://a.test/echo?x=1",
        "status": 200,
        "request_size": 0,
    }


def test_plain_http_is_decided_like_https(world: World) -> None:
    run = world.register(policy(rule("a.test")))
    assert world.guest.curl("http://a.test/echo").json()["path"] == "/echo"
    assert world.guest.curl("http://b.test/echo").status == 403
    assert [line["url"] for line in run.lines(2)] == ["http://a.test/echo", "http://b.test/echo"]


@VERSIONS
def test_a_denied_request_is_answered_with_what_an_agent_can_act_on_and_reaches_nobody(world: World, version: str) -> None:
    requests = [{"action": "allow", "method": "GET", "path": "/{owner}/{repo}"}]
    run = world.register(policy(rule("a.test", name="github", path="/repos", requests=requests)))
    reply = world.guest.curl("https://a.test/repos/x?q=1", version, "--data", "body")
    assert reply.status == 403
    answer = reply.json()
    assert answer.pop("hint")
    assert answer.pop("message") == "POST a.test/repos/x is denied: rule github denies it."
    assert answer == {
        "error": "network_policy_denied",
        "denied_by": "runner network policy",
        "rule": "github",
        "method": "POST",
        "host": "a.test",
        "path": "/repos/x",
    }
    line = run.line()
    assert (line["action"], line["rule"], line["status"], line["error"]) == ("DENY", "github", 403, None)
    assert world.internet.news() == []


@VERSIONS
def test_a_denied_upload_is_answered_before_its_body(world: World, version: str) -> None:
    world.register(DENY_ALL)
    big = world.scratch / "big"
    with big.open("wb") as file:
        file.truncate(300_000_000)
    reply = world.guest.curl("https://a.test/upload", version, "--data-binary", f"@{big}", "--header", "Expect:")
    assert reply.status == 403
    assert reply.json()["host"] == "a.test"


def test_audit_lets_pass_and_logs_what_it_would_deny(world: World) -> None:
    run = world.register(policy(mode="audit"))
    assert world.guest.curl("https://a.test/echo").status == 200
    line = run.line()
    assert (line["action"], line["rule"], line["status"]) == ("AUDIT", "default", 200)


def test_a_policy_is_changed_while_its_connections_live(world: World) -> None:
    run = world.register(DENY_ALL)
    reply = world.guest.curl("https://a.test/echo")
    assert reply.status == 403
    run.update(policy(rule("a.test")))
    assert world.guest.curl("https://a.test/echo").status == 200


def test_bodies_are_counted_and_compressed_ones_left_as_they_are(world: World) -> None:
    run = world.register()
    assert world.guest.curl("https://a.test/upload", "--data", "x" * 5000).json()["size"] == 5000
    reply = world.guest.curl("https://a.test/gzip")
    assert reply.body.encode("latin-1")[:2] == b"\x1f\x8b"
    assert world.guest.curl("https://h1.test.example/chunked", "--http1.1").body == "onetwo"
    sizes = [(line["request_size"], line["response_size"]) for line in run.lines(3)]
    assert sizes[0][0] == 5000
    assert sizes[1] == (0, len(reply.body))
    assert sizes[2] == (0, 6)


def test_a_server_without_http2_serves_a_guest_that_speaks_it(world: World) -> None:
    world.register()
    reply = world.guest.curl("https://h1.test.example/echo", "--http2")
    assert (reply.status, reply.head.split()[0]) == (200, "HTTP/2")


@VERSIONS
@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("unknown.test", "unable to get local issuer certificate"),
        ("expired.test", "certificate has expired"),
        ("wrong.test", "ostname mismatch"),
    ],
)
def test_a_server_whose_certificate_is_not_good_is_refused_with_the_reason(
    world: World, version: str, host: str, reason: str
) -> None:
    run = world.register()
    reply = world.guest.curl(f"https://{host}/echo", version)
    assert reply.status == 502, reply
    assert reply.json()["error"] == "upstream_failed"
    assert reason in reply.json()["message"]
    line = run.line()
    assert reason in line["error"]
    assert (line["action"], line["status"]) == ("ALLOW", None)
    assert not [news for news in world.internet.news() if news["event"] == "request"]


def test_a_server_that_refuses_connections_is_told_apart_from_a_denial(world: World) -> None:
    run = world.register()
    reply = world.guest.curl("https://refuses.test/")
    assert (reply.status, reply.json()["error"]) == (502, "upstream_failed")
    assert "refused" in run.line()["error"].lower()


def test_a_name_that_does_not_exist_is_told_as_such(world: World) -> None:
    world.register()
    reply = world.guest.curl("https://nowhere.test/")
    assert reply.status == 502
    assert "not known" in reply.json()["message"]


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_with_the_option_for_trusted_cas_emptied_every_https_request_fails(world: World, version: str) -> None:
    with world.another_proxy("emptied.log", trusted="") as emptied:
        run = emptied.register(policy(default="allow"))
        reply = emptied.guest.curl("https://a.test/", version)
        assert (reply.status, reply.exit_code) in ((502, 0), (0, 92)), reply
        assert run.line()["error"]


@VERSIONS
@pytest.mark.parametrize("number", ["70000", "600", "0", "-5"])
def test_an_answer_with_a_status_that_http_does_not_have_is_none(world: World, version: str, number: str) -> None:
    run = world.register(policy(rule("h1.test.example")))
    reply = world.guest.curl(f"https://h1.test.example/status/{number}", version)
    assert reply.status == 502
    assert reply.json()["message"] == f"The server answered with status {number}, which is none."
    line = run.line()
    assert (line["status"], line["error"]) == (None, f"The server answered with status {number}, which is none.")
    # The rest of the answer, which has no end, is not waited for.
    world.internet.wait_for("closed")
    assert world.guest.curl("https://h1.test.example/echo", version).status == 200


@VERSIONS
def test_interim_answers_are_not_taken_for_the_final_one(world: World, version: str) -> None:
    run = world.register(policy(rule("h1.test.example")))
    url = "https://h1.test.example/interim"
    reply = world.guest.curl(url, version)
    assert (reply.status, reply.body) == (200, "final")
    line = run.line()
    assert (line["status"], line["response_size"]) == (200, 5)
