"""Two guests, a hub with the proxy, and the internet.

    guest 100.96.0.1 ──┐
                       ├── hub ── 198.18.0.0/15 ── internet (198.18.0.10)
    guest 100.96.0.3 ──┘

The hub looks names up in a hosts file. Guests connect to DECOY, where nobody is: what arrives somewhere did so because the
proxy looked the name up itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import queue
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .authority import TestAuthority
from .daemon import Daemon, command_line
from .namespaces import Namespace, link

PORT = 8080
DECOY = "203.0.113.9"
SERVER = "198.18.0.10"
NAMES = ("a.test", "b.test", "h1.test.example", "unknown.test", "expired.test", "wrong.test", "pinned.test")
# Nobody listens there, and nobody answers there.
REFUSES = "refuses.test"
SILENT = "silent.test"
# It takes connections and says nothing.
MUTE = "mute.test"

_NFT = f"""
table ip hub {{
    chain arriving {{
        type nat hook prerouting priority dstnat
        iifname "v*" tcp dport {{ 80, 443 }} redirect to :{PORT}
    }}
}}
"""

_NFT_SILENT = """
table ip internet {
    chain arriving {
        type filter hook input priority filter
        ip daddr 198.18.0.12 drop
    }
}
"""

ALLOW_ALL: dict[str, Any] = {"version": 1, "default": "allow", "mode": "enforce", "rules": []}
DENY_ALL: dict[str, Any] = {**ALLOW_ALL, "default": "deny"}


def rule(host: str, action: str = "allow", **more: Any) -> dict[str, Any]:
    return {"name": host, "scheme": None, "host": host, "port": None, "path": "", "action": action, "requests": [], **more}


def policy(*rules: dict[str, Any], default: str = "deny", mode: str = "enforce") -> dict[str, Any]:
    return {"version": 1, "default": default, "mode": mode, "rules": list(rules)}


@dataclass
class Reply:
    status: int
    body: str
    exit_code: int
    head: str

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Guest:
    namespace: Namespace
    address: str
    trusted: Path

    def curl(self, url: str, *options: str, seconds: int = 30) -> Reply:
        """curl, which believes that every name is at DECOY."""
        command = ["curl", "--silent", "--include", "--max-time", str(seconds), "--cacert", str(self.trusted)]
        for port in (80, 443):
            command += ["--resolve", f"*:{port}:{DECOY}"]
        done = subprocess.run(
            self.namespace.enter(*command, *options, "--write-out", "\n%{http_code}", url), capture_output=True, check=False
        )
        output = done.stdout.decode("latin-1")
        content, _, status = output.rpartition("\n")
        head, _, body = content.partition("\r\n\r\n")
        while head.startswith("HTTP/1.1 100"):
            head, _, body = body.partition("\r\n\r\n")
        return Reply(int(status or 0), body, done.returncode, head)

    def tls(self, name: str | None, *alpn: str, host: str = DECOY) -> ssl.SSLSocket:
        """A TLS connection that names a server, or none."""
        context = ssl.create_default_context(cafile=str(self.trusted))
        context.check_hostname = name is not None
        context.set_alpn_protocols(alpn or ("http/1.1",))
        sock = self.namespace.connect(host, 443)
        try:
            return context.wrap_socket(sock, server_hostname=name)
        except OSError:
            sock.close()
            raise

    def talk(self, data: bytes, name: str | None = None, *, tls: bool = True, host: str = DECOY) -> bytes:
        """Sends bytes as they are; gives what comes until the other side is silent or closes."""
        sock = self.tls(name, host=host) if tls else self.namespace.connect(host, 80)
        with sock:
            sock.sendall(data)
            return read_response(sock)


def read_response(sock: socket.socket) -> bytes:
    """What comes until a response is whole or the connection is closed."""
    received = b""
    while not _is_whole(received) and (piece := sock.recv(65536)):
        received += piece
    return received


def _is_whole(response: bytes) -> bool:
    head, end, body = response.partition(b"\r\n\r\n")
    length = next((line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
    return bool(end) and length is not None and len(body) >= int(length)


@dataclass
class Run:
    """A registration."""

    daemon: Daemon
    guest: Guest
    generation: int

    def update(self, new: dict[str, Any]) -> None:
        order = {"address": self.guest.address, "generation": self.generation, "policy": new}
        assert self.daemon.ask(op="update", **order)["ok"]

    def unregister(self) -> None:
        order = {"address": self.guest.address, "generation": self.generation}
        assert self.daemon.ask(op="unregister", **order)["ok"]

    def begin_unregister(self) -> Callable[[], dict[str, Any]]:
        return self.daemon.begin(op="unregister", address=self.guest.address, generation=self.generation)

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The log's lines so far, once there are that many."""
        return self.daemon.wait_for_lines(lambda lines: len(lines) >= count, self.generation)

    def line(self) -> dict[str, Any]:
        (line,) = self.lines(1)
        return line


class Internet:
    """The servers' process, and what it tells."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        command = namespace.enter(sys.executable, str(Path(__file__).with_name("upstream.py")), str(directory), SERVER)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._news: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_for("ready")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._news.put(json.loads(line))

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        while True:
            news = self._news.get(timeout=20)
            if news["event"] == event and all(news.get(name) == value for name, value in fields.items()):
                return news

    def news(self) -> list[dict[str, Any]]:
        """Everything it has told and nobody has taken."""
        taken = []
        while not self._news.empty():
            taken.append(self._news.get())
        return taken

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()


@dataclass
class World:
    scratch: Path
    guests: tuple[Guest, Guest]
    hub: Namespace
    internet_namespace: Namespace
    internet: Internet
    daemon: Daemon
    ca: TestAuthority
    trusted_upstream: Path
    _generations: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _ports: Iterator[int] = field(default_factory=lambda: itertools.count(PORT + 100))

    @property
    def guest(self) -> Guest:
        return self.guests[0]

    def register(self, rules: dict[str, Any] = ALLOW_ALL, secrets: tuple[dict[str, Any], ...] = (), guest: int = 0) -> Run:
        self.internet.news()
        generation = next(self._generations)
        order = {"address": self.guests[guest].address, "generation": generation, "run_id": f"run-{generation}"}
        answer = self.daemon.ask(op="register", **order, policy=rules, secrets=list(secrets))
        assert answer.get("ok"), answer
        return Run(self.daemon, self.guests[guest], generation)

    def start_proxy(self, port: int, name: str, *, trusted: str | None = None, **options: object) -> Daemon:
        """Another proxy in the hub."""
        command = command_line(port, str(self.trusted_upstream) if trusted is None else trusted, **options)
        daemon = Daemon(self.hub.enter(*command), self.ca.pem, self.scratch / name)
        daemon.wait_until_it_listens()
        return daemon

    @contextlib.contextmanager
    def another_proxy(self, name: str, *, trusted: str | None = None, **options: object) -> Iterator[World]:
        """This world with another proxy in the place of its own, for the first guest."""
        port = next(self._ports)
        daemon = self.start_proxy(port, name, trusted=trusted, **options)
        self.hub.run("nft", f"insert rule ip hub arriving iifname v0 tcp dport {{ 80, 443 }} redirect to :{port}")
        try:
            yield dataclasses.replace(self, daemon=daemon)
        finally:
            rules = self.hub.run("nft", "-a", "list", "chain", "ip", "hub", "arriving").splitlines()
            (number,) = [line.rpartition(" ")[2] for line in rules if f":{port} " in line]
            self.hub.run("nft", "delete", "rule", "ip", "hub", "arriving", "handle", number)
            daemon.close()


@contextlib.contextmanager
def build(scratch: Path) -> Iterator[World]:
    scratch.chmod(0o755)
    world_ca, other_ca, runner_ca = TestAuthority("world"), TestAuthority("nobody's"), TestAuthority("runner")
    directory = scratch / "servers"
    directory.mkdir()
    for name in NAMES:
        authority = other_ca if name == "unknown.test" else world_ca
        shown = "elsewhere.test" if name == "wrong.test" else name
        (directory / f"{name}.pem").write_bytes(authority.server(shown, expired=name == "expired.test"))
    (scratch / "world-ca.pem").write_bytes(world_ca.certificate)
    (scratch / "runner-ca.pem").write_bytes(runner_ca.certificate)

    hub, internet = Namespace(), Namespace()
    guests = []
    for number in range(2):
        namespace = Namespace()
        here, there = f"100.96.0.{2 * number + 1}", f"100.96.0.{2 * number}"
        link(hub, f"v{number}", f"{there}/31", namespace, "eth0", f"{here}/31")
        namespace.run("ip", "route", "add", "default", "via", there)
        guests.append(Guest(namespace, here, scratch / "runner-ca.pem"))
    link(hub, "up", "198.18.255.1/15", internet, "eth0", f"{SERVER}/15")
    hub.run("nft", "-f", "-", text=_NFT)
    # A server that takes no connection and says nothing: what is sent there is dropped.
    internet.run("nft", "-f", "-", text=_NFT_SILENT)
    for address in ("198.18.0.11/15", "198.18.0.12/15", "198.18.0.13/15"):
        internet.run("ip", "address", "add", address, "dev", "eth0")
    hosts = "".join(f"{SERVER} {name}\n" for name in NAMES) + f"198.18.0.11 {REFUSES}\n198.18.0.12 {SILENT}\n198.18.0.13 {MUTE}\n"
    hub.write_over("/etc/hosts", f"127.0.0.1 localhost\n{hosts}", scratch)
    hub.write_over("/etc/nsswitch.conf", "hosts: files\n", scratch)

    servers = Internet(internet, directory)
    trusted = scratch / "world-ca.pem"
    daemon = Daemon(hub.enter(*command_line(PORT, str(trusted))), runner_ca.pem, scratch / "proxy.log")
    try:
        assert daemon.wait_until_it_listens() == PORT
        yield World(scratch, (guests[0], guests[1]), hub, internet, servers, daemon, runner_ca, trusted)
    finally:
        daemon.close()
        servers.close()
        for namespace in (hub, internet, *(guest.namespace for guest in guests)):
            namespace.close()
