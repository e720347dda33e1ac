"""What mitmproxy may say on stderr: little, at a bounded rate, and without secrets.

A guest can provoke most of mitmproxy's messages, and some quote what it sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from .secrets import Vault

_LINES = 20
_SECONDS = 10.0
# These speak for every connection or request.
_SILENCED = (
    "mitmproxy.proxy.server",
    "mitmproxy.proxy.mode_servers",
    "mitmproxy.addons.next_layer",
    "hpack",
    "asyncio",
)


class Quiet(logging.Filter):
    def __init__(self, vaults: Callable[[], Iterable[Vault]], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._vaults = vaults
        self._clock = clock
        self._window = clock()
        self._lines = 0

    @classmethod
    def install(cls, vaults: Callable[[], Iterable[Vault]]) -> None:
        for name in _SILENCED:
            logging.getLogger(name).setLevel(logging.ERROR)
        quiet = cls(vaults)
        for handler in logging.getLogger().handlers:
            handler.addFilter(quiet)

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        if now - self._window >= _SECONDS:
            self._window, self._lines = now, 0
        self._lines += 1
        if self._lines > _LINES:
            return False
        text = record.getMessage()
        for vault in self._vaults():
            text = vault.scrub(text)
        record.msg, record.args = text, ()
        return True
