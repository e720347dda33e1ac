"""What a guest is told when its request goes nowhere: JSON that an agent can act on."""

from __future__ import annotations

import json
import os
import re

from mitmproxy.http import Headers, Response

from .policy import Decision

_LONGEST_TEXT = 2000
# Where mitmproxy begins to quote bytes in Python's notation, in which secrets would have spellings that nobody looks for.
_QUOTED_BYTES = re.compile(r"""[\s:]*\bb['"]""")
_CONNECT_FAILED = re.compile(r"\[Errno (\d+)\] Connect call failed")
DENIED_BY = "runner network policy"
_HINT_DENY = (
    "This run may not make this request, and trying again will not help. Go on without it, or ask whoever submitted the run "
    "to allow it (--allow HOST, or a firewall file)."
)
_HINT_INVALID = "Send a plain request to the host itself, with one Host header that is also the name of the TLS connection."
_HINT_FAILED = "The request was allowed, but the server could not be reached. The message says why."


def denied(decision: Decision, method: str, host: str, path: str, sentence: str | None = None) -> Response:
    """403: the policy says no."""
    by = "no rule allows it" if decision.rule is None else f"rule {decision.label} denies it"
    return _json(
        403,
        {
            "error": "network_policy_denied",
            "message": sentence or f"{method} {host}{path} is denied: {by}.",
            "denied_by": DENIED_BY,
            "rule": decision.label,
            "method": method,
            "host": host,
            "path": path,
            "hint": _HINT_DENY,
        },
    )


def invalid(status: int, sentence: str, method: str, host: str, path: str) -> Response:
    """The request is refused whatever the policy says."""
    return _json(
        status,
        {
            "error": "network_policy_denied",
            "message": sentence,
            "denied_by": DENIED_BY,
            "rule": "invalid",
            "method": method,
            "host": host,
            "path": path,
            "hint": _HINT_INVALID,
        },
    )


def failed(status: int, sentence: str, host: str) -> Response:
    """502 and its like: allowed, but there is no answer."""
    return _json(
        status,
        {"error": "upstream_failed", "message": sentence, "denied_by": None, "host": host, "hint": _HINT_FAILED},
    )


def refused(status: int, sentence: str) -> Response:
    """What mitmproxy itself refuses: a message that is no HTTP."""
    return _json(
        status,
        {"error": "bad_request", "message": sentence, "denied_by": DENIED_BY, "rule": "invalid", "hint": _HINT_INVALID},
    )


def _json(status: int, content: dict[str, object]) -> Response:
    shown = {name: _short(value) if isinstance(value, str) else value for name, value in content.items()}
    body = json.dumps(shown).encode() + b"\n"
    headers = Headers(
        content_type="application/json", content_length=str(len(body)), cache_control="no-store", server="runner-proxy"
    )
    return Response.make(status, body, headers)


def readable(message: str) -> str:
    """A message of mitmproxy's or asyncio's, with the system's words in place of its numbers, up to what it quotes."""
    if quote := _QUOTED_BYTES.search(message):
        message = message[: quote.start()] + "."
    return _CONNECT_FAILED.sub(lambda found: f"{os.strerror(int(found.group(1)))}: connecting to", message)


def _short(text: str) -> str:
    # mitmproxy's messages may quote whatever it received.
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"
