"""The servers of a test's world: what they get goes, a JSON object a line, to the file named by the second argument."""

import asyncio
import base64
import hashlib
import http.server
import json
import socket
import socketserver
import ssl
import sys
import threading
import time
import zlib

# A line for each thing that arrived.
record_file = open(sys.argv[2], "a", buffering=1)  # noqa: SIM115 - as long as the process
record_lock = threading.Lock()


def record(**what):
    with record_lock:
        record_file.write(json.dumps(what) + "\n")


# In the colours that the tests look for.
PAGE = b"""<title>A page of the world</title><body style="margin:0;background:#204a87;color:#fce94f;font:48px sans-serif">
<h1>Fetched over https</h1><p style="background:#cc0000">and looked at by Chromium</p>"""

# Events that somebody has confirmed, by the name of their stream.
confirmed = {}
news = threading.Condition()


class Web(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        record(at=self.server.at, path=self.path, headers=headers)
        if self.path.startswith("/slow"):
            self.slow()
            return
        if self.path == "/broken":
            self.broken()
            return
        if self.path.startswith("/events/"):
            self.events(self.path.removeprefix("/events/"))
            return
        if self.path.startswith("/confirm/"):
            _, _, stream, number = self.path.split("/")
            with news:
                confirmed[stream] = int(number)
                news.notify_all()
        if self.path.startswith("/socket"):
            self.web_socket(headers["sec-websocket-key"])
            return
        length = int(headers.get("content-length", 0))
        self.rfile.read(length)
        body = PAGE if self.path == "/page" else b"hello from the world\n"
        self.send_response(200)
        if body is PAGE:
            self.send_header("content-type", "text/html")
        elif "text/html" in headers.get("accept", ""):
            # A browser sees which site it got, in its own colour.
            site = headers.get("host", "")
            colour = f"#{zlib.crc32(site.encode()) & 0xFFFFFF:06x}"
            page = f"<title>{site}</title><body style='margin:0;background:{colour};font:64px sans-serif'><h1>{site}</h1>"
            body = page.encode()
            self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - a name of http.server

    def slow(self):
        """A download that never ends by itself."""
        self.send_response(200)
        self.send_header("content-length", "1000000000")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 100)
                time.sleep(0.05)
        except OSError:
            record(at=self.server.at, path=self.path, ended=True)
            self.close_connection = True

    def broken(self):
        """A download that ends long before it should."""
        self.send_response(200)
        self.send_header("content-length", "1000000")
        self.end_headers()
        self.wfile.write(b"x" * 100)
        self.close_connection = True

    def events(self, stream):
        """Server-sent events, each sent only when the one before it was confirmed: whoever gathers them waits for ever."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(1, 6):
            event = f"data: {number}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            with news:
                if not news.wait_for(lambda sent=number: confirmed.get(stream) == sent, timeout=60):
                    record(at=self.server.at, path=self.path, unconfirmed=number)
                    self.close_connection = True
                    return
        self.wfile.write(b"0\r\n\r\n")

    def web_socket(self, key):
        """RFC 6455: sends every frame back as it came, without its mask. Frames of less than 126 bytes only."""
        accept = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()  # noqa: S324 - the RFC's
        self.send_response(101)
        self.send_header("upgrade", "websocket")
        self.send_header("connection", "upgrade")
        self.send_header("sec-websocket-accept", base64.b64encode(accept).decode())
        self.end_headers()
        self.close_connection = True
        try:
            while head := self.rfile.read(2):
                length = head[1] & 0x7F
                mask, data = self.rfile.read(4), self.rfile.read(length)
                if len(mask) + len(data) < 4 + length:
                    break
                record(at=f"{self.server.at} socket", path=self.path, size=length)
                plain = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
                self.wfile.write(bytes([head[0], length]) + plain)
        except OSError:
            # As good as the end: the connection is gone.
            pass
        record(at=self.server.at, path=self.path, ended=True)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    at = "http"
    context = None

    def finish_request(self, request, client):
        if self.context:
            # In the connection's own thread: a slow handshake holds nobody up.
            try:
                request = self.context.wrap_socket(request, server_side=True)
            except OSError:
                return
        super().finish_request(request, client)

    def handle_error(self, *_):
        pass


def context(name):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(f"{name}.pem", "server.key")
    return made


def tls(by_name, otherwise):
    contexts = {name: context(certificate) for name, certificate in by_name.items()}

    def choose(connection, name, _):
        connection.context = contexts.get(name, connection.context)

    first = context(otherwise)
    first.sni_callback = choose
    return first


def web(at, address, port, tls_context=None):
    server = Server((address, port), Web)
    server.at, server.context = at, tls_context
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        record(at="echo")
        while data := self.request.recv(65536):
            record(at="echo data", size=len(data))
            self.request.sendall(data)


def echo(address, port):
    socketserver.ThreadingTCPServer.daemon_threads = True
    server = socketserver.ThreadingTCPServer((address, port), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def forbidden_tcp(address, port):
    """Records whoever comes."""
    server = socket.create_server((address, port))

    def accept():
        while True:
            connection, peer = server.accept()
            record(at=f"forbidden tcp {address}:{port}", peer=peer[0])
            connection.close()

    threading.Thread(target=accept, daemon=True).start()


def forbidden_udp(address, port):
    """Records whatever comes."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, port))

    def receive():
        while True:
            _, peer = server.recvfrom(65536)
            record(at=f"forbidden udp {address}:{port}", peer=peer[0])

    threading.Thread(target=receive, daemon=True).start()


def forbidden(address, port):
    forbidden_tcp(address, port)
    forbidden_udp(address, port)


def terminator(address, port, tls_context, inner):
    """TLS outside, and the same bytes in the clear to the server at `inner`: a load balancer."""

    async def pump(source, sink):
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()

    async def handle(reader, writer):
        try:
            inner_reader, inner_writer = await asyncio.open_connection(*inner)
        except OSError:
            writer.close()
            return
        both = pump(reader, inner_writer), pump(inner_reader, writer)
        await asyncio.gather(*both, return_exceptions=True)

    listens = threading.Event()

    async def serve():
        server = await asyncio.start_server(handle, address, port, ssl=tls_context)
        listens.set()
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    if not listens.wait(60):
        sys.exit("the terminator does not listen")


if sys.argv[1] == "world":
    certificates = {
        "unknown.example.net": "unknown",
        "expired.example.net": "expired",
        "wrong.example.net": "wrong",
    }
    web("https", "198.18.0.2", 443, tls(certificates, "good"))
    web("http", "198.18.0.2", 80)
    echo("198.18.0.2", 9000)
    terminator("198.18.0.5", 8443, context("good"), ("198.18.0.5", 8090))
    for port in (22, 853, 8080, 9001):
        forbidden("198.18.0.2", port)
    # No QUIC.
    forbidden_udp("198.18.0.2", 443)
    forbidden("198.18.0.53", 53)
    for address in ("169.254.169.254", "10.9.9.9"):
        for port in (22, 53, 80, 443):
            forbidden(address, port)
else:
    # The host itself, on all its addresses: a service that has no business with VMs.
    for port in (22, 80, 443, 8080):
        forbidden("0.0.0.0", port)  # noqa: S104 - in a namespace of the test

print("ready", flush=True)
threading.Event().wait()
