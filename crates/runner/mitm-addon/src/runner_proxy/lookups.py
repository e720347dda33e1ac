"""Looking up servers' names: by the C library, in threads, of which one guest holds only so many.

The C library cannot be told to stop. Whoever asks for a name that nobody answers for and goes away leaves a thread that waits;
the place it holds is free when the thread is, not before.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

_places: ContextVar[asyncio.Semaphore | None] = ContextVar("places", default=None)


def take_places_from(places: asyncio.Semaphore) -> None:
    """Whose places the lookups of the current task take from now on."""
    _places.set(places)


def install(loop: asyncio.AbstractEventLoop) -> None:
    """Has every lookup of the loop take a place."""
    look_up = loop.getaddrinfo

    async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        places = _places.get()
        if places is None:
            return await look_up(host, port, **options)
        await places.acquire()
        lookup = asyncio.ensure_future(look_up(host, port, **options))

        def done(lookup: asyncio.Future[Any]) -> None:
            places.release()
            # Whoever asked may be gone; an error is then nobody's.
            if not lookup.cancelled():
                lookup.exception()

        lookup.add_done_callback(done)
        return await asyncio.shield(lookup)

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]
