"""mitmproxy's protocol layers, with the bounds and answers that a hostile guest makes necessary.

- A request's head, a chunk's head, trailers and pipelined requests are kept in memory by mitmproxy without a limit; here
  whoever sends more than HEAD_BYTES of them is closed.
- A request that we answer ourselves is answered before its body, and the body is dropped as it comes.
- mitmproxy's own error pages are HTML; guests get JSON, in which no secret stands.
- A server's answer has a status from 100 to 599. Interim ones of HTTP/1.1 are left out, as mitmproxy does with HTTP/2.
- Senders that are faster than their receivers wait (see `backlog`).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from logging import WARNING

from mitmproxy.connection import Connection
from mitmproxy.http import Response
from mitmproxy.net.http import http1
from mitmproxy.net.http.status_codes import NO_RESPONSE
from mitmproxy.proxy import commands, events, layer, server
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers.http import (
    DropStream,
    HttpLayer,
    HTTPMode,
    HttpStream,
    SendHttp,
    _http1,
)
from mitmproxy.proxy.layers.http._base import HttpEvent
from mitmproxy.proxy.layers.http._events import (
    RequestData,
    RequestEndOfMessage,
    RequestProtocolError,
    RequestTrailers,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._hooks import HttpResponseHeadersHook
from mitmproxy.proxy.layers.http._http1 import Http1Client, Http1Connection, Http1Server
from mitmproxy.proxy.layers.http._http2 import Http2Client, Http2Connection, Http2Server
from mitmproxy.proxy.layers.tcp import TCPLayer

from . import answers
from .backlog import Drained, Withholding
from .limits import BACKLOG_BYTES, HEAD_BYTES, SILENCE_SECONDS
from .lines import STATUSES

Commands = layer.CommandGenerator[None]

# The heads of interim responses, as mitmproxy delimits heads. 101 is final: what follows it is another protocol.
_INTERIM = re.compile(rb"(?:HTTP/1\.[01] 1(?!01)[0-9]{2}(?: [^\n]*)?\r?\n(?:[^\r\n][^\n]*\n)*\r?\n)+")


class GuardedHttpLayer(HttpLayer):
    """HTTP of one guest's connection."""

    def __init__(self, context: Context, scrub: Callable[[str], str]) -> None:
        super().__init__(context, HTTPMode.transparent)
        # Takes the run's secrets out of what a guest is told.
        self._scrub = scrub
        # HTTP/2 connections, which acknowledge only what was passed on.
        self.withholding: list[Withholding] = []
        # HTTP/1 connections that are not read for now, with what their readers wait for.
        self.held: dict[Connection, asyncio.Event] = {}

    def _handle_event(self, event: events.Event) -> Commands:
        if isinstance(event, events.DataReceived):
            connection = self._innermost(event.connection)
            if isinstance(connection, Http1Connection) and self._holds_too_much(connection):
                yield from self._give_up(event.connection)
                return
        try:
            yield from super()._handle_event(event)
        except (AssertionError, NotImplementedError) as error:
            # mitmproxy knows no trailers in HTTP/1, for one, and would leave the connection hanging.
            yield commands.Log(f"A connection is closed, since mitmproxy cannot go on with it: {error!r}", WARNING)
            yield commands.CloseConnection(self.context.client)
            return
        if isinstance(event, events.DataReceived) and self._is_full(event.connection):
            self.held.setdefault(event.connection, asyncio.Event())
        for held in [held for held in self.held if not self._is_full(held)]:
            self.held.pop(held).set()
        for http2 in list(self.withholding):
            if http2.withheld:
                yield from self.event_to_child(self.connections[http2.conn], Drained())

    @property
    def refused(self) -> bool:
        """Whether the guest's connection was ended since no request could be read from it."""
        http = self.connections.get(self.context.client)
        return isinstance(http, Http1Server) and http.state == http.done

    def backlog(self, stream_id: int, *, from_guest: bool) -> int:
        """Bytes of a stream that were received and could not be passed on."""
        stream = self.streams.get(stream_id)
        if stream is None:
            return 0
        waiting = sum(
            len(event.data)
            for event in stream._paused_event_queue
            if isinstance(event, RequestData if from_guest else ResponseData)
        )
        receiver = self._innermost(stream.context.server if from_guest else self.context.client)
        if isinstance(receiver, Http2Client):
            queued = receiver.stream_queue.get(stream_id, ())
            waiting += sum(len(event.data) for event in queued if isinstance(event, RequestData))
            stream_id = receiver.our_stream_id.get(stream_id, 0)
        if isinstance(receiver, Http2Connection):
            waiting += sum(len(part.data) for part in receiver.h2_conn.stream_buffers.get(stream_id, ()))
        return waiting

    def _is_full(self, connection: Connection) -> bool:
        sender = self._innermost(connection)
        if not isinstance(sender, Http1Connection) or sender.stream_id is None or sender.state == sender.passthrough:
            return False
        return self.backlog(sender.stream_id, from_guest=connection is self.context.client) > BACKLOG_BYTES

    def _innermost(self, connection: Connection) -> layer.Layer | None:
        """The HTTP layer of a connection, below its TLS."""
        found = self.connections.get(connection)
        if isinstance(found, HttpStream) or found is None:
            return None
        return found if connection is self.context.client else found.context.layers[-1]

    @staticmethod
    def _holds_too_much(connection: Http1Connection) -> bool:
        return connection.state != connection.passthrough and len(connection.buf) > HEAD_BYTES

    def _give_up(self, connection: Connection) -> Commands:
        if connection is self.context.client:
            http = self.connections[connection]
            if isinstance(http, Http1Server) and http.state == http.read_headers:
                sentence = f"The request's head has more than {HEAD_BYTES} bytes."
                yield commands.SendData(connection, _error_response(431, sentence))
        yield commands.CloseConnection(connection)

    def make_stream(self, stream_id: int) -> Commands:
        stream = GuardedHttpStream(self.context.fork(), stream_id)
        self.streams[stream_id] = stream
        yield from self.event_to_child(stream, events.Start())

    def event_to_child(self, child: layer.Layer | HttpStream, event: events.Event) -> Commands:
        if isinstance(event, ResponseProtocolError) and child is self.connections.get(self.context.client):
            yield from self._tell_error(child, event)
        elif isinstance(event, ResponseHeaders) and isinstance(child, HttpStream) and event.response.status_code not in STATUSES:
            yield from self._refuse_response(child, event)
        else:
            yield from super().event_to_child(child, event)

    def _refuse_response(self, stream: HttpStream, event: ResponseHeaders) -> Commands:
        """An answer with a status that HTTP does not have: nobody could say what became of the request."""
        sentence = f"The server answered with status {event.response.status_code}, which is none."
        sender = self.connections[stream.context.server]
        yield from super().event_to_child(stream, ResponseProtocolError(event.stream_id, sentence))
        # Whatever else the answer has is not waited for.
        yield from super().event_to_child(sender, RequestProtocolError(event.stream_id, sentence))

    def _tell_error(self, child: layer.Layer, event: ResponseProtocolError) -> Commands:
        """An error page of ours, where mitmproxy would send one of its own."""
        page = None if event.code == NO_RESPONSE else self._page(event)
        if page is None:
            yield from super().event_to_child(child, event)
        elif isinstance(child, Http1Server) and child.response is None:
            page.headers["connection"] = "close"
            yield commands.SendData(self.context.client, http1.assemble_response(page))
            # Set, so that nothing but closing is left to do.
            child.response = page
            yield from super().event_to_child(child, event)
        elif isinstance(child, Http2Server) and _is_unanswered(child, event.stream_id):
            sent: tuple[HttpEvent, ...] = (
                ResponseHeaders(event.stream_id, page, end_stream=False),
                ResponseData(event.stream_id, page.raw_content or b""),
                ResponseEndOfMessage(event.stream_id),
            )
            for part in sent:
                yield from super().event_to_child(child, part)
        else:
            yield from super().event_to_child(child, event)

    def _page(self, event: ResponseProtocolError) -> Response:
        stream = self.streams.get(event.stream_id)
        code = int(event.code)
        if stream is None or code < 500:
            return answers.refused(code, self._scrub(answers.readable(event.message)))
        return answers.failed(code, self._scrub(answers.readable(event.message)), stream.flow.request.data.host)


def _is_unanswered(server: Http2Server, stream_id: int) -> bool:
    stream = server.h2_conn.streams.get(stream_id)
    return stream is not None and server.is_open_for_us(stream_id) and not stream.state_machine.headers_sent


class GuardedHttpStream(HttpStream):
    """One request and its response."""

    def start_request_stream(self) -> Commands:
        """Called when a request has a body to come and an addon has looked at its head."""
        if self.flow.response is None:
            yield from super().start_request_stream()
            return
        # Answered by us. mitmproxy would first read all of the body, into memory.
        self.flow.response.timestamp_start = time.time()
        self.client_state = self.state_drop_request_body
        yield HttpResponseHeadersHook(self.flow)
        yield from self.send_response()
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)

    def state_drop_request_body(self, event: events.Event) -> Commands:
        """The answer is out; what still comes of the request is nobody's."""
        assert isinstance(event, RequestData | RequestTrailers | RequestEndOfMessage)
        if isinstance(event, RequestEndOfMessage):
            self.client_state = self.state_done
            yield DropStream(self.stream_id)


class Relay(TCPLayer):
    """A connection that is passed on untouched, to a name that we look up, and counted."""

    def __init__(self, context: Context, upstream: tuple[str, int]) -> None:
        # `ignore`: no hook and no copy of any message.
        super().__init__(context, ignore=True)
        self.upstream = upstream
        self.request_size = 0
        self.response_size = 0
        context.server.address = upstream

    def relay_messages(self, event: events.Event) -> Commands:
        if isinstance(event, events.DataReceived):
            if event.connection is self.context.client:
                self.request_size += len(event.data)
            else:
                self.response_size += len(event.data)
        yield from super().relay_messages(event)


def _error_response(status_code: int, message: str = "") -> bytes:
    """For heads that mitmproxy cannot even read."""
    page = answers.refused(status_code, message)
    page.headers["connection"] = "close"
    return bytes(http1.assemble_response(page))


def _without_interim(read_headers: Callable[[Http1Client, events.ConnectionEvent], Commands]) -> Callable[..., Commands]:
    """mitmproxy's reader of HTTP/1 responses' heads, which takes an interim response for the final one."""

    def read(client: Http1Client, event: events.ConnectionEvent) -> Commands:
        if client.request and (interim := _INTERIM.match(bytes(client.buf))):
            client.buf.maybe_extract_at_most(interim.end())
            if not client.buf and isinstance(event, events.DataReceived):
                return
        yield from read_headers(client, event)

    return read


def install() -> None:
    """Makes mitmproxy use ours where it has no other place for it."""
    assert callable(_http1.make_error_response)
    _http1.make_error_response = _error_response
    assert isinstance(server.TCP_TIMEOUT, int)
    server.TCP_TIMEOUT = SILENCE_SECONDS
    Http1Client.read_headers = _without_interim(Http1Client.read_headers)  # type: ignore[method-assign]
