"""Secrets between guest, server and log."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from world.world import World, policy, rule

VALUE = "s3cret/value+with=odd"
PLACEHOLDER = "placeholder0123456789abcdef"


def secret(*hosts: str) -> dict[str, Any]:
    return {"name": "TOKEN", "value": VALUE, "placeholder": PLACEHOLDER, "hosts": list(hosts)}


def header(reply_json: Any, name: str) -> str | None:
    return next((value for key, value in reply_json["headers"] if key.lower() == name), None)


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"user:{password}".encode()).decode()


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_a_placeholder_becomes_the_value_in_headers_and_the_query_and_nowhere_else(world: World, version: str) -> None:
    run = world.register(policy(rule("a.test")), (secret("a.test"),))
    reply = world.guest.curl(
        f"https://a.test/echo/{PLACEHOLDER}?key={PLACEHOLDER}&other=1",
        version,
        "--header",
        f"Authorization: Bearer {PLACEHOLDER}",
        "--data",
        PLACEHOLDER,
    ).json()
    assert header(reply, "authorization") == f"Bearer {VALUE}"
    assert reply["path"] == f"/echo/{PLACEHOLDER}?key=s3cret%2Fvalue%2Bwith%3Dodd&other=1"
    assert reply["size"] == len(PLACEHOLDER)
    line = run.line()
    assert line["url"] == f"https://a.test/echo/{PLACEHOLDER}?key={PLACEHOLDER}&other=1"


def test_a_placeholder_is_found_inside_basic_authorization(world: World) -> None:
    world.register(policy(rule("a.test")), (secret("a.test"),))
    reply = world.guest.curl("https://a.test/echo", "--user", f"user:{PLACEHOLDER}").json()
    assert header(reply, "authorization") == basic(VALUE)


@pytest.mark.parametrize(
    ("hosts", "url", "mode"),
    [
        (["b.test"], "https://a.test/echo", "enforce"),
        ([], "https://a.test/echo", "enforce"),
        (["a.test"], "http://a.test/echo", "enforce"),
        (["a.test"], "https://a.test/echo", "audit"),
    ],
    ids=["another host's", "no host's, and the rule does not name it", "in the clear", "in an audit"],
)
def test_a_secret_that_may_not_go_out_does_not(world: World, hosts: list[str], url: str, mode: str) -> None:
    rules = policy(mode="audit") if mode == "audit" else policy(rule("a.test"))
    world.register(rules, (secret(*hosts),))
    reply = world.guest.curl(url, "--header", f"X-Key: {PLACEHOLDER}", "--user", f"user:{PLACEHOLDER}").json()
    assert header(reply, "x-key") == PLACEHOLDER
    assert header(reply, "authorization") == basic(PLACEHOLDER)


def test_a_rule_sets_headers_and_query_whatever_the_guest_sent(world: World) -> None:
    templates: dict[str, Any] = {
        "headers": {"Authorization": "Bearer ${{ secrets.TOKEN }}", "X-Fixed": "yes"},
        "query": {"key": "${{ secrets.TOKEN }}"},
    }
    world.register(policy(rule("a.test", **templates)), (secret(),))
    reply = world.guest.curl("https://a.test/echo?a=1&key=mine&%6bey=too", "--header", "Authorization: mine").json()
    assert [value for name, value in reply["headers"] if name.lower() == "authorization"] == [f"Bearer {VALUE}"]
    assert header(reply, "x-fixed") == "yes"
    assert reply["path"] == "/echo?a=1&key=s3cret%2Fvalue%2Bwith%3Dodd"


def test_a_rules_secret_does_not_go_out_in_the_clear(world: World) -> None:
    run = world.register(policy(rule("a.test", headers={"Authorization": "Bearer ${{ secrets.TOKEN }}"})), (secret(),))
    reply = world.guest.curl("http://a.test/echo", "--header", "Authorization: mine").json()
    assert header(reply, "authorization") is None
    assert "Authorization" in run.line()["error"]


def test_a_secret_does_not_go_to_a_server_that_is_not_who_it_says(world: World) -> None:
    world.register(policy(rule("unknown.test")), (secret("unknown.test"),))
    assert world.guest.curl("https://unknown.test/echo", "--header", f"X: {PLACEHOLDER}").status == 502
    assert not [news for news in world.internet.news() if news["event"] == "request"]


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_a_value_that_comes_back_in_a_header_is_the_placeholder_again(world: World, version: str) -> None:
    world.register(policy(rule("a.test")), (secret("a.test"),))
    reply = world.guest.curl("https://a.test/reflect", version, "--header", f"Authorization: Bearer {PLACEHOLDER}")
    assert VALUE not in reply.head
    assert f"x-reflected: Bearer {PLACEHOLDER}" in reply.head


def test_no_log_line_and_no_message_holds_a_value(world: World) -> None:
    run = world.register(policy(rule("a.test")), (secret("a.test"),))
    # A guest that learnt it from a body may send it itself.
    world.guest.curl(f"https://a.test/echo?v={VALUE}&w=s3cret%2fvalue%2Bwith%3dodd")
    world.guest.curl(f"https://b.test/{base64.b64encode(VALUE.encode()).decode()}")
    everything = json.dumps(run.lines(2)) + world.daemon.stderr.read_text()
    assert "s3cret" not in everything
    assert base64.b64encode(VALUE.encode()).decode()[:-4] not in everything
    assert "***" in everything


@pytest.mark.parametrize("value", [VALUE, "back\\slash-s3cret", 'it\'s "s3cret"'], ids=["plain", "backslash", "quotes"])
def test_a_value_in_what_the_proxy_cannot_read_is_in_neither_its_page_nor_the_log(world: World, value: str) -> None:
    run = world.register(policy(rule("h1.test.example")), ({**secret("h1.test.example"), "value": value},))
    reply = world.guest.curl("https://h1.test.example/garble", "--header", f"Authorization: Bearer {PLACEHOLDER}")
    assert reply.status == 502
    assert reply.json()["error"] == "upstream_failed"
    everything = reply.head + reply.body + json.dumps(run.line()) + world.daemon.stderr.read_text()
    assert "s3cret" not in everything
