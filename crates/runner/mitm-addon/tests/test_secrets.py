"""Secrets without a proxy around them."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import quote

import pytest
from mitmproxy.http import Headers

from runner_proxy.fields import FieldError
from runner_proxy.hosts import parse_host
from runner_proxy.policy import Action, Decision
from runner_proxy.secrets import Vault, parse_secrets

VALUE = "tok/en+ä=1234"
PLACEHOLDER = "placeholder-0123456789"
HOST = parse_host("api.example.com")
ALLOWED = Decision(Action.ALLOW, "default", None)


def secret(**changes: Any) -> dict[str, Any]:
    return {"name": "TOKEN", "value": VALUE, "placeholder": PLACEHOLDER, "hosts": ["*.example.com"], **changes}


def vault(*secrets: dict[str, Any]) -> Vault:
    return Vault(parse_secrets(secrets or (secret(),)))


@pytest.mark.parametrize(
    "text",
    [
        VALUE,
        quote(VALUE, safe=""),
        quote(VALUE, safe="").lower(),
        quote(VALUE),
        "".join(f"%{byte:02x}" for byte in VALUE.encode()),
        base64.b64encode(VALUE.encode()).decode(),
        base64.urlsafe_b64encode(VALUE.encode()).decode(),
        base64.b64encode(f"user:{VALUE}".encode()).decode(),
        base64.b64encode(f"us:{VALUE}!".encode()).decode(),
        base64.b64encode(f"u:{VALUE}:x".encode()).decode(),
    ],
)
def test_no_spelling_of_a_value_is_logged(text: str) -> None:
    scrubbed = vault().scrub(f"https://host/?a={text}&b=1")
    assert "***" in scrubbed
    core = base64.b64encode(VALUE.encode()).decode()[4:12]
    for spelling in (VALUE, "tok", "1234", core, "%74"):
        assert spelling not in scrubbed


def test_other_texts_are_logged_as_they_are() -> None:
    text = f"https://host/100%25+sure/%zz?key={PLACEHOLDER}\udcff"
    assert vault().scrub(text) == text


def test_a_placeholder_that_begins_like_another_is_not_mistaken_for_it() -> None:
    both = vault(secret(), secret(name="OTHER", value="other-value", placeholder=PLACEHOLDER + "9"))
    headers = Headers([(b"X", f"{PLACEHOLDER}9 {PLACEHOLDER}".encode())])
    both.inject(headers, "/", "https", HOST, ALLOWED)
    assert headers.fields == ((b"X", f"other-value {VALUE}".encode()),)


@pytest.mark.parametrize("value", ["Basic !!!", "Basic", "basic  ", "Basic " + base64.b64encode(b"a:b").decode()])
def test_authorization_without_a_placeholder_is_left_as_it_is(value: str) -> None:
    headers = Headers([(b"Authorization", value.encode())])
    assert vault().inject(headers, "/?q", "https", HOST, ALLOWED) == ("/?q", None)
    assert headers["authorization"] == value


def test_a_reflected_value_becomes_the_placeholder_however_it_is_spelled() -> None:
    headers = Headers([(b"Location", f"/?t={quote(VALUE, safe='').lower()}".encode()), (b"Set-Cookie", VALUE.encode())])
    vault().hide_reflections(headers)
    assert headers["location"] == f"/?t={PLACEHOLDER}"
    assert headers["set-cookie"] == PLACEHOLDER


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "1X"},
        {"value": "abc"},
        {"value": "line\nbreak"},
        {"value": "lone \ud800 half"},
        {"placeholder": "short"},
        {"placeholder": "with blanks in between"},
        {"hosts": ["a b"]},
        {"hosts": "a"},
        {"more": 1},
    ],
)
def test_secrets_that_cannot_be_used_are_refused_and_not_repeated(changes: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as refused:
        parse_secrets([secret(**changes)])
    assert VALUE not in str(refused.value)
    assert "break" not in str(refused.value) or "line break" in str(refused.value)


def test_two_secrets_of_one_name_or_placeholder_are_refused() -> None:
    for changes in ({"name": "OTHER"}, {"placeholder": "another-placeholder"}):
        with pytest.raises(FieldError):
            parse_secrets([secret(), secret(**changes)])
