"""The socket to the daemon: JSON lines in both directions, in order, with bounded memory.

Answers and log lines share one queue, so an answer follows every line that was queued before it: that is what makes the answer
to `unregister` mean "and its lines were sent". When the daemon does not read, the queue fills and whoever has something to log
waits, and with it the exchange it belongs to.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import Awaitable, Callable

from .limits import WAITING_BYTES, WAITING_LINES
from .messages import MOST_BYTES, MessageError, Order, parse_message

Handler = Callable[[Order], Awaitable[None]]


class RefusedError(Exception):
    """An order that cannot be carried out; a sentence for the daemon."""


class Outbox:
    """Messages that wait to be written."""

    def __init__(self, most_lines: int = WAITING_LINES, most_bytes: int = WAITING_BYTES) -> None:
        self._most_lines = most_lines
        self._most_bytes = most_bytes
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def put(self, message: dict[str, object]) -> None:
        """Queues a message, once there is room."""
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        while not self._room.is_set():
            await self._room.wait()
        self._waiting.append(data)
        self._bytes += len(data)
        self._filled.set()
        if len(self._waiting) >= self._most_lines or self._bytes >= self._most_bytes:
            self._room.clear()

    async def take(self) -> bytes:
        """Everything that waits, at least one message."""
        await self._filled.wait()
        data = b"".join(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        self._filled.clear()
        self._room.set()
        return data


class Control:
    """Serves one daemon until it goes away."""

    def __init__(self, sock: socket.socket, outbox: Outbox, handle: Handler) -> None:
        self._sock = sock
        self._outbox = outbox
        self._handle = handle
        self._orders: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Returns when the daemon has closed its end or broken the protocol."""
        reader, writer = await asyncio.open_unix_connection(sock=self._sock, limit=MOST_BYTES)
        sender = asyncio.create_task(self._send(writer), name="control sender")
        receiver = asyncio.create_task(self._receive(reader), name="control receiver")
        _, pending = await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(sender, receiver, return_exceptions=True)
        writer.close()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await reader.readline()
            except (ValueError, OSError):
                # A line beyond the limit: where the next one begins is unknown.
                return
            if not line.endswith(b"\n"):
                return
            try:
                message_id, order = parse_message(line)
            except MessageError as error:
                await self._outbox.put({"id": error.message_id, "error": str(error)})
                continue
            # Tasks begin in the order in which they are made, and an order takes effect before its first wait: one
            # that takes long (closing what an `unregister` ends) holds up no other.
            task = asyncio.create_task(self._carry_out(message_id, order), name=f"order {message_id}")
            self._orders.add(task)
            task.add_done_callback(self._orders.discard)

    async def _carry_out(self, message_id: int, order: Order) -> None:
        try:
            await self._handle(order)
        except RefusedError as error:
            await self._outbox.put({"id": message_id, "error": str(error)})
        else:
            await self._outbox.put({"id": message_id, "ok": True})

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(await self._outbox.take())
                await writer.drain()
        except OSError:
            return
