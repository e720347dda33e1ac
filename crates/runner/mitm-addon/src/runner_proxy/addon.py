"""The hooks that mitmproxy calls, in the order in which a connection meets them."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

from mitmproxy.net.tls import starts_like_tls_record
from mitmproxy.proxy.layers.tls import ClientTLSLayer, ServerTLSLayer, parse_client_hello

from . import answers, lookups
from .control import Outbox
from .hosts import HostError
from .layers import GuardedHttpLayer, Relay
from .limits import (
    CONNECTIONS_PER_SLOT,
    DIALS_PER_SLOT,
    HEAD_BYTES,
    REQUESTS_PER_SLOT,
    UPSTREAMS_PER_SLOT,
    Patience,
)
from .lines import Line, Verdict, http_line, tcp_line
from .policy import Action, Scheme
from .registry import Link, Registry, Slot
from .sessions import Exchange, Session
from .targets import BadRequestError, find_target, parse_server_name, remove_upgrades

if TYPE_CHECKING:
    from mitmproxy.addons.proxyserver import Proxyserver
    from mitmproxy.connection import Client, Connection, Server
    from mitmproxy.http import HTTPFlow, Response
    from mitmproxy.proxy.layer import NextLayer
    from mitmproxy.proxy.server_hooks import ServerConnectionHookData
    from mitmproxy.tcp import TCPFlow
    from mitmproxy.tls import TlsData

_TLS_RECORD_HEAD = 3
# One line about connections beyond the limit in this time: a flood is logged, and not a flood of lines.
_FLOOD_LINE_SECONDS = 1.0
_SWEEP_SECONDS = 1.0


class RunnerAddon:
    def __init__(self, registry: Registry, outbox: Outbox, proxyserver: Callable[[], Proxyserver]) -> None:
        self.patience = Patience()
        self._registry = registry
        self._outbox = outbox
        self._proxyserver = proxyserver
        self._sessions: dict[str, Session] = {}
        # Whose connection a server connection is, also when the guest's is gone already.
        self._dialled: dict[str, Session] = {}

    # --- a guest connects ---

    async def client_connected(self, client: Client) -> None:
        slot = self._registry.find(client.peername[0])
        if slot is None:
            client.error = "its address is not registered"
            return
        port = client.sockname[1]
        if not slot.policy.speaks_http_on(port):
            client.error = "it spoke to the proxy's own port"
            await self._log_refused(slot, client, "The proxy's own port was spoken to, which nobody may do.")
        elif len(slot.links) >= CONNECTIONS_PER_SLOT:
            client.error = "too many connections"
            await self._log_flood(slot, client)
        else:
            link = Link(slot, lambda: self._close(client))
            session = Session(client, link, time.time(), port, time.monotonic() + self.patience.first_request)
            self._sessions[client.id] = session
            slot.add(link)
            self._take_over(session)

    def _take_over(self, session: Session) -> None:
        """Changes what mitmproxy does with this connection outside of its layers."""
        handler = self._proxyserver().connections[session.client.id]
        # This hook runs in the task that ends when the connection and all its server connections have ended.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._finish(session))
        # mitmproxy lets more than five connections to one server wait without saying so; our limits are the slot's.
        handler.max_conns = collections.defaultdict(lambda: asyncio.Semaphore(UPSTREAMS_PER_SLOT))
        # Readers wait where mitmproxy lets them wait for sockets, between two reads.
        drain: Callable[[], Awaitable[None]] = handler.drain_writers

        async def drain_all() -> None:
            await drain()
            if session.http is not None and session.http.held:
                reader = asyncio.current_task()
                for connection, gate in list(session.http.held.items()):
                    transport = handler.transports.get(connection)
                    if transport is not None and transport.handler is reader:
                        await gate.wait()

        handler.drain_writers = drain_all  # type: ignore[method-assign]

    def _close(self, client: Client) -> None:
        self._cut(client.id, client)

    def _cut(self, client_id: str, connection: Connection, reason: str = "closed by the runner") -> None:
        """Ends a connection from our side, at once."""
        handler = self._proxyserver().connections.get(client_id)
        transport = None if handler is None else handler.transports.get(connection)
        if transport is None:
            return
        if transport.handler is not None:
            transport.handler.cancel(reason)
        elif transport.writer is not None:
            transport.writer.close()

    def next_layer(self, nextlayer: NextLayer) -> None:
        context = nextlayer.context
        session = self._sessions.get(context.client.id)
        if session is None or session.refused:
            return
        if session.tls:
            self._start_http(session, nextlayer)
            return
        data: bytes = nextlayer.data_client()
        if len(data) < _TLS_RECORD_HEAD:
            return
        if not starts_like_tls_record(data):
            self._start_http(session, nextlayer)
            return
        try:
            hello = parse_client_hello(data)
            if hello is None:
                if len(data) > HEAD_BYTES:
                    self._refuse(session, "The TLS ClientHello is too large.")
                return
            session.server_name = parse_server_name(hello.sni)
        except (HostError, ValueError) as error:
            self._refuse(session, f"The TLS connection was refused: {error}")
            return
        session.tls = True
        self._start_tls(session, nextlayer)

    def _start_http(self, session: Session, nextlayer: NextLayer) -> None:
        session.http = GuardedHttpLayer(nextlayer.context, session.slot.vault.scrub)
        nextlayer.layer = session.http

    def _start_tls(self, session: Session, nextlayer: NextLayer) -> None:
        context = nextlayer.context
        name = session.server_name
        if name is not None:
            # Never the address to which the guest connected.
            context.server.address = (name.text, session.port)
            context.server.sni = name.text
            if rule := session.slot.policy.passthrough(name.text, session.port):
                session.relay_rule = rule.name
                session.relay = Relay(context, (name.text, session.port))
                nextlayer.layer = session.relay
                return
        server_tls = ServerTLSLayer(context)
        server_tls.child_layer = ClientTLSLayer(context)
        nextlayer.layer = server_tls

    def _refuse(self, session: Session, sentence: str) -> None:
        session.refused = True
        session.error = sentence
        self._close(session.client)

    def tls_failed_client(self, data: TlsData) -> None:
        if session := self._sessions.get(data.context.client.id):
            session.error = f"The guest ended the TLS handshake: {data.conn.error}."

    # --- a request ---

    def requestheaders(self, flow: HTTPFlow) -> None:
        session = self._sessions.get(flow.client_conn.id)
        if session is None or not session.slot.alive:
            flow.kill()
            return
        request = flow.request
        path = request.path
        scheme: Scheme = "https" if session.tls else "http"
        shown_host = session.server_name.text if session.server_name else request.authority or request.host_header or ""
        exchange = Exchange(
            begin=request.timestamp_start,
            method=request.method,
            url=f"{scheme}://{shown_host}{path}",
            verdict=Verdict(Action.DENY, "invalid", shown_host, session.port),
        )
        session.exchanges[flow.id] = exchange
        session.slot.requests += 1
        if flow.error is not None:
            # mitmproxy has refused it; `error` follows.
            return
        try:
            response = self._decide(session, flow, exchange, scheme)
        except BadRequestError as error:
            exchange.verdict.error = str(error)
            response = answers.invalid(error.status, str(error), request.method, shown_host, path.partition("?")[0])
        if response is None:
            request.stream = exchange.count_request
            remove_upgrades(request)
        else:
            exchange.status = response.status_code
            exchange.response_size = len(response.raw_content or b"")
            flow.response = response
            # The answer comes before the body, so nobody is told to go on with it.
            request.headers.pop("expect", None)
            request.stream = True

    def _decide(self, session: Session, flow: HTTPFlow, exchange: Exchange, scheme: Scheme) -> Response | None:
        """Sends the request on its way, or gives the answer that takes its place."""
        request, slot, verdict = flow.request, session.slot, exchange.verdict
        if slot.requests > REQUESTS_PER_SLOT:
            raise BadRequestError(429, f"More than {REQUESTS_PER_SLOT} requests of this VM are under way: wait for some of them.")
        http2 = flow.client_conn.alpn == b"h2"
        target = find_target(request, http2=http2, server_name=session.server_name, tls=session.tls, port=session.port)
        host, path = target.host, target.path
        port = "" if session.port == (443 if session.tls else 80) else f":{session.port}"
        exchange.url = f"{scheme}://{host}{port}{path}"
        verdict.host = host.text
        decision = slot.policy.decide(scheme, host, session.port, request.method, path)
        verdict.rule = decision.label
        if session.tls and host.is_address and not slot.policy.names_address(host, session.port):
            verdict.error = "TLS without a server name, to an address that no rule names."
            sentence = f"The TLS connection named no server, and no rule names the address {host}: use the host's name."
            return answers.denied(decision, request.method, host.text, path.partition("?")[0], sentence)
        verdict.action = decision.action
        if not decision.passes:
            return answers.denied(decision, request.method, host.text, path.partition("?")[0])
        request.path, verdict.error = slot.vault.inject(request.headers, path, scheme, host, decision)
        request.data.host = host.text
        if http2 and request.authority:
            request.headers.pop("host", None)
        elif not http2:
            # A target that names the host (absolute form) becomes a plain path.
            request.data.authority = b""
        exchange.upstream = (host.text, session.port)
        return None

    def responseheaders(self, flow: HTTPFlow) -> None:
        session = self._sessions.get(flow.client_conn.id)
        exchange = None if session is None else session.exchanges.get(flow.id)
        if session is None or exchange is None or exchange.upstream is None or flow.response is None:
            return
        exchange.status = flow.response.status_code
        session.slot.vault.hide_reflections(flow.response.headers)
        flow.response.stream = exchange.count_response

    async def response(self, flow: HTTPFlow) -> None:
        session = self._sessions.get(flow.client_conn.id)
        if session is None:
            return
        if flow.response is not None and flow.response.trailers is not None:
            session.slot.vault.hide_reflections(flow.response.trailers)
        if exchange := self._take(session, flow.id):
            if exchange.status == 101 and exchange.upstream is not None:
                session.upgraded = exchange
            else:
                await self._log_exchange(session, exchange)

    async def error(self, flow: HTTPFlow) -> None:
        session = self._sessions.get(flow.client_conn.id)
        if session is None:
            return
        if exchange := self._take(session, flow.id):
            exchange.verdict.error = answers.readable(flow.error.msg) if flow.error else "The exchange failed."
            await self._log_exchange(session, exchange)

    def _take(self, session: Session, flow_id: str) -> Exchange | None:
        exchange = session.exchanges.pop(flow_id, None)
        if exchange is not None:
            session.slot.requests -= 1
            session.deadline = time.monotonic() + self.patience.idle
        return exchange

    def tcp_message(self, flow: TCPFlow) -> None:
        """A piece of a two-way stream that began as a request (WebSocket)."""
        session = self._sessions.get(flow.client_conn.id)
        if session is not None and session.upgraded is not None:
            message = flow.messages[-1]
            if message.from_client:
                session.upgraded.request_size += len(message.content)
            else:
                session.upgraded.response_size += len(message.content)
        # mitmproxy keeps them all otherwise.
        flow.messages.clear()

    # --- servers ---

    async def server_connect(self, data: ServerConnectionHookData) -> None:
        """The last gate: no connection is opened without a decision that names its host."""
        session, server = self._sessions.get(data.client.id), data.server
        address = server.address
        if session is None or not session.slot.alive or address is None or not session.permits((address[0], address[1])):
            server.error = "no decision stands behind this connection"
            return
        slot = session.slot
        if slot.upstreams >= UPSTREAMS_PER_SLOT:
            server.error = f"this VM already has {UPSTREAMS_PER_SLOT} connections to servers"
            return
        session.upstreams[server] = None
        self._dialled[server.id] = session
        slot.upstreams += 1
        try:
            async with asyncio.timeout(self.patience.dial):
                await slot.dials.acquire()
        except TimeoutError:
            server.error = f"{DIALS_PER_SLOT} other servers keep this VM waiting"
        else:
            lookups.take_places_from(slot.lookups)
            session.dialling.add(server)
            session.upstreams[server] = time.monotonic() + self.patience.dial

    def server_connected(self, data: ServerConnectionHookData) -> None:
        if session := self._dialled.get(data.server.id):
            self._dialled_to(session, data.server)
            if not data.server.tls:
                session.upstreams[data.server] = None

    def tls_established_server(self, data: TlsData) -> None:
        if session := self._dialled.get(data.conn.id):
            session.upstreams[cast("Server", data.conn)] = None

    def server_connect_error(self, data: ServerConnectionHookData) -> None:
        if session := self._dialled.get(data.server.id):
            session.error = answers.readable(data.server.error or "The server could not be reached.")
            self._forget_upstream(session, data.server)

    def server_disconnected(self, data: ServerConnectionHookData) -> None:
        if session := self._dialled.get(data.server.id):
            self._forget_upstream(session, data.server)

    def _dialled_to(self, session: Session, server: Server) -> None:
        """The next of the slot's dials may begin."""
        if server in session.dialling:
            session.dialling.remove(server)
            session.slot.dials.release()

    def _forget_upstream(self, session: Session, server: Server) -> None:
        self._dialled_to(session, server)
        del self._dialled[server.id]
        del session.upstreams[server]
        session.slot.upstreams -= 1

    # --- a guest's connection ends ---

    async def client_disconnected(self, client: Client) -> None:
        session = self._sessions.pop(client.id, None)
        if session is None:
            return
        await self._log_rest(session)

    def _finish(self, session: Session) -> None:
        """Nothing of the connection is left, also where mitmproxy broke off without calling a hook."""
        self._sessions.pop(session.client.id, None)
        for flow_id in list(session.exchanges):
            self._take(session, flow_id)
        for server in list(session.upstreams):
            self._forget_upstream(session, server)
        session.slot.remove(session.link)

    async def _log_rest(self, session: Session) -> None:
        """What has no line yet when the connection is gone."""
        for flow_id in list(session.exchanges):
            if exchange := self._take(session, flow_id):
                exchange.verdict.error = exchange.verdict.error or session.error or "The connection was closed."
                await self._log_exchange(session, exchange)
        if session.upgraded is not None:
            await self._log_exchange(session, session.upgraded)
        elif session.lines == 0:
            await self._log_connection(session)

    async def _log_connection(self, session: Session) -> None:
        """A line for a connection that was no request: relayed, or TLS (or nothing at all) that never became one."""
        name = session.server_name.text if session.server_name else session.client.sockname[0]
        relay = session.relay
        error = session.error
        if relay is None and error is None:
            error = "The connection ended before a request was made."
        if session.http is not None and session.http.refused:
            session.refused = True
            error = "What the guest sent is no HTTP/1.1 request."
        action = Action.DENY if session.refused else Action.ALLOW
        rule = "invalid" if session.refused else session.relay_rule
        line = tcp_line(
            session.slot.vault,
            Verdict(action, rule, name, session.port, error),
            begin=session.begin,
            end=time.time(),
            request_size=0 if relay is None else relay.request_size,
            response_size=0 if relay is None else relay.response_size,
        )
        await self._log(session.slot, line)

    async def _log_exchange(self, session: Session, exchange: Exchange) -> None:
        session.lines += 1
        line = http_line(
            session.slot.vault,
            exchange.verdict,
            begin=exchange.begin,
            end=time.time(),
            method=exchange.method,
            url=exchange.url,
            status=exchange.status,
            request_size=exchange.request_size,
            response_size=exchange.response_size,
        )
        await self._log(session.slot, line)

    async def _log_refused(self, slot: Slot, client: Client, sentence: str) -> None:
        host, port = client.sockname[:2]
        verdict = Verdict(Action.DENY, "invalid", host, port, sentence)
        now = time.time()
        await self._log(slot, tcp_line(slot.vault, verdict, begin=now, end=now, request_size=0, response_size=0))

    async def _log_flood(self, slot: Slot, client: Client) -> None:
        slot.turned_away += 1
        now = time.monotonic()
        if now < slot.next_flood_line:
            return
        slot.next_flood_line = now + _FLOOD_LINE_SECONDS
        count, slot.turned_away = slot.turned_away, 0
        await self._log_refused(
            slot, client, f"A VM may have {CONNECTIONS_PER_SLOT} connections at a time; {count} more were closed."
        )

    async def _log(self, slot: Slot, line: Line) -> None:
        await self._outbox.put({"log": {"address": slot.address, "generation": slot.generation, "line": line}})

    # --- every second ---

    def sweep(self) -> None:
        """Closes what takes too long: requests that do not come, servers that do not answer."""
        now = time.monotonic()
        for session in list(self._sessions.values()):
            for server, deadline in list(session.upstreams.items()):
                if deadline is not None and now > deadline:
                    self._cut(session.client.id, server, f"no answer within {self.patience.dial} seconds")
            if session.overdue(now):
                session.error = session.error or "No request came in time."
                self._close(session.client)

    async def sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.sweep()
