"""The internet's servers, all in one process: `python upstream.py DIRECTORY ADDRESS`.

DIRECTORY holds a NAME.pem for each name. Every connection and request is told on standard output, one JSON object a line;
the process ends with its standard input. Names that begin with `h1.` speak HTTP/1.1 only.

    /echo          what arrived, as JSON         /bytes/N       N bytes
    /sse           events 0 to 4, each after GET /acknowledge of the one before
    /reflect       its Authorization header, in a header of the response
    /websocket     sends back what it is sent    /gzip          a compressed body
    /upload        swallows a body, tells its size
    /chunked       a body of unknown length      /stall         never answers
    /trailers      trailers after the body (HTTP/1.1)
    /interim       two interim responses before the final one (HTTP/1.1)
    /status/N      a response with this status, whatever it is (HTTP/1.1), and a body without end
    /garble        its Authorization header, in a first line that is none (HTTP/1.1)
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import wsproto
import wsproto.events

_ids = itertools.count(1)
_acknowledged = asyncio.Semaphore(0)
_PIECE = bytes(64 * 1024)
# An address at which connections are taken and nothing is said.
MUTE = "198.18.0.13"


def tell(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


@dataclass
class Request:
    connection: int
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: AsyncIterator[bytes]
    # Returns when the client is gone.
    gone: Callable[[], Awaitable[object]]

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")


@dataclass
class Response:
    headers: list[tuple[str, str]]
    body: AsyncIterator[bytes]
    status: int = 200
    # What is sent in front of the response (HTTP/1.1).
    before: bytes = b""


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _fixed(body: bytes, *headers: tuple[str, str]) -> Response:
    return Response([("content-length", str(len(body))), *headers], _pieces(body))


async def _zeros(size: int) -> AsyncIterator[bytes]:
    while size > 0:
        yield _PIECE[:size]
        size -= len(_PIECE)


async def _until(gone: Callable[[], Awaitable[object]]) -> AsyncIterator[bytes]:
    yield b"more to come"
    await gone()
    raise asyncio.IncompleteReadError(b"", None)


async def _events() -> AsyncIterator[bytes]:
    for number in range(5):
        yield f"data: {number}\n\n".encode()
        await _acknowledged.acquire()


async def answer(request: Request) -> Response:
    path, _, _query = request.path.partition("?")
    size = 0
    async for piece in request.body:
        size += len(piece)
    tell(
        event="request",
        connection=request.connection,
        method=request.method,
        path=request.path,
        headers=request.headers,
        size=size,
    )
    match path.split("/")[1:]:
        case ["bytes", count]:
            return Response([("content-length", count)], _zeros(int(count)))
        case ["sse"]:
            return Response([("content-type", "text/event-stream")], _events())
        case ["acknowledge"]:
            _acknowledged.release()
            return _fixed(b"")
        case ["reflect"]:
            return _fixed(b"reflected", ("x-reflected", request.header("authorization")))
        case ["interim"]:
            before = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
            return Response([("content-length", "5")], _pieces(b"final"), before=before)
        case ["status", number]:
            return Response([], _until(request.gone), int(number))
        case ["garble"]:
            return Response([], _pieces(), before=f"HTTP/1.1 {request.header('authorization')}\r\n\r\n".encode())
        case ["trailers"]:
            return Response([("trailer", "x-after")], _pieces(b"body"))
        case ["gzip"]:
            return _fixed(gzip.compress(b"compressed" * 100), ("content-encoding", "gzip"))
        case ["chunked"]:
            return Response([], _pieces(b"one", b"two"))
        case ["stall"]:
            await request.gone()
            raise asyncio.IncompleteReadError(b"", None)
        case ["echo" | "upload", *_]:
            told = {"method": request.method, "path": request.path, "headers": request.headers, "size": size}
            return _fixed(json.dumps({**told, "connection": request.connection}).encode())
        case _:
            return _fixed(b"hello\n")


async def serve_http1(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head[:-4].split("\r\n")
        method, path, _version = first.split(" ")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        request = Request(number, method, path, headers, _pieces(), reader.read)
        if request.header("upgrade").lower() == "websocket":
            tell(event="request", connection=number, method=method, path=path, headers=headers, size=0)
            await serve_websocket(number, head.encode("latin-1"), reader, writer)
            return
        request.body = _http1_body(request, reader)
        response = await answer(request)
        chunked = not any(name == "content-length" for name, _ in response.headers)
        fields = [*response.headers, ("transfer-encoding", "chunked")] if chunked else response.headers
        writer.write(response.before)
        await writer.drain()
        writer.write(f"HTTP/1.1 {response.status} OK\r\n".encode())
        writer.write("".join(f"{name}: {value}\r\n" for name, value in fields).encode() + b"\r\n")
        async for piece in response.body:
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
        if chunked:
            writer.write(b"0\r\nX-After: 1\r\n\r\n" if path == "/trailers" else b"0\r\n\r\n")
        await writer.drain()


async def _http1_body(request: Request, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    if "chunked" in request.header("transfer-encoding"):
        while size := int((await reader.readline()).strip(), 16):
            yield await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return
    left = int(request.header("content-length") or 0)
    while left > 0:
        piece = await reader.read(min(left, len(_PIECE)))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


async def serve_websocket(number: int, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    socket = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
    data = head
    while data:
        socket.receive_data(data)
        for event in socket.events():
            if isinstance(event, wsproto.events.Request):
                writer.write(socket.send(wsproto.events.AcceptConnection()))
            elif isinstance(event, wsproto.events.TextMessage):
                writer.write(socket.send(wsproto.events.TextMessage(event.data, message_finished=event.message_finished)))
            elif isinstance(event, wsproto.events.CloseConnection):
                writer.write(socket.send(event.response()))
                await writer.drain()
                return
        await writer.drain()
        data = await reader.read(65536)
    tell(event="websocket closed", connection=number)


class Http2:
    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._number = number
        self._reader = reader
        self._writer = writer
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self._bodies: dict[int, asyncio.Queue[bytes | None]] = {}
        self._window = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        self._h2.initiate_connection()
        await self._flush()
        try:
            while data := await self._reader.read(65536):
                for event in self._h2.receive_data(data):
                    self._take(event)
                await self._flush()
        finally:
            for task in self._tasks:
                task.cancel()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                queue: asyncio.Queue[bytes | None] = asyncio.Queue()
                self._bodies[event.stream_id] = queue
                headers = [(str(name), str(value)) for name, value in event.headers]
                task = asyncio.create_task(self._respond(event.stream_id, headers, queue))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case h2.events.DataReceived():
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self._bodies[event.stream_id].put_nowait(event.data)
            case h2.events.StreamEnded():
                self._bodies[event.stream_id].put_nowait(None)
            case h2.events.WindowUpdated():
                self._window.set()

    async def _respond(self, stream: int, headers: list[tuple[str, str]], queue: asyncio.Queue[bytes | None]) -> None:
        pseudo = dict(headers)

        async def body() -> AsyncIterator[bytes]:
            while (piece := await queue.get()) is not None:
                yield piece

        response = await answer(Request(self._number, pseudo[":method"], pseudo[":path"], headers, body(), asyncio.Event().wait))
        self._h2.send_headers(stream, [(":status", str(response.status)), *response.headers])
        await self._flush()
        async for piece in response.body:
            await self._send(stream, piece)
        self._h2.end_stream(stream)
        await self._flush()

    async def _send(self, stream: int, data: bytes) -> None:
        while data:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if room == 0:
                self._window.clear()
                await self._window.wait()
                continue
            self._h2.send_data(stream, data[:room])
            data = data[room:]
            await self._flush()

    async def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())
        await self._writer.drain()


async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    number = next(_ids)
    tls = writer.get_extra_info("ssl_object")
    tell(event="connection", connection=number, tls=tls is not None, peer=writer.get_extra_info("peername")[0])
    try:
        if tls is not None and tls.selected_alpn_protocol() == "h2":
            await Http2(number, reader, writer).serve()
        else:
            await serve_http1(number, reader, writer)
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        tell(event="closed", connection=number)
        writer.close()


def contexts(directory: Path) -> ssl.SSLContext:
    """One context that chooses another by the name that a client asks for."""
    by_name: dict[str, ssl.SSLContext] = {}
    for file in directory.glob("*.pem"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        context.set_alpn_protocols(["http/1.1"] if file.stem.startswith("h1.") else ["h2", "http/1.1"])
        by_name[file.stem] = context
    first = next(iter(by_name.values()))

    def choose(sock: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        tell(event="hello", name=name)
        sock.context = by_name.get(name or "", first)

    first.sni_callback = choose
    return first


async def main(directory: Path, address: str) -> None:
    await asyncio.start_server(connected, address, 80)
    await asyncio.start_server(connected, address, 443, ssl=contexts(directory))
    await asyncio.start_server(lambda _reader, _writer: None, MUTE, 443)
    tell(event="ready")
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
