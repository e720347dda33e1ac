"""Puts the parts together inside mitmdump.

Descriptor 3 is the socket to the daemon, 4 the CA. Of mitmproxy's own addons only those stay that a transparent proxy needs: the
others (playback, an onboarding site, saving, scripting by options…) would be called for every event and could be reached.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn, cast

from mitmproxy import ctx
from mitmproxy.exceptions import OptionsError
from mitmproxy.net import tls as net_tls
from mitmproxy.proxy.mode_servers import AsyncioServerInstance

from . import backlog, layers, lookups
from .addon import RunnerAddon
from .certificates import Authority, CaError, GuestTls
from .control import Control, Outbox
from .limits import ACCEPT_BACKLOG, RESOLVER_THREADS, Patience
from .messages import Order, Ping, Register, Unregister, Update
from .quiet import Quiet
from .registry import Registry

if TYPE_CHECKING:
    from mitmproxy.addonmanager import Loader
    from mitmproxy.addons.proxyserver import Proxyserver

CONTROL_FD = 3
CA_FD = 4
_LARGEST_CA = 64 * 1024

# mitmproxy's addons that stay, by the names under which it keeps them.
_KEPT = frozenset({"core", "proxyserver", "scriptloader", "errorcheck", "keepserving", "termlog"})

# Without these the proxy would dial the guest's address or keep bodies. A wrong command line must not start it.
_REQUIRED_OPTIONS: dict[str, object] = {
    "mode": ["transparent"],
    "connection_strategy": "lazy",
    "upstream_cert": False,
    "websocket": False,
    "rawtcp": True,
    "http2": True,
    "ssl_insecure": False,
    "validate_inbound_headers": True,
    "stream_large_bodies": None,
    "body_size_limit": None,
}


class Startup:
    """The addon that mitmdump loads; the others hang below it."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.outbox = Outbox()
        self.runner = RunnerAddon(self.registry, self.outbox, _proxyserver)
        self.addons = [self.runner]
        self._control: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def load(self, loader: Loader) -> None:
        for limit in fields(Patience):
            help_text = "How long the proxy waits (limits.py says for what), in seconds."
            loader.add_option(f"runner_{limit.name}_seconds", int, limit.default, help_text)
        backlog.install()
        layers.install()
        Quiet.install(self.registry.vaults)
        try:
            authority = Authority(_read_all(CA_FD))
            self._control = socket.socket(fileno=CONTROL_FD)
        except (CaError, OSError) as error:
            raise OptionsError(
                f"Descriptors {CONTROL_FD} (a socket to the runner) and {CA_FD} (its CA) are not what they should be: {error}"
            ) from error
        manager = loader.master.addons
        # Not by `remove`, which asks each to end what it has begun: none has.
        manager.lookup = {name: addon for name, addon in manager.lookup.items() if name in _KEPT}
        manager.chain = [addon for addon in manager.chain if addon in manager.lookup.values()]
        manager.add(GuestTls(authority))

    def running(self) -> None:
        for name, wanted in _REQUIRED_OPTIONS.items():
            if getattr(ctx.options, name) != wanted:
                _stop(f"Option {name} must be {wanted!r}.")
        if net_tls.log_master_secret is not None:
            _stop("SSLKEYLOGFILE or MITMPROXY_SSLKEYLOGFILE is set, which would write every connection's key to a file.")
        for limit in fields(Patience):
            setattr(self.runner.patience, limit.name, getattr(ctx.options, f"runner_{limit.name}_seconds"))
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="resolver"))
        lookups.install(loop)
        _widen_accept_queues()
        ports = {address[1] for address in _proxyserver().listen_addrs()}
        self._tasks = [
            loop.create_task(self._serve(min(ports)), name="control"),
            loop.create_task(self.runner.sweep_forever(), name="sweep"),
        ]

    async def _serve(self, port: int) -> None:
        assert self._control is not None
        await self.outbox.put({"event": "listening", "port": port})
        try:
            await Control(self._control, self.outbox, self._carry_out).serve()
        finally:
            # Without the daemon nobody decides and nobody writes: not one more byte is forwarded.
            _stop(None)

    async def _carry_out(self, order: Order) -> None:
        match order:
            case Register():
                await self.registry.register(order)
            case Update():
                self.registry.update(order)
            case Unregister():
                await self.registry.unregister(order)
            case Ping():
                pass


def _proxyserver() -> Proxyserver:
    return cast("Proxyserver", ctx.master.addons.get("proxyserver"))


def _widen_accept_queues() -> None:
    """asyncio's are 100 long, which one guest's burst fills; the next guest's connection then comes a second late."""
    for instance in _proxyserver().servers:
        if not isinstance(instance, AsyncioServerInstance):
            continue
        for server in instance._servers:
            # The others are for UDP, which a transparent proxy has none of.
            for listener in server.sockets if isinstance(server, asyncio.Server) else ():
                with listener.dup() as same:
                    same.listen(ACCEPT_BACKLOG)


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        # A memfd handed over may stand at its end, where it was written.
        file.seek(0)
        return file.read(_LARGEST_CA)


def _stop(complaint: str | None) -> NoReturn:
    if complaint is not None:
        sys.stderr.write(f"mitm_addon: {complaint}\n")
    sys.stderr.flush()
    os._exit(0 if complaint is None else 1)
