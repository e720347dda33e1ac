"""Lines of the network log (docs/network.md, "Network log")."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from .policy import Action
from .secrets import Vault

# Longer texts are cut: a guest can make its URL as long as a request's head, and people read its log.
_LONGEST_TEXT = 1024
_LONGEST_URL = 8 * 1024

# The statuses of HTTP (RFC 9110, 15); nothing else is passed on, or stands in a line.
STATUSES = range(100, 600)

Line = dict[str, object]


@dataclass(slots=True)
class Verdict:
    """What the log says about an exchange's fate."""

    action: Action
    rule: str | None
    host: str
    port: int
    error: str | None = None


def http_line(
    vault: Vault,
    verdict: Verdict,
    *,
    begin: float,
    end: float,
    method: str,
    url: str,
    status: int | None,
    request_size: int,
    response_size: int,
) -> Line:
    return {
        **_common(vault, "http", verdict, begin),
        "method": _text(vault, method),
        "url": _text(vault, url, _LONGEST_URL),
        "status": status if status in STATUSES else None,
        "latency_ms": _milliseconds(begin, end),
        "request_size": request_size,
        "response_size": response_size,
    }


def tcp_line(vault: Vault, verdict: Verdict, *, begin: float, end: float, request_size: int, response_size: int) -> Line:
    return {
        **_common(vault, "tcp", verdict, begin),
        "latency_ms": _milliseconds(begin, end),
        "request_size": request_size,
        "response_size": response_size,
    }


def _common(vault: Vault, kind: str, verdict: Verdict, begin: float) -> Line:
    return {
        "timestamp": timestamp(begin),
        "type": kind,
        "action": verdict.action.value,
        "rule": verdict.rule,
        "host": _text(vault, verdict.host),
        "port": verdict.port,
        "error": None if verdict.error is None else _text(vault, verdict.error),
    }


def timestamp(moment: float) -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _milliseconds(begin: float, end: float) -> int:
    return max(0, round((end - begin) * 1000))


def _text(vault: Vault, text: str, longest: int = _LONGEST_TEXT) -> str:
    # Scrubbed before it is cut: half a secret at the end would not be recognised.
    shown = vault.scrub(text).encode("utf-8", "replace").decode()
    raw = shown.encode()
    return shown if len(raw) <= longest else raw[:longest].decode("utf-8", "ignore") + "…"
