"""Requests a second through plain mitmdump and through mitmdump with the addon, in turns, in the same run.

    sudo PYTHONPATH=tests python bench/compare.py [SECONDS [ROUNDS]]

Both proxies stand in the hub of the tests' world, with the same options where these exist without the addon; the load comes from
the guest's namespace and goes to an HTTPS server in the internet's. "direct" is the same load without a proxy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from world.daemon import _SET, mitmdump
from world.world import DECOY, PORT, SERVER, World, build, policy, rule

_REQUEST = b"GET /hello HTTP/1.1\r\nHost: h1.test.example\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
_NAME = "h1.test.example"
_PLAIN_PORT = 8070
_CONNECTIONS = 8
# A policy as jobs have them: the rule that decides is not the first.
RULES = policy(
    *(rule(f"*.{number}.example.com", name=f"other-{number}") for number in range(30)),
    rule(_NAME, requests=[{"action": "allow", "method": "GET", "path": "/{file}"}]),
)


def _one_request(sock: ssl.SSLSocket) -> None:
    sock.sendall(_REQUEST)
    received = sock.recv(65536)
    while not received.endswith(b"hello\n"):
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError(received)
        received += piece


def keep_alive(connect: Callable[[], ssl.SSLSocket], end: float) -> int:
    done = 0
    with connect() as sock:
        while time.monotonic() < end:
            _one_request(sock)
            done += 1
    return done


def new_connections(connect: Callable[[], ssl.SSLSocket], end: float) -> int:
    done = 0
    while time.monotonic() < end:
        with connect() as sock:
            _one_request(sock)
        done += 1
    return done


LOADS = {"keep-alive": keep_alive, "new connections": new_connections}


def generate(load: str, address: str, trusted: str, seconds: float) -> None:
    """Runs inside the guest: prints how many requests were answered."""
    context = ssl.create_default_context(cafile=trusted)

    def connect() -> ssl.SSLSocket:
        return context.wrap_socket(socket.create_connection((address, 443)), server_hostname=_NAME)

    counts: list[int] = []
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=lambda: counts.append(LOADS[load](connect, end))) for _ in range(_CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(sum(counts))


def run_load(world: World, load: str, address: str, trusted: Path, seconds: float) -> float:
    command = world.guest.namespace.enter(sys.executable, __file__, "--generate", load, address, str(trusted), str(seconds))
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "tests")},
    )
    return int(done.stdout) / seconds


@contextlib.contextmanager
def plain_mitmdump(world: World) -> Iterator[Path]:
    """mitmdump as it comes; gives its CA's certificate."""
    confdir = world.scratch / "plain"
    confdir.mkdir()
    command = [*mitmdump(), "--mode", "transparent", "--listen-port", str(_PLAIN_PORT)]
    options = {**_SET, "ssl_verify_upstream_trusted_ca": world.trusted_upstream, "confdir": confdir}
    # It looks servers up by the guest's address; the guest connects to the right one.
    for name, value in options.items():
        command += ["--set", f"{name}={value}"]
    with subprocess.Popen(world.hub.enter(*command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        certificate = confdir / "mitmproxy-ca-cert.pem"
        while not certificate.exists() or not _listens(world):
            time.sleep(0.05)
        try:
            yield certificate
        finally:
            process.terminate()


def _listens(world: World) -> bool:
    return f":{_PLAIN_PORT}" in world.hub.run("ss", "-Htln")


def _redirect(world: World, port: int) -> None:
    world.hub.run("nft", "flush chain ip hub arriving")
    world.hub.run("nft", f'add rule ip hub arriving iifname "v*" tcp dport {{ 80, 443 }} redirect to :{port}')


def _route_directly(world: World) -> None:
    world.hub.run("nft", "flush chain ip hub arriving")
    world.hub.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    world.internet_namespace.run("ip", "route", "replace", "100.96.0.0/16", "via", "198.18.255.1")


def _resident(process: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found.group(1)) if found else 0


def main(seconds: float, rounds: int) -> None:
    figures: dict[str, dict[str, list[float]]] = {load: {} for load in LOADS}
    with tempfile.TemporaryDirectory(prefix="runner-proxy-") as scratch, build(Path(scratch)) as world:
        world.register(RULES)
        before = _resident(world.daemon.process.pid)
        with plain_mitmdump(world) as plain_certificate:
            ways: dict[str, tuple[Callable[[], None], str, Path]] = {
                "direct": (lambda: _route_directly(world), SERVER, world.trusted_upstream),
                "plain mitmdump": (lambda: _redirect(world, _PLAIN_PORT), SERVER, plain_certificate),
                "with the addon": (lambda: _redirect(world, PORT), DECOY, world.guest.trusted),
            }
            for _ in range(rounds):
                for load in LOADS:
                    for way, (prepare, address, trusted) in ways.items():
                        prepare()
                        figures[load].setdefault(way, []).append(run_load(world, load, address, trusted, seconds))
        after = _resident(world.daemon.process.pid)
    for load, by_way in figures.items():
        middle = {way: statistics.median(values) for way, values in by_way.items()}
        share = middle["with the addon"] / middle["plain mitmdump"]
        shown = ", ".join(f"{way} {value:.0f}/s" for way, value in middle.items())
        print(f"{load}: {shown}; the addon's share of plain mitmdump {share:.0%}")
    print(f"resident memory with the addon: {before / 1024:.0f} MiB before, {after / 1024:.0f} MiB after")
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--generate"]:
        generate(sys.argv[2], sys.argv[3], sys.argv[4], float(sys.argv[5]))
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
