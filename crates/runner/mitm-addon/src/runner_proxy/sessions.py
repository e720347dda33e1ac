"""What is known of one guest's connection while it lasts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mitmproxy.connection import Client, Server

    from .hosts import Host
    from .layers import GuardedHttpLayer, Relay
    from .lines import Verdict
    from .registry import Link, Slot


@dataclass(slots=True, eq=False)
class Exchange:
    """A request and what came of it."""

    begin: float
    method: str
    url: str
    verdict: Verdict
    # Where the request may go; None: nowhere.
    upstream: tuple[str, int] | None = None
    status: int | None = None
    request_size: int = 0
    response_size: int = 0

    def count_request(self, data: bytes) -> bytes:
        self.request_size += len(data)
        return data

    def count_response(self, data: bytes) -> bytes:
        self.response_size += len(data)
        return data


@dataclass(slots=True, eq=False)
class Session:
    client: Client
    link: Link
    begin: float
    # To which port of the world the guest connected.
    port: int
    # When it is closed if no request comes (monotonic).
    deadline: float
    # The TLS connection's name, if there is TLS and it has one.
    server_name: Host | None = None
    tls: bool = False
    # Under way, by the id of mitmproxy's flow.
    exchanges: dict[str, Exchange] = field(default_factory=dict)
    # The exchange that became a two-way stream (101), for the rest of the connection.
    upgraded: Exchange | None = None
    http: GuardedHttpLayer | None = None
    relay: Relay | None = None
    # Rule by which it is relayed.
    relay_rule: str | None = None
    # Server connections, with the time by which they must be established (None: they are, or wait for their turn).
    upstreams: dict[Server, float | None] = field(default_factory=dict)
    # Those of them that hold one of the slot's places for dialling.
    dialling: set[Server] = field(default_factory=set)
    lines: int = 0
    error: str | None = None
    refused: bool = False

    @property
    def slot(self) -> Slot:
        return self.link.slot

    def overdue(self, now: float) -> bool:
        idle = not self.exchanges and self.upgraded is None and self.relay is None
        return idle and now > self.deadline

    def permits(self, address: tuple[str, int]) -> bool:
        """Whether a decision stands behind a connection to this address."""
        if self.relay is not None and self.relay.upstream == address:
            return True
        return any(exchange.upstream == address for exchange in self.exchanges.values())
