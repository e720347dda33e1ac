"""What a request is about: one host, or the reason why that cannot be said.

Whatever could make two programs on the way read two different requests is refused here, before any decision.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mitmproxy.http import Request

from .hosts import Host, HostError, parse_authority, parse_host

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
# No blank or control character: in HTTP/1 they would end the request line.
_PATH = re.compile(r"(?:/[^\x00-\x20\x7f]*|\*)")
_LINE_BREAKS = re.compile(rb"[\r\n\0]")
_HTTP1_VERSIONS = ("HTTP/1.1", "HTTP/1.0")


class BadRequestError(Exception):
    """A request that is answered with a status and a sentence, and goes nowhere."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True, slots=True)
class Target:
    host: Host
    path: str


def find_target(request: Request, *, http2: bool, server_name: Host | None, tls: bool, port: int) -> Target:
    """The host that everything in the request agrees on."""
    if not http2 and request.http_version not in _HTTP1_VERSIONS:
        raise BadRequestError(400, f"{request.http_version} is not spoken on this connection.")
    if not _TOKEN.fullmatch(request.method) or request.method == "CONNECT":
        raise BadRequestError(400, "CONNECT and methods with odd characters are not taken: connect to the host itself.")
    path = request.path
    if not _PATH.fullmatch(path):
        raise BadRequestError(400, "The request's path does not begin with a slash, or holds a blank or control character.")
    for name, value in request.headers.fields:
        if _LINE_BREAKS.search(value) or _LINE_BREAKS.search(name):
            raise BadRequestError(400, "A header holds a line break or NUL.")
    authorities = request.headers.get_all("host")
    if len(authorities) > 1:
        raise BadRequestError(400, "The request has more than one Host header.")
    if request.authority:
        authorities.append(request.authority)
    if not authorities:
        raise BadRequestError(400, "The request has no Host header.")
    try:
        host, *others = [parse_authority(authority, port) for authority in authorities]
    except HostError as error:
        raise BadRequestError(400, f"The request's host is not valid. {error}") from error
    if any(other != host for other in others):
        raise BadRequestError(400, "The request names two different hosts.")
    if tls and server_name is None and not host.is_address:
        raise BadRequestError(403, "The TLS connection named no server (SNI), so nothing says that it is meant for this host.")
    if server_name is not None and server_name != host:
        raise BadRequestError(421, f"The TLS connection was made to {server_name}, and the request is for {host}.")
    return Target(host, path)


def parse_server_name(sni: str | None) -> Host | None:
    """A ClientHello's server name; HostError if it is none."""
    return None if sni is None else parse_host(sni)


def remove_upgrades(request: Request) -> None:
    """Leaves no upgrade but WebSocket's: HTTP/2 in the clear (h2c) would hide requests in one connection."""
    headers = request.headers
    if "upgrade" not in headers or headers["upgrade"].lower() == "websocket":
        return
    del headers["upgrade"]
    headers.pop("http2-settings", None)
    tokens = [token.strip() for token in headers.get("connection", "").split(",")]
    kept = [token for token in tokens if token and token.lower() not in ("upgrade", "http2-settings")]
    if kept:
        headers["connection"] = ", ".join(kept)
    else:
        headers.pop("connection", None)
