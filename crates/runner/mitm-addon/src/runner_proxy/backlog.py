"""Senders wait for their receivers.

mitmproxy waits for a socket that takes no more, which is enough between two HTTP/1 connections. Not with HTTP/2: there it tells
every sender at once that its data was taken, and keeps what the receiver's window has no room for, and it reads on while a
stream waits for its server connection. A guest could fill the proxy's memory with either.

Here a stream's backlog is what was received for it and could not be passed on. Where the sender speaks HTTP/2, data
is acknowledged only while the backlog is small, so that its window closes. Where it speaks HTTP/1, its connection is not read
until the backlog is small again.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import TYPE_CHECKING, Protocol, cast

import h2.events
from h2.connection import H2Connection
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.http._base import ReceiveHttp
from mitmproxy.proxy.layers.http._http2 import Http2Client, Http2Connection, Http2Server, StreamState

from .limits import BACKLOG_BYTES, CONNECTION_WINDOW, STREAM_WINDOW

if TYPE_CHECKING:
    from mitmproxy.proxy.context import Context

    _Base = Http2Connection
else:
    _Base = object

Commands = layer.CommandGenerator[None]


class Drained(events.Event):
    """Some receiver has taken data: what was withheld may be acknowledged."""


class Owner(Protocol):
    """The layer whose streams these connections carry."""

    withholding: list[Withholding]

    def backlog(self, stream_id: int, *, from_guest: bool) -> int: ...


class Withholding(_Base):
    """An HTTP/2 connection that acknowledges data when it was passed on."""

    from_guest: bool

    def __init__(self, context: Context) -> None:
        super().__init__(context)  # type: ignore[call-arg]
        self.withheld: dict[int, int] = {}
        self.h2_conn.local_settings.initial_window_size = STREAM_WINDOW
        self.h2_conn.local_settings.acknowledge()
        # Instead of opening the connection's window as wide as it goes.
        self.h2_conn.initiate_connection = functools.partial(_initiate, self.h2_conn)  # type: ignore[method-assign]
        self._owner = _owner(context)
        self._owner.withholding.append(self)

    def stream_of_guest(self, stream_id: int) -> int:
        return stream_id

    def _handle_event(self, event: events.Event) -> Commands:
        if isinstance(event, Drained):
            for stream_id in list(self.withheld):
                self._acknowledge(stream_id)
            if data := self.h2_conn.data_to_send():
                yield commands.SendData(self.conn, data)
        else:
            yield from super()._handle_event(event)

    def handle_h2_event(self, event: h2.events.Event) -> Generator[commands.Command, object, bool]:
        if isinstance(event, h2.events.DataReceived):
            stream_id = event.stream_id
            if self.streams.get(stream_id) is StreamState.HEADERS_RECEIVED:
                yield ReceiveHttp(self.ReceiveData(stream_id, event.data))
                self.withheld[stream_id] = self.withheld.get(stream_id, 0) + event.flow_controlled_length
                self._acknowledge(stream_id)
                return False
        return (yield from super().handle_h2_event(event))

    def _acknowledge(self, stream_id: int) -> None:
        if self._owner.backlog(self.stream_of_guest(stream_id), from_guest=self.from_guest) <= BACKLOG_BYTES:
            self.h2_conn.acknowledge_received_data(self.withheld.pop(stream_id), stream_id)

    def close_connection(self, msg: str) -> Commands:
        self.withheld.clear()
        self._owner.withholding.remove(self)
        yield from super().close_connection(msg)


def _owner(context: Context) -> Owner:
    return next(cast("Owner", found) for found in reversed(context.layers) if hasattr(found, "withholding"))


def _initiate(connection: H2Connection) -> None:
    H2Connection.initiate_connection(connection)
    connection.increment_flow_control_window(CONNECTION_WINDOW - connection.inbound_flow_control_window)


class WithholdingServer(Withholding, Http2Server):
    from_guest = True


class WithholdingClient(Withholding, Http2Client):
    from_guest = False

    def stream_of_guest(self, stream_id: int) -> int:
        return self.their_stream_id[stream_id]


def install() -> None:
    """Makes mitmproxy's HTTP layer use these."""
    for name, bounded in (("Http2Server", WithholdingServer), ("Http2Client", WithholdingClient)):
        assert issubclass(bounded, getattr(http_layers, name))
        setattr(http_layers, name, bounded)
