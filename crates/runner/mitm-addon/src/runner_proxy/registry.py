"""Who is who: slots by source address and generation, and the connections that belong to them.

A connection belongs to the registration that was there when it began and dies with it. Nothing of one registration (policy,
secrets, server connections) is ever seen by the connection of another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .control import RefusedError
from .limits import DIALS_PER_SLOT
from .messages import Register, Unregister, Update
from .policy import Policy
from .secrets import Vault


class Link:
    """One connection of a guest."""

    __slots__ = ("close", "slot")

    def __init__(self, slot: Slot, close: Callable[[], None]) -> None:
        self.slot = slot
        # Ends it from our side.
        self.close = close


class Slot:
    """One registration: a run in a VM."""

    def __init__(self, order: Register) -> None:
        self.address = order.address
        self.generation = order.generation
        self.run_id = order.run_id
        self.policy: Policy = order.policy
        self.vault: Vault = order.vault
        self.alive = True
        self.requests = 0
        self.upstreams = 0
        # Connections beyond the limit since the last line about them, and when the next may come (monotonic).
        self.turned_away = 0
        self.next_flood_line = 0.0
        self.dials = asyncio.Semaphore(DIALS_PER_SLOT)
        # Held by threads, which may outlive the dials that they were started for.
        self.lookups = asyncio.Semaphore(DIALS_PER_SLOT)
        self.links: set[Link] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def add(self, link: Link) -> None:
        self.links.add(link)
        self._empty.clear()

    def remove(self, link: Link) -> None:
        """Forgets a connection that has ended, with its connections to servers and its lines queued."""
        self.links.discard(link)
        if not self.links:
            self._empty.set()

    async def end(self) -> None:
        """Closes every connection, and returns when all of them are gone."""
        self.alive = False
        for link in list(self.links):
            link.close()
        await self._empty.wait()


class Registry:
    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._ending: set[Slot] = set()

    def find(self, address: str) -> Slot | None:
        return self._slots.get(address)

    def vaults(self) -> list[Vault]:
        return [slot.vault for slot in (*self._slots.values(), *self._ending)]

    async def register(self, order: Register) -> None:
        old = self._slots.get(order.address)
        if old is not None and order.generation < old.generation:
            raise RefusedError(
                f"{order.address} is registered with generation {old.generation}, which is later than {order.generation}."
            )
        if old is not None and order.generation == old.generation and order.run_id != old.run_id:
            raise RefusedError(f"Generation {order.generation} of {order.address} belongs to another run.")
        self._slots[order.address] = Slot(order)
        if old is not None:
            await self._end(old)

    def update(self, order: Update) -> None:
        slot = self._current(order.address, order.generation)
        if missing := order.policy.secrets() - slot.vault.names:
            raise RefusedError(f"The policy names the secret {min(missing)}, which the run does not have.")
        slot.policy = order.policy

    async def unregister(self, order: Unregister) -> None:
        slot = self._current(order.address, order.generation)
        del self._slots[order.address]
        await self._end(slot)

    def _current(self, address: str, generation: int) -> Slot:
        slot = self._slots.get(address)
        if slot is None:
            raise RefusedError(f"{address} is not registered.")
        if slot.generation != generation:
            raise RefusedError(f"{address} is registered with generation {slot.generation}, not {generation}.")
        return slot

    async def _end(self, slot: Slot) -> None:
        self._ending.add(slot)
        try:
            await slot.end()
        finally:
            self._ending.discard(slot)
